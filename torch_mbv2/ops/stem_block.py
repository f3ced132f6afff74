"""MobileNetV2's start: the stem and the first block."""

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
    check_float,
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
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stem_stride: Sequence[int],
    stem_padding: Sequence[int],
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_image(op, input)
    check_channels(op, input)
    n, channels, height, width = input.shape
    like = ("stem_weight", stem_weight)
    check_float(op, stem_weight, "stem_weight")
    check_alike(op, "stem_weight", stem_weight, input, like)
    check_alike(op, "depthwise_weight", depthwise_weight, input, like)
    check_alike(op, "project_weight", project_weight, input, like)
    if stem_weight.dim() != 4 or stem_weight.shape[1] != channels:
        raise fail(
            op,
            f"stem_weight must have shape (S, {channels}, kH, kW) from input, "
            f"got {shape_of(stem_weight)}",
        )
    check_fills(op, "stem_weight", stem_weight)
    hidden, _, *stem_kernel = stem_weight.shape
    check_depthwise(op, depthwise_weight, hidden, "stem_weight")
    check_project(op, project_weight, hidden)
    out_channels = project_weight.shape[0]
    check_bias(op, stem_bias, hidden, input, "stem_", like)
    check_bias(op, depthwise_bias, hidden, input, "depthwise_", like)
    check_bias(op, project_bias, out_channels, input, "project_", like)
    check_packed(op, packed, input, like)
    check_ints(op, "stem_stride", stem_stride, 2, 1)
    check_ints(op, "stem_padding", stem_padding, 4, 0)
    check_ints(op, "padding", padding, 4, 0)
    check_activation(op, act_min, act_max)
    hidden_h, hidden_w = output_size(
        op, (height, width), stem_kernel, stem_padding, stem_stride, kernel_name="stem kernel"
    )
    out_h, out_w = output_size(
        op,
        (hidden_h, hidden_w),
        depthwise_weight.shape[2:],
        padding,
        kernel_name="depthwise kernel",
        image_name="stem output",
    )
    check_size(op, "stem output", hidden, hidden_h, hidden_w)
    check_size(op, "depthwise output", hidden, out_h, out_w)
    check_size(op, "output", out_channels, out_h, out_w)
    return n, out_channels, out_h, out_w


raw = define(
    "stem_block(Tensor input, Tensor stem_weight, Tensor? stem_bias, Tensor depthwise_weight, "
    "Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, Tensor? packed, "
    "int[2] stem_stride, int[4] stem_padding, int[4] padding, float? act_min, float? act_max) "
    "-> Tensor",
    shape,
    reference.stem_block,
    like="stem_weight",
)


def stem_block(
    input: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stem_stride: int | Sequence[int] = 2,
    stem_padding: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    activation: Activation = "relu6",
    packed: Tensor | None = None,
) -> Tensor:
    """MobileNetV2's start in one kernel: the stem, a dense convolution, and the first block, which
    has no expansion and stride 1. It reads images of up to 3 channels, of any float dtype and
    layout, as they are; channels_last in the dtype of the weights is fastest.

    Equivalent: `y = act(F.conv2d(F.pad(input.to(stem_weight.dtype), stem_padding), stem_weight,
    stem_bias, stem_stride))`; `y = act(F.conv2d(F.pad(y, padding), depthwise_weight,
    depthwise_bias, groups=S))`; `F.conv2d(y, project_weight, project_bias)`. Where no fused kernel
    fits the sizes, the dtype or the activation (a lower bound other than 0), CUDA runs these steps
    one by one. The fused kernel multiplies by zeros: an infinite or NaN element becomes NaN in the
    channels beside it and in the pixel left or right of those that read it. Source: Sandler et al.,
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, rows 1 and 2 of table 2.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16, whatever the weights are.
        stem_weight: (S, Cin, kH, kW), float32, float16 or bfloat16, on the device of `input`.
        stem_bias: (S,) or None; dtype and device of `stem_weight`, as all other tensors.
        depthwise_weight: (S, 1, kH, kW).
        depthwise_bias: (S,) or None.
        project_weight: (Cout, S, 1, 1).
        project_bias: (Cout,) or None.
        stem_stride: pixels, of the stem; one value or (vertical, horizontal).
        stem_padding: zeros around `input`, in pixels: one value, (vertical, horizontal) as in
            `F.conv2d`, or (left, right, top, bottom) as in `F.pad`.
        padding: zeros around the stem's output, in the same forms.
        activation: after the stem and after the depthwise convolution: None, "relu", "relu6", or
            (min, max).
        packed: what `weights.packing.pack_stem_block` makes of the weights and biases. On CUDA
            each call without it packs them again, so pack once and pass it.

    Returns:
        (N, Cout, Hout, Wout) of the dtype of `stem_weight`, channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    op = "stem_block"
    weights = (
        stem_weight,
        stem_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
    )
    refuse_grad(op, input, *weights, packed)
    act_min, act_max = bounds(op, activation)
    options = (
        pair(op, "stem_stride", stem_stride),
        sides(op, stem_padding, "stem_padding"),
        sides(op, padding),
        act_min,
        act_max,
    )
    if packed is None and input.is_cuda:
        shape(op, input, *weights, packed, *options)  # before anything is packed
        packed = packing.pack_stem_block(*weights)
    return raw(input, *weights, packed, *options)
