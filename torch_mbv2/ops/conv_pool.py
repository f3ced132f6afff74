"""MobileNetV2's head: the last convolution and the pooling."""

from __future__ import annotations

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
    check_pixels,
    check_size,
    fail,
    refuse_grad,
    shape_of,
)
from ._define import define


def shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_image(op, input)
    check_channels(op, input)
    check_pixels(op, input)
    n, channels, height, width = input.shape
    check_alike(op, "weight", weight, input)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise fail(
            op,
            f"weight must have shape (Cout, {channels}, 1, 1) from input, got {shape_of(weight)}",
        )
    out_channels = weight.shape[0]
    check_bias(op, bias, out_channels, input)
    check_activation(op, act_min, act_max)
    check_size(op, "convolution output", out_channels, height, width)
    return n, out_channels


raw = define(
    "conv_pool(Tensor input, Tensor weight, Tensor? bias, float? act_min, float? act_max) "
    "-> Tensor",
    shape,
    reference.conv_pool,
)


def conv_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """MobileNetV2's head in one kernel: 1 x 1 convolution, activation, mean over height and width.

    Equivalent: `act(F.conv2d(input, weight, bias)).mean((2, 3))`. Source: Sandler et al.,
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.

    Args:
        input: (N, Cin, H, W) with at least one pixel, float32, float16 or bfloat16; channels_last
            is fastest.
        weight: (Cout, Cin, 1, 1), dtype and device of `input`.
        bias: (Cout,) or None.
        activation: between convolution and mean: None, "relu", "relu6", or (min, max).

    Returns:
        (N, Cout), contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("conv_pool", input, weight, bias)
    return raw(input, weight, bias, *bounds("conv_pool", activation))
