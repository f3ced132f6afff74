"""Bad arguments: one sentence each, the same from the implementation, the fake and CUDA."""
# ruff: noqa: E501 (a line for each refusal)

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_arguments import GOOD, TENSORS, T, arguments
from op_cases import ACTIVATING, BLOCKS, CUDA, DEVICES, INFINITY, NAN
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torch_mbv2 import ops

RAW = torch.ops.torch_mbv2
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
    ("add", {"act_min": NAN, "act_max": None}, "act_min must be a number or None, got nan"),
    ("conv2d", {"act_min": None, "act_max": NAN}, "act_max must be a number or None, got nan"),
    (
        "inverted_residual",
        {"act_min": NAN, "act_max": None},
        "act_min must be a number or None, got nan",
    ),
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
