"""Average pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ._checks import (
    check_image,
    check_ints,
    check_kernel_fits,
    check_size,
    fail,
    pair,
    refuse_grad,
)
from ._define import define


def _pooled_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    out = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    # With ceil_mode the last window must still start inside the input or its left padding.
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def shape(
    op: str,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_image(op, input)
    check_ints(op, "kernel_size", kernel_size, 2, 1)
    check_ints(op, "stride", stride, 2, 1)
    check_ints(op, "padding", padding, 2, 0)
    if 2 * padding[0] > kernel_size[0] or 2 * padding[1] > kernel_size[1]:
        raise fail(
            op,
            f"padding must be at most half of kernel_size {tuple(kernel_size)}, "
            f"got {tuple(padding)}",
        )
    if divisor_override == 0:
        raise fail(op, "divisor_override must not be 0")
    n, channels, height, width = input.shape
    check_kernel_fits(
        op, height + 2 * padding[0], width + 2 * padding[1], kernel_size[0], kernel_size[1]
    )
    out_h = _pooled_size(height, kernel_size[0], stride[0], padding[0], ceil_mode)
    out_w = _pooled_size(width, kernel_size[1], stride[1], padding[1], ceil_mode)
    check_size(op, "output", channels, out_h, out_w)
    return n, channels, out_h, out_w


raw = define(
    "avg_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
    "bool count_include_pad, int? divisor_override) -> Tensor",
    shape,
    reference.avg_pool2d,
)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling.

    Equivalent: `F.avg_pool2d` with the same arguments.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16; channels_last is fastest.
        kernel_size: pixels; one value or (vertical, horizontal).
        stride: pixels; None means `kernel_size`.
        padding: zeros on each side, at most half of `kernel_size`.
        ceil_mode: round the output size up instead of down.
        count_include_pad: count padding in the divisor.
        divisor_override: divide by this instead.

    Returns:
        (N, C, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("avg_pool2d", input)
    kernel = pair("avg_pool2d", "kernel_size", kernel_size)
    return raw(
        input,
        kernel,
        kernel if stride is None else pair("avg_pool2d", "stride", stride),
        pair("avg_pool2d", "padding", padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
