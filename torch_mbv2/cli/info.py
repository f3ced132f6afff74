"""`info`: what there is to run on, and whether the kernels can."""

from __future__ import annotations

import argparse
from typing import Any

from torch_mbv2.cli import output
from torch_mbv2.measure.environment import environment, kernels

HELP = "show the GPU, the versions, and whether the kernels are built and can run here"
EXAMPLE = "info --json info.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has no arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Print the environment; `--json` writes what `environment` and `kernels` return."""
    found: dict[str, Any] = {
        "schema": 1,
        "verb": "info",
        "environment": environment(),
        "kernels": kernels(),
    }
    output.emit(args.json, found, lambda: _print(found["environment"], found["kernels"]))
    return 0


def _print(found: dict[str, Any], built: dict[str, Any]) -> None:
    gpus = [
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']:.0f} GiB"
        for gpu in found["gpus"]
    ]
    why = built["why_not_available"]
    output.print_pairs(
        {
            "GPU": "; ".join(gpus) or "none",
            "driver": found["driver"] or "none",
            "CPU": f"{found['cpu']}, {found['threads']} threads",
            "system": found["system"],
            "Python": found["python"],
            "torch": found["torch"],
            "CUDA": found["cuda"] or "none: torch is a CPU-only build",
            "cuDNN": found["cudnn"] or "none",
            "torch_mbv2": found["torch_mbv2"] or "not installed, run from its source",
            "commit": found["commit"] or "unknown",
            "kernels": "can run" if why is None else f"cannot run: {why}",
            "built for": ", ".join(built["archs"]) or "nothing",
            **{name: text or "not installed" for name, text in found["packages"].items()},
        }
    )
