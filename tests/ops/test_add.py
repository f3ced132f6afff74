"""The residual add."""

from __future__ import annotations

from op_cases import Case
from op_tests import ActivationTests, HugeTests, NanTests, OpTests, OtherTensorTests, OverflowTests

CASES = [
    Case("add", ((2, 24, 14, 14), (2, 24, 14, 14))),
    Case("add", ((3, 13, 5, 7), (3, 13, 5, 7)), {"activation": "relu6"}),
    Case("add", ((1001,), (1001,)), {"activation": (-0.1, 0.1)}),
    Case("add", ((), ())),
    Case("add", ((0, 4), (0, 4))),
]
KERNELS = [
    Case("add", ((3, 16, 9, 8), (3, 16, 9, 8))),
]
HUGE = [
    ((None,), {}),
]


class TestAdd(OpTests, OtherTensorTests, NanTests, OverflowTests, ActivationTests, HugeTests):
    op = "add"
