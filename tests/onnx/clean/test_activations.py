"""Steps of the pre-pass on small graphs: activations that are clamps."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx_helpers import IMAGE, WEIGHT, assert_same, operators, small_graph

from torch_mbv2.onnx.clean.activations import clamp_bounds, merge_clamps

HIGH, LOW = np.float32(0.6), np.float32(-0.4)
ZERO, SIX = np.float32(0), np.float32(6)


def clamps(*chain: str, opset: int = 13, **tensors: object) -> object:
    """Clamps one behind the other, from `x` to `y`: "Max low", "Clip - high" and so on."""
    nodes = []
    for i, clamp in enumerate(chain):
        op, *bounds = clamp.split()
        before = f"v{i - 1}" if i else "x"
        after = "y" if i == len(chain) - 1 else f"v{i}"
        nodes.append((op, " ".join([before, *bounds]), after))
    named = {"high": HIGH, "low": LOW, "zero": ZERO, "six": SIX}
    return small_graph(*nodes, opset=opset, **(named | tensors))


@pytest.mark.parametrize(
    ("chain", "merged"),
    [
        (["Max zero"], "Relu"),
        (["Relu", "Relu"], "Relu"),
        (["Max low"], "Clip"),
        (["Min high"], "Clip"),
        (["Max zero", "Min six"], "Clip"),
        (["Min six", "Max zero"], "Clip"),
        (["Relu", "Min high"], "Clip"),
        (["Relu", "Clip - high"], "Clip"),
        (["Clip low", "Relu"], "Relu"),
        (["Clip low high", "Clip zero six", "Relu"], "Clip"),
        (["Clip high low", "Clip low high"], "Clip"),
        (["Clip zero six", "Clip high low"], "Clip"),
        (["Max high", "Min low"], "Clip"),
        (["Min low", "Max high"], "Clip"),
        (["Clip", "Clip"], "Clip"),
    ],
    ids=" ".join,
)
def test_chain_of_clamps(chain: list[str], merged: str) -> None:
    """Bounds in any order; the low one may lie above the high one."""
    before = clamps(*chain)
    after = merge_clamps(before)
    assert operators(after) == [merged]
    assert_same(before, after)


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_bound_comes_first(op: str) -> None:
    before = small_graph((op, "c x", "y"), c=HIGH)
    after = merge_clamps(before)
    assert operators(after) == ["Clip"]
    assert_same(before, after)


@pytest.mark.parametrize(
    ("attributes", "bounds"),
    [
        ({"min": 0.0, "max": 6.0}, {"min": 0.0, "max": 6.0}),
        ({"max": 0.5}, {"min": 0.0, "max": 0.5}),
        ({"min": -0.5}, None),
    ],
    ids=str,
)
def test_bounds_of_attributes(attributes: dict, bounds: dict | None) -> None:
    """Before opset 11 they are no inputs."""
    before = small_graph(("Relu", "x", "r"), ("Clip", "r", "y", attributes), opset=9)
    after = merge_clamps(before)
    assert operators(after) == ["Relu" if bounds is None else "Clip"]
    assert dict(after.nodes[0].attributes) == pytest.approx(bounds or {})
    assert_same(before, after)


@pytest.mark.parametrize("chain", [["Relu"], ["Clip low high"], ["Clip - high"]], ids=" ".join)
def test_single_clamps_stay(chain: list[str]) -> None:
    before = clamps(*chain)
    assert merge_clamps(before) is before


@pytest.mark.parametrize(
    ("chain", "tensors"),
    [
        (["Max low high"], {}),
        (["Max low"], {"low": np.zeros((3, 1, 1), np.float32)}),
        (["Max low"], {"low": np.zeros((1, 1, 1, 1, 1), np.float32)}),
    ],
    ids=["three", "one a channel", "five dimensions"],
)
def test_what_is_no_clamp_stays(chain: list[str], tensors: dict) -> None:
    before = clamps(*chain, **tensors)
    assert merge_clamps(before) is before


def test_computed_bound_stays() -> None:
    before = small_graph(
        ("ReduceMax", "x", "other", {"keepdims": 0}),
        ("Clip", "x low other", "c"),
        ("Relu", "c", "y"),
        low=LOW,
    )
    assert merge_clamps(before) is before


@pytest.mark.parametrize("outputs", [("v0", "y"), ("y",)], ids=["output", "two users"])
def test_clamp_that_is_read_elsewhere_stays(outputs: tuple[str, ...]) -> None:
    nodes = [("Relu", "x", "v0"), ("Clip", "v0 low high", "v1"), ("Sub", "v1 v0", "y")]
    before = small_graph(*nodes, outputs=outputs, low=LOW, high=HIGH)
    assert merge_clamps(before) is before


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_bounds_have_the_dtype_of_the_data(kind: str) -> None:
    """Which is not that of most weights here."""
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    before = small_graph(
        ("Cast", "x", "h", {"to": to}),
        ("Relu", "h", "r"),
        ("Clip", "r - high", "c"),
        ("Cast", "c", "t", {"to": 1}),
        ("Conv", "t w", "y"),
        w=WEIGHT,
        high=np.array(0.5, kind),
    )
    after = merge_clamps(before)
    assert operators(after) == ["Cast", "Clip", "Cast", "Conv"]
    assert {after.tensors[name].dtype for name in after.nodes[1].inputs[1:]} == {np.dtype(kind)}
    onnx.shape_inference.infer_shapes(after.to_model(), check_type=True, strict_mode=True)
    assert_same(before, after)


@pytest.mark.parametrize("limit", [6, 2**62 + 1, np.iinfo(np.int64).max])
def test_integers_are_not_made_floats(limit: int) -> None:
    before = small_graph(
        ("Max", "x low", "r"),
        ("Min", "r high", "y"),
        dtype=np.int64,
        low=np.int64(2),
        high=np.int64(limit),
    )
    assert merge_clamps(before) is before


@pytest.mark.parametrize("limit", [np.inf, np.finfo(np.float32).max])
def test_bounds_beyond_every_float_are_none(limit: float) -> None:
    before = small_graph(("Clip", "x zero top", "y"), zero=ZERO, top=np.float32(limit))
    assert clamp_bounds(before.nodes[0], before) == (0.0, None)
    assert_same(before, merge_clamps(before), IMAGE * 100)
