"""Each step of the pre-pass on a graph of its own size, written by hand."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from torch_mbv2.onnx import clean
from torch_mbv2.onnx.graph import Graph, read

IMAGE = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32)


def graph(
    *nodes: tuple,
    opset: int = 13,
    shape: tuple = ("n", 3, 6, 6),
    rank: int | None = None,
    **tensors: object,
) -> Graph:
    """A graph from `x` to `y`; a node is (operator, inputs, outputs, attributes)."""
    protos = [
        helper.make_node(node[0], node[1].split(), node[2].split(), **(node[3] if node[3:] else {}))
        for node in nodes
    ]
    out = None if rank is None else [None] * rank
    proto = helper.make_graph(
        protos,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return read(helper.make_model(proto, opset_imports=opsets, ir_version=8))


def operators(of: Graph) -> list[str]:
    return [node.op for node in of.nodes]


def compute(of: Graph, image: np.ndarray = IMAGE) -> np.ndarray:
    return ReferenceEvaluator(of.to_model()).run(None, {"x": image})[0]


def same(before: Graph, after: Graph, image: np.ndarray = IMAGE) -> None:
    np.testing.assert_allclose(compute(after, image), compute(before, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": helper.make_tensor("t", TensorProto.FLOAT, [1], [2.5])}, [2.5]),
        ({"value_float": 2.5}, 2.5),
        ({"value_floats": [2.5, 1.0, 0.0, 3.0, 4.0, 7.0]}, [2.5, 1.0, 0.0, 3.0, 4.0, 7.0]),
    ],
)
def test_fold_constants(attributes: dict, expected: object) -> None:
    before = graph(("Constant", "", "c", attributes), ("Mul", "x c", "y"))
    after = clean.fold_constants(before)
    assert operators(after) == ["Mul"]
    np.testing.assert_array_equal(after.tensors["c"], np.asarray(expected, np.float32))
    same(before, after)


def test_drop_identities_inside() -> None:
    """Shared tensors, chains, and Dropout: readers get the source."""
    before = graph(
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
    same(before, after)


def test_drop_identity_before_the_output() -> None:
    """The output keeps its name; another reader of the source follows."""
    before = graph(
        ("Relu", "x", "r"), ("Identity", "r", "i"), ("Identity", "i", "y"), ("Neg", "r", "unused")
    )
    after = clean.drop_identities(before)
    assert operators(after) == ["Relu", "Neg"]
    assert after.nodes[1].inputs == ("y",)
    same(before, after)


@pytest.mark.parametrize("source", ["x", "w"])
def test_identity_of_an_input_or_tensor_to_the_output_stays(source: str) -> None:
    before = graph(("Identity", source, "y"), w=IMAGE)
    after = clean.drop_identities(before)
    assert operators(after) == ["Identity"]
    same(before, after)


def test_evaluate_sizes() -> None:
    """Height and width are numbers here, the batch is not."""
    before = graph(
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
    same(before, after)


def test_evaluate_leaves_a_numbered_batch_open() -> None:
    before = graph(
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
    before = graph(
        (operator, inputs, "large"),
        ("Mul", "x large", "y"),
        size=np.array([100000, 100000, 1, 1, 1, 1]),
        one=np.float32(1),
    )
    assert operators(clean.evaluate(before)) == [operator, "Mul"]


@pytest.mark.parametrize("size", [5, 6, 7])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize(
    "attributes",
    [{"strides": [2, 2]}, {"strides": [2, 1]}, {"dilations": [2, 1]}, {"strides": [3, 3]}],
)
def test_explicit_padding(attributes: dict, mode: str, size: int) -> None:
    before = graph(
        ("Conv", "x w", "y", {"auto_pad": mode, **attributes}), shape=("n", 3, size, 9), w=WEIGHT
    )
    after = clean.explicit_padding(before)
    assert "auto_pad" not in after.nodes[0].attributes
    image = np.random.default_rng(2).normal(size=(2, 3, size, 9)).astype(np.float32)
    expected = (-(-size // attributes.get("strides", [1])[0])) if mode.startswith("SAME") else None
    assert expected in (None, compute(after, image).shape[2])
    if mode != "SAME_LOWER":  # onnx's own evaluator pads it as SAME_UPPER at times
        same(before, after, image)


def test_auto_pad_without_sizes_stays() -> None:
    before = graph(
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
    before = graph(node, conv, opset=opset, w=WEIGHT, **tensors)
    after = clean.fold_pads(before)
    assert operators(after) == ["Conv"]
    assert after.nodes[0].attributes["pads"] == [2, 2, 3, 5]
    same(graph(("Pad", "x pads", "p"), conv, w=WEIGHT, pads=np.array(pads)), after)


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
    before = graph(
        ("Pad", "x pads fill", "p", attributes),
        ("Conv", "p w", "y"),
        w=WEIGHT,
        pads=np.array(pads),
        fill=np.float32(fill),
    )
    assert operators(clean.fold_pads(before)) == ["Pad", "Conv"]


def test_pad_that_another_node_reads_stays() -> None:
    before = graph(
        ("Pad", "x pads", "p"),
        ("Conv", "p w", "c"),
        ("ReduceMax", "p", "m"),
        ("Add", "c m", "y"),
        w=WEIGHT,
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    assert operators(clean.fold_pads(before)) == operators(before)


def test_pad_of_nothing_goes() -> None:
    before = graph(("Pad", "x pads", "p"), ("Relu", "p", "y"), pads=np.zeros(8, np.int64))
    assert operators(clean.fold_pads(before)) == ["Relu"]


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 3), (-1, 2), (2, -1)])
def test_mean_of_mean(first: int, second: int, keep: int, opset: int) -> None:
    if not keep and first == 2 and second == 3:
        second = 2  # what was dimension 3
    axes = [[first], [second]]
    names = [" a", " b"] if opset == 18 else ["", ""]
    attributes = [{} if opset == 18 else {"axes": axis} for axis in axes]
    before = graph(
        ("ReduceMean", f"x{names[0]}", "m", {"keepdims": keep, **attributes[0]}),
        ("ReduceMean", f"m{names[1]}", "y", {"keepdims": keep, **attributes[1]}),
        opset=opset,
        a=np.array(axes[0]),
        b=np.array(axes[1]),
    )
    after = clean.means_to_pools(clean.merge_means(before))
    assert operators(after) == ["GlobalAveragePool"] + ["Flatten"] * (not keep)
    same(before, after)


@pytest.mark.parametrize("axes", [[2], [1, 2], [1, 2, 3], [0, 1]])
def test_other_means_stay(axes: list[int]) -> None:
    before = graph(("ReduceMean", "x", "y", {"axes": axes}))
    assert clean.means_to_pools(clean.merge_means(before)) is before


def test_mean_of_a_volume_stays() -> None:
    """Dimensions 2 and 3 are the whole map only where there are four."""
    before = graph(("ReduceMean", "x", "y", {"axes": [2, 3]}), shape=("n", 3, 6, 6, 6))
    assert operators(clean.means_to_pools(before)) == ["ReduceMean"]


@pytest.mark.parametrize(
    ("attributes", "pooled"),
    [
        ({"kernel_shape": [6, 6]}, True),
        ({"kernel_shape": [6, 6], "strides": [6, 6]}, True),
        ({"kernel_shape": [5, 6]}, False),
        ({"kernel_shape": [6, 6], "pads": [0, 0, 1, 1]}, False),
        ({"kernel_shape": [6, 6], "auto_pad": "SAME_UPPER"}, False),
    ],
)
def test_average_pool_of_a_whole_map(attributes: dict, pooled: bool) -> None:
    before = graph(("AveragePool", "x", "y", attributes))
    after = clean.means_to_pools(before)
    assert operators(after) == ["GlobalAveragePool" if pooled else "AveragePool"]
    if pooled:
        same(before, after)


def test_average_pool_of_an_unknown_map_stays() -> None:
    before = graph(("AveragePool", "x", "y", {"kernel_shape": [6, 6]}), shape=("n", 3, "h", "w"))
    assert operators(clean.means_to_pools(before)) == ["AveragePool"]


POOL = ("GlobalAveragePool", "x", "p")


@pytest.mark.parametrize("size", [[-1, 3], [0, -1], [0, 3], [0, 0], [-1, 0], [2, 3]], ids=str)
def test_reshape_to_rows(size: list[int]) -> None:
    before = graph(POOL, ("Reshape", "p size", "y"), size=np.array(size))
    after = clean.flatten_pools(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    same(before, after)


def test_reshape_of_a_numbered_batch() -> None:
    before = graph(POOL, ("Reshape", "p size", "y"), shape=(2, 3, 6, 6), size=np.array([2, -1]))
    assert operators(clean.flatten_pools(before)) == ["GlobalAveragePool", "Flatten"]


@pytest.mark.parametrize("size", [[1, -1], [3, -1], [-1, 1], [-1], [1, -1, 3]], ids=str)
def test_other_reshapes_stay(size: list[int]) -> None:
    """(1, -1) is Flatten for one image only, and the batch is open here."""
    before = graph(POOL, ("Reshape", "p size", "y"), size=np.array(size))
    assert operators(clean.flatten_pools(before)) == ["GlobalAveragePool", "Reshape"]


def test_squeezes_to_rows() -> None:
    before = graph(POOL, ("Squeeze", "p a", "q"), ("Squeeze", "q b", "y"),
                   a=np.array([3]), b=np.array([-1]))  # fmt: skip
    after = clean.flatten_pools(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    same(before, after)


@pytest.mark.parametrize("rest", [-1, 3])
@pytest.mark.parametrize("shape_of", ["x", "p"])
@pytest.mark.parametrize("way", ["gather", "slice", "start and end"])
def test_reshape_by_the_batch_size(way: str, shape_of: str, rest: int) -> None:
    nodes = {
        "gather": [
            ("Shape", shape_of, "s"),
            ("Gather", "s zero", "g"),
            ("Unsqueeze", "g zeros", "n"),
        ],
        "slice": [("Shape", shape_of, "s"), ("Slice", "s zeros ones zeros", "n")],
        "start and end": [("Shape", shape_of, "n", {"start": 0, "end": 1})],
    }[way]
    tensors = {
        "zero": np.int64(0),
        "zeros": np.array([0]),
        "ones": np.array([1]),
        "rest": np.array([rest]),
    }
    tail = [("Concat", "n rest", "size", {"axis": 0}), ("Reshape", "p size", "y")]
    before = graph(POOL, *nodes, *tail, opset=15, **tensors)
    after = clean.drop_dead(clean.flatten_pools(before))
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    same(before, after)


@pytest.mark.parametrize("index", [1, 2])
def test_reshape_by_another_size_stays(index: int) -> None:
    before = graph(
        POOL,
        ("Shape", "x", "s"),
        ("Gather", "s index", "n"),
        ("Concat", "n rest", "size", {"axis": 0}),
        ("Reshape", "p size", "y"),
        shape=("n", 3, "h", "w"),
        index=np.array([index]),
        rest=np.array([-1]),
    )
    assert "Reshape" in operators(clean.clean(before))


@pytest.mark.parametrize("order", ["m b", "b m"])
@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_matmul_and_add_to_gemm(shape: tuple[int, ...], order: str) -> None:
    rng = np.random.default_rng(3)
    before = graph(
        POOL,
        ("Flatten", "p", "f"),
        ("MatMul", "f w", "m"),
        ("Add", order, "y"),
        w=rng.normal(size=(3, 5)).astype(np.float32),
        b=rng.normal(size=shape).astype(np.float32),
    )
    after = clean.matmuls_to_gemm(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten", "Gemm"]
    same(before, after)


def test_matmul_of_more_than_matrices_stays() -> None:
    before = graph(("MatMul", "x w", "y"), w=np.ones((6, 5), np.float32))
    assert operators(clean.matmuls_to_gemm(before)) == ["MatMul"]


@pytest.mark.parametrize("bias", ["", " c"])
def test_fold_batch_norms(bias: str) -> None:
    rng = np.random.default_rng(4)
    vectors = {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in "sbmvc"}
    before = graph(
        ("Conv", f"x w{bias}", "t"),
        ("BatchNormalization", "t s b m v", "y", {"epsilon": 0.1}),
        opset=14,
        w=WEIGHT,
        **vectors,
    )
    after = clean.fold_batch_norms(before)
    assert operators(after) == ["Conv"]
    same(before, after)


def test_batch_norm_stays_if_the_convolution_is_read_elsewhere() -> None:
    before = graph(
        ("Conv", "x w", "t"),
        ("BatchNormalization", "t v v v v", "n"),
        ("Add", "t n", "y"),
        w=WEIGHT,
        v=np.ones(4, np.float32),
    )
    assert clean.fold_batch_norms(before) is before


def test_drop_dead() -> None:
    before = graph(("Relu", "x", "y"), ("Add", "x w", "unused"), w=np.float32(1))
    after = clean.drop_dead(before)
    assert operators(after) == ["Relu"]
    assert not after.tensors


def test_steps_leave_their_graph_alone() -> None:
    before = graph(
        ("Constant", "", "c", {"value_float": 2.0}),
        ("Mul", "x c", "m"),
        ("ReduceMean", "m", "y", {"axes": [2, 3], "keepdims": 0}),
    )
    nodes, tensors = list(before.nodes), dict(before.tensors)
    clean.clean(before)
    assert list(before.nodes) == nodes
    assert dict(before.tensors) == tensors
