"""Average pooling."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICES, Case
from op_tests import HugeTests, NanTests, OpTests

from torch_mbv2 import ops

CASES = [
    Case("avg_pool2d", ((2, 16, 8, 8),), {"kernel_size": 2}),
    Case("avg_pool2d", ((2, 5, 9, 7),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case(
        "avg_pool2d",
        ((1, 24, 10, 9),),
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True},
    ),
    Case(
        "avg_pool2d",
        ((1, 8, 7, 7),),
        {
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "ceil_mode": True,
            "count_include_pad": False,
        },
    ),
    Case("avg_pool2d", ((1, 8, 7, 7),), {"kernel_size": 3, "stride": 4, "divisor_override": 5}),
    Case("avg_pool2d", ((3, 130, 1, 7),), {"kernel_size": (1, 3), "stride": (5, 1)}),
    Case("avg_pool2d", ((0, 8, 7, 7),), {"kernel_size": 7}),
]
KERNELS = [
    Case("avg_pool2d", ((3, 16, 9, 8),), {"kernel_size": 3, "stride": 2}),
]
HUGE = [
    ((), {"kernel_size": 2}),
]


class TestAvgPool2d(OpTests, NanTests, HugeTests):
    op = "avg_pool2d"


@pytest.mark.parametrize("device", DEVICES)
def test_poolings_sum_beyond_float16(device):
    x = torch.full((1, 64, 4, 4), 60000.0, device=device, dtype=torch.float16)
    assert torch.equal(ops.avg_pool2d(x, 2), x[:, :, ::2, ::2])
    assert ops.avg_pool2d(x, 2, divisor_override=1).isposinf().all()
