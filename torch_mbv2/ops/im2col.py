"""The sliding windows of an image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ._checks import check_image, check_ints, check_size, output_size, pair, refuse_grad
from ._define import define


def shape(
    op: str,
    input: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_image(op, input)
    check_ints(op, "kernel_size", kernel_size, 2, 1)
    check_ints(op, "dilation", dilation, 2, 1)
    check_ints(op, "padding", padding, 2, 0)
    check_ints(op, "stride", stride, 2, 1)
    n, channels, height, width = input.shape
    vertical, horizontal = padding
    sides = (horizontal, horizontal, vertical, vertical)
    out_h, out_w = output_size(op, (height, width), kernel_size, sides, stride, dilation)
    rows = channels * kernel_size[0] * kernel_size[1]
    check_size(op, "output", rows, out_h, out_w)
    return n, rows, out_h * out_w


raw = define(
    "im2col(Tensor input, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) "
    "-> Tensor",
    shape,
    reference.im2col,
)


def im2col(
    input: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """The sliding windows of an image as columns of a matrix.

    Equivalent: `F.unfold(input, kernel_size, dilation, padding, stride)`.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16.
        kernel_size: pixels; one value or (vertical, horizontal); so the others.
        dilation: distance of taps.
        padding: zeros on each side.
        stride: distance of windows.

    Returns:
        (N, C * kH * kW, windows), contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("im2col", input)
    return raw(
        input,
        pair("im2col", "kernel_size", kernel_size),
        pair("im2col", "dilation", dilation),
        pair("im2col", "padding", padding),
        pair("im2col", "stride", stride),
    )
