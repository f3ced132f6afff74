"""Steps of the pre-pass on small graphs: padding."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx_helpers import WEIGHT, assert_same, compute, operators, small_graph

from torch_mbv2.onnx import clean


@pytest.mark.parametrize("size", [5, 6, 7])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize(
    "attributes",
    [{"strides": [2, 2]}, {"strides": [2, 1]}, {"dilations": [2, 1]}, {"strides": [3, 3]}],
)
def test_explicit_padding(attributes: dict, mode: str, size: int) -> None:
    before = small_graph(
        ("Conv", "x w", "y", {"auto_pad": mode, **attributes}), shape=("n", 3, size, 9), w=WEIGHT
    )
    after = clean.explicit_padding(before)
    assert "auto_pad" not in after.nodes[0].attributes
    image = np.random.default_rng(2).normal(size=(2, 3, size, 9)).astype(np.float32)
    expected = (-(-size // attributes.get("strides", [1])[0])) if mode.startswith("SAME") else None
    assert expected in (None, compute(after, image)[0].shape[2])
    if mode != "SAME_LOWER":  # onnx's own evaluator pads it as SAME_UPPER at times
        assert_same(before, after, image)


def test_auto_pad_without_sizes_stays() -> None:
    before = small_graph(
        ("Conv", "x w", "y", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        shape=("n", 3, "h", "w"),
        w=WEIGHT,
    )
    assert clean.explicit_padding(before).nodes[0].attributes["auto_pad"] == "SAME_UPPER"


@pytest.mark.parametrize("opset", [9, 13])
def test_fold_pads(opset: int) -> None:
    pads = [0, 0, 1, 2, 0, 0, 3, 4]
    node, tensors = ("Pad", "x", "p", {"pads": pads}), {}
    if opset > 9:
        node, tensors = ("Pad", "x pads zero", "p"), {"pads": pads, "zero": np.float32(0)}
    conv = ("Conv", "p w", "y", {"pads": [1, 0, 0, 1]})
    before = small_graph(node, conv, opset=opset, w=WEIGHT, **tensors)
    after = clean.fold_pads(before)
    assert operators(after) == ["Conv"]
    assert after.nodes[0].attributes["pads"] == [2, 2, 3, 5]
    assert_same(small_graph(("Pad", "x pads", "p"), conv, w=WEIGHT, pads=np.array(pads)), after)


@pytest.mark.parametrize(
    ("pads", "attributes", "fill"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "edge"}, 0.0),
        ([0, 0, 1, 1, 0, 0, 1, 1], {}, 1.0),
        ([1, 0, 1, 1, 0, 0, 1, 1], {}, 0.0),
        ([0, 0, -1, 0, 0, 0, 0, 0], {}, 0.0),
    ],
    ids=["edge", "ones", "batch", "crop"],
)
def test_pads_that_no_convolution_can_do_stay(pads: list, attributes: dict, fill: float) -> None:
    before = small_graph(
        ("Pad", "x pads fill", "p", attributes),
        ("Conv", "p w", "y"),
        w=WEIGHT,
        pads=np.array(pads),
        fill=np.float32(fill),
    )
    assert operators(clean.fold_pads(before)) == ["Pad", "Conv"]


def test_pad_that_another_node_reads_stays() -> None:
    before = small_graph(
        ("Pad", "x pads", "p"),
        ("Conv", "p w", "c"),
        ("ReduceMax", "p", "m"),
        ("Add", "c m", "y"),
        w=WEIGHT,
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    assert operators(clean.fold_pads(before)) == operators(before)


def test_pad_of_nothing_goes() -> None:
    before = small_graph(("Pad", "x pads", "p"), ("Relu", "p", "y"), pads=np.zeros(8, np.int64))
    assert operators(clean.fold_pads(before)) == ["Relu"]


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_windows_of_one_pixel_need_no_padding(mode: str) -> None:
    """Whatever the stride and the sizes are."""
    before = small_graph(
        ("Conv", "x w", "y", {"auto_pad": mode, "strides": [2, 2]}),
        shape=("n", 3, "h", "w"),
        w=WEIGHT[:, :, :1, :1],
    )
    after = clean.explicit_padding(before)
    assert after.nodes[0].attributes["pads"] == [0, 0, 0, 0]
    assert_same(before, after)


# ------------------------------------------------------------- pads computed from the image's size

LAST = {"value_ints": [2, 3]}


def computed_padding(
    *formula: tuple,
    strides: tuple[int, int] = (2, 2),
    shape_of: str = "x",
    pad: tuple = ("Pad", "x pads", "p"),
    conv: dict | None = None,
    kernel: int = 3,
    **tensors: object,
) -> object:
    """`formula` computes the `total` padding of height and width from their `sizes`; half of it,
    rounded down, comes first."""
    return small_graph(
        ("Relu", "x", "other"),
        ("Shape", shape_of, "shape"),
        ("Gather", "shape last", "sizes"),
        *formula,
        ("Div", "total two", "begins"),
        ("Sub", "total begins", "ends"),
        ("Concat", "none begins none ends", "pads", {"axis": 0}),
        pad,
        ("Conv", "p w", "y", {"strides": strides, **(conv or {})}),
        shape=("n", 3, "h", "w"),
        last=np.array([2, 3]),
        none=np.array([0, 0]),
        zero=np.array([0]),
        one=np.array([1]),
        two=np.array([2]),
        three=np.array([3]),
        strides=np.array(strides),
        kernel=np.array([kernel]),
        half=np.float32(0.5),
        w=np.random.default_rng(2).normal(size=(4, 3, kernel, kernel)).astype(np.float32),
        **tensors,
    )


# total = max((ceil(size / stride) - 1) * stride + kernel - size, 0), in whole numbers.
SAME = (
    ("Add", "sizes strides", "a"),
    ("Sub", "a one", "b"),
    ("Div", "b strides", "outputs"),
    ("Sub", "outputs one", "c"),
    ("Mul", "c strides", "d"),
    ("Add", "d kernel", "e"),
    ("Sub", "e sizes", "f"),
    ("Max", "f zero", "total"),
)
# The same by floats and Ceil, as TensorFlow's converter writes it.
CEIL = (
    ("Cast", "sizes", "floats", {"to": 1}),
    ("Cast", "strides", "steps", {"to": 1}),
    ("Div", "floats steps", "quotient"),
    ("Ceil", "quotient", "rounded"),
    ("Cast", "rounded", "outputs", {"to": 7}),
    ("Sub", "outputs one", "c"),
    ("Mul", "c strides", "d"),
    ("Add", "d kernel", "e"),
    ("Sub", "e sizes", "f"),
    ("Max", "f zero", "total"),
)


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (5, 8), (1, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("formula", [SAME, CEIL], ids=["integers", "ceil"])
def test_same_padding(formula: tuple, strides: tuple[int, int], size: tuple[int, int]) -> None:
    before = computed_padding(*formula, strides=strides)
    after = clean.drop_dead(clean.recognise_same_padding(before))
    assert operators(after) == ["Conv"]
    assert after.nodes[0].attributes["auto_pad"] == "SAME_UPPER"
    assert "pads" not in after.nodes[0].attributes
    assert_same(before, after, np.random.default_rng(3).normal(size=(2, 3, *size)).astype("f4"))


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ((("Identity", "two", "t"), ("Expand", "t two", "total")), {}),
        ((*SAME[:-1], ("Max", "f two", "total")), {}),
        ((*SAME[:-1], ("Abs", "f", "g"), ("Add", "g one", "total")), {}),
        ((*SAME[:2], ("Div", "a strides", "outputs"), *SAME[3:]), {}),
        (SAME, {"shape_of": "other"}),
        (SAME, {"pad": ("Pad", "x pads half", "p")}),
        (SAME, {"pad": ("Pad", "x pads", "p", {"mode": "reflect"})}),
        (SAME, {"conv": {"pads": [1, 1, 1, 1]}}),
        (SAME, {"conv": {"dilations": [2, 2]}}),
        (SAME, {"conv": {"auto_pad": "SAME_UPPER"}}),
        (SAME, {"conv": {"strides": [3, 3]}}),
        (SAME, {"kernel": 1}),
    ],
    ids=[
        *("always two", "at least two", "one more", "a column too many", "sizes of another value"),
        *("filled with one half", "reflected", "padded twice", "dilated", "SAME twice"),
        *("another stride", "stride beyond the window"),
    ],
)
def test_almost_same_padding_stays(formula: tuple, options: dict) -> None:
    before = computed_padding(*formula, **options)
    assert clean.recognise_same_padding(before) is before


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_by_the_batch_or_channels_stays(axis: int) -> None:
    """For one image, or one channel, it would be that of SAME."""
    before = computed_padding(
        ("Gather", "shape axis", "count"),
        *SAME[:-1],
        ("Max", "f zero", "g"),
        ("Mul", "g count", "total"),
        axis=np.array([axis]),
    )
    assert clean.recognise_same_padding(before) is before


def test_same_padding_that_another_node_reads_stays() -> None:
    before = computed_padding(*SAME, ("ReduceMax", "p", "m", {"keepdims": 0}))
    assert clean.recognise_same_padding(before) is before


@pytest.mark.parametrize("mode", ["SAME", "same_upper", ""])
def test_unknown_modes_stay(mode: str) -> None:
    before = small_graph(("Conv", "x w", "y", {"auto_pad": mode}), w=WEIGHT)
    assert clean.explicit_padding(before) is before
