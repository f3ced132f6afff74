"""What the tests of all ops share: what each op means, cases of random tensors, and the comparison
with float64."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_mbv2 import ops, testing

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INFINITY, NAN = float("inf"), float("nan")
BLOCKS = ("inverted_residual", "stem_block", "conv_pool")
ACTIVATING = ("conv2d", "conv2d_winograd", "linear", "add", *BLOCKS)


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
