"""`info`: what there is to run on, and whether the kernels can."""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torch_mbv2 import _extension
from torch_mbv2.cli import output

HELP = "show the GPU, the versions, and whether the kernels are built and can run here"
EXAMPLE = "info --json info.json"

_PACKAGES = ("onnx", "onnx2torch", "onnxruntime", "torchvision", "timm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has no arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Print the environment; `--json` writes what `environment` and `kernels` return."""
    found = {"schema": 1, "verb": "info", "environment": environment(), "kernels": kernels()}
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


def kernels() -> dict[str, Any]:
    """Whether the kernels can run, why not, and the architectures that they were built for."""
    build = _extension.build_info()
    archs = build.get("archs") or []
    return {
        "available": _extension.is_available(),
        "why_not_available": _extension.why_not_available(),
        "archs": archs.split(";") if isinstance(archs, str) else [str(arch) for arch in archs],
        "build": build,
    }


def environment() -> dict[str, Any]:
    """The machine and the versions, as plain data; None for what there is not."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    return {
        "gpus": gpus,
        "driver": driver_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "torch_mbv2": _installed("torch_mbv2"),
        "commit": commit(),
        "packages": {name: _installed(name) for name in _PACKAGES},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cudnn() -> str | None:
    number = torch.backends.cudnn.version() if torch.version.cuda is not None else None
    if number is None:
        return None
    # 8 and older count the major version in thousands, 9 in ten thousands.
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def driver_version() -> str | None:
    """The NVIDIA driver's version, from nvidia-smi."""
    return _stdout("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+" if files differ from it; in a
    copy without its history, what the variable TORCH_MBV2_COMMIT says."""
    here = str(Path(__file__).parent)
    # Installed into an environment inside some other repository, that one's commit says nothing.
    if _stdout("git", "-C", here, "ls-files", "--", Path(__file__).name) is None:
        return os.environ.get("TORCH_MBV2_COMMIT")
    head = _stdout("git", "-C", here, "rev-parse", "HEAD")
    changed = _stdout("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changed else "")


def _stdout(*command: str) -> str | None:
    """The first line that a program prints; None if it is missing, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
