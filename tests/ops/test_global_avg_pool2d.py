"""The mean over an image."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICES, Case
from op_tests import HugeTests, NanTests, OpTests

from torch_mbv2 import ops

CASES = [
    Case("global_avg_pool2d", ((2, 1280, 7, 7),)),
    Case("global_avg_pool2d", ((3, 13, 5, 9),), {"keepdim": True}),
    Case("global_avg_pool2d", ((1, 24, 112, 112),)),
    Case("global_avg_pool2d", ((4, 1, 1, 1),)),
    Case("global_avg_pool2d", ((17, 33, 1, 7),), {"keepdim": True}),
    Case("global_avg_pool2d", ((0, 8, 2, 2),)),
]
KERNELS = [
    Case("global_avg_pool2d", ((3, 16, 9, 8),)),
]
HUGE = [
    ((), {}),
]


class TestGlobalAvgPool2d(OpTests, NanTests, HugeTests):
    op = "global_avg_pool2d"


@pytest.mark.parametrize("device", DEVICES)
def test_poolings_sum_beyond_float16(device):
    x = torch.full((1, 64, 4, 4), 60000.0, device=device, dtype=torch.float16)
    assert torch.equal(ops.global_avg_pool2d(x), x[:, :, 0, 0])
