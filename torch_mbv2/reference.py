"""What each op means, in stock PyTorch operators, with the arguments of its schema: the CPU
implementations call these functions, and the tests compare the CUDA kernels with them. They check
nothing; `ops` does."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def clamp(x: Tensor, act_min: float | None, act_max: float | None) -> Tensor:
    """Clamp the freshly made tensor `x` in place; None leaves a side open."""
    if act_min is None and act_max is None:
        return x
    return x.clamp_(act_min, act_max)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    """`F.conv2d(F.pad(input, padding), ...).clamp(act_min, act_max)`; padding as in `F.pad`."""
    left, right, top, bottom = padding
    if left == right and top == bottom:
        symmetric = (top, left)
    else:
        input = F.pad(input, (left, right, top, bottom))
        symmetric = (0, 0)
    out = F.conv2d(input, weight, bias, tuple(stride), symmetric, tuple(dilation), groups)
    return clamp(out, act_min, act_max)


def conv2d_winograd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    """`conv2d` with a stride and a dilation of 1, and one group."""
    return conv2d(input, weight, bias, (1, 1), padding, (1, 1), 1, act_min, act_max)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    """`F.linear(input, weight, bias).clamp(act_min, act_max)`."""
    return clamp(F.linear(input, weight, bias), act_min, act_max)


def avg_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """`F.avg_pool2d` with the same arguments."""
    return F.avg_pool2d(
        input,
        tuple(kernel_size),
        tuple(stride),
        tuple(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def global_avg_pool2d(input: Tensor, keepdim: bool) -> Tensor:
    """`input.mean((2, 3), keepdim=keepdim)`."""
    return input.mean((2, 3), keepdim=keepdim)


def add(input: Tensor, other: Tensor, act_min: float | None, act_max: float | None) -> Tensor:
    """`(input + other).clamp(act_min, act_max)`."""
    return clamp(torch.add(input, other), act_min, act_max)


def im2col(
    input: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """`F.unfold(input, kernel_size, dilation, padding, stride)`."""
    return F.unfold(input, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))


#: Of a convolution: stride, padding, dilation and groups.
_POINTWISE = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
#: What a block is made of here.
_STOCK = SimpleNamespace(conv2d=conv2d, add=add)


def inverted_residual(
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
    *,
    layers: Any = _STOCK,
) -> Tensor:
    """`input` through `act(expand)` (if any), `act(depthwise)` and `project`, plus `input` with
    `residual`; each step rounds, as stock layers do. `packed` holds nothing but the weights.

    Its steps are `layers.conv2d` and `layers.add`: those here, or the ops of that name, which a
    block without a fused kernel runs on CUDA."""
    x: Tensor = input
    act = (act_min, act_max)
    if expand_weight is not None:
        x = layers.conv2d(x, expand_weight, expand_bias, *_POINTWISE, *act)
    window = (stride, padding, (1, 1), depthwise_weight.shape[0])
    x = layers.conv2d(x, depthwise_weight, depthwise_bias, *window, *act)
    x = layers.conv2d(x, project_weight, project_bias, *_POINTWISE, None, None)
    if residual:
        x = layers.add(input, x, None, None)
    return x


def stem_block(
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
    *,
    layers: Any = _STOCK,
) -> Tensor:
    """`input.to(stem_weight.dtype)` through `act(stem)`, `act(depthwise)` and `project`. `packed`
    holds nothing but the weights; `layers` as in `inverted_residual`."""
    x, window = input.to(stem_weight.dtype), (stem_stride, stem_padding, (1, 1), 1)
    x = layers.conv2d(x, stem_weight, stem_bias, *window, act_min, act_max)
    return inverted_residual(
        x,
        None,
        None,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        None,
        (1, 1),
        padding,
        False,
        act_min,
        act_max,
        layers=layers,
    )


def conv_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    """`F.conv2d(input, weight, bias).clamp(act_min, act_max).mean((2, 3))`."""
    return conv2d(input, weight, bias, *_POINTWISE, act_min, act_max).mean((2, 3))
