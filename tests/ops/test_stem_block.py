"""MobileNetV2's stem and first block in one kernel."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICES, DTYPES, check, stem
from op_tests import BlockTests, FusedTests, LargeTests, NanTests, OpTests, OtherTensorTests

from torch_mbv2 import ops, testing

CASES = [
    stem(2, 3, 33, 32, 32, 16),
    stem(2, 3, 32, 34, 32, 16, stem_padding=(0, 1, 0, 1)),
    stem(1, 3, 65, 17, 48, 24, activation="relu"),
    stem(2, 3, 32, 30, 16, 8, bias=False),
    stem(2, 1, 19, 21, 7, 13),
    stem(2, 4, 20, 19, 24, 16, stem_stride=1),
    stem(1, 3, 21, 22, 40, 24, stem_padding=0, padding=0),
    stem(2, 20, 13, 12, 24, 16, kernel=5, stem_padding=2),
    stem(1, 3, 24, 25, 16, 8, stem_stride=(3, 1), stem_padding=(1, 0, 2, 3), padding=(0, 1, 2, 1)),
    stem(2, 3, 16, 16, 32, 16, activation=None),
    stem(5, 3, 2, 1, 32, 16),
    stem(0, 3, 32, 32, 32, 16),
]
LARGE = [
    stem(5, 3, 224, 224, 32, 16),
    stem(2, 3, 225, 301, 32, 16),
    stem(2, 3, 224, 224, 32, 16, stem_padding=(0, 1, 0, 1)),
]
KERNELS = [
    stem(3, 3, 9, 8, 32, 16),
]
HUGE = [stem(4000, 3, 224, 224, 32, 16)]  # more than 2^31 elements of the stem's output too
BORDERS = [stem(2, 3, 19, 16, 32, 16)]


class TestStemBlock(OpTests, OtherTensorTests, NanTests, LargeTests, BlockTests, FusedTests):
    pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("width", "left"), [(32, 1), (30, 1), (33, 1), (32, 0)])
@pytest.mark.parametrize("device", DEVICES)
def test_stem_block_reads_images_of_any_dtype(device, width, left, memory_format, image, dtype):
    """Rows as they lie (32 wide, channels_last, of one dtype), pairs of pixels, or single ones."""
    case = stem(3, 3, 33, width, 32, 16, stem_padding=(left, 1, 1, 1))
    _, *weights = case.tensors(device, dtype)
    x = case.tensors(device, image)[0].contiguous(memory_format=memory_format)
    got = check(case.op, [x, *weights], case.options)
    assert got.dtype == dtype
    converted = ops.stem_block(x.to(dtype), *weights, **case.options)
    if left == 0:  # rows as they lie are added in another order there
        assert testing.relative_l2(got, converted) < testing.unit_roundoff(dtype)
    else:
        assert torch.equal(got, converted)
