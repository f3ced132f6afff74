"""MobileNetV2's block in one kernel."""

from __future__ import annotations

from op_cases import Case, block
from op_tests import BlockTests, FusedTests, LargeTests, NanTests, OpTests, OtherTensorTests

from torch_mbv2 import mobilenet


def mobilenet_blocks(batch: int, height: int, width: int) -> list[Case]:
    """The 17 inverted residuals of MobileNetV2, all on images of this size."""
    cases, channels = [], 32
    for expansion, out, repeats, first_stride in mobilenet.DEFAULT_SETTING:
        for i in range(repeats):
            expanded = None if expansion == 1 else expansion * channels
            stride = first_stride if i == 0 else 1
            residual = stride == 1 and channels == out
            sizes = (batch, channels, height, width, expanded, out)
            cases.append(block(*sizes, stride=stride, residual=residual))
            channels = out
    return cases


CASES = [
    *mobilenet_blocks(2, 9, 8),
    # expansions: none, 1, 2, odd; channels that no tile divides
    block(2, 16, 11, 10, None, 24, stride=2),
    block(2, 13, 9, 11, None, 13, residual=True),
    block(2, 13, 9, 11, 13, 13, residual=True),
    block(3, 7, 9, 8, 14, 13),
    block(2, 8, 12, 13, 40, 8, residual=True),
    block(2, 24, 7, 17, 100, 20, stride=2),
    block(2, 40, 9, 9, 120, 24),
    block(1, 1, 5, 5, 1, 1, activation=None),
    block(17, 16, 5, 3, 96, 24, activation="relu"),
    block(1, 96, 9, 33, 576, 328),
    # strides and paddings
    block(2, 16, 12, 10, 96, 24, stride=2, padding=(0, 1, 0, 1)),
    block(2, 24, 13, 11, 144, 32, stride=2, padding=0),
    block(2, 24, 13, 11, 144, 32, padding=0, activation="relu"),
    block(2, 16, 12, 9, 48, 16, stride=(2, 1), padding=(0, 1)),
    block(2, 16, 12, 9, 48, 16, stride=3, padding=(1, 0, 0, 2)),
    block(1, 8, 9, 7, 24, 16, padding=4),
    block(1, 6, 13, 17, 18, 8, kernel=(4, 2), stride=(1, 2), padding=(0, 1, 2, 3)),
    block(1, 8, 2, 3, 48, 8, stride=2),
    # windows
    block(2, 24, 12, 13, 72, 24, kernel=5, padding=2, residual=True),
    block(1, 16, 13, 12, 64, 24, kernel=7, padding=3, stride=2),
    block(2, 16, 9, 8, 48, 16, kernel=1, padding=0, residual=True),
    block(2, 16, 9, 8, 48, 16, kernel=(1, 3), padding=(0, 1), residual=True),
    # biases and activations
    block(2, 24, 9, 8, 144, 24, bias=False, residual=True),
    block(2, 24, 9, 8, 144, 24, activation="relu", residual=True),
    block(2, 24, 9, 8, 144, 32, activation=None),
    block(2, 24, 9, 8, 144, 32, activation=(-1, 2.5)),
    block(2, 24, 9, 8, 144, 32, activation=(None, 2)),
    # a pixel, a row, none
    block(3, 24, 1, 1, 144, 24, residual=True),
    block(3, 24, 1, 1, 144, 32, stride=2),
    block(2, 24, 1, 9, 144, 24, residual=True),
    block(2, 32, 57, 1, 192, 64, stride=2),
    block(0, 24, 9, 8, 144, 24, residual=True),
]
LARGE = [
    block(5, 32, 112, 112, None, 16),
    block(5, 16, 112, 112, 96, 24, stride=2),
    block(3, 16, 112, 112, 96, 24, stride=2, padding=(0, 1, 0, 1)),
    block(9, 24, 56, 56, 144, 24, residual=True),
    block(9, 24, 57, 55, 144, 32, stride=2),
    block(33, 32, 28, 28, 192, 32, residual=True),
    block(33, 64, 14, 14, 384, 64, residual=True),
    block(33, 96, 14, 14, 576, 160, stride=2),
    block(65, 160, 7, 7, 960, 320),
]
KERNELS = [
    block(3, 16, 9, 8, 96, 16, residual=True),
    block(3, 16, 9, 8, 48, 24, stride=2),
    block(3, 24, 9, 8, 72, 56),
    block(3, 16, 9, 8, None, 24),
    block(3, 16, 9, 8, 48, 20, kernel=5, padding=2),
]
HUGE = [
    block(2000, 16, 112, 112, 96, 24, stride=2),  # more than 2^31 expanded elements
    block(1800, 96, 112, 112, 96, 96, residual=True),  # and of input and output
]
BORDERS = [
    block(2, 16, 9, 8, 96, 16, residual=True),
    block(2, 16, 9, 8, 96, 24, stride=2, padding=(0, 1, 0, 1)),
    block(2, 16, 9, 8, None, 24),
]


class TestInvertedResidual(OpTests, OtherTensorTests, NanTests, LargeTests, BlockTests, FusedTests):
    pass
