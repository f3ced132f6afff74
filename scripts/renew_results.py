"""Renews the results in scripts/results on the machine that it runs on, by the verb `bench`, each
in a process of its own, and what is rendered from them, by scripts/render_results.py.

A result replaces the old one only if bench has succeeded. The exit status is 0, 1 if a model did
not agree with stock, or 2 if bench could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import torch_mbv2
from torch_mbv2.errors import Error
from torch_mbv2.measure import baseline, figures

ROOT = Path(__file__).resolve().parents[1]
MODEL = "torchvision:mobilenet_v2"
ON_GPU = ("--batches", "1,8,32,128,256", "--dtypes", "float16,bfloat16,float32", "--layers")
ON_CPU = ("--device", "cpu", "--batches", "1,8,32", "--dtypes", "float32")

_EXAMPLE = """example, in an environment with the extra `bench`:
  python scripts/renew_results.py
  python scripts/renew_results.py --only cpu -- --rounds 50"""
# Of a GPU's name: makers, and what kind of module or memory it is.
_NO_NAME = re.compile(r"nvidia|tesla|geforce|gpu|sxm\d*|hbm\d*e?|\d+gb")
_CPUS = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Renew the results and return the exit status. argv: by default that of the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("gpu", "cpu"), help="default: both, if there is a GPU")
    parser.add_argument("--no-render", action="store_true", help="only measure")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "scripts/results",
        metavar="DIR",
        help="the folder of the results; default: scripts/results",
    )
    parser.add_argument(
        "bench", nargs="*", metavar="-- ARGUMENT", help="more arguments for bench, behind ours"
    )
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        print(f"renew_results: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    baseline.require_jsonschema("renew_results")
    if not args.no_render:
        figures.require_matplotlib("renew_results")
    directory = args.results.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    for name, arguments in _jobs(args.only).items():
        status = _renew(directory / f"{name}.json", [*arguments, *args.bench])
        if status != 0:
            return status
    if args.no_render:
        return 0
    script = str(ROOT / "scripts/render_results.py")
    return _python(script, "--results", str(directory))


def _jobs(only: str | None) -> dict[str, tuple[str, ...]]:
    """The names of the results to renew, and the arguments of bench for each."""
    jobs: dict[str, tuple[str, ...]] = {}
    if only != "cpu" and torch.cuda.is_available():
        why = torch_mbv2.why_not_available()
        if why is not None:
            raise Error(f"the GPU's results need the kernels: {why}; --only cpu needs none")
        jobs[gpu_name(torch.cuda.get_device_name())] = ON_GPU
    elif only == "gpu":
        raise Error("--only gpu: no CUDA GPU is visible to torch")
    elif only is None:
        _say("no CUDA GPU is visible to torch: only the CPU's results are renewed")
    if only != "gpu":
        jobs[cpu_name(platform.machine())] = ON_CPU
    return jobs


def gpu_name(device: str) -> str:
    """What the results of a GPU are called: h100 for "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "_".join(word for word in words if not _NO_NAME.fullmatch(word)) or "gpu"


def cpu_name(machine: str) -> str:
    """What the results of a CPU are called, given `platform.machine()`."""
    return _CPUS.get(machine.lower(), machine.lower() or "cpu")


def _renew(path: Path, arguments: Sequence[str]) -> int:
    """Run bench and, if it succeeds, replace its result; the exit status."""
    bench = ("bench", MODEL, *arguments, "--json")
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    command = shlex.join(["python", "-m", "torch_mbv2", *bench, shown.as_posix()])
    _say(command)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        status = _python("-m", "torch_mbv2", *bench, str(written))
        if status != 0:
            why = "a comparison failed" if status == 1 else "bench could not run"
            _say(f"{why} (exit status {status}): {shown} stays as it was")
            return 1 if status == 1 else 2
        result = baseline.load(written, "renew_results")
    # Where it was written meanwhile is no use to anybody: this command makes the same file again.
    result["command"] = command
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _python(*arguments: str) -> int:
    """Run this Python, with the package of this checkout, and return its exit status."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode


def _say(text: str) -> None:
    print(f"renew_results: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
