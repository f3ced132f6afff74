"""3 x 3 convolution by Winograd's method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ._checks import Activation, bounds, fail, refuse_grad, shape_of, sides
from ._define import define
from .conv2d import shape as conv2d_shape


def shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    out = conv2d_shape(op, input, weight, bias, (1, 1), padding, (1, 1), 1, act_min, act_max)
    if tuple(weight.shape[2:]) != (3, 3):
        raise fail(op, f"weight must have a 3 x 3 kernel, got {shape_of(weight)}")
    return out


raw = define(
    "conv2d_winograd(Tensor input, Tensor weight, Tensor? bias, int[4] padding, "
    "float? act_min, float? act_max) -> Tensor",
    shape,
    reference.conv2d_winograd,
)


def conv2d_winograd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | Sequence[int] = 0,
    activation: Activation = None,
) -> Tensor:
    """3 x 3 dense convolution of stride 1 by Winograd's F(2x2, 3x3): 2.25 times fewer products.

    Equivalent: `conv2d(input, weight, bias, padding=padding, activation=activation)`. Transforms
    and products are in float32 for every dtype. An input element that is infinite or NaN can reach
    all four pixels of the 2 x 2 output tiles whose 4 x 4 patches hold it, and infinity can become
    NaN. Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016,
    section 4.1.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16.
        weight: (Cout, Cin, 3, 3), dtype and device of `input`.
        bias: (Cout,) or None.
        padding: as for `conv2d`.
        activation: as for `conv2d`.

    Returns:
        (N, Cout, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("conv2d_winograd", input, weight, bias)
    act_min, act_max = bounds("conv2d_winograd", activation)
    return raw(input, weight, bias, sides("conv2d_winograd", padding), act_min, act_max)
