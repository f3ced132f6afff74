"""Steps of the pre-pass on small graphs: from the last feature map to the logits."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx_helpers import assert_same, operators, small_graph

from torch_mbv2.onnx import clean


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 3), (-1, 2), (2, -1)])
def test_mean_of_mean(first: int, second: int, keep: int, opset: int) -> None:
    if not keep and first == 2 and second == 3:
        second = 2  # what was dimension 3
    axes = [[first], [second]]
    names = [" a", " b"] if opset == 18 else ["", ""]
    attributes = [{} if opset == 18 else {"axes": axis} for axis in axes]
    before = small_graph(
        ("ReduceMean", f"x{names[0]}", "m", {"keepdims": keep, **attributes[0]}),
        ("ReduceMean", f"m{names[1]}", "y", {"keepdims": keep, **attributes[1]}),
        opset=opset,
        a=np.array(axes[0]),
        b=np.array(axes[1]),
    )
    after = clean.means_to_pools(clean.merge_means(before))
    assert operators(after) == ["GlobalAveragePool"] + ["Flatten"] * (not keep)
    assert_same(before, after)


@pytest.mark.parametrize("axes", [[2], [1, 2], [1, 2, 3], [0, 1]])
def test_other_means_stay(axes: list[int]) -> None:
    before = small_graph(("ReduceMean", "x", "y", {"axes": axes}))
    assert clean.means_to_pools(clean.merge_means(before)) is before


def test_mean_of_a_volume_stays() -> None:
    """Dimensions 2 and 3 are the whole map only where there are four."""
    before = small_graph(("ReduceMean", "x", "y", {"axes": [2, 3]}), shape=("n", 3, 6, 6, 6))
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
    before = small_graph(("AveragePool", "x", "y", attributes))
    after = clean.means_to_pools(before)
    assert operators(after) == ["GlobalAveragePool" if pooled else "AveragePool"]
    if pooled:
        assert_same(before, after)


def test_average_pool_of_an_unknown_map_stays() -> None:
    before = small_graph(
        ("AveragePool", "x", "y", {"kernel_shape": [6, 6]}), shape=("n", 3, "h", "w")
    )
    assert operators(clean.means_to_pools(before)) == ["AveragePool"]


POOL = ("GlobalAveragePool", "x", "p")


@pytest.mark.parametrize("size", [[-1, 3], [0, -1], [0, 3], [0, 0], [-1, 0], [2, 3]], ids=str)
def test_reshape_to_rows(size: list[int]) -> None:
    before = small_graph(POOL, ("Reshape", "p size", "y"), size=np.array(size))
    after = clean.flatten_pools(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    assert_same(before, after)


def test_reshape_of_a_numbered_batch() -> None:
    before = small_graph(
        POOL, ("Reshape", "p size", "y"), shape=(2, 3, 6, 6), size=np.array([2, -1])
    )
    assert operators(clean.flatten_pools(before)) == ["GlobalAveragePool", "Flatten"]


@pytest.mark.parametrize("size", [[1, -1], [3, -1], [-1, 1], [-1], [1, -1, 3]], ids=str)
def test_other_reshapes_stay(size: list[int]) -> None:
    """(1, -1) is Flatten for one image only, and the batch is open here."""
    before = small_graph(POOL, ("Reshape", "p size", "y"), size=np.array(size))
    assert operators(clean.flatten_pools(before)) == ["GlobalAveragePool", "Reshape"]


def test_squeezes_to_rows() -> None:
    before = small_graph(POOL, ("Squeeze", "p a", "q"), ("Squeeze", "q b", "y"),
                   a=np.array([3]), b=np.array([-1]))  # fmt: skip
    after = clean.flatten_pools(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    assert_same(before, after)


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
    before = small_graph(POOL, *nodes, *tail, opset=15, **tensors)
    after = clean.drop_dead(clean.flatten_pools(before))
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    assert_same(before, after)


@pytest.mark.parametrize("index", [1, 2])
def test_reshape_by_another_size_stays(index: int) -> None:
    before = small_graph(
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
    before = small_graph(
        POOL,
        ("Flatten", "p", "f"),
        ("MatMul", "f w", "m"),
        ("Add", order, "y"),
        w=rng.normal(size=(3, 5)).astype(np.float32),
        b=rng.normal(size=shape).astype(np.float32),
    )
    after = clean.matmuls_to_gemm(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert_same(before, after)


def test_matmul_of_more_than_matrices_stays() -> None:
    before = small_graph(("MatMul", "x w", "y"), w=np.ones((6, 5), np.float32))
    assert operators(clean.matmuls_to_gemm(before)) == ["MatMul"]


@pytest.mark.parametrize("keep", [0, 1])
def test_mean_of_a_mean_that_is_an_output_stays(keep: int) -> None:
    before = small_graph(
        ("ReduceMean", "x", "m", {"axes": [3], "keepdims": keep}),
        ("ReduceMean", "m", "y", {"axes": [2], "keepdims": keep}),
        outputs=("m", "y"),
    )
    assert clean.merge_means(before) is before


def test_rows_by_the_batch_of_other_images_stay() -> None:
    """Each channel is an image here, so that a row for each of the inputs has three pools."""
    before = small_graph(
        ("Reshape", "x images", "t"),
        ("GlobalAveragePool", "t", "p"),
        ("Shape", "x", "s"),
        ("Gather", "s zero", "n"),
        ("Concat", "n rest", "size", {"axis": 0}),
        ("Reshape", "p size", "y"),
        images=np.array([-1, 1, 6, 6]),
        zero=np.array([0]),
        rest=np.array([-1]),
    )
    after = clean.clean(before)
    assert "Flatten" not in operators(after)
    assert_same(before, after)


def test_rows_by_the_batch_of_what_a_network_reads() -> None:
    before = small_graph(
        ("Mul", "c x", "a"),
        ("Transpose", "a", "t", {"perm": [0, 1, 3, 2]}),
        ("Relu", "a", "b"),
        ("GlobalAveragePool", "b", "p"),
        ("Shape", "x", "s"),
        ("Gather", "s zero", "n"),
        ("Concat", "n rest", "size", {"axis": 0}),
        ("Reshape", "p size", "y"),
        zero=np.array([0]),
        rest=np.array([-1]),
        c=np.float32(2),
    )
    after = clean.clean(before)
    assert operators(after) == ["Mul", "Relu", "GlobalAveragePool", "Flatten"]
    assert_same(before, after)


@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [0, 3, 2, 1], [0, 3, 1, 2]], ids=str)
def test_transposed_pools_to_rows(perm: list[int]) -> None:
    before = small_graph(
        POOL,
        ("Transpose", "p", "q", {"perm": perm}),
        ("Reshape", "q size", "y"),
        size=np.array([-1, 3]),
    )
    after = clean.flatten_pools(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten"]
    assert_same(before, after)


def test_pools_transposed_with_the_batch_stay() -> None:
    before = small_graph(
        POOL,
        ("Transpose", "p", "q", {"perm": [1, 0, 2, 3]}),
        ("Reshape", "q size", "y"),
        size=np.array([-1, 3]),
    )
    assert clean.flatten_pools(before) is before


def test_pool_that_is_read_twice() -> None:
    before = small_graph(
        POOL,
        ("Reshape", "p size", "a"),
        ("Squeeze", "p axes", "b"),
        ("Add", "a b", "y"),
        size=np.array([-1, 3]),
        axes=np.array([2, 3]),
    )
    after = clean.flatten_pools(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten", "Flatten", "Add"]
    assert_same(before, after)


CLASSIFIER = np.random.default_rng(7).normal(size=(5, 3, 1, 1)).astype(np.float32)
BIAS = np.random.default_rng(8).normal(size=5).astype(np.float32)


@pytest.mark.parametrize("bias", ["", " -", " b"], ids=["none", "left out", "bias"])
def test_pooled_convolution_to_gemm(bias: str) -> None:
    before = small_graph(
        POOL,
        ("Conv", f"p w{bias}", "c", {"strides": [2, 2]}),
        ("Flatten", "c", "y"),
        w=CLASSIFIER,
        b=BIAS,
    )
    after = clean.pooled_convs_to_gemm(before)
    assert operators(after) == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert_same(before, after)


@pytest.mark.parametrize(
    ("conv", "flatten", "outputs"),
    [
        ({"pads": [0, 0, 1, 1]}, {}, ("y",)),
        ({"group": 1}, {"axis": 2}, ("y",)),
        ({}, {}, ("c", "y")),
    ],
    ids=["padded", "flattened elsewhere", "output"],
)
def test_other_pooled_convolutions_stay(conv: dict, flatten: dict, outputs: tuple) -> None:
    before = small_graph(
        POOL,
        ("Conv", "p w", "c", conv),
        ("Flatten", "c", "y", flatten),
        outputs=outputs,
        w=CLASSIFIER,
    )
    assert clean.pooled_convs_to_gemm(before) is before


def test_grouped_pooled_convolution_stays() -> None:
    before = small_graph(
        POOL, ("Conv", "p w", "c", {"group": 3}), ("Flatten", "c", "y"), w=CLASSIFIER[:3, :1]
    )
    assert clean.pooled_convs_to_gemm(before) is before


def test_convolution_of_a_map_stays() -> None:
    before = small_graph(("Conv", "x w", "c"), ("Flatten", "c", "y"), w=CLASSIFIER)
    assert clean.pooled_convs_to_gemm(before) is before
