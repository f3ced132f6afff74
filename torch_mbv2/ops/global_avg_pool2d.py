"""Mean over height and width."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ._checks import check_image, check_pixels, refuse_grad
from ._define import define


def shape(op: str, input: Tensor, keepdim: bool) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_image(op, input)
    check_pixels(op, input)
    n, channels = input.shape[:2]
    return (n, channels, 1, 1) if keepdim else (n, channels)


raw = define(
    "global_avg_pool2d(Tensor input, bool keepdim) -> Tensor",
    shape,
    reference.global_avg_pool2d,
)


def global_avg_pool2d(input: Tensor, keepdim: bool = False) -> Tensor:
    """Mean over height and width.

    Equivalent: `input.mean((2, 3), keepdim=keepdim)`; with `keepdim`, `F.adaptive_avg_pool2d(input,
    1)`.

    Args:
        input: (N, C, H, W) with at least one pixel, float32, float16 or bfloat16; channels_last is
            fastest.
        keepdim: return (N, C, 1, 1) instead of (N, C).

    Returns:
        (N, C), contiguous, or (N, C, 1, 1), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("global_avg_pool2d", input)
    return raw(input, keepdim)
