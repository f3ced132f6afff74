"""Convolution: GEMM, depthwise, implicit GEMM, and Winograd where that is chosen."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, conv
from op_tests import (
    ActivationTests,
    HugeNchwTests,
    HugeTests,
    LargeTests,
    NanTests,
    OpTests,
    OtherTensorTests,
    OverflowTests,
)

from torch_mbv2 import ops, testing

CASES = [
    # layers of MobileNetV2
    conv(2, 3, 65, 64, 32, 3, 3, stride=2, padding=1, activation="relu6"),
    conv(2, 3, 64, 64, 32, 3, 3, stride=2, padding=(0, 1, 0, 1), activation="relu6"),
    conv(2, 32, 28, 28, 16, 1, 1),
    conv(2, 16, 28, 28, 96, 1, 1, activation="relu6"),
    conv(3, 144, 14, 14, 24, 1, 1),
    conv(1, 960, 7, 7, 320, 1, 1),
    conv(2, 320, 7, 7, 1280, 1, 1, activation="relu6"),
    conv(2, 32, 29, 28, 32, 3, 3, padding=1, groups=32, activation="relu6"),
    conv(2, 96, 29, 28, 96, 3, 3, stride=2, padding=1, groups=96, activation="relu6"),
    conv(2, 96, 28, 29, 96, 3, 3, stride=2, padding=(0, 1, 0, 1), groups=96, activation="relu6"),
    conv(2, 960, 7, 7, 960, 3, 3, padding=1, groups=960, activation="relu6"),
    # pointwise: sizes that no tile divides, strides, paddings
    conv(1, 1, 1, 1, 1, 1, 1),
    conv(3, 7, 5, 3, 13, 1, 1, bias=False),
    conv(17, 33, 1, 7, 130, 1, 1, activation="relu"),
    conv(2, 24, 9, 9, 20, 1, 1, stride=(2, 3)),
    conv(2, 16, 6, 5, 8, 1, 1, padding=(1, 0, 2, 3)),
    conv(2, 16, 6, 5, 7, 1, 1),
    conv(2, 100, 5, 5, 33, 1, 1),
    conv(0, 16, 6, 5, 8, 1, 1),
    # depthwise: kernels, strides, dilations, odd channels
    conv(2, 13, 9, 11, 13, 3, 3, padding=1, groups=13),
    conv(2, 64, 12, 13, 64, 5, 5, padding=2, groups=64, bias=False),
    conv(2, 64, 12, 13, 64, 5, 5, stride=2, padding=2, groups=64),
    conv(1, 24, 10, 10, 24, 7, 7, padding=3, groups=24),
    conv(1, 16, 20, 17, 16, 3, 3, padding=2, dilation=2, groups=16),
    conv(1, 16, 11, 11, 16, 3, 3, stride=3, groups=16, activation=(-0.5, 0.5)),
    conv(1, 16, 13, 12, 16, 3, 3, stride=4, groups=16),
    conv(2, 16, 12, 9, 16, 3, 3, stride=(2, 1), padding=(0, 1), groups=16, activation="relu6"),
    conv(2, 32, 57, 3, 32, 3, 3, padding=1, groups=32, activation=(None, 0.5)),
    conv(17, 24, 3, 5, 24, 5, 5, padding=(1, 3, 2, 0), groups=24, activation="relu6"),
    conv(1, 8, 3, 3, 8, 3, 3, padding=5, groups=8),
    conv(1, 8, 1, 1, 8, 3, 3, padding=1, groups=8),
    conv(1, 8, 9, 7, 8, 1, 3, padding=(1, 1, 0, 0), groups=8),
    conv(0, 8, 9, 7, 8, 3, 3, padding=1, groups=8),
    # dense and grouped; one with all integers different
    conv(1, 6, 13, 17, 8, 4, 2, stride=(1, 2), padding=(0, 1, 2, 3), dilation=(2, 3), groups=2),
    conv(2, 64, 10, 9, 72, 3, 3, padding=1, activation="relu"),
    conv(2, 64, 10, 9, 72, 3, 3, padding=1, stride=2),
    conv(1, 100, 6, 6, 30, 3, 3, dilation=2, padding=2),
    conv(1, 1, 5, 5, 1, 3, 3, padding=1),
    conv(3, 33, 1, 7, 130, 1, 3, padding=(0, 1)),
    conv(2, 16, 9, 11, 24, 5, 3, stride=(3, 1), padding=(2, 0), activation="relu6"),
    conv(1, 8, 2, 3, 16, 3, 3, padding=4),
    conv(1, 8, 11, 10, 16, 3, 3, stride=5),
    conv(2, 32, 8, 8, 64, 3, 3, padding=1, groups=32),
    conv(2, 64, 8, 8, 48, 3, 3, padding=1, groups=4, activation=(None, 0.5)),
    conv(1, 3, 16, 16, 5, 7, 7, stride=4, padding=3),
    conv(0, 64, 10, 9, 72, 3, 3, padding=1),
]
LARGE = [
    conv(2, 8, 80, 80, 72, 1, 1, padding=1, activation="relu6"),
    conv(5, 8, 80, 80, 40, 1, 1, padding=1),
]
KERNELS = [
    conv(3, 16, 9, 8, 24, 1, 1),
    conv(3, 16, 9, 8, 16, 3, 3, padding=1, groups=16),
    conv(3, 16, 9, 8, 16, 1, 3, padding=(0, 1), groups=16),
    conv(3, 3, 9, 8, 8, 3, 3, padding=1, stride=2),
    conv(3, 16, 9, 8, 24, 3, 3, padding=1),
    conv(3, 16, 9, 8, 8, 3, 3, groups=4),
]
HUGE = [
    (((64, 64, 1, 1), (64,)), {}),
    (((64, 1, 3, 3), (64,)), {"padding": 1, "groups": 64}),
    (((64, 1, 3, 2), (64,)), {"padding": 1, "groups": 64}),
    (((16, 64, 3, 3), (16,)), {"padding": 1}),
]
HUGE_NCHW = [((8, 4, 3, 3), {"stride": 2, "padding": 1})]


class TestConv2d(
    OpTests,
    OtherTensorTests,
    NanTests,
    OverflowTests,
    ActivationTests,
    LargeTests,
    HugeTests,
    HugeNchwTests,
):
    op = "conv2d"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_groups_than_a_grid_has_layers(dtype):
    groups = 65535 + 70
    x = torch.randn(3, groups * 2, 1, 1, device="cuda", dtype=dtype)
    weight = torch.randn(groups, 2, 1, 1, device="cuda", dtype=dtype)
    expected = (x.double().view(3, groups, 2) * weight.double().view(groups, 2)).sum(2)
    testing.assert_close(ops.conv2d(x, weight, groups=groups)[:, :, 0, 0], expected)
