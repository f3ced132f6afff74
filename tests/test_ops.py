"""Every op against float64 on the CPU and, marked `cuda`, on a GPU; its refusals; its manners."""
# ruff: noqa: E501 (a line for each refusal)

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torch_mbv2 import mobilenet, ops, testing
from torch_mbv2.weights import packing

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RAW = torch.ops.torch_mbv2
BLOCKS = ("inverted_residual", "stem_block", "conv_pool")
ACTIVATING = ("conv2d", "conv2d_winograd", "linear", "add", *BLOCKS)

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


# ------------------------------------------------------------------------ the meaning of each op


def clamp(x: Tensor, activation: Any) -> Tensor:
    low, high = {"relu": (0, None), "relu6": (0, 6), None: (None, None)}.get(activation, activation)
    return x if low is None and high is None else x.clamp(low, high)


def plain(op: str, *tensors: Tensor, activation: Any = None, **options: Any) -> Tensor:
    """What `op` means, in stock operators, in the dtype of its tensors."""
    x = tensors[0]
    if op in BLOCKS:
        *_, out = layers(op, *tensors, activation=activation, **options)
        return out
    if op in ("conv2d", "conv2d_winograd"):
        out = padded_conv(*tensors, **options)
    elif op == "linear":
        out = F.linear(*tensors)
    elif op == "add":
        out = x + tensors[1]
    elif op == "avg_pool2d":
        return F.avg_pool2d(x, **options)
    elif op == "global_avg_pool2d":
        return x.mean((2, 3), **options)
    else:
        return F.unfold(x, **options)
    return clamp(out, activation)


def padded_conv(x: Tensor, *tensors: Tensor | None, padding: Any = 0, **options: Any) -> Tensor:
    if isinstance(padding, tuple) and len(padding) == 4:
        x, padding = F.pad(x, padding), 0
    return F.conv2d(x, *tensors, padding=padding, **options)


def layers(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    depthwise: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project: Tensor | None = None,
    project_bias: Tensor | None = None,
    *,
    activation: Any = None,
    residual: bool = False,
    stride: Any = 1,
    padding: Any = 1,
    stem_stride: Any = 2,
    stem_padding: Any = 1,
) -> Iterator[Tensor]:
    """What the layers of a fused block make, before their activation, and last its output."""
    y = x
    if weight is not None:
        stem = {"stride": stem_stride, "padding": stem_padding} if op == "stem_block" else {}
        y = padded_conv(y.to(weight.dtype), weight, bias, **stem)
        yield y
        y = clamp(y, activation)
    if op == "conv_pool":
        yield y.mean((2, 3))
        return
    groups = len(depthwise)
    y = padded_conv(y, depthwise, depthwise_bias, stride=stride, padding=padding, groups=groups)
    yield y
    y = F.conv2d(clamp(y, activation), project, project_bias)
    yield x + y if residual else y


class Case(NamedTuple):
    """An op on random tensors: shapes of the tensors, or None for no bias."""

    op: str
    shapes: tuple[tuple[int, ...] | None, ...]
    options: Mapping[str, Any] = MappingProxyType({})

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(sum(len(s or ()) for s in self.shapes))
        tensors: list[Tensor | None] = []
        for i, shape in enumerate(self.shapes):
            x = None if shape is None else torch.randn(shape, generator=generator)
            if x is not None and self.op == "add":
                x *= 3
            elif x is not None and i == 1:  # weights: outputs of about 4, so ReLU6 meets both sides
                x *= 4 / max(1, x[0].numel() if len(x) else 1) ** 0.5
            elif (
                x is not None and i == 3
            ):  # depthwise: so do its outputs, of inputs of 1 or about 3
                taps = math.prod(map(min, x.shape[2:], self.shapes[0][2:]))
                x *= (4 if self.shapes[1] is None else 1.5) / taps**0.5
            elif x is not None and i == 5:
                x /= x[0].numel() ** 0.5
            tensors.append(None if x is None else x.to(device, dtype))
        return tensors

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.op} {' '.join(str(s).replace(' ', '') for s in self.shapes)} {options}"


def conv(*sizes: int, bias: bool = True, op: str = "conv2d", **options: Any) -> Case:
    """sizes: N, Cin, H, W, Cout, kH, kW."""
    n, channels, height, width, out_channels, *kernel = sizes
    groups = options.get("groups", 1)
    shapes = (
        (n, channels, height, width),
        (out_channels, channels // groups, *kernel),
        (out_channels,) if bias else None,
    )
    return Case(op, shapes, options)


winograd = functools.partial(conv, op="conv2d_winograd")


def linear(*sizes: int, bias: bool = True, **options: Any) -> Case:
    """sizes: ..., K, N."""
    *rows, features, out_features = sizes
    shapes = ((*rows, features), (out_features, features), (out_features,) if bias else None)
    return Case("linear", shapes, options)


def block(*sizes: int | None, kernel: Any = 3, bias: bool = True, **options: Any) -> Case:
    """sizes: N, Cin, H, W, E (None: no expansion), Cout."""
    n, channels, height, width, expanded, out_channels = sizes
    expand = expanded is not None
    hidden = expanded if expand else channels
    shapes = (
        (n, channels, height, width),
        (hidden, channels, 1, 1) if expand else None,
        (hidden,) if expand and bias else None,
        (hidden, 1, *((kernel, kernel) if isinstance(kernel, int) else kernel)),
        (hidden,) if bias else None,
        (out_channels, hidden, 1, 1),
        (out_channels,) if bias else None,
    )
    return Case("inverted_residual", shapes, {"activation": "relu6"} | options)


def stem(*sizes: int, kernel: int = 3, bias: bool = True, **options: Any) -> Case:
    """sizes: N, Cin, H, W, S, Cout."""
    n, channels, height, width, hidden, out_channels = sizes
    shapes = (
        (n, channels, height, width),
        (hidden, channels, kernel, kernel),
        (hidden,) if bias else None,
        (hidden, 1, 3, 3),
        (hidden,) if bias else None,
        (out_channels, hidden, 1, 1),
        (out_channels,) if bias else None,
    )
    return Case("stem_block", shapes, {"activation": "relu6"} | options)


def conv_pool(*sizes: int, bias: bool = True, **options: Any) -> Case:
    """sizes: N, Cin, H, W, Cout."""
    case = conv(*sizes, 1, 1, bias=bias)
    return Case("conv_pool", case.shapes, {"activation": "relu6"} | options)


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


BLOCK_CASES = [
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
    linear(1, 1280, 1000),
    linear(64, 1280, 1000),
    Case("global_avg_pool2d", ((2, 1280, 7, 7),)),
    Case("add", ((2, 24, 14, 14), (2, 24, 14, 14))),
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
    winograd(2, 16, 8, 8, 24, 3, 3, padding=1, activation="relu6"),
    winograd(1, 7, 5, 9, 13, 3, 3, bias=False),
    winograd(3, 64, 7, 7, 64, 3, 3, padding=(0, 1, 2, 3)),
    winograd(1, 1, 3, 3, 1, 3, 3, padding=2),
    winograd(2, 130, 6, 11, 33, 3, 3, padding=(1, 2), activation="relu"),
    winograd(17, 13, 3, 3, 7, 3, 3, activation=(None, 0.5)),
    winograd(0, 8, 8, 8, 8, 3, 3),
    # linear
    linear(29, 33, 7, activation="relu6"),
    linear(5, 64, 7, activation="relu"),
    linear(64, 16, bias=False),
    linear(2, 3, 4, 40, 24, activation=(-1, 1)),
    linear(3, 1, 1),
    linear(3, 0, 5),
    linear(0, 8, 8),
    # poolings
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
    Case("global_avg_pool2d", ((3, 13, 5, 9),), {"keepdim": True}),
    Case("global_avg_pool2d", ((1, 24, 112, 112),)),
    Case("global_avg_pool2d", ((4, 1, 1, 1),)),
    Case("global_avg_pool2d", ((17, 33, 1, 7),), {"keepdim": True}),
    Case("global_avg_pool2d", ((0, 8, 2, 2),)),
    # add
    Case("add", ((3, 13, 5, 7), (3, 13, 5, 7)), {"activation": "relu6"}),
    Case("add", ((1001,), (1001,)), {"activation": (-0.1, 0.1)}),
    Case("add", ((), ())),
    Case("add", ((0, 4), (0, 4))),
    # im2col
    Case(
        "im2col",
        ((2, 5, 9, 7),),
        {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (2, 1), "stride": (2, 1)},
    ),
    Case("im2col", ((1, 3, 32, 32),), {"kernel_size": 3, "padding": 1, "stride": 2}),
    Case("im2col", ((17, 2, 1, 1),), {"kernel_size": (1, 3), "padding": (3, 4)}),
    Case("im2col", ((1, 1, 1, 1),), {"kernel_size": 1}),
    Case("im2col", ((0, 3, 5, 5),), {"kernel_size": 3}),
    *BLOCK_CASES,
]
# One for each tile that only large products run on (on a GPU of 132 multiprocessors), and one of
# more than a chunk of Winograd tiles.
LARGE_CASES = [
    linear(12545, 8, 25, activation="relu6"),
    linear(4001, 8, 199),
    linear(4001, 8, 319),
    linear(12545, 8, 41),
    linear(12545, 288, 57),
    linear(16901, 8, 103),
    linear(16901, 8, 25),
    linear(2001, 144, 25),
    conv(2, 8, 80, 80, 72, 1, 1, padding=1, activation="relu6"),
    conv(5, 8, 80, 80, 40, 1, 1, padding=1),
    winograd(2, 64, 361, 363, 2, 3, 3, padding=1),
]
# Blocks on images of MobileNetV2's sizes.
LARGE_BLOCKS = [
    stem(5, 3, 224, 224, 32, 16),
    stem(2, 3, 225, 301, 32, 16),
    stem(2, 3, 224, 224, 32, 16, stem_padding=(0, 1, 0, 1)),
    block(5, 32, 112, 112, None, 16),
    block(5, 16, 112, 112, 96, 24, stride=2),
    block(3, 16, 112, 112, 96, 24, stride=2, padding=(0, 1, 0, 1)),
    block(9, 24, 56, 56, 144, 24, residual=True),
    block(9, 24, 57, 55, 144, 32, stride=2),
    block(33, 32, 28, 28, 192, 32, residual=True),
    block(33, 64, 14, 14, 384, 64, residual=True),
    block(33, 96, 14, 14, 576, 160, stride=2),
    block(65, 160, 7, 7, 960, 320),
    conv_pool(129, 320, 7, 7, 1280),
]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """All memory from `empty`, in Python or C++, holds NaN, so what nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(op: str, tensors: list[Tensor | None], options: Mapping[str, Any]) -> Tensor:
    """Run `op` and compare it with float64 and with stock PyTorch's own error."""
    with poisoned():
        got = getattr(ops, op)(*tensors, **options)
    block = op in BLOCKS
    exact = [None if x is None else x.double() for x in tensors]  # where it is: CPUs are slow
    expected = plain(op, *exact, **options).cpu()
    if op == "im2col":
        assert torch.equal(got.double().cpu(), expected)
        return got
    if got.is_cuda:  # the bounds are those of the kernels; stock rounds some results twice
        bounds = testing.BLOCK_BOUNDS if block else testing.BOUNDS
        testing.assert_close(got, expected, bounds[got.dtype])
    stock = testing.relative_l2(plain(op, *tensors, **options), expected)
    # A rounding as it is on average; Winograd's transforms and the layers of a block round once
    # more, which shows beside a direct sum of few products.
    floor = testing.unit_roundoff(got.dtype) * (1 if block or op == "conv2d_winograd" else 0.5)
    assert testing.relative_l2(got, expected) <= testing.ERROR_RATIO * max(stock, floor)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_against_float64(device, case, dtype):
    tensors = case.tensors(device, dtype)
    if tensors[0].dim() == 4:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    got = check(case.op, tensors, case.options)
    again = getattr(ops, case.op)(*tensors, **case.options)
    assert torch.equal(got, again), "two runs differ: a race"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE_CASES + LARGE_BLOCKS, ids=str)
def test_large_products(case, dtype):
    check(case.op, case.tensors("cuda", dtype), case.options)


ACTIVATED = [case for case in CASES if case.options.get("activation") and (case.op not in BLOCKS)]
# With enough elements that the few beyond a bound are not left to chance.
ACTIVATED_BLOCKS = [
    case for case in BLOCK_CASES if case.options["activation"] and math.prod(case.shapes[0]) > 500
]


@pytest.mark.parametrize("case", ACTIVATED, ids=str)
def test_the_cases_reach_the_bounds_of_their_activation(case):
    options = {**case.options, "activation": None}
    unbounded = plain(case.op, *case.tensors("cpu", torch.float32), **options)
    low, high = ops.bounds(case.op, case.options["activation"])
    assert low is None or (unbounded < low).any()
    assert high is None or (unbounded > high).any()
    assert ((unbounded > (low or -1e9)) & (unbounded < (high or 1e9))).any()


@pytest.mark.parametrize("case", ACTIVATED_BLOCKS, ids=str)
def test_each_layer_of_a_block_reaches_the_bounds_of_its_activation(case):
    low, high = ops.bounds(case.op, case.options["activation"])
    *hidden, _ = layers(case.op, *case.tensors("cpu", torch.float32), **case.options)
    assert len(hidden) == 1 + (case.op != "conv_pool") - (case.shapes[1] is None)
    for unbounded in hidden:
        assert low is None or (unbounded < low).float().mean() > 0.05
        assert high is None or (unbounded > high).float().mean() > 0.01
        assert ((unbounded > (low or -1e9)) & (unbounded < (high or 1e9))).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        block(2, 16, 9, 8, 96, 16, residual=True),
        block(2, 16, 9, 8, 96, 24, stride=2, padding=(0, 1, 0, 1)),
        block(2, 16, 9, 8, None, 24),
        stem(2, 3, 19, 16, 32, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_borders_are_zeros_of_the_hidden_tensor(device, case, dtype):
    """Of a constant image and large biases, where padding the input instead would show."""
    tensors = case.tensors(device, dtype)
    tensors[0].fill_(1.0)
    for bias in tensors[2::2]:
        if bias is not None:
            bias.copy_(torch.linspace(2, 5, len(bias)))
    got = check(case.op, tensors, case.options)
    inside, corner = got[0, :, 3, 3].double(), got[0, :, 0, 0].double()
    if case.options.get("padding") is None:
        assert (inside - corner).norm() > 0.1 * inside.norm()


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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("device", DEVICES)
def test_the_poison_works(device, dtype):
    with poisoned():
        memory = torch.empty(64, dtype=dtype, device=device)
    assert memory.view(torch.float32 if dtype == torch.uint8 else dtype).isnan().all()


# --------------------------------------------------------------------------- layouts and memory

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels of a larger": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "odd channel offset": lambda x: torch.cat([x[:, :1], x], 1).to(
        memory_format=torch.channels_last
    )[:, 1:],
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "window of a larger": lambda x: F.pad(x, (1, 2, 3, 0)).to(memory_format=torch.channels_last)[
        :, :, 3:, 1:-2
    ],
    "images of a larger": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "broadcast": lambda x: x[:1, :, :1, :].expand(x.shape),
    "odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


# One for each kernel.
KERNELS = [
    conv(3, 16, 9, 8, 24, 1, 1),
    conv(3, 16, 9, 8, 16, 3, 3, padding=1, groups=16),
    conv(3, 16, 9, 8, 16, 1, 3, padding=(0, 1), groups=16),
    conv(3, 3, 9, 8, 8, 3, 3, padding=1, stride=2),
    conv(3, 16, 9, 8, 24, 3, 3, padding=1),
    conv(3, 16, 9, 8, 8, 3, 3, groups=4),
    winograd(3, 16, 9, 8, 24, 3, 3, padding=1),
    linear(3, 16, 9, 8, 24),
    Case("avg_pool2d", ((3, 16, 9, 8),), {"kernel_size": 3, "stride": 2}),
    Case("global_avg_pool2d", ((3, 16, 9, 8),)),
    Case("add", ((3, 16, 9, 8), (3, 16, 9, 8))),
    Case("im2col", ((3, 16, 9, 8),), {"kernel_size": 3}),
    block(3, 16, 9, 8, 96, 16, residual=True),
    block(3, 16, 9, 8, 48, 24, stride=2),
    block(3, 24, 9, 8, 72, 56),
    block(3, 16, 9, 8, None, 24),
    block(3, 16, 9, 8, 48, 20, kernel=5, padding=2),
    stem(3, 3, 9, 8, 32, 16),
    conv_pool(3, 16, 9, 8, 24),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", KERNELS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_any_layout_of_the_input(device, case, layout, dtype):
    tensors = case.tensors(device, dtype)
    tensors[0] = LAYOUTS[layout](tensors[0])
    check(case.op, tensors, case.options)


OTHER_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "rows of a larger": lambda x: x.repeat_interleave(3, 0)[::3],
    "broadcast": lambda x: x[:1].expand(x.shape),
    "odd offset": LAYOUTS["odd offset"],
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("case", [case for case in KERNELS if len(case.shapes) > 1], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_any_layout_of_the_other_tensors(device, case, layout, dtype):
    x, *others = case.tensors(device, dtype)
    others = [None if other is None else OTHER_LAYOUTS[layout](other) for other in others]
    check(case.op, [x, *others], case.options)


def as_fake(tensors: list[Tensor | None], mode: FakeTensorMode) -> list[Tensor | None]:
    return [None if x is None else mode.from_tensor(x) for x in tensors]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_fake_has_the_shape_and_strides_of_the_real(device, case, memory_format):
    tensors = case.tensors(device, torch.float16)
    if tensors[0].dim() == 4:
        tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    call = getattr(ops, case.op)
    real = call(*tensors, **case.options)
    with FakeTensorMode() as mode:
        fake = call(*as_fake(tensors, mode), **case.options)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    image = real.dim() == 4 and case.op != "linear"
    wanted = torch.channels_last if image else torch.contiguous_format
    assert real.stride() == torch.empty(real.shape, memory_format=wanted).stride()


# ------------------------------------------------------------------------------- special values


INFINITY, NAN = float("inf"), float("nan")
# What the fused kernel of CUDA takes in half precision.
FUSED = [
    case
    for case in KERNELS
    if case.op in ("inverted_residual", "stem_block") and case.shapes[-2][0] % 8 == 0
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize(
    ("case", "activation"),
    [
        (case, activation)
        for case in KERNELS
        if "winograd" not in case.op
        for activation in (None, "relu", "relu6", (-1, 1))
        if activation is None or case.op in ACTIVATING
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity_pass_through(device, case, value, activation, dtype):
    if device == "cuda" and dtype == torch.half and case in FUSED and "relu" in str(activation):
        pytest.skip("fused blocks multiply by zeros: see the next test")
    options = dict(case.options)
    if case.op in ACTIVATING:
        options["activation"] = activation
    tensors = case.tensors(device, dtype)
    tensors[0][1, 5 % tensors[0].shape[1], 4, 3] = value
    with poisoned():
        got = getattr(ops, case.op)(*tensors, **options)
    exact = [None if x is None else x.double().cpu() for x in tensors]
    expected = plain(case.op, *exact, **options)
    assert torch.equal(got.isfinite().cpu(), expected.isfinite())
    torch.testing.assert_close(  # which of the three; how far is for others to test
        got.cpu(), expected.to(dtype), rtol=0.01, atol=0.05, equal_nan=True, check_stride=False
    )


@pytest.mark.cuda
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_nan_and_infinity_stay_near_in_fused_blocks(case, dtype, activation, value):
    """NaN comes out where it does in stock, and no pixel changes that is not next to one that does
    there."""
    options = {**case.options, "activation": activation}
    clean = case.tensors("cuda", dtype)
    dirty = [clean[0].clone(), *clean[1:]]
    dirty[0][1, 1, 4, 3] = value
    got, before = (getattr(ops, case.op)(*tensors, **options) for tensors in (dirty, clean))
    expected, plain_before = (
        plain(case.op, *(None if x is None else x.double() for x in tensors), **options)
        for tensors in (dirty, clean)
    )
    assert got[expected.isnan()].isnan().all()
    may_change = (expected != plain_before).any(1, keepdim=True).float()
    near = F.max_pool2d(may_change, 3, 1, 1).bool().expand_as(got)
    assert torch.equal(got[~near], before[~near])


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


@pytest.mark.parametrize(
    ("activation", "sign", "wanted"),
    [(None, 1, INFINITY), (None, -1, -INFINITY), ("relu6", 1, 6.0), ("relu", -1, 0.0)],
)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in KERNELS
        if case.op in ("conv2d", "conv2d_winograd", "linear", "add", "conv_pool")
        for dtype in DTYPES
        # The sums of Winograd's float32 infinities of both signs are NaN.
        if case.op != "conv2d_winograd" or dtype == torch.float16
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_overflows_to_infinity_like_stock(device, case, dtype, activation, sign, wanted):
    tensors = case.tensors(device, dtype)
    tensors[0].fill_(sign * torch.finfo(dtype).max / 2)
    tensors[1].fill_(8.0 if case.op != "add" else tensors[0].flatten()[0].item() * 1.5)
    got = getattr(ops, case.op)(*tensors, **{**case.options, "activation": activation})
    assert torch.equal(got, torch.full_like(got, wanted))


@pytest.mark.parametrize("device", DEVICES)
def test_poolings_sum_beyond_float16(device):
    x = torch.full((1, 64, 4, 4), 60000.0, device=device, dtype=torch.float16)
    assert torch.equal(ops.global_avg_pool2d(x), x[:, :, 0, 0])
    assert torch.equal(ops.avg_pool2d(x, 2), x[:, :, ::2, ::2])
    assert ops.avg_pool2d(x, 2, divisor_override=1).isposinf().all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: ops.conv2d(x, x, padding="same"), "padding must be an int or ints, got 'same'"),
        (lambda x: ops.conv2d(x, x, stride=1.0), "stride must be an int or ints, got 1.0"),
        (lambda x: ops.conv2d(x, x, dilation=(1,)), "dilation must have 2 values, got 1"),
        (lambda x: ops.avg_pool2d(x, "2"), "kernel_size must be an int or ints, got '2'"),
        (lambda x: ops.im2col(x, 1, padding=None), "padding must be an int or ints, got None"),
        (
            lambda x: ops.inverted_residual(x, None, None, x, None, x, None, padding="same"),
            "padding must be an int or ints, got 'same'",
        ),
        (
            lambda x: ops.stem_block(x, x, None, x, None, x, None, stem_padding="same"),
            "stem_padding must be an int or ints, got 'same'",
        ),
    ],
)
def test_sizes_that_are_no_integers_are_refused(call, sentence):
    with pytest.raises(RuntimeError, match=re.escape(f": {sentence}") + "$"):
        call(torch.ones(1, 1, 1, 1))


# ------------------------------------------------------------------------------------- refusals


class T(NamedTuple):
    """A tensor to be made, on the device of the input or `elsewhere`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    elsewhere: bool = False


GOOD: dict[str, dict[str, Any]] = {
    "conv2d": {
        "input": T((2, 6, 8, 9)),
        "weight": T((4, 3, 3, 3)),
        "bias": T((4,)),
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "groups": 2,
        "act_min": None,
        "act_max": None,
    },
    "conv2d_winograd": {
        "input": T((2, 6, 8, 9)),
        "weight": T((4, 6, 3, 3)),
        "bias": T((4,)),
        "padding": [1, 1, 1, 1],
        "act_min": None,
        "act_max": None,
    },
    "linear": {
        "input": T((2, 6)),
        "weight": T((4, 6)),
        "bias": T((4,)),
        "act_min": None,
        "act_max": None,
    },
    "avg_pool2d": {
        "input": T((2, 6, 8, 9)),
        "kernel_size": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0],
        "ceil_mode": False,
        "count_include_pad": True,
        "divisor_override": None,
    },
    "global_avg_pool2d": {"input": T((2, 6, 8, 9)), "keepdim": False},
    "add": {"input": T((2, 6)), "other": T((2, 6)), "act_min": None, "act_max": None},
    "im2col": {
        "input": T((2, 6, 8, 9)),
        "kernel_size": [2, 2],
        "dilation": [1, 1],
        "padding": [0, 0],
        "stride": [1, 1],
    },
    "inverted_residual": {
        "input": T((2, 6, 8, 9)),
        "expand_weight": T((12, 6, 1, 1)),
        "expand_bias": T((12,)),
        "depthwise_weight": T((12, 1, 3, 5)),
        "depthwise_bias": T((12,)),
        "project_weight": T((6, 12, 1, 1)),
        "project_bias": T((6,)),
        "packed": T((5,)),
        "stride": [1, 1],
        "padding": [2, 2, 1, 1],
        "residual": True,
        "act_min": None,
        "act_max": None,
    },
    "stem_block": {
        "input": T((2, 3, 8, 9)),
        "stem_weight": T((12, 3, 3, 5)),
        "stem_bias": T((12,)),
        "depthwise_weight": T((12, 1, 3, 3)),
        "depthwise_bias": T((12,)),
        "project_weight": T((6, 12, 1, 1)),
        "project_bias": T((6,)),
        "packed": T((5,)),
        "stem_stride": [2, 2],
        "stem_padding": [2, 2, 1, 1],
        "padding": [1, 1, 1, 1],
        "act_min": None,
        "act_max": None,
    },
    "conv_pool": {
        "input": T((2, 6, 8, 9)),
        "weight": T((4, 6, 1, 1)),
        "bias": T((4,)),
        "act_min": None,
        "act_max": None,
    },
}
TENSORS = [(op, name) for op, good in GOOD.items() for name in good if isinstance(good[name], T)]
LIKE = {"stem_block": "stem_weight"}  # whose dtype the other tensors must have, if not the input's
LARGE = (1, 65536, 256, 128)
WIDE = T((1, 2**29, 1, 1), torch.float16)  # too large only with its padding, and then just so
BAD: list[tuple[str, dict[str, Any], str]] = [
    *(
        (
            op,
            {"input": T(good["input"].shape, dtype)},
            f"input must be float32, float16 or bfloat16, got {name}",
        )
        for op, good in GOOD.items()
        for dtype, name in (
            (torch.float64, "float64"),
            (torch.int64, "int64"),
            (torch.bool, "bool"),
        )
    ),
    *(
        (op, change, sentence)
        for op in GOOD
        if op not in ("linear", "add")
        for change, sentence in (
            ({"input": T((6, 8, 9))}, "input must have shape (N, C, H, W), got (6, 8, 9)"),
            ({"input": T((6,))}, "input must have shape (N, C, H, W), got (6,)"),
            (
                {"input": T(LARGE)},
                "one image of input must have fewer than 2147483648 elements, "
                "got (65536, 256, 128)",
            ),
        )
    ),
    *(
        (op, {name: GOOD[op][name]._replace(**change)}, f"{name} must {rule}")
        for op, name in TENSORS
        if name != "input"
        for change, rule in (
            (
                {"dtype": torch.float16},
                f"have the dtype of {LIKE.get(op, 'input')}, float32, got float16",
            ),
            (
                {"elsewhere": True},
                "be on the device of input, {here}, got {elsewhere}",
            ),
        )
        if (name, change) != ("stem_weight", {"dtype": torch.float16})
    ),
    *(
        (
            "add",
            {"input": T((2, 6), dtype)},
            f"input must be float32, float16 or bfloat16, got {name}",
        )
        for dtype, name in (
            (torch.uint8, "uint8"),
            (torch.int8, "int8"),
            (torch.int16, "int16"),
            (torch.int32, "int32"),
            (torch.complex64, "complex64"),
            (torch.complex128, "complex128"),
            (torch.uint16, "uint16"),
            (torch.float8_e4m3fn, "float8_e4m3fn"),
        )
    ),
    (
        "conv2d",
        {"weight": T((4, 3, 3))},
        "weight must have shape (Cout, Cin / groups, kH, kW), got (4, 3, 3)",
    ),
    (
        "conv2d",
        {"input": T((2, 0, 8, 9))},
        "input must have at least one channel, got (2, 0, 8, 9)",
    ),
    ("conv2d", {"groups": 0}, "groups must divide Cin 6 and Cout 4, got 0"),
    ("conv2d", {"groups": 3}, "groups must divide Cin 6 and Cout 4, got 3"),
    (
        "conv2d",
        {"weight": T((4, 6, 3, 3))},
        "weight must have shape (Cout, 3, kH, kW) from 6 input channels in 2 groups, got (4, 6, 3, 3)",
    ),
    ("conv2d", {"bias": T((5,))}, "bias must have shape (4,) from weight, got (5,)"),
    ("conv2d", {"bias": T((4, 1))}, "bias must have shape (4,) from weight, got (4, 1)"),
    ("conv2d", {"stride": [1]}, "stride must have 2 values, got 1"),
    ("conv2d", {"stride": [0, 1]}, "stride must be at least 1, got (0, 1)"),
    ("conv2d", {"stride": [1, 2**31]}, "stride must be less than 2147483648, got (1, 2147483648)"),
    ("conv2d", {"padding": [1, 1]}, "padding must have 4 values, got 2"),
    ("conv2d", {"padding": [0, 0, -1, 0]}, "padding must be at least 0, got (0, 0, -1, 0)"),
    ("conv2d", {"dilation": [1, 0]}, "dilation must be at least 1, got (1, 0)"),
    ("conv2d", {"dilation": [1, 2, 3]}, "dilation must have 2 values, got 3"),
    ("conv2d", {"act_min": 1.0, "act_max": 0.5}, "act_min must not exceed act_max, got 1 and 0.5"),
    (
        "conv2d",
        {"dilation": [9, 1]},
        "the kernel must fit into the padded input: dilated kernel (19, 3), padded input (10, 11)",
    ),
    (
        "conv2d",
        {"weight": T((4, 3, 0, 3))},
        "the kernel must fit into the padded input: dilated kernel (0, 3), padded input (10, 11)",
    ),
    (
        "conv2d",
        {"padding": [2**31 - 1, 0, 1, 1]},
        "one image of output must have fewer than 2147483648 elements, got (4, 8, 2147483654)",
    ),
    (
        "conv2d_winograd",
        {"weight": T((4, 6, 3, 5))},
        "weight must have a 3 x 3 kernel, got (4, 6, 3, 5)",
    ),
    (
        "conv2d_winograd",
        {"padding": [0, 0, 0, -1]},
        "padding must be at least 0, got (0, 0, 0, -1)",
    ),
    (
        "conv2d_winograd",
        {"weight": T((4, 3, 3, 3))},
        "weight must have shape (Cout, 6, kH, kW) from 6 input channels in 1 groups, got (4, 3, 3, 3)",
    ),
    ("conv2d_winograd", {"bias": T((6,))}, "bias must have shape (4,) from weight, got (6,)"),
    (
        "conv2d_winograd",
        {"act_min": 6.5, "act_max": 6},
        "act_min must not exceed act_max, got 6.5 and 6",
    ),
    (
        "conv2d_winograd",
        {"input": T((2, 6, 1, 9)), "padding": [0, 0, 1, 0]},
        "the kernel must fit into the padded input: dilated kernel (3, 3), padded input (2, 9)",
    ),
    ("linear", {"input": T(())}, "input must have shape (..., K), got ()"),
    ("linear", {"weight": T((6, 4))}, "weight must have shape (N, 6) from input, got (6, 4)"),
    ("linear", {"weight": T((6,))}, "weight must have shape (N, 6) from input, got (6,)"),
    ("linear", {"bias": T((6,))}, "bias must have shape (4,) from weight, got (6,)"),
    ("linear", {"act_min": 2.0, "act_max": -1.0}, "act_min must not exceed act_max, got 2 and -1"),
    (
        "linear",
        {"weight": T((2**31, 6)), "bias": None},
        "weight must have fewer than 2147483648 rows and columns, got (2147483648, 6)",
    ),
    (
        "avg_pool2d",
        {"input": WIDE, "padding": [1, 1], "stride": [1, 1]},
        "one image of output must have fewer than 2147483648 elements, got (536870912, 2, 2)",
    ),
    (
        "im2col",
        {"input": WIDE, "kernel_size": [2, 1], "padding": [1, 0]},
        "one image of output must have fewer than 2147483648 elements, got (1073741824, 2, 1)",
    ),
    ("avg_pool2d", {"kernel_size": [2]}, "kernel_size must have 2 values, got 1"),
    ("avg_pool2d", {"kernel_size": [0, 2]}, "kernel_size must be at least 1, got (0, 2)"),
    ("avg_pool2d", {"stride": [2, -1]}, "stride must be at least 1, got (2, -1)"),
    (
        "avg_pool2d",
        {"padding": [2, 0]},
        "padding must be at most half of kernel_size (2, 2), got (2, 0)",
    ),
    ("avg_pool2d", {"divisor_override": 0}, "divisor_override must not be 0"),
    (
        "avg_pool2d",
        {"kernel_size": [9, 2]},
        "the kernel must fit into the padded input: dilated kernel (9, 2), padded input (8, 9)",
    ),
    (
        "global_avg_pool2d",
        {"input": T((2, 6, 0, 9))},
        "input must have at least one pixel, got (2, 6, 0, 9)",
    ),
    ("add", {"other": T((6, 2))}, "other must have the shape of input, (2, 6), got (6, 2)"),
    ("add", {"other": T((6,))}, "other must have the shape of input, (2, 6), got (6,)"),
    ("add", {"act_min": 2.0, "act_max": 1.0}, "act_min must not exceed act_max, got 2 and 1"),
    ("add", {"act_min": NAN, "act_max": 1.0}, "act_min must not exceed act_max, got nan and 1"),
    (
        "add",
        {"act_min": INFINITY, "act_max": 1e-7},
        "act_min must not exceed act_max, got inf and 1e-07",
    ),
    ("im2col", {"kernel_size": [2, 2, 2]}, "kernel_size must have 2 values, got 3"),
    (
        "im2col",
        {"kernel_size": [9, 2]},
        "the kernel must fit into the padded input: dilated kernel (9, 2), padded input (8, 9)",
    ),
    ("im2col", {"stride": [1, 0]}, "stride must be at least 1, got (1, 0)"),
    ("im2col", {"padding": [-1, 0]}, "padding must be at least 0, got (-1, 0)"),
    ("im2col", {"dilation": [0, 1]}, "dilation must be at least 1, got (0, 1)"),
    *(
        (op, {"input": T((2, 0, 8, 9))}, "input must have at least one channel, got (2, 0, 8, 9)")
        for op in BLOCKS
    ),
    *(
        (op, change, sentence)
        for op, source in (("inverted_residual", "expand_weight"), ("stem_block", "stem_weight"))
        for change, sentence in (
            (
                {"depthwise_weight": T((12, 3, 3))},
                f"depthwise_weight must have shape (12, 1, kH, kW) from {source}, got (12, 3, 3)",
            ),
            (
                {"depthwise_weight": T((6, 1, 3, 3))},
                f"depthwise_weight must have shape (12, 1, kH, kW) from {source}, got (6, 1, 3, 3)",
            ),
            (
                {"depthwise_weight": T((12, 2, 3, 3))},
                f"depthwise_weight must have shape (12, 1, kH, kW) from {source}, got (12, 2, 3, 3)",
            ),
            (
                {"project_weight": T((6, 12))},
                "project_weight must have shape (Cout, 12, 1, 1) from depthwise_weight, got (6, 12)",
            ),
            (
                {"project_weight": T((6, 12, 1, 3))},
                "project_weight must have shape (Cout, 12, 1, 1) from depthwise_weight, got (6, 12, 1, 3)",
            ),
            (
                {"depthwise_bias": T((6,))},
                "depthwise_bias must have shape (12,) from depthwise_weight, got (6,)",
            ),
            (
                {"project_bias": T((6, 1))},
                "project_bias must have shape (6,) from project_weight, got (6, 1)",
            ),
            ({"packed": T((5, 1))}, "packed must have shape (L,), got (5, 1)"),
            ({"padding": [1, 1]}, "padding must have 4 values, got 2"),
            ({"padding": [1, 1, 0, -1]}, "padding must be at least 0, got (1, 1, 0, -1)"),
            ({"act_min": 6.5, "act_max": 6}, "act_min must not exceed act_max, got 6.5 and 6"),
        )
    ),
    (
        "inverted_residual",
        {"expand_weight": T((12, 6))},
        "expand_weight must have shape (E, 6, 1, 1) from input, got (12, 6)",
    ),
    (
        "inverted_residual",
        {"expand_weight": T((12, 3, 1, 1))},
        "expand_weight must have shape (E, 6, 1, 1) from input, got (12, 3, 1, 1)",
    ),
    (
        "inverted_residual",
        {"expand_weight": T((12, 6, 3, 1))},
        "expand_weight must have shape (E, 6, 1, 1) from input, got (12, 6, 3, 1)",
    ),
    (
        "inverted_residual",
        {"expand_weight": T((0, 6, 1, 1))},
        "expand_weight must have at least one output channel, got (0, 6, 1, 1)",
    ),
    (
        "inverted_residual",
        {"expand_weight": None},
        "depthwise_weight must have shape (6, 1, kH, kW) from input, got (12, 1, 3, 5)",
    ),
    (
        "inverted_residual",
        {
            "expand_weight": None,
            "depthwise_weight": T((6, 1, 3, 3)),
            "project_weight": T((6, 6, 1, 1)),
        },
        "expand_bias must be None where expand_weight is None",
    ),
    (
        "inverted_residual",
        {"expand_bias": T((6,))},
        "expand_bias must have shape (12,) from expand_weight, got (6,)",
    ),
    ("inverted_residual", {"stride": [1]}, "stride must have 2 values, got 1"),
    ("inverted_residual", {"stride": [1, 0]}, "stride must be at least 1, got (1, 0)"),
    (
        "inverted_residual",
        {"stride": [2**31, 1]},
        "stride must be less than 2147483648, got (2147483648, 1)",
    ),
    (
        "inverted_residual",
        {"depthwise_weight": T((12, 1, 11, 3))},
        "the kernel must fit into the padded input: dilated kernel (11, 3), padded input (10, 13)",
    ),
    (
        "inverted_residual",
        {"depthwise_weight": T((12, 1, 3, 0))},
        "the kernel must fit into the padded input: dilated kernel (3, 0), padded input (10, 13)",
    ),
    (
        "inverted_residual",
        {
            "input": T((1, 1, 2**15, 2**13), torch.float16),
            "expand_weight": T((12, 1, 1, 1), torch.float16),
            "expand_bias": None,
            **dict.fromkeys(("depthwise_bias", "project_bias", "packed")),
            "depthwise_weight": T((12, 1, 3, 3), torch.float16),
            "project_weight": T((1, 12, 1, 1), torch.float16),
        },
        "one image of expanded input must have fewer than 2147483648 elements, got (12, 32768, 8192)",
    ),
    (
        "inverted_residual",
        {"padding": [2**31 - 1, 0, 1, 1]},
        "one image of depthwise output must have fewer than 2147483648 elements, got (12, 8, 2147483652)",
    ),
    (
        "inverted_residual",
        {"padding": [2**25, 0, 1, 1], "project_weight": T((64, 12, 1, 1)), "project_bias": None},
        "one image of depthwise output must have fewer than 2147483648 elements, got (12, 8, 33554437)",
    ),
    (
        "inverted_residual",
        {"padding": [2**23, 0, 1, 1], "project_weight": T((64, 12, 1, 1)), "project_bias": None},
        "one image of output must have fewer than 2147483648 elements, got (64, 8, 8388613)",
    ),
    (
        "inverted_residual",
        {"stride": [2, 1]},
        "residual needs an output of the shape of input, (2, 6, 8, 9), got (2, 6, 4, 9)",
    ),
    (
        "inverted_residual",
        {"padding": [0, 0, 1, 1]},
        "residual needs an output of the shape of input, (2, 6, 8, 9), got (2, 6, 8, 5)",
    ),
    (
        "inverted_residual",
        {"project_weight": T((4, 12, 1, 1)), "project_bias": None},
        "residual needs an output of the shape of input, (2, 6, 8, 9), got (2, 4, 8, 9)",
    ),
    (
        "stem_block",
        {"stem_weight": T((12, 3, 3, 5), torch.float64)},
        "stem_weight must be float32, float16 or bfloat16, got float64",
    ),
    (
        "stem_block",
        {"stem_weight": T((12, 3, 3, 5), torch.float16)},
        "depthwise_weight must have the dtype of stem_weight, float16, got float32",
    ),
    (
        "stem_block",
        {"stem_weight": T((12, 3, 9))},
        "stem_weight must have shape (S, 3, kH, kW) from input, got (12, 3, 9)",
    ),
    (
        "stem_block",
        {"stem_weight": T((12, 1, 3, 3))},
        "stem_weight must have shape (S, 3, kH, kW) from input, got (12, 1, 3, 3)",
    ),
    (
        "stem_block",
        {"stem_weight": T((0, 3, 3, 3))},
        "stem_weight must have at least one output channel, got (0, 3, 3, 3)",
    ),
    (
        "stem_block",
        {"stem_bias": T((6,))},
        "stem_bias must have shape (12,) from stem_weight, got (6,)",
    ),
    ("stem_block", {"stem_stride": [2]}, "stem_stride must have 2 values, got 1"),
    ("stem_block", {"stem_stride": [0, 2]}, "stem_stride must be at least 1, got (0, 2)"),
    ("stem_block", {"stem_padding": [1]}, "stem_padding must have 4 values, got 1"),
    (
        "stem_block",
        {"stem_padding": [0, -1, 0, 0]},
        "stem_padding must be at least 0, got (0, -1, 0, 0)",
    ),
    (
        "stem_block",
        {"stem_weight": T((12, 3, 11, 5))},
        "the stem kernel must fit into the padded input: dilated kernel (11, 5), padded input (10, 13)",
    ),
    (
        "stem_block",
        {"depthwise_weight": T((12, 1, 7, 3))},
        "the depthwise kernel must fit into the padded stem output: dilated kernel (7, 3), padded stem output (6, 7)",
    ),
    (
        "stem_block",
        {"stem_padding": [2**31 - 1, 0, 1, 1]},
        "one image of stem output must have fewer than 2147483648 elements, got (12, 4, 1073741826)",
    ),
    (
        "stem_block",
        {"padding": [2**31 - 1, 0, 1, 1]},
        "one image of depthwise output must have fewer than 2147483648 elements, got (12, 4, 2147483650)",
    ),
    (
        "stem_block",
        {"padding": [2**23, 0, 1, 1], "project_weight": T((64, 12, 1, 1)), "project_bias": None},
        "one image of output must have fewer than 2147483648 elements, got (64, 4, 8388611)",
    ),
    (
        "conv_pool",
        {"input": T((2, 6, 8, 0))},
        "input must have at least one pixel, got (2, 6, 8, 0)",
    ),
    (
        "conv_pool",
        {"weight": T((4, 6))},
        "weight must have shape (Cout, 6, 1, 1) from input, got (4, 6)",
    ),
    (
        "conv_pool",
        {"weight": T((4, 6, 1, 3))},
        "weight must have shape (Cout, 6, 1, 1) from input, got (4, 6, 1, 3)",
    ),
    (
        "conv_pool",
        {"weight": T((4, 3, 1, 1))},
        "weight must have shape (Cout, 6, 1, 1) from input, got (4, 3, 1, 1)",
    ),
    ("conv_pool", {"bias": T((6,))}, "bias must have shape (4,) from weight, got (6,)"),
    (
        "conv_pool",
        {"act_min": 2.0, "act_max": -1.0},
        "act_min must not exceed act_max, got 2 and -1",
    ),
    (
        "conv_pool",
        {"weight": T((2**25, 6, 1, 1)), "bias": None},
        "one image of convolution output must have fewer than 2147483648 elements, got (33554432, 8, 9)",
    ),
]


def arguments(op: str, change: dict[str, Any], device: str, elsewhere: str) -> list[Any]:
    def make(value: Any) -> Any:
        if not isinstance(value, T):
            return value
        where = elsewhere if value.elsewhere else device
        if max(value.shape, default=0) > 2**15:  # without the memory
            return torch.ones(1, dtype=value.dtype, device=where).expand(value.shape)
        return torch.ones(value.shape, dtype=value.dtype, device=where)

    return [make(value) for value in (GOOD[op] | change).values()]


@pytest.mark.parametrize(
    "kind", ["cpu", "meta", "fake", CUDA, pytest.param("fake cuda", marks=pytest.mark.cuda)]
)
@pytest.mark.parametrize(("op", "change", "sentence"), BAD)
def test_bad_arguments_get_one_sentence(op, change, sentence, kind):
    device, elsewhere = {
        "meta": ("meta", "cpu"),
        "cpu": ("cpu", "meta"),
        "fake": ("cpu", "meta"),
    }.get(kind, ("cuda:0", "cpu"))
    if "fake" in kind:
        with FakeTensorMode():
            values = arguments(op, change, device, elsewhere)
            with pytest.raises(RuntimeError) as caught:
                getattr(RAW, op)(*values)
    else:
        values = arguments(op, change, device, elsewhere)
        with pytest.raises(RuntimeError) as caught:
            getattr(RAW, op)(*values)
        with pytest.raises(RuntimeError) as direct:  # as modules call it
            getattr(ops.raw, op)(*values)
        assert str(direct.value) == str(caught.value)
    wanted = sentence.format(here=device, elsewhere=elsewhere)
    assert str(caught.value).splitlines()[0] == f"torch_mbv2::{op}: {wanted}"


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("device", DEVICES)
def test_the_good_arguments_are_good(op, device):
    getattr(RAW, op)(*arguments(op, {}, device, device))


WRAPPER_OPTIONS: dict[str, dict[str, Any]] = {
    "conv2d": {"groups": 2},
    "avg_pool2d": {"kernel_size": 2},
    "im2col": {"kernel_size": 2},
}


def wrapper_call(op: str, device: str = "cpu") -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Good tensors for the public function of `op`, by name, and the function with its options."""
    values = dict(zip(GOOD[op], arguments(op, {}, device, device), strict=True))
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, functools.partial(getattr(ops, op), **WRAPPER_OPTIONS.get(op, {}))


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize("device", DEVICES)
def test_what_requires_grad_is_refused_by_the_wrapper_alone(device, op, name):
    with torch.inference_mode(False), torch.enable_grad():
        tensors, call = wrapper_call(op, device)
        tensors[name].requires_grad_()
        with pytest.raises(RuntimeError) as caught:
            call(**tensors)
        assert str(caught.value) == (
            f"torch_mbv2::{op}: an argument requires grad, but torch_mbv2 is for inference only: "
            "call it under torch.inference_mode() (or torch.no_grad())"
        )
        getattr(RAW, op)(*(tensors.get(key, value) for key, value in GOOD[op].items()))
        with torch.no_grad():
            assert not call(**tensors).requires_grad
        with torch.inference_mode():
            call(**tensors)


@pytest.mark.parametrize("activation", ["gelu", "ReLU6", "", 6, 0.5, (1.0,), (0, 1, 2)], ids=repr)
@pytest.mark.parametrize("op", ACTIVATING)
def test_unknown_activations_are_refused(op, activation):
    tensors, call = wrapper_call(op)
    with pytest.raises(RuntimeError) as caught:
        call(**tensors, activation=activation)
    assert str(caught.value) == (
        f'torch_mbv2::{op}: activation must be None, "relu", "relu6" or (min, max), '
        f"got {activation!r}"
    )


@pytest.mark.parametrize("op", ACTIVATING)
def test_bounds_in_the_wrong_order_are_refused_by_the_wrapper(op):
    tensors, call = wrapper_call(op)
    with pytest.raises(RuntimeError, match="act_min must not exceed act_max, got 2 and 1"):
        call(**tensors, activation=(2, 1))


# ------------------------------------------------------------------------------------ ecosystem


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(op, device):
    with torch.inference_mode(False):
        overload = getattr(RAW, op).default
        torch.library.opcheck(overload, tuple(arguments(op, {}, device, device)))


def network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """A bit of every op."""
    dense, depthwise, point, head = weights
    y = ops.conv2d(x, dense, stride=2, padding=1, activation="relu6")
    z = ops.conv2d(y, depthwise, padding=(0, 2, 1, 1), groups=len(depthwise), activation="relu")
    z = ops.add(ops.conv2d(z, point), y)
    z = ops.inverted_residual(z, point, None, depthwise, None, point, None, residual=True)
    y = ops.stem_block(x, dense, None, depthwise, None, point, None)
    z = ops.conv2d_winograd(ops.avg_pool2d(z, 2), dense.repeat(1, 8, 1, 1)[:, :16], padding=1)
    columns = ops.im2col(z, 1)
    pooled = ops.global_avg_pool2d(z) + columns.mean(2) + ops.conv_pool(y, point, None, "relu6")
    return ops.linear(pooled, head, activation=(-1, 1))


def network_weights(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 3, 3, 3), (16, 1, 3, 3), (16, 16, 1, 1), (10, 16))
    return [torch.randn(s, generator=generator).to(device, dtype) / 4 for s in shapes]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    with torch.inference_mode(False), torch.no_grad():
        torch._dynamo.reset()
        weights, x = network_weights(device), torch.randn(5, 3, 17, 16, device=device)
        backend = "inductor" if device == "cuda" else "aot_eager"
        compiled = torch.compile(network, fullgraph=True, backend=backend, dynamic=dynamic)
        torch.testing.assert_close(compiled(x, weights), network(x, weights))
        torch.testing.assert_close(compiled(x[:3], weights), network(x[:3], weights))


@pytest.mark.parametrize("device", DEVICES)
def test_exports_with_a_dynamic_batch(device):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, weight in enumerate(network_weights(device)):
                self.register_buffer(f"weight{i}", weight)

        def forward(self, x: Tensor) -> Tensor:
            return network(x, list(self.buffers()))

    with torch.inference_mode(False), torch.no_grad():
        module = Network()
        example = (torch.randn(2, 3, 17, 16, device=device),)
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=512)}}
        exported = torch.export.export(module, example, dynamic_shapes=shapes)
        names = {str(node.target) for node in exported.graph.nodes}
        assert {f"torch_mbv2.{op}.default" for op in GOOD} <= names
        x = torch.randn(5, 3, 17, 16, device=device)
        torch.testing.assert_close(exported.module()(x), module(x))


# ---------------------------------------------------------------------------------- CUDA's ways


@pytest.mark.cuda
def test_runs_on_the_current_stream():
    weights = network_weights("cuda", torch.float16)
    x = torch.randn(64, 3, 64, 64, device="cuda", dtype=torch.float16)
    expected = network(x, weights)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # on another stream, the ops would read zeros
        late.copy_(x)
        got = network(late, weights)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_as_a_cuda_graph(dtype):
    weights = network_weights("cuda", dtype)
    x = torch.zeros(4, 3, 33, 32, device="cuda", dtype=dtype)
    replay, out = testing.capture(lambda: network(x, weights))
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        replay()
        assert torch.equal(out, network(x, weights))


@pytest.mark.cuda
def test_runs_on_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weights, x = network_weights("cuda:1"), torch.randn(2, 3, 17, 16, device="cuda:1")
    torch.testing.assert_close(network(x, weights).cpu(), network(x.cpu(), network_weights("cpu")))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("op", "shapes", "options"),
    [  # the shapes of the other tensors; None for x itself
        ("conv2d", ((64, 64, 1, 1), (64,)), {}),
        ("conv2d", ((64, 1, 3, 3), (64,)), {"padding": 1, "groups": 64}),
        ("conv2d", ((64, 1, 3, 2), (64,)), {"padding": 1, "groups": 64}),
        ("conv2d", ((16, 64, 3, 3), (16,)), {"padding": 1}),
        ("conv2d_winograd", ((8, 64, 3, 3), (8,)), {"padding": 1}),
        ("linear", ((16, 8),), {}),
        ("avg_pool2d", (), {"kernel_size": 2}),
        ("global_avg_pool2d", (), {}),
        ("add", (None,), {}),
        ("im2col", (), {"kernel_size": 2, "stride": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_more_than_two_to_the_31_elements(op, shapes, options):
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    images = 2**31 // (64 * 8 * 8) + 5
    x = torch.empty(images, 64, 8, 8, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last).normal_()
    others = [x if s is None else torch.randn(s, device="cuda").half() / 8 for s in shapes]
    got = getattr(ops, op)(x, *others, **options)
    for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(-2, None)):
        tensors = [
            x[part],
            *(t[part] if s is None else t for t, s in zip(others, shapes, strict=True)),
        ]
        expected = plain(op, *(t.double() for t in tensors), **options)
        testing.assert_close(got[part], expected)


@pytest.mark.cuda
@pytest.mark.parametrize(("op", "weight"), [("conv2d", (8, 4, 3, 3)), ("im2col", None)])
def test_more_than_two_to_the_31_elements_in_nchw(op, weight):
    """What reads its input by strides, without a copy in channels_last."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    images = 2**31 // (4 * 8 * 8) + 5
    x = torch.empty(images, 4, 8, 8, device="cuda", dtype=torch.float16).normal_()
    options = {"stride": 2, "padding": 1} if weight else {"kernel_size": 2, "stride": 2}
    others = [torch.randn(weight, device="cuda").half() / 6] if weight else []
    got = getattr(ops, op)(x, *others, **options)
    for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(-2, None)):
        expected = plain(op, *(t.double() for t in (x[part], *others)), **options)
        testing.assert_close(got[part], expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_groups_than_a_grid_has_layers(dtype):
    groups = 65535 + 70
    x = torch.randn(3, groups * 2, 1, 1, device="cuda", dtype=dtype)
    weight = torch.randn(groups, 2, 1, 1, device="cuda", dtype=dtype)
    expected = (x.double().view(3, groups, 2) * weight.double().view(groups, 2)).sum(2)
    testing.assert_close(ops.conv2d(x, weight, groups=groups)[:, :, 0, 0], expected)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "case",
    [
        block(2000, 16, 112, 112, 96, 24, stride=2),  # more than 2^31 expanded elements
        block(1800, 96, 112, 112, 96, 96, residual=True),  # and of input and output
        stem(4000, 3, 224, 224, 32, 16),  # and of the stem's output
        conv_pool(40000, 320, 7, 7, 1280),
    ],
    ids=str,
)
def test_blocks_of_more_than_two_to_the_31_elements(case):
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    (images, *image), *_ = case.shapes
    _, *weights = case._replace(shapes=((1, *image), *case.shapes[1:])).tensors("cuda", torch.half)
    x = torch.empty((images, *image), device="cuda", dtype=torch.half)
    x = x.to(memory_format=torch.channels_last).normal_()
    got = getattr(ops, case.op)(x, *weights, **case.options)
    for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(-2, None)):
        exact = [None if t is None else t.double() for t in (x[part], *weights)]
        bound = testing.BLOCK_BOUNDS[torch.half]
        testing.assert_close(got[part], plain(case.op, *exact, **case.options), bound)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE_BLOCKS, ids=str)
def test_a_hundred_runs_of_a_block_are_bitwise_equal(case, dtype):
    tensors = case.tensors("cuda", dtype)
    first = getattr(ops, case.op)(*tensors, **case.options)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        differ += (getattr(ops, case.op)(*tensors, **case.options) != first).sum()
    assert differ == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in KERNELS if c.op in BLOCKS[:2]], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_packed_once_is_packed_in_the_call(device, case, dtype):
    x, *weights = case.tensors(device, dtype)
    packed = getattr(packing, f"pack_{case.op}")(*weights)
    call = functools.partial(getattr(ops, case.op), x, *weights, **case.options)
    assert torch.equal(call(packed=packed), call())
