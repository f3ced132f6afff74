"""Steps of the pre-pass on small graphs: transpositions."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx_helpers import IMAGE, WEIGHT, assert_same, operators, small_graph

from torch_mbv2.onnx import clean
from torch_mbv2.onnx.graph import Graph

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
RNG = np.random.default_rng(0)


def transpose(source: str, result: str, order: tuple[int, ...]) -> tuple:
    return ("Transpose", source, result, {"perm": order})


def between(*nodes: tuple, there: tuple = LAST, back: tuple | None = FIRST, **options: object):
    """`nodes`, which read `a` and compute `b`, between a transposition and `back`."""
    end = () if back is None else (transpose("b", "y", back),)
    return small_graph(transpose("x", "a", there), *nodes, *end, **options)


def floats(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def transposes(graph: Graph) -> int:
    return operators(graph).count("Transpose")


@pytest.mark.parametrize(
    ("first", "second"),
    [(LAST, FIRST), (FIRST, LAST), ((3, 2, 1, 0), (3, 2, 1, 0)), ((1, 2, 3, 0), (3, 0, 1, 2))],
    ids=str,
)
def test_inverse_transpositions_cancel(first: tuple, second: tuple) -> None:
    before = between(("Relu", "a", "b"), there=first, back=second)
    after = clean.sink_transposes(before)
    assert operators(after) == ["Relu"]
    assert_same(before, after)


@pytest.mark.parametrize("second", [LAST, (0, 1, 3, 2), (3, 2, 1, 0), (0, 1, 2, 3)], ids=str)
def test_other_transpositions_become_one(second: tuple) -> None:
    before = between(("Relu", "a", "b"), back=second)
    after = clean.sink_transposes(before)
    assert operators(after) == ["Relu", "Transpose"]
    assert_same(before, after)


def test_transposition_that_moves_nothing_goes() -> None:
    before = between(("Relu", "a", "y"), there=(0, 1, 2, 3), back=None)
    after = clean.sink_transposes(before)
    assert operators(after) == ["Relu"]
    assert_same(before, after)


def test_transposition_without_an_order_stays() -> None:
    """It reverses the dimensions, as many as there are."""
    before = small_graph(("Transpose", "x", "a"), ("Relu", "a", "b"), ("Transpose", "b", "y"))
    after = clean.sink_transposes(before)
    assert operators(after) == ["Transpose", "Relu", "Transpose"]
    assert_same(before, after)


@pytest.mark.parametrize("shape", [(2, 3, 2, 4, 5), (2, 3, 4), (2, 3)], ids=str)
def test_other_ranks(shape: tuple[int, ...]) -> None:
    order = (0, *range(2, len(shape)), 1)
    back = (0, len(shape) - 1, *range(1, len(shape) - 1))
    before = between(("Mul", "a c", "b"), there=order, back=back, shape=shape, c=floats(3))
    after = clean.sink_transposes(before)
    assert operators(after) == ["Mul"]
    assert_same(before, after, RNG.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (6, 1), (6, 6, 1), (6, 1, 3), (2, 1, 6, 3), (1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("node", ["Add a c", "Mul c a", "Sub a c", "Div c a", "Max a c"])
def test_elementwise_with_constants(node: str, shape: tuple[int, ...]) -> None:
    op, inputs = node.split(" ", 1)
    before = between((op, inputs, "b"), c=floats(*shape))
    after = clean.sink_transposes(before)
    assert operators(after) == [op]
    assert_same(before, after)


@pytest.mark.parametrize(
    "node",
    [
        ("Clip", "a low high", "b"),
        ("LeakyRelu", "a", "b", {"alpha": 0.3}),
        ("HardSigmoid", "a", "b", {"alpha": 0.3}),
        ("Sigmoid", "a", "b"),
        ("Neg", "a", "b"),
    ],
    ids=lambda node: node[0],
)
def test_activations(node: tuple) -> None:
    before = between(node, low=np.float32(-0.5), high=np.float32(0.5))
    after = clean.sink_transposes(before)
    assert operators(after) == [node[0]]
    assert_same(before, after)


@pytest.mark.parametrize(
    "nodes",
    [
        [("Softmax", "a", "b", {"axis": -1})],
        [("Add", "a wide", "b")],
        [("ReduceMax", "a", "m", {"keepdims": 0}), ("Add", "a m", "b")],
        [("Flatten", "a", "b")],
        [("MatMul", "a square", "b")],
        [("CumSum", "a three", "b")],
    ],
    ids=["softmax", "constant of rank 5", "computed operand", "flatten", "matmul", "cumsum"],
)
def test_what_depends_on_the_order_stays(nodes: list[tuple]) -> None:
    before = between(
        *nodes,
        back=None,
        outputs=("b",),
        wide=floats(1, 1, 1, 1, 3),
        square=floats(3, 3),
        three=np.int64(3),
    )
    after = clean.sink_transposes(before)
    assert operators(after) == operators(before)
    assert_same(before, after)


def test_residual_sum() -> None:
    before = between(("Relu", "a", "r"), ("Neg", "a", "n"), ("Add", "n r", "b"))
    after = clean.sink_transposes(before)
    assert operators(after) == ["Relu", "Neg", "Add"]
    assert_same(before, after)


def test_sum_of_unlike_transpositions() -> None:
    before = small_graph(
        transpose("x", "a", (0, 1, 3, 2)),
        transpose("x", "b", (0, 1, 2, 3)),
        transpose("x", "c", (0, 1, 3, 2)),
        ("Add", "a b", "d"),
        ("Mul", "d c", "y"),
    )
    after = clean.sink_transposes(before)
    assert operators(after) == ["Transpose", "Add", "Transpose", "Mul"]
    assert_same(before, after)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_concat(axis: int) -> None:
    before = between(("Relu", "a", "r"), ("Concat", "r a r", "b", {"axis": axis}))
    after = clean.sink_transposes(before)
    assert operators(after) == ["Relu", "Concat"]
    assert_same(before, after)


def test_concat_with_what_is_not_transposed_stays() -> None:
    before = between(("Concat", "a c", "b", {"axis": 0}), c=floats(1, 6, 6, 3))
    assert operators(clean.sink_transposes(before)) == ["Transpose", "Concat", "Transpose"]


PADS = [0, 1, 2, 0, 1, 3, 1, 2]


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("there", [LAST, (3, 1, 0, 2)], ids=str)
def test_pad(there: tuple, mode: str) -> None:
    before = between(
        ("Pad", "a pads fill", "b", {"mode": mode}),
        there=there,
        back=tuple(np.argsort(there).tolist()),
        shape=(4, 5, 6, 7),
        pads=np.array(PADS),
        fill=np.float32(2.5),
    )
    after = clean.sink_transposes(before)
    assert operators(after) == ["Pad"]
    assert_same(before, after, RNG.normal(size=(4, 5, 6, 7)).astype(np.float32))


def test_pad_by_attribute() -> None:
    node = ("Pad", "a", "b", {"pads": PADS, "value": 1.5})
    after = clean.sink_transposes(between(node, opset=10))
    assert operators(after) == ["Pad"]
    assert after.nodes[0].ints("pads", ()) == (0, 0, 1, 2, 1, 2, 3, 1)
    assert after.nodes[0].attributes["value"] == 1.5


@pytest.mark.parametrize("pads", ["computed", "axes"])
def test_pad_that_is_not_constant_stays(pads: str) -> None:
    nodes = {
        "computed": [("Shape", "a", "s"), ("Concat", "s s", "p", {"axis": 0})],
        "axes": [("Identity", "two", "p")],
    }[pads]
    pad = ("Pad", "a p - axes" if pads == "axes" else "a p", "b")
    before = between(*nodes, pad, opset=18, two=np.array([1, 2]), axes=np.array([3]))
    after = clean.sink_transposes(before)
    assert transposes(after) == 2
    assert_same(before, after)


@pytest.mark.parametrize("outputs", [("y",), ("p", "y")], ids=["alone", "output"])
@pytest.mark.parametrize("order", [FIRST, (3, 0, 2, 1)], ids=str)
def test_transposition_behind_a_pad(order: tuple, outputs: tuple[str, ...]) -> None:
    """It goes in front of a pad that nothing else reads."""
    before = small_graph(
        ("Pad", "x pads", "p"), transpose("p", "y", order), outputs=outputs, pads=np.array(PADS)
    )
    after = clean.sink_transposes(before)
    lifted = ["Transpose", "Pad"] if outputs == ("y",) else ["Pad", "Transpose"]
    assert operators(after) == lifted
    assert_same(before, after)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[1, 2], [3], [-1], [0], [0, 1, 2, 3], [-2, -3]], ids=str)
@pytest.mark.parametrize("there", [LAST, (3, 1, 0, 2)], ids=str)
def test_mean(there: tuple, axes: list[int], keep: int, opset: int) -> None:
    if opset < 18:
        node = ("ReduceMean", "a", "b", {"axes": axes, "keepdims": keep})
    else:
        node = ("ReduceMean", "a axes", "b", {"keepdims": keep})
    before = between(
        node, ("Relu", "b", "y"), there=there, back=None, opset=opset, axes=np.array(axes)
    )
    after = clean.sink_transposes(before)
    assert operators(after)[:2] == ["ReduceMean", "Relu"]
    assert_same(before, after)


@pytest.mark.parametrize(
    "attributes", [{}, {"noop_with_empty_axes": 1}], ids=["of all", "of nothing"]
)
def test_mean_without_axes_stays(attributes: dict) -> None:
    before = between(("ReduceMean", "a", "b", attributes), opset=18)
    after = clean.sink_transposes(before)
    assert transposes(after) == 2
    assert_same(before, after)


@pytest.mark.parametrize("outputs", [("a", "y"), ("b", "y"), ("a", "b", "y")], ids=str)
def test_transposed_values_that_are_outputs(outputs: tuple[str, ...]) -> None:
    before = between(("Relu", "a", "b"), outputs=outputs)
    after = clean.sink_transposes(before)
    assert transposes(after) == len(outputs) - 1
    assert_same(before, after)


def test_output_that_is_the_input() -> None:
    before = small_graph(transpose("x", "a", LAST), transpose("a", "y", FIRST))
    after = clean.sink_transposes(before)
    assert operators(after) == ["Identity"]
    assert_same(before, after)


def test_value_that_several_read() -> None:
    """It is computed once for those that need it, and not for the others."""
    before = between(
        ("Relu", "a", "b"),
        ("Softmax", "a", "s", {"axis": 3}),
        ("Softmax", "a", "t", {"axis": 2}),
        ("Add", "s t", "z"),
        outputs=("y", "z"),
    )
    after = clean.sink_transposes(before)
    assert transposes(after) == 1
    assert_same(before, after)


def test_convolutions_that_are_transposed_around() -> None:
    """As converters from channels-last frameworks write them."""
    before = small_graph(
        transpose("x", "a", FIRST),
        ("Conv", "a w", "c"),
        transpose("c", "d", LAST),
        ("Add", "d bias", "e"),
        ("Relu", "e", "f"),
        ("Pad", "f pads", "g"),
        transpose("g", "h", FIRST),
        ("Conv", "h w2", "i"),
        transpose("i", "j", LAST),
        ("ReduceMean", "j", "y", {"axes": [1, 2], "keepdims": 0}),
        shape=("n", 6, 6, 3),
        w=WEIGHT,
        w2=RNG.normal(size=(5, 4, 3, 3)).astype(np.float32),
        bias=floats(4),
        pads=np.array([0, 0, 0, 0, 0, 1, 1, 0]),
    )
    after = clean.clean(before)
    wanted = ["Transpose", "Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten"]
    assert operators(after) == wanted
    assert_same(before, after, IMAGE.transpose(0, 2, 3, 1).copy())
