"""What holds for every op, or for several: a file of tests/ops makes a class of these, and lists
the cases that they run with.

    CASES: sizes and options of every kind
    KERNELS: one for each kernel
    LARGE: one for each tile that only large products run on (on a GPU of 132 multiprocessors), one
        of more than a chunk of Winograd tiles; blocks on images of MobileNetV2's sizes
    HUGE, HUGE_NCHW: with more than 2^31 elements
    BORDERS: blocks with zeros around the hidden tensor
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ACTIVATING,
    DEVICES,
    DTYPES,
    INFINITY,
    NAN,
    Case,
    check,
    layers,
    plain,
    poisoned,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torch_mbv2 import ops, testing
from torch_mbv2.weights import packing


def of_file(names: str, choose: Callable[[ModuleType], Iterable[Any]]) -> Callable[[Any], Any]:
    """As `pytest.mark.parametrize`, with what `choose` takes from the test's file."""

    def decorate(test: Any) -> Any:
        test.of_file = (names, choose)
        return test

    return decorate


every_case = of_file("case", lambda file: file.CASES)
every_kernel = of_file("case", lambda file: file.KERNELS)


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
OTHER_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "rows of a larger": lambda x: x.repeat_interleave(3, 0)[::3],
    "broadcast": lambda x: x[:1].expand(x.shape),
    "odd offset": LAYOUTS["odd offset"],
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
}


def as_fake(tensors: list[Tensor | None], mode: FakeTensorMode) -> list[Tensor | None]:
    return [None if x is None else mode.from_tensor(x) for x in tensors]


class OpTests:
    """Of every op."""

    @every_case
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("device", DEVICES)
    def test_against_float64(self, device, case, dtype):
        tensors = case.tensors(device, dtype)
        if tensors[0].dim() == 4:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        got = check(case.op, tensors, case.options)
        again = getattr(ops, case.op)(*tensors, **case.options)
        assert torch.equal(got, again), "two runs differ: a race"

    @every_kernel
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("device", DEVICES)
    def test_any_layout_of_the_input(self, device, case, layout, dtype):
        tensors = case.tensors(device, dtype)
        tensors[0] = LAYOUTS[layout](tensors[0])
        check(case.op, tensors, case.options)

    @every_case
    @pytest.mark.parametrize(
        "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
    )
    @pytest.mark.parametrize("device", DEVICES)
    def test_fake_has_the_shape_and_strides_of_the_real(self, device, case, memory_format):
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


class OtherTensorTests:
    """Of ops with several tensors."""

    @every_kernel
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("layout", OTHER_LAYOUTS)
    @pytest.mark.parametrize("device", DEVICES)
    def test_any_layout_of_the_other_tensors(self, device, case, layout, dtype):
        x, *others = case.tensors(device, dtype)
        others = [None if other is None else OTHER_LAYOUTS[layout](other) for other in others]
        check(case.op, [x, *others], case.options)


class NanTests:
    """Of ops that NaN and infinity pass through."""

    @of_file(
        "case, activation",
        lambda file: [
            (case, activation)
            for case in file.KERNELS
            for activation in (None, "relu", "relu6", (-1, 1))
            if activation is None or case.op in ACTIVATING
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
    @pytest.mark.parametrize("device", DEVICES)
    def test_nan_and_infinity_pass_through(self, device, case, value, activation, dtype):
        if device == "cuda" and dtype == torch.half and fused(case) and "relu" in str(activation):
            pytest.skip("fused blocks multiply by zeros: see FusedTests")
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


class OverflowTests:
    """Of ops whose sums overflow as stock ones do."""

    @of_file(
        "case, dtype",
        lambda file: [
            (case, dtype)
            for case in file.KERNELS
            for dtype in DTYPES
            # The sums of Winograd's float32 infinities of both signs are NaN.
            if case.op != "conv2d_winograd" or dtype == torch.float16
        ],
    )
    @pytest.mark.parametrize(
        ("activation", "sign", "wanted"),
        [(None, 1, INFINITY), (None, -1, -INFINITY), ("relu6", 1, 6.0), ("relu", -1, 0.0)],
    )
    @pytest.mark.parametrize("device", DEVICES)
    def test_overflows_to_infinity_like_stock(self, device, case, dtype, activation, sign, wanted):
        tensors = case.tensors(device, dtype)
        tensors[0].fill_(sign * torch.finfo(dtype).max / 2)
        tensors[1].fill_(8.0 if case.op != "add" else tensors[0].flatten()[0].item() * 1.5)
        got = getattr(ops, case.op)(*tensors, **{**case.options, "activation": activation})
        assert torch.equal(got, torch.full_like(got, wanted))


class ActivationTests:
    """Of ops that end with an activation."""

    @of_file("case", lambda file: [case for case in file.CASES if case.options.get("activation")])
    def test_the_cases_reach_the_bounds_of_their_activation(self, case):
        options = {**case.options, "activation": None}
        unbounded = plain(case.op, *case.tensors("cpu", torch.float32), **options)
        low, high = ops.bounds(case.op, case.options["activation"])
        assert low is None or (unbounded < low).any()
        assert high is None or (unbounded > high).any()
        assert ((unbounded > (low or -1e9)) & (unbounded < (high or 1e9))).any()


class LargeTests:
    """Of ops that run on other tiles where they are large."""

    @pytest.mark.cuda
    @of_file("case", lambda file: file.LARGE)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_large_products(self, case, dtype):
        check(case.op, case.tensors("cuda", dtype), case.options)


class HugeTests:
    """Of ops that are no blocks: the shapes of the other tensors, None for the input itself."""

    op: str

    @pytest.mark.cuda
    @of_file("shapes, options", lambda file: file.HUGE)
    def test_more_than_two_to_the_31_elements(self, shapes, options):
        if torch.cuda.mem_get_info()[0] < 24e9:
            pytest.skip("needs 24 GB of free GPU memory")
        images = 2**31 // (64 * 8 * 8) + 5
        x = torch.empty(images, 64, 8, 8, device="cuda", dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last).normal_()
        others = [x if s is None else torch.randn(s, device="cuda").half() / 8 for s in shapes]
        got = getattr(ops, self.op)(x, *others, **options)
        for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(-2, None)):
            tensors = [
                x[part],
                *(t[part] if s is None else t for t, s in zip(others, shapes, strict=True)),
            ]
            expected = plain(self.op, *(t.double() for t in tensors), **options)
            testing.assert_close(got[part], expected)


class HugeNchwTests:
    """Of ops that read their input by strides, without a copy in channels_last."""

    op: str

    @pytest.mark.cuda
    @of_file("weight, options", lambda file: file.HUGE_NCHW)
    def test_more_than_two_to_the_31_elements_in_nchw(self, weight, options):
        if torch.cuda.mem_get_info()[0] < 24e9:
            pytest.skip("needs 24 GB of free GPU memory")
        images = 2**31 // (4 * 8 * 8) + 5
        x = torch.empty(images, 4, 8, 8, device="cuda", dtype=torch.float16).normal_()
        others = [torch.randn(weight, device="cuda").half() / 6] if weight else []
        got = getattr(ops, self.op)(x, *others, **options)
        for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(-2, None)):
            expected = plain(self.op, *(t.double() for t in (x[part], *others)), **options)
            testing.assert_close(got[part], expected)


class BlockTests:
    """Of ops that run several layers in one kernel."""

    @of_file(
        "case",
        lambda file: [
            case
            for case in file.CASES
            # With enough elements that the few beyond a bound are not left to chance.
            if case.options["activation"] and math.prod(case.shapes[0]) > 500
        ],
    )
    def test_each_layer_of_a_block_reaches_the_bounds_of_its_activation(self, case):
        low, high = ops.bounds(case.op, case.options["activation"])
        *hidden, _ = layers(case.op, *case.tensors("cpu", torch.float32), **case.options)
        assert len(hidden) == 1 + (case.op != "conv_pool") - (case.shapes[1] is None)
        for unbounded in hidden:
            assert low is None or (unbounded < low).float().mean() > 0.05
            assert high is None or (unbounded > high).float().mean() > 0.01
            assert ((unbounded > (low or -1e9)) & (unbounded < (high or 1e9))).float().mean() > 0.05

    @pytest.mark.cuda
    @of_file("case", lambda file: file.LARGE)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_hundred_runs_of_a_block_are_bitwise_equal(self, case, dtype):
        tensors = case.tensors("cuda", dtype)
        first = getattr(ops, case.op)(*tensors, **case.options)
        differ = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(100):
            differ += (getattr(ops, case.op)(*tensors, **case.options) != first).sum()
        assert differ == 0

    @pytest.mark.cuda
    @of_file("case", lambda file: file.HUGE)
    def test_blocks_of_more_than_two_to_the_31_elements(self, case):
        if torch.cuda.mem_get_info()[0] < 24e9:
            pytest.skip("needs 24 GB of free GPU memory")
        (images, *image), *_ = case.shapes
        _, *weights = case._replace(shapes=((1, *image), *case.shapes[1:])).tensors(
            "cuda", torch.half
        )
        x = torch.empty((images, *image), device="cuda", dtype=torch.half)
        x = x.to(memory_format=torch.channels_last).normal_()
        got = getattr(ops, case.op)(x, *weights, **case.options)
        for part in (slice(0, 2), slice(images // 2, images // 2 + 2), slice(-2, None)):
            exact = [None if t is None else t.double() for t in (x[part], *weights)]
            bound = testing.BLOCK_BOUNDS[torch.half]
            testing.assert_close(got[part], plain(case.op, *exact, **case.options), bound)


def fused(case: Case) -> bool:
    """Whether it is what the fused kernel of CUDA takes in half precision."""
    return case.op in ("inverted_residual", "stem_block") and case.shapes[-2][0] % 8 == 0


class FusedTests:
    """Of ops whose depthwise convolution runs on tensor cores."""

    @of_file("case", lambda file: file.BORDERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("device", DEVICES)
    def test_borders_are_zeros_of_the_hidden_tensor(self, device, case, dtype):
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

    @pytest.mark.cuda
    @of_file("case", lambda file: [case for case in file.KERNELS if fused(case)])
    @pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
    @pytest.mark.parametrize("activation", ["relu", "relu6"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_nan_and_infinity_stay_near_in_fused_blocks(self, case, dtype, activation, value):
        """NaN comes out where it does in stock, and no pixel changes that is not next to one that
        does there."""
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

    @every_kernel
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("device", DEVICES)
    def test_packed_once_is_packed_in_the_call(self, device, case, dtype):
        x, *weights = case.tensors(device, dtype)
        packed = getattr(packing, f"pack_{case.op}")(*weights)
        call = functools.partial(getattr(ops, case.op), x, *weights, **case.options)
        assert torch.equal(call(packed=packed), call())
