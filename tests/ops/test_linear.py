"""The fully connected layer."""

from __future__ import annotations

from op_cases import linear
from op_tests import (
    ActivationTests,
    HugeTests,
    LargeTests,
    NanTests,
    OpTests,
    OtherTensorTests,
    OverflowTests,
)

CASES = [
    linear(1, 1280, 1000),
    linear(64, 1280, 1000),
    linear(29, 33, 7, activation="relu6"),
    linear(5, 64, 7, activation="relu"),
    linear(64, 16, bias=False),
    linear(2, 3, 4, 40, 24, activation=(-1, 1)),
    linear(3, 1, 1),
    linear(3, 0, 5),
    linear(0, 8, 8),
]
LARGE = [
    linear(12545, 8, 25, activation="relu6"),
    linear(4001, 8, 199),
    linear(4001, 8, 319),
    linear(12545, 8, 41),
    linear(12545, 288, 57),
    linear(16901, 8, 103),
    linear(16901, 8, 25),
    linear(2001, 144, 25),
]
KERNELS = [
    linear(3, 16, 9, 8, 24),
]
HUGE = [
    (((16, 8),), {}),
]


class TestLinear(
    OpTests, OtherTensorTests, NanTests, OverflowTests, ActivationTests, LargeTests, HugeTests
):
    op = "linear"
