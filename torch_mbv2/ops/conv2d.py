"""Convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ._checks import (
    Activation,
    bounds,
    check_activation,
    check_alike,
    check_bias,
    check_channels,
    check_image,
    check_ints,
    check_size,
    fail,
    output_size,
    pair,
    refuse_grad,
    shape_of,
    sides,
)
from ._define import define


def shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, ...]:
    """Check all arguments of a convolution; its output shape."""
    check_image(op, input)
    check_alike(op, "weight", weight, input)
    check_ints(op, "stride", stride, 2, 1)
    check_ints(op, "padding", padding, 4, 0)
    check_ints(op, "dilation", dilation, 2, 1)
    n, channels, height, width = input.shape
    check_channels(op, input)
    if weight.dim() != 4:
        raise fail(
            op, f"weight must have shape (Cout, Cin / groups, kH, kW), got {shape_of(weight)}"
        )
    out_channels, group_channels, *kernel = weight.shape
    if groups < 1 or channels % groups != 0 or out_channels % groups != 0:
        raise fail(
            op,
            f"groups must divide Cin {channels} and Cout {out_channels}, got {groups}",
        )
    if group_channels != channels // groups:
        raise fail(
            op,
            f"weight must have shape (Cout, {channels // groups}, kH, kW) from {channels} input "
            f"channels in {groups} groups, got {shape_of(weight)}",
        )
    check_bias(op, bias, out_channels, input)
    check_activation(op, act_min, act_max)
    out_h, out_w = output_size(op, (height, width), kernel, padding, stride, dilation)
    check_size(op, "output", out_channels, out_h, out_w)
    return n, out_channels, out_h, out_w


raw = define(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
    "int[2] dilation, int groups, float? act_min, float? act_max) -> Tensor",
    shape,
    reference.conv2d,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: Activation = None,
) -> Tensor:
    """2-D convolution with bias and activation in one kernel.

    Equivalent: `F.conv2d(F.pad(input, padding), weight, bias, stride, 0, dilation, groups)`
    followed by the activation. On CUDA, pointwise convolutions run as a GEMM, depthwise ones as a
    direct kernel, dense float32 3 x 3 ones with 64 channels or more as `conv2d_winograd`, and all
    others as an implicit GEMM.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16; channels_last is fastest.
        weight: (Cout, Cin / groups, kH, kW), dtype and device of `input`.
        bias: (Cout,) or None.
        stride: pixels; one value or (vertical, horizontal).
        padding: zeros added, in pixels: one value, (vertical, horizontal) as in `F.conv2d`, or
            (left, right, top, bottom) as in `F.pad`.
        dilation: pixels; one value or (vertical, horizontal).
        groups: must divide Cin and Cout.
        activation: None, "relu", "relu6", or (min, max).

    Returns:
        (N, Cout, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("conv2d", input, weight, bias)
    act_min, act_max = bounds("conv2d", activation)
    return raw(
        input,
        weight,
        bias,
        pair("conv2d", "stride", stride),
        sides("conv2d", padding),
        pair("conv2d", "dilation", dilation),
        groups,
        act_min,
        act_max,
    )
