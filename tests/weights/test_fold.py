"""Batch-norm folding and weight packing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_mbv2.weights import fold


def _norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, affine=affine).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 4)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 6])
def test_folded_convolution_equals_convolution_then_norm(affine, bias, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, 3, groups=groups, bias=bias).double()
    norm = _norm(12, affine).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    weight, shift = fold.fold_batch_norm(conv.weight, conv.bias, norm)
    torch.testing.assert_close(F.conv2d(x, weight, shift, groups=groups), norm(conv(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folding_rounds_once(dtype):
    torch.manual_seed(1)
    norm = _norm(4)
    weight = torch.randn(4, 3, 1, 1).to(dtype)
    folded, shift = fold.fold_batch_norm(weight, None, norm)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = weight.double() * scale.view(-1, 1, 1, 1)
    assert folded.dtype == dtype
    assert shift.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(folded, exact.to(dtype))


def test_norm_without_statistics_is_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        fold.fold_batch_norm(torch.randn(4, 3, 1, 1), None, norm)


def test_packed_weight_lies_in_kernel_order():
    weight = torch.randn(8, 5, 3, 2)
    packed = fold.pack_conv_weight(weight)
    assert torch.equal(packed, weight)
    assert torch.equal(
        torch.as_strided(packed, (8 * 3 * 2 * 5,), (1,)), weight.permute(0, 2, 3, 1).flatten()
    )
