"""MobileNetV2's head in one kernel."""

from __future__ import annotations

from op_cases import conv_pool
from op_tests import BlockTests, LargeTests, NanTests, OpTests, OtherTensorTests, OverflowTests

CASES = [
    conv_pool(2, 320, 7, 7, 1280),
    conv_pool(3, 13, 5, 9, 7),
    conv_pool(17, 33, 1, 7, 130, activation="relu"),
    conv_pool(2, 64, 6, 5, 72, bias=False),
    conv_pool(2, 64, 6, 5, 72, activation=None),
    conv_pool(65, 16, 4, 4, 40, activation=(-1, 1)),
    conv_pool(5, 24, 1, 1, 100),
    conv_pool(1, 8, 33, 31, 16),
    conv_pool(0, 320, 7, 7, 1280),
]
LARGE = [
    conv_pool(129, 320, 7, 7, 1280),
]
KERNELS = [
    conv_pool(3, 16, 9, 8, 24),
]
HUGE = [conv_pool(40000, 320, 7, 7, 1280)]


class TestConvPool(OpTests, OtherTensorTests, NanTests, OverflowTests, LargeTests, BlockTests):
    pass
