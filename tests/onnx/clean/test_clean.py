"""Each step of the pre-pass on a graph of its own size: constants, sizes, reshapes, dead ends."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx import TensorProto, helper
from onnx_helpers import IMAGE, WEIGHT, assert_same, operators, small_graph

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx import clean
from torch_mbv2.onnx.clean.shapes import simplify_reshapes


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": helper.make_tensor("t", TensorProto.FLOAT, [1], [2.5])}, [2.5]),
        ({"value_float": 2.5}, 2.5),
        ({"value_floats": [2.5, 1.0, 0.0, 3.0, 4.0, 7.0]}, [2.5, 1.0, 0.0, 3.0, 4.0, 7.0]),
    ],
)
def test_fold_constants(attributes: dict, expected: object) -> None:
    before = small_graph(("Constant", "", "c", attributes), ("Mul", "x c", "y"))
    after = clean.fold_constants(before)
    assert operators(after) == ["Mul"]
    np.testing.assert_array_equal(after.tensors["c"], np.asarray(expected, np.float32))
    assert_same(before, after)


def test_drop_identities_inside() -> None:
    """Shared tensors, chains, and Dropout: readers get the source."""
    before = small_graph(
        ("Identity", "w", "w1"),
        ("Identity", "w1", "w2"),
        ("Dropout", "x", "d"),
        ("Mul", "d w2", "m"),
        ("Identity", "m", "m1"),
        ("Add", "m1 w1", "y"),
        w=np.float32(3),
    )
    after = clean.drop_identities(before)
    assert operators(after) == ["Mul", "Add"]
    assert after.nodes[0].inputs == ("x", "w")
    assert_same(before, after)


def test_drop_identity_before_the_output() -> None:
    """The output keeps its name; another reader of the source follows."""
    before = small_graph(
        ("Relu", "x", "r"), ("Identity", "r", "i"), ("Identity", "i", "y"), ("Neg", "r", "unused")
    )
    after = clean.drop_identities(before)
    assert operators(after) == ["Relu", "Neg"]
    assert after.nodes[1].inputs == ("y",)
    assert_same(before, after)


@pytest.mark.parametrize("source", ["x", "w"])
def test_identity_of_an_input_or_tensor_to_the_output_stays(source: str) -> None:
    before = small_graph(("Identity", source, "y"), w=IMAGE)
    after = clean.drop_identities(before)
    assert operators(after) == ["Identity"]
    assert_same(before, after)


def test_evaluate_sizes() -> None:
    """Height and width are numbers here, the batch is not."""
    before = small_graph(
        ("Shape", "x", "s"),
        ("Gather", "s two", "h"),
        ("Gather", "s zero", "n"),
        ("Add", "h h", "hh"),
        ("Unsqueeze", "n zeros", "n1"),
        ("Unsqueeze", "hh zeros", "hh1"),
        ("Concat", "n1 rest hh1", "target", {"axis": 0}),
        ("Reshape", "x target", "y"),
        two=np.int64(2),
        zero=np.int64(0),
        zeros=np.array([0]),
        rest=np.array([9]),
    )
    after = clean.evaluate(before)
    assert operators(after) == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]
    assert after.tensors["hh1"].tolist() == [12]
    assert_same(before, after)


def test_evaluate_leaves_a_numbered_batch_open() -> None:
    before = small_graph(
        ("Shape", "x", "s"),
        ("Gather", "s zero", "n"),
        ("Concat", "n rest", "target", {"axis": 0}),
        ("Reshape", "x target", "y"),
        shape=(2, 3, 6, 6),
        zero=np.array([0]),
        rest=np.array([-1]),
    )
    assert operators(clean.evaluate(before)) == operators(before)


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand"])
def test_evaluate_makes_nothing_large(operator: str) -> None:
    inputs = "size" if operator == "ConstantOfShape" else "one size"
    before = small_graph(
        (operator, inputs, "large"),
        ("Mul", "x large", "y"),
        size=np.array([100000, 100000, 1, 1, 1, 1]),
        one=np.float32(1),
    )
    assert operators(clean.evaluate(before)) == [operator, "Mul"]


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        ([("Add", "column row", "large")], {"column": (4000, 1), "row": (1, 4000)}),
        ([("Concat", " ".join(["column"] * 2000), "large", {"axis": 0})], {"column": (4000, 1)}),
        ([("Where", "flags column row", "large")], {"column": (4000, 1), "row": (1, 4000)}),
    ],
    ids=["broadcast", "concat", "where"],
)
def test_evaluate_makes_nothing_large_of_small_tensors(nodes: list, inputs: dict) -> None:
    tensors = {name: np.ones(shape, np.float32) for name, shape in inputs.items()}
    before = small_graph(
        *nodes, ("Mul", "x large", "y"), shape=("n", "m"), flags=np.array(True), **tensors
    )
    tracemalloc.start()
    after = clean.evaluate(before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert operators(after) == operators(before)
    assert peak < 2**24


def test_evaluate_leaves_what_fails() -> None:
    """Shapes that do not fit are for the conversion to name, with their node."""
    before = small_graph(
        ("Add", "a b", "c"), ("Mul", "x c", "y"), a=np.ones(2, np.float32), b=np.ones(3, np.float32)
    )
    assert operators(clean.evaluate(before)) == ["Add", "Mul"]


def test_evaluate_of_a_transposed_weight() -> None:
    """Weights of any size are moved; they are no sizes, so nothing is computed with them."""
    weight = np.random.default_rng(5).normal(size=(70, 70)).astype(np.float32)
    before = small_graph(
        ("Transpose", "w", "moved", {"perm": [1, 0]}),
        ("Sqrt", "w", "root"),
        ("MatMul", "x moved", "m"),
        ("Add", "m root", "y"),
        shape=("n", 70),
        w=np.abs(weight),
    )
    after = clean.evaluate(before)
    assert operators(after) == ["Sqrt", "MatMul", "Add"]
    image = np.random.default_rng(6).normal(size=(70, 70)).astype(np.float32)
    assert_same(before, after, image)


@pytest.mark.parametrize(("opset", "second"), [(11, ""), (13, " mask"), (13, " -")])
def test_dropout_goes_if_nobody_reads_its_mask(opset: int, second: str) -> None:
    """Nor is an input that is left out, here of Clip, a mask that is left out."""
    options = {"opset": opset, "high": np.float32(1)}
    before = small_graph(("Dropout", "x", f"d{second}"), ("Clip", "d - high", "y"), **options)
    after = clean.drop_identities(before)
    assert operators(after) == ["Clip"]
    assert_same(small_graph(("Clip", "x - high", "y"), **options), after)


def test_dropout_stays_if_its_mask_is_read() -> None:
    before = small_graph(
        ("Dropout", "x", "d mask"), ("Cast", "mask", "m", {"to": 1}), ("Mul", "d m", "y")
    )
    assert operators(clean.drop_identities(before)) == operators(before)


def test_training_dropout_is_refused() -> None:
    before = small_graph(("Dropout", "x - t", "d"), ("Relu", "d", "y"), t=np.array(True))
    with pytest.raises(ModelError, match="is in training mode"):
        clean.drop_identities(before)


def test_tensors_are_no_inputs() -> None:
    """Files of IR version 3 list their weights among the inputs."""
    before = small_graph(("Mul", "x c", "y"), c=np.float32(2))
    listed = helper.make_tensor_value_info("c", TensorProto.FLOAT, [])
    both = replace(before, inputs=(*before.inputs, listed))
    assert [value.name for value in clean.drop_tensor_inputs(both).inputs] == ["x"]


# --------------------------------------------------------------------------- simplify_reshapes


def reshape_to(*parts: str, **tensors: object) -> object:
    """x (n, 3, 6, 6) to the sizes `parts`, of which "n" and "c" are computed."""
    index = {"zero": np.array([0]), "one": np.array([1])}
    return small_graph(
        ("Shape", "x", "s"),
        ("Gather", "s zero", "n"),
        ("Gather", "s one", "c"),
        ("Concat", " ".join(parts), "size", {"axis": 0}),
        ("Reshape", "x size", "y", {"allowzero": 1}),
        opset=14,
        **index,
        **tensors,
    )


@pytest.mark.parametrize(("parts", "target"), [(["n", "k"], [-1, 108]), (["k", "n"], [108, -1])])
def test_reshape_with_one_unknown(parts: list[str], target: list[int]) -> None:
    before = reshape_to(*parts, k=np.array([108]))
    after = clean.drop_dead(simplify_reshapes(before))
    assert operators(after) == ["Reshape"]
    assert [after.tensors[name].tolist() for name in after.nodes[0].inputs[1:]] == [target]
    assert_same(before, after)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [(["n", "c", "k"], [36]), (["n", "k"], [-1]), (["n", "k"], [0, 36]), (["n", "k"], [3, -1, 6])],
    ids=["two unknown", "-1", "0", "-1 among others"],
)
def test_reshapes_that_one_unknown_does_not_tell_stay(parts: list[str], sizes: list[int]) -> None:
    before = reshape_to(*parts, k=np.array(sizes))
    assert simplify_reshapes(before) is before


def test_reshape_to_a_vector_that_is_computed_stays() -> None:
    """What is computed may be several sizes, of which -1 would say one."""
    before = small_graph(
        ("Shape", "x", "s"),
        ("Slice", "s zero two", "nc"),
        ("Concat", "nc k", "size", {"axis": 0}),
        ("Reshape", "x size", "y"),
        zero=np.array([0]),
        two=np.array([2]),
        k=np.array([36]),
    )
    assert simplify_reshapes(before) is before


# ------------------------------------------------------------------------------- all the steps


def test_drop_dead() -> None:
    before = small_graph(("Relu", "x", "y"), ("Add", "x w", "unused"), w=np.float32(1))
    after = clean.drop_dead(before)
    assert operators(after) == ["Relu"]
    assert not after.tensors


def test_steps_leave_their_graph_alone() -> None:
    before = small_graph(
        ("Constant", "", "c", {"value_float": 2.0}),
        ("Mul", "x c", "m"),
        ("ReduceMean", "m", "y", {"axes": [2, 3], "keepdims": 0}),
    )
    nodes, tensors = list(before.nodes), dict(before.tensors)
    clean.clean(before)
    assert list(before.nodes) == nodes
    assert dict(before.tensors) == tensors


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ([("Softmax", "x", "y")], {"opset": 11}),
        ([("Softmax", "x", "y")], {"opset": 13}),
        ([("Conv", "x w", "t"), ("Relu", "t", "y")], {"outputs": ("t", "y")}),
        ([("Relu", "x", "t"), ("Clip", "t half", "y")], {"outputs": ("t", "y")}),
        ([("Conv", "x w", "t"), ("Mul", "t c", "u"), ("Add", "u c", "y")], {"outputs": ("u", "y")}),
        ([("Transpose", "x", "t"), ("Relu", "t", "y")], {}),
        ([("Relu", "x", "r"), ("BatchNormalization", "r v v v v", "y")], {"opset": 14}),
        ([("ReduceMean", "x", "m", {"axes": [2, 3]}), ("Squeeze", "m", "y")], {}),
        ([("ReduceMean", "x", "y", {"noop_with_empty_axes": 1})], {"opset": 18}),
        ([("ReduceMean", "x", "y")], {}),
        ([("Conv", "x w", "t"), ("Add", "t column", "y")], {}),
    ],
    ids=[
        *("softmax of opset 11", "softmax", "output that is read", "clamp that is an output"),
        *("scale that is an output", "transpose without perm", "batch norm of an activation"),
        *("squeeze of all", "mean of nothing", "mean of all", "sum that grows"),
    ],
)
def test_clean_changes_nothing(nodes: list, options: dict) -> None:
    before = small_graph(
        *nodes,
        **options,
        w=WEIGHT,
        half=np.float32(0.5),
        c=np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1),
        v=np.arange(1, 4, dtype=np.float32),
        column=np.ones((4, 4, 1), np.float32),
    )
    assert_same(before, clean.clean(before))
