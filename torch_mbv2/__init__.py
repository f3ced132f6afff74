"""MobileNetV2 inference in PyTorch on hand-written CUDA kernels.

`fast = torch_mbv2.patch(model)` swaps a model's layers for the kernels; importing touches no GPU.
"""

from __future__ import annotations

from . import ops
from ._extension import is_available, why_not_available
from .errors import Error, ModelError, UnavailableError
from .mobilenet import MobileNetV2
from .onnx import load_onnx
from .patch import Report, patch, report, unpatch

__all__ = [
    "Error",
    "MobileNetV2",
    "ModelError",
    "Report",
    "UnavailableError",
    "is_available",
    "load_onnx",
    "ops",
    "patch",
    "report",
    "unpatch",
    "why_not_available",
]
