"""Elementwise sum."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ._checks import (
    Activation,
    bounds,
    check_activation,
    check_alike,
    check_float,
    fail,
    refuse_grad,
    shape_of,
)
from ._define import define


def shape(
    op: str, input: Tensor, other: Tensor, act_min: float | None, act_max: float | None
) -> tuple[int, ...]:
    """Check all arguments; the output shape."""
    check_float(op, input)
    check_alike(op, "other", other, input)
    if input.shape != other.shape:
        raise fail(
            op, f"other must have the shape of input, {shape_of(input)}, got {shape_of(other)}"
        )
    check_activation(op, act_min, act_max)
    return tuple(input.shape)


raw = define(
    "add(Tensor input, Tensor other, float? act_min, float? act_max) -> Tensor",
    shape,
    reference.add,
)


def add(input: Tensor, other: Tensor, activation: Activation = None) -> Tensor:
    """Elementwise sum of two tensors of one shape, with activation: the residual connection.

    Equivalent: `input + other` followed by the activation.

    Args:
        input: any shape, float32, float16 or bfloat16.
        other: shape, dtype and device of `input`.
        activation: None, "relu", "relu6", or (min, max).

    Returns:
        The sum, rounded once: channels_last if 4-D, else contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("add", input, other)
    return raw(input, other, *bounds("add", activation))
