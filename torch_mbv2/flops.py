"""FLOP formulas of the operators, registered with `torch.utils.flop_counter`: `FlopCounterMode` and
what is built on it count a patched model exactly as they count the stock one.

As there, a multiply-add is two FLOPs and only products count: those of the convolutions and of the
linear layer, of Winograd's as those of a direct convolution. Pooling, addition and im2col have no
formula and count nothing, as their stock equivalents.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_REGISTERING = threading.Lock()

# A formula gets the arguments of its op by the names of the schema, each tensor as its shape.
Shape = Sequence[int]


def _macs(weight: Shape, image: Shape) -> int:
    """The multiply-adds of a convolution by `weight` at every pixel of `image`, (N, _, H, W)."""
    return image[0] * prod(image[2:]) * prod(weight)


def _conv2d(input: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * _macs(weight, out_shape)


def _conv_pool(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * _macs(weight, input)


def _linear(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(input[:-1]) * prod(weight)


def _inverted_residual(
    input: Shape,
    expand_weight: Shape | None,
    expand_bias: Shape | None,
    depthwise_weight: Shape,
    depthwise_bias: Shape | None,
    project_weight: Shape,
    *_: Any,
    out_shape: Shape,
    **__: Any,
) -> int:
    expand = 0 if expand_weight is None else _macs(expand_weight, input)
    return 2 * (expand + _macs(depthwise_weight, out_shape) + _macs(project_weight, out_shape))


def _stem_block(
    input: Shape,
    stem_weight: Shape,
    stem_bias: Shape | None,
    depthwise_weight: Shape,
    depthwise_bias: Shape | None,
    project_weight: Shape,
    project_bias: Shape | None,
    packed: Shape | None,
    stem_stride: Sequence[int],
    stem_padding: Sequence[int],
    *_: Any,
    out_shape: Shape,
    **__: Any,
) -> int:
    left, right, top, bottom = stem_padding
    height = (input[2] + top + bottom - stem_weight[2]) // stem_stride[0] + 1
    width = (input[3] + left + right - stem_weight[3]) // stem_stride[1] + 1
    stem = _macs(stem_weight, (input[0], stem_weight[0], height, width))
    return 2 * (stem + _macs(depthwise_weight, out_shape) + _macs(project_weight, out_shape))


def _network(input: Shape, weights: Shape, program: str, **_: Any) -> int:
    """The sum over the steps, whose shapes are found without data."""
    from .ops.network import Weight, parse, run_steps  # which registers these formulas

    weight_dtypes = [
        argument.dtype
        for step in parse(program)
        for argument in step.arguments
        if isinstance(argument, Weight)
    ]
    image = torch.empty(input, dtype=next(iter(weight_dtypes), torch.float32), device="meta")
    total = 0

    def visit(op: str, arguments: Sequence[Any], out: torch.Tensor) -> None:
        nonlocal total
        if op in FORMULAS:
            shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in arguments]
            total += FORMULAS[op](*shapes, out_shape=out.shape)

    run_steps(image, program, lambda w: torch.empty(w.shape, dtype=w.dtype, device="meta"), visit)
    return total


FORMULAS: dict[str, Callable[..., int]] = {
    "conv2d": _conv2d,
    "conv2d_winograd": _conv2d,
    "linear": _linear,
    "inverted_residual": _inverted_residual,
    "stem_block": _stem_block,
    "conv_pool": _conv_pool,
    "network": _network,
}
"""By the name of the op, as `torch.utils.flop_counter.register_flop_formula` takes them."""


def register(load: bool = False) -> None:
    """Register `FORMULAS` with torch's FLOP counter, if that is imported; calling it again is free.

    `FlopCounterMode` takes the formulas that are registered when it is made. So torch_mbv2 calls
    this when it is imported, and `patch` with `load`: whoever has a patched model can count it. To
    count calls of `ops`, or a model that was patched in another process, import the counter before
    torch_mbv2, or call this before counting.

    load: import the counter, too. That takes 0.2 s where nobody has loaded Triton yet, as
        torchvision, timm and torch.compile do; `import torch_mbv2` would take three times as long.
    """
    if not load and _COUNTER not in sys.modules:
        return
    counter = importlib.import_module(_COUNTER)
    with _REGISTERING:
        for name, formula in FORMULAS.items():
            op = getattr(torch.ops.torch_mbv2, name)
            if op not in counter.flop_registry:
                counter.register_flop_formula(op)(formula)
