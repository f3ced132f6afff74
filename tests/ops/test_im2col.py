"""The columns of an image."""

from __future__ import annotations

from op_cases import Case
from op_tests import HugeNchwTests, HugeTests, NanTests, OpTests

CASES = [
    Case(
        "im2col",
        ((2, 5, 9, 7),),
        {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (2, 1), "stride": (2, 1)},
    ),
    Case("im2col", ((1, 3, 32, 32),), {"kernel_size": 3, "padding": 1, "stride": 2}),
    Case("im2col", ((17, 2, 1, 1),), {"kernel_size": (1, 3), "padding": (3, 4)}),
    Case("im2col", ((1, 1, 1, 1),), {"kernel_size": 1}),
    Case("im2col", ((0, 3, 5, 5),), {"kernel_size": 3}),
]
KERNELS = [
    Case("im2col", ((3, 16, 9, 8),), {"kernel_size": 3}),
]
HUGE = [
    ((), {"kernel_size": 2, "stride": 2}),
]
HUGE_NCHW = [(None, {"kernel_size": 2, "stride": 2})]


class TestIm2Col(OpTests, NanTests, HugeTests, HugeNchwTests):
    op = "im2col"
