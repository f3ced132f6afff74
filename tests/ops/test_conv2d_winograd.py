"""Winograd's convolution."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICES, INFINITY, NAN, plain, poisoned, winograd
from op_tests import (
    ActivationTests,
    HugeTests,
    LargeTests,
    OpTests,
    OtherTensorTests,
    OverflowTests,
)

from torch_mbv2 import ops, testing

CASES = [
    winograd(2, 16, 8, 8, 24, 3, 3, padding=1, activation="relu6"),
    winograd(1, 7, 5, 9, 13, 3, 3, bias=False),
    winograd(3, 64, 7, 7, 64, 3, 3, padding=(0, 1, 2, 3)),
    winograd(1, 1, 3, 3, 1, 3, 3, padding=2),
    winograd(2, 130, 6, 11, 33, 3, 3, padding=(1, 2), activation="relu"),
    winograd(17, 13, 3, 3, 7, 3, 3, activation=(None, 0.5)),
    winograd(0, 8, 8, 8, 8, 3, 3),
]
LARGE = [
    winograd(2, 64, 361, 363, 2, 3, 3, padding=1),
]
KERNELS = [
    winograd(3, 16, 9, 8, 24, 3, 3, padding=1),
]
HUGE = [
    (((8, 64, 3, 3), (8,)), {"padding": 1}),
]


class TestConv2dWinograd(
    OpTests, OtherTensorTests, OverflowTests, ActivationTests, LargeTests, HugeTests
):
    op = "conv2d_winograd"


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 4), (4, 5), (8, 7)])
@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_stay_in_the_winograd_tiles_that_read_them(device, row, column, value):
    case = winograd(3, 16, 9, 8, 24, 3, 3, padding=(1, 1, 1, 1))
    tensors = case.tensors(device, torch.float32)
    tensors[0][1, 5, row, column] = value
    with poisoned():
        got = ops.conv2d_winograd(*tensors, **case.options).cpu()
    expected = plain(case.op, *(x.double().cpu() for x in tensors), **case.options)
    assert not got[~expected.isfinite()].isfinite().any()
    # The 4 x 4 patch of the tile of outputs 2i and 2i + 1 starts at 2i in the padded input.
    first_row, first_column = torch.arange(9) // 2 * 2, torch.arange(8) // 2 * 2
    rows = (first_row <= row + 1) & (row + 1 < first_row + 4)
    columns = (first_column <= column + 1) & (column + 1 < first_column + 4)
    untouched = torch.ones(got.shape, dtype=torch.bool)
    untouched[1] = ~(rows[:, None] & columns)
    testing.assert_close(got[untouched], expected[untouched])
