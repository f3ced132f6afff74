"""Finds and loads the compiled library once, and remembers why it could not."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent


@functools.cache
def _load_error() -> str | None:
    return _load_from(_PACKAGE)


def _load_from(package: Path) -> str | None:
    """Load the library in `package`; None, or why that is not possible."""
    library = package / "_C.so"
    info = build_info(package)
    # A library that the last build does not account for is an older one's.
    if not library.exists() or not info.get("built", True):
        if info.get("built"):
            return f"the library {library} is missing"
        return f"built without CUDA kernels: {info.get('reason', 'setup.py has not been run')}"
    if torch.version.cuda is None:
        # It needs libtorch_cuda, so loading it here would fail with a linker's message.
        return f"this torch ({torch.__version__}) is built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        built = f"built with torch {info.get('torch', '?')}, CUDA {info.get('cuda', '?')}"
        here = f"this is torch {torch.__version__}, CUDA {torch.version.cuda}"
        # Newer torch puts its own sentence around the loader's, which tells why.
        return f"the library could not be loaded: {error.__cause__ or error} ({built}; {here})"
    return None


def load() -> bool:
    """Load the library that adds the CUDA kernels; whether it is there and loaded."""
    return _load_error() is None


def build_info(package: Path = _PACKAGE) -> dict[str, Any]:
    """What `setup.py` recorded: {"built", "reason", "archs", ...}; empty where it never ran."""
    try:
        info = json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `archs`, such as "8.0;9.0a;12.0+PTX", runs on `capability`."""
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            return True  # unknown here, so no reason to refuse
        built = (int(match.group(1)), int(match.group(2)))
        if built == capability:
            return True
        if match.group(3) == "a":
            continue  # for that one alone, its PTX too
        portable = match.group(4) and not match.group(3)
        if built <= capability and (built[0] == capability[0] or portable):
            return True
    return False


def why_not_available() -> str | None:
    """Why the CUDA kernels cannot run here, in one sentence; None if they can."""
    error = _load_error()
    if error is not None:
        return error
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"GPU compute capability {major}.{minor} is not supported; 8.0 or newer needed"
    archs = build_info().get("archs")
    if archs and not _covers(archs, (major, minor)):
        return (
            f"the kernels are built for {archs}, not for this GPU's compute capability "
            f"{major}.{minor}: build again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


def is_available() -> bool:
    """Whether the CUDA kernels can run here."""
    return why_not_available() is None
