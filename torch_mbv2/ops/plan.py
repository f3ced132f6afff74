"""What would run an op on CUDA: asked of the library, which plans it as it would for a call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import dtype_name
from .network import Program

#: What a plan is for where no GPU is visible: an H100's architecture, multiprocessors and shared
#: memory, of a thread block and of a multiprocessor, in bytes.
H100 = (900, 132, 232448, 233472)


@dataclass(frozen=True)
class Plan:
    """What runs an op.

    Attributes:
        kernels: their names, in order.
        reason: why it is not the op's own kernel, if that is so.
    """

    kernels: tuple[str, ...]
    reason: str | None = None

    def __str__(self) -> str:
        return " + ".join(self.kernels)


def plan(
    op: str, sizes: Sequence[Sequence[int]], dtype: torch.dtype, arguments: Sequence[Any]
) -> Plan:
    """What runs one call of an op.

    Args:
        op: its name.
        sizes: of its inputs, of the first `dtype`; images are channels_last.
        dtype: float32, float16 or bfloat16.
        arguments: what follows the inputs in its schema; of tensors, only shape and dtype count.
    """
    if not hasattr(torch.ops.torch_mbv2, "explain"):
        return _plan_without_library(op, sizes[0], dtype, arguments)
    program = Program()
    program.add(op, *[program.input] * len(sizes), *arguments)
    size = tuple(int(n) for n in sizes[0])
    return _explained(program.text, size, dtype_name(dtype), _current_device())


def _current_device() -> int | None:
    """The index of the current CUDA device, if there is one. Does not initialise CUDA."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


@functools.lru_cache(maxsize=4096)
def _explained(program: str, size: tuple[int, ...], dtype: str, index: int | None) -> Plan:
    stride = torch.empty(
        size,
        device="meta",
        memory_format=torch.channels_last if len(size) == 4 else torch.contiguous_format,
    ).stride()
    device = H100 if index is None else ()  # the current one
    text = torch.ops.torch_mbv2.explain(program, size, stride, dtype, device)
    lines = [line.split(" ", 2) for line in text.splitlines()]
    reasons = [rest for _, word, rest in lines if word == "!"]
    kernels = [word for _, word, _ in lines if word != "!"]
    # A kernel that is launched several times in a row counts once.
    runs = [kernel for i, kernel in enumerate(kernels) if kernels[i - 1 : i] != [kernel]]
    return Plan(tuple(runs), reasons[0] if reasons else None)


def _plan_without_library(
    op: str, size: Sequence[int], dtype: torch.dtype, arguments: Sequence[Any]
) -> Plan:
    """The same as far as it can be told where no kernel can run: names only. A test holds it equal
    to what the library says."""
    if op == "conv2d":
        return Plan((_convolution(size, dtype, *arguments),))
    if op in ("inverted_residual", "stem_block"):
        first, packed = arguments[0], arguments[6]
        if packed is not None:
            return Plan((op,))
        why = "these sizes have no fused kernel"
        if dtype == torch.float32:
            why = "float32 has no fused kernel"
        kernels = ["conv_depthwise", "gemm"]
        if op == "stem_block":
            stride, padding = arguments[7:9]
            stem = _convolution(size, dtype, first, None, stride, padding, (1, 1), 1)
            return Plan((stem, *kernels), why)
        expand = ["gemm"] * (first is not None)
        return Plan((*expand, *kernels, *["add"] * arguments[9]), why)
    names = {"linear": "gemm", "conv2d_winograd": "conv_winograd"}
    return Plan((names.get(op, op),))


def _convolution(
    size: Sequence[int],
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: Any,
) -> str:
    """As plan_convolution of csrc/plan/convolution.h."""
    out_channels, kernel = weight.shape[0], list(weight.shape[2:])
    if groups > 1:
        depthwise = groups == size[1] == out_channels
        return "conv_depthwise" if depthwise else "conv_implicit_gemm"
    whole = tuple(stride) == (1, 1)
    if kernel == [1, 1]:
        return "gemm" if whole and not any(padding) else "conv_implicit_gemm"
    many = size[1] >= 64 and out_channels >= 64 and dtype == torch.float32
    dense = whole and tuple(dilation) == (1, 1) and kernel == [3, 3]
    return "conv_winograd" if dense and many else "conv_implicit_gemm"
