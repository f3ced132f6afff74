"""MobileNetV2's block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..weights import packing
from ._checks import (
    Activation,
    bounds,
    check_activation,
    check_alike,
    check_bias,
    check_channels,
    check_depthwise,
    check_fills,
    check_image,
    check_ints,
    check_packed,
    check_project,
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
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: bool,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_image(op, input)
    check_channels(op, input)
    n, channels, height, width = input.shape
    if expand_weight is not None:
        check_alike(op, "expand_weight", expand_weight, input)
    check_alike(op, "depthwise_weight", depthwise_weight, input)
    check_alike(op, "project_weight", project_weight, input)
    expanded, source = channels, "input"
    if expand_weight is not None:
        if expand_weight.dim() != 4 or tuple(expand_weight.shape[1:]) != (channels, 1, 1):
            raise fail(
                op,
                f"expand_weight must have shape (E, {channels}, 1, 1) from input, "
                f"got {shape_of(expand_weight)}",
            )
        check_fills(op, "expand_weight", expand_weight)
        expanded, source = expand_weight.shape[0], "expand_weight"
    check_depthwise(op, depthwise_weight, expanded, source)
    check_project(op, project_weight, expanded)
    if expand_weight is None and expand_bias is not None:
        raise fail(op, "expand_bias must be None where expand_weight is None")
    out_channels = project_weight.shape[0]
    check_bias(op, expand_bias, expanded, input, "expand_")
    check_bias(op, depthwise_bias, expanded, input, "depthwise_")
    check_bias(op, project_bias, out_channels, input, "project_")
    check_packed(op, packed, input)
    check_ints(op, "stride", stride, 2, 1)
    check_ints(op, "padding", padding, 4, 0)
    check_activation(op, act_min, act_max)
    kernel = depthwise_weight.shape[2:]
    out_h, out_w = output_size(op, (height, width), kernel, padding, stride)
    # The stock implementation, and CUDA where no fused kernel fits, make these too.
    check_size(op, "expanded input", expanded, height, width)
    check_size(op, "depthwise output", expanded, out_h, out_w)
    check_size(op, "output", out_channels, out_h, out_w)
    if residual and (out_channels, out_h, out_w) != (channels, height, width):
        raise fail(
            op,
            f"residual needs an output of the shape of input, {shape_of(input)}, "
            f"got {(n, out_channels, out_h, out_w)}",
        )
    return n, out_channels, out_h, out_w


raw = define(
    "inverted_residual(Tensor input, Tensor? expand_weight, Tensor? expand_bias, "
    "Tensor depthwise_weight, Tensor? depthwise_bias, Tensor project_weight, "
    "Tensor? project_bias, Tensor? packed, int[2] stride, int[4] padding, bool residual, "
    "float? act_min, float? act_max) -> Tensor",
    shape,
    reference.inverted_residual,
)


def inverted_residual(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    residual: bool = False,
    activation: Activation = "relu6",
    packed: Tensor | None = None,
) -> Tensor:
    """MobileNetV2's block in one kernel: 1 x 1 expansion, depthwise convolution, 1 x 1 projection
    without activation, residual add.

    Equivalent: `y = act(F.conv2d(input, expand_weight, expand_bias))` (`y = input` without
    `expand_weight`); `y = act(F.conv2d(F.pad(y, padding), depthwise_weight, depthwise_bias, stride,
    groups=E))`; `y = F.conv2d(y, project_weight, project_bias)`; `input + y` with `residual`, else
    `y`. The padding is zeros of the expanded tensor. Where no fused kernel fits the sizes, the
    dtype or the activation (a lower bound other than 0), CUDA runs these steps one by one. The
    fused kernel's depthwise convolution is a matrix product with zeros: an infinite element becomes
    NaN in the channels beside it. Source: Sandler et al., "MobileNetV2: Inverted Residuals and
    Linear Bottlenecks", CVPR 2018, figure 4d and table 1.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16; channels_last is fastest.
        expand_weight: (E, Cin, 1, 1), or None, where E is Cin; dtype and device of `input`, as all
            other tensors.
        expand_bias: (E,) or None.
        depthwise_weight: (E, 1, kH, kW).
        depthwise_bias: (E,) or None.
        project_weight: (Cout, E, 1, 1).
        project_bias: (Cout,) or None.
        stride: pixels, of the depthwise convolution; one value or (vertical, horizontal).
        padding: zeros around the expanded tensor, in pixels: one value, (vertical, horizontal) as
            in `F.conv2d`, or (left, right, top, bottom) as in `F.pad`.
        residual: add `input`; the output must have its shape.
        activation: after the expansion and after the depthwise convolution: None, "relu", "relu6",
            or (min, max).
        packed: what `weights.packing.pack_inverted_residual` makes of the weights and biases. On
            CUDA each call without it packs them again, so pack once and pass it.

    Returns:
        (N, Cout, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    op = "inverted_residual"
    weights = (
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
    )
    refuse_grad(op, input, *weights, packed)
    act_min, act_max = bounds(op, activation)
    options = (pair(op, "stride", stride), sides(op, padding), residual, act_min, act_max)
    if packed is None and input.is_cuda:
        shape(op, input, *weights, packed, *options)  # before anything is packed
        packed = packing.pack_inverted_residual(*weights)
    return raw(input, *weights, packed, *options)
