"""Finds and loads the compiled library once, and remembers why it could not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_load_error: str | None = None


@functools.cache
def load() -> bool:
    """Load the library that adds the CUDA kernels; whether it is there and loaded."""
    global _load_error
    library = _PACKAGE / "_C.so"
    if not library.exists():
        reason = build_info().get(
            "reason", "torch_mbv2 was not built from source with a CUDA toolkit"
        )
        _load_error = f"built without CUDA kernels: {reason}"
    elif torch.version.cuda is None:
        # It needs libtorch_cuda, so loading it here would fail with a linker's message.
        _load_error = f"this torch is a CPU-only build ({torch.__version__})"
    else:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            _load_error = f"the library could not be loaded: {error}"
    return _load_error is None


def build_info() -> dict[str, Any]:
    """What `setup.py` recorded: {"built", "reason", "archs", ...}; empty where it never ran."""
    record = _PACKAGE / "_build_info.json"
    return json.loads(record.read_text()) if record.exists() else {}


def why_not_available() -> str | None:
    """Why the CUDA kernels cannot run here, in one sentence; None if they can."""
    if not load():
        return _load_error
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"GPU compute capability {major}.{minor} is not supported; 8.0 or newer needed"
    return None


def is_available() -> bool:
    """Whether the CUDA kernels can run here."""
    return why_not_available() is None
