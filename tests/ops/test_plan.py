"""ops.plan: what would run an op, asked of the library, or told without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_mbv2 import ops
from torch_mbv2.ops.plan import _plan_without_library
from torch_mbv2.weights import packing

needs_library = pytest.mark.skipif(
    not hasattr(torch.ops.torch_mbv2, "explain"), reason="needs the compiled library"
)
ONES, NONE = (1, 1), (0, 0, 0, 0)
OPEN = (None, None)


def conv(
    out: int,
    group: int,
    size: int,
    *,
    stride: int = 1,
    pad: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> tuple[object, ...]:
    weight = torch.empty(out, group, size, size)
    return (weight, None, (stride,) * 2, (pad,) * 4, (dilation,) * 2, groups, *OPEN)


def block(
    dtype: torch.dtype,
    *,
    channels: int = 16,
    window: int = 3,
    low: float = 0.0,
    residual: bool = True,
) -> tuple[object, ...]:
    hidden = 6 * channels
    expand = torch.zeros(hidden, channels, 1, 1, dtype=dtype)
    depthwise = torch.zeros(hidden, 1, window, window, dtype=dtype)
    project = torch.zeros(channels, hidden, 1, 1, dtype=dtype)
    packed: Tensor | None = packing.pack_inverted_residual(
        expand, None, depthwise, None, project, None
    )
    pads = (window // 2,) * 4
    return (expand, None, depthwise, None, project, None, packed, ONES, pads, residual, low, 6.0)


CASES = {
    "pointwise": ("conv2d", 16, conv(24, 16, 1)),
    "strided pointwise": ("conv2d", 16, conv(24, 16, 1, stride=2)),
    "padded pointwise": ("conv2d", 16, conv(24, 16, 1, pad=1)),
    "depthwise": ("conv2d", 16, conv(16, 1, 3, pad=1, groups=16)),
    "groups": ("conv2d", 16, conv(16, 8, 3, groups=2)),
    "dense": ("conv2d", 64, conv(64, 64, 3)),
    "few channels": ("conv2d", 32, conv(64, 32, 3)),
    "dilated": ("conv2d", 64, conv(64, 64, 3, dilation=2)),
    "winograd": ("conv2d_winograd", 8, (torch.empty(8, 8, 3, 3), None, NONE, *OPEN)),
    "average": ("avg_pool2d", 8, ((2, 2), (2, 2), (0, 0), False, True, None)),
    "mean": ("global_avg_pool2d", 8, (False,)),
    "head": ("conv_pool", 8, (torch.empty(16, 8, 1, 1), None, *OPEN)),
    "unfold": ("im2col", 8, ((2, 2), ONES, (0, 0), ONES)),
}


def in_dtype(arguments: tuple[object, ...], dtype: torch.dtype) -> tuple[object, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments)


@needs_library
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_names_without_a_library_are_the_library_s(case, dtype):
    op, channels, arguments = CASES[case]
    arguments, size = in_dtype(arguments, dtype), (2, channels, 20, 20)
    assert ops.plan(op, [size], dtype, arguments) == _plan_without_library(
        op, size, dtype, arguments
    )


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_blocks_without_a_library_are_the_library_s(dtype, residual):
    arguments, size = block(dtype, residual=residual), (2, 16, 20, 20)
    expected = ops.plan("inverted_residual", [size], dtype, arguments)
    assert _plan_without_library("inverted_residual", size, dtype, arguments) == expected
    assert (len(expected.kernels) == 1) == (dtype != torch.float32)


@needs_library
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "float32 has no fused kernel"),
        ({"dtype": torch.float16, "window": 5}, "5x5 windows have no fused kernel"),
        ({"dtype": torch.float16, "low": -1.0}, "the activation's lower bound must be 0, got -1"),
        ({"dtype": torch.float16, "channels": 12}, "input channels must be multiples of 8, got 12"),
    ],
)
def test_says_why_a_block_is_not_one_kernel(options, reason):
    arguments = block(**options)
    size = (1, options.get("channels", 16), 20, 20)
    found = ops.plan("inverted_residual", [size], options["dtype"], arguments)
    assert found == ops.Plan(("gemm", "conv_depthwise", "gemm", "add"), reason)
