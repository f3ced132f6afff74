"""Fully connected layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._checks import (
    Activation,
    bounds,
    check_activation,
    check_alike,
    check_bias,
    check_float,
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
    check_float(op, input)
    check_alike(op, "weight", weight, input)
    if input.dim() < 1:
        raise fail(op, f"input must have shape (..., K), got {shape_of(input)}")
    features = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != features:
        raise fail(op, f"weight must have shape (N, {features}) from input, got {shape_of(weight)}")
    check_bias(op, bias, weight.shape[0], input)
    check_activation(op, act_min, act_max)
    if max(weight.shape) >= 2**31:
        raise fail(
            op,
            f"weight must have fewer than 2147483648 rows and columns, got {shape_of(weight)}",
        )
    return (*input.shape[:-1], weight.shape[0])


raw = define(
    "linear(Tensor input, Tensor weight, Tensor? bias, float? act_min, float? act_max) -> Tensor",
    shape,
    reference.linear,
    layout=torch.contiguous_format,
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Fully connected layer with bias and activation in one kernel.

    Equivalent: `F.linear(input, weight, bias)` followed by the activation.

    Args:
        input: (..., K), float32, float16 or bfloat16.
        weight: (N, K), dtype and device of `input`.
        bias: (N,) or None.
        activation: None, "relu", "relu6", or (min, max).

    Returns:
        (..., N), contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    refuse_grad("linear", input, weight, bias)
    return raw(input, weight, bias, *bounds("linear", activation))
