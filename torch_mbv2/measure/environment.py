"""Where a measurement was taken: the machine, the versions and the commit, as plain data."""

from __future__ import annotations

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

_PACKAGES = (
    "onnx",
    "onnx2torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch_tensorrt",
    "torchvision",
    "timm",
    "matplotlib",
    "jsonschema",
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


_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "max_memory_mhz": "clocks.max.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def clocks() -> dict[str, float | None] | None:
    """The clocks (MHz), temperature (degrees Celsius) and power (W) of the current GPU at the
    moment, from nvidia-smi; None for what it does not tell, and altogether without it."""
    if not torch.cuda.is_available():
        return None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = (f"--query-gpu={','.join(_CLOCKS.values())}", "--format=csv,noheader,nounits")
    line = _stdout("nvidia-smi", f"--id=GPU-{uuid}", *query)
    if line is None:
        return None
    return dict(zip(_CLOCKS, map(_number, line.split(",")), strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


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
