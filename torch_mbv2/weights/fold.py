"""Batch-norm folding and weight packing: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """The weight and bias of a convolution that does what `norm(conv(x))` does in eval mode.

    Equivalent: `torch.nn.utils.fuse_conv_bn_weights`, but computed in float64 and rounded once.

    Args:
        weight: (Cout, ...), of the convolution.
        bias: (Cout,) or None, of the convolution.
        norm: over Cout channels, with running statistics.

    Returns:
        weight of the same shape and dtype, and bias (Cout,) in float32 (float64 for a float64
        weight): what rounding a bias to half precision costs is the same for all pixels and so does
        not average out.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("fold_batch_norm: norm must have running statistics")
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double()
        if bias is not None:
            shift = shift + bias.double()
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        folded = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
        bias_dtype = torch.promote_types(weight.dtype, torch.float32)
        return folded.to(weight.dtype), shift.to(bias_dtype)


def pack_conv_weight(weight: Tensor) -> Tensor:
    """A copy of a (Cout, Cin / groups, kH, kW) weight in the memory order that the kernels read:
    (Cout, kH, kW, Cin / groups), which for depthwise convolutions is the stock order."""
    return weight.detach().clone(memory_format=torch.channels_last)
