"""Steps of the pre-pass on small graphs: batch norms and affine maps of channels."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx_helpers import WEIGHT, assert_same, operators, small_graph

from torch_mbv2.onnx.clean import norms


@pytest.mark.parametrize("bias", ["", " c"])
def test_fold_batch_norms(bias: str) -> None:
    rng = np.random.default_rng(4)
    vectors = {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in "sbmvc"}
    before = small_graph(
        ("Conv", f"x w{bias}", "t"),
        ("BatchNormalization", "t s b m v", "y", {"epsilon": 0.1}),
        opset=14,
        w=WEIGHT,
        **vectors,
    )
    after = norms.fold_batch_norms(before)
    assert operators(after) == ["Conv"]
    assert_same(before, after)


def test_batch_norm_stays_if_the_convolution_is_read_elsewhere() -> None:
    before = small_graph(
        ("Conv", "x w", "t"),
        ("BatchNormalization", "t v v v v", "n"),
        ("Add", "t n", "y"),
        w=WEIGHT,
        v=np.ones(4, np.float32),
    )
    assert norms.fold_batch_norms(before) is before


# -------------------------------------------------------------------------------- fold_affine

RNG = np.random.default_rng(5)
# Of the layers below, whose outputs have 4 channels.
BIAS = RNG.normal(size=4).astype(np.float32)
LAYERS = {
    "conv": [("Conv", "x w", "t")],
    "conv with bias": [("Conv", "x w b", "t", {"pads": [1, 1, 1, 1]})],
    "grouped conv": [("Conv", "x grouped b", "t", {"group": 3})],
    "gemm": [("Flatten", "x", "f"), ("Gemm", "f m b", "t")],
    "gemm, transposed": [("Flatten", "x", "f"), ("Gemm", "f mt", "t", {"transB": 1})],
    "gemm, one bias for all": [("Flatten", "x", "f"), ("Gemm", "f m one", "t")],
    "matmul": [("Flatten", "x", "f"), ("MatMul", "f m", "t")],
}


def layer(name: str, *after: tuple, outputs: tuple[str, ...] = ("y",), **tensors: object) -> object:
    matrix = RNG.normal(size=(108, 4)).astype(np.float32)
    return small_graph(
        *LAYERS[name],
        *after,
        outputs=outputs,
        w=WEIGHT,
        grouped=RNG.normal(size=(6, 1, 3, 3)).astype(np.float32),
        m=matrix,
        mt=matrix.T.copy(),
        b=RNG.normal(size=6 if name == "grouped conv" else 4).astype(np.float32),
        one=np.float32([3]),
        **tensors,
    )


def channels(name: str, count: int | None = None) -> np.ndarray:
    count = count or (6 if name == "grouped conv" else 4)
    values = RNG.uniform(0.5, 2, count).astype(np.float32)
    return values.reshape(-1, 1, 1) if "conv" in name else values


@pytest.mark.parametrize(
    "chain",
    [
        [("Mul", "t v", "y")],
        [("Mul", "v t", "y")],
        [("Div", "t v", "y")],
        [("Mul", "t v", "u"), ("Div", "u half", "y")],
    ],
    ids=["mul", "mul from the left", "div", "mul and div"],
)
@pytest.mark.parametrize("name", [*LAYERS])
def test_scales_are_folded(name: str, chain: list[tuple]) -> None:
    before = layer(name, *chain, v=channels(name), half=np.float32(0.5))
    after = norms.fold_affine(before)
    assert operators(after) == operators(before)[: len(LAYERS[name])]
    assert_same(before, after)


@pytest.mark.parametrize(
    "chain",
    [
        [("Add", "t v", "y")],
        [("Add", "v t", "y")],
        [("Sub", "t v", "y")],
        [("Sub", "t v", "u"), ("Mul", "u v", "s"), ("Add", "half s", "y")],
    ],
    ids=["add", "add from the left", "sub", "norm"],
)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "matmul"])
def test_shifts_are_folded(name: str, chain: list[tuple]) -> None:
    before = layer(name, *chain, v=channels(name), half=np.float32(0.5))
    after = norms.fold_affine(before)
    assert operators(after) == operators(before)[: len(LAYERS[name])]
    assert_same(before, after)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_shapes_of_a_channel_vector(op: str, shape: tuple[int, ...]) -> None:
    before = layer("conv with bias", (op, "t v", "y"), v=RNG.normal(size=shape).astype(np.float32))
    after = norms.fold_affine(before)
    assert operators(after) == ["Conv"]
    assert_same(before, after)


@pytest.mark.parametrize(
    ("name", "op", "vector"),
    [
        ("conv", "Mul t v", np.ones((4, 6, 1))),
        ("conv", "Mul t v", np.ones((4,))),
        ("conv", "Add t v", np.ones((2, 1, 1, 1))),
        ("conv", "Add t v", np.ones((1, 1, 4, 1, 1))),
        ("conv", "Sub v t", np.ones(())),
        ("conv", "Div v t", np.ones(())),
        ("conv", "Div t v", np.zeros(())),
        ("conv", "Mul t v", np.full((), np.inf)),
        ("conv", "Max t v", np.zeros(())),
        ("gemm", "Mul t v", np.ones((2, 1))),
        ("matmul", "Add t v", np.ones((4,))),
    ],
    ids=[
        *("rows", "columns", "images", "five dimensions", "subtracted from", "divided by it"),
        *("divided by 0", "infinite", "clamp", "rows of a matrix", "no bias"),
    ],
)
def test_other_operations_stay(name: str, op: str, vector: np.ndarray) -> None:
    op, *inputs = op.split()
    before = layer(name, (op, " ".join(inputs), "y"), v=vector.astype(np.float32))
    assert norms.fold_affine(before) is before


@pytest.mark.parametrize(
    ("chain", "outputs"),
    [
        ([("Mul", "t v", "y")], ("t", "y")),
        ([("Mul", "t v", "u"), ("Add", "t u", "y")], ("y",)),
        ([("Mul", "t t", "y")], ("y",)),
    ],
    ids=["output", "two users", "square"],
)
def test_layer_that_is_read_elsewhere_stays(chain: list[tuple], outputs: tuple) -> None:
    before = layer("conv", *chain, outputs=outputs, v=channels("conv"))
    assert norms.fold_affine(before) is before


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}], ids=str)
def test_scaled_gemm_stays(attributes: dict) -> None:
    before = small_graph(
        ("Gemm", "x m b", "t", attributes),
        ("Mul", "t b", "y"),
        shape=("n", 3),
        m=np.ones((3, 4), np.float32),
        b=BIAS,
    )
    assert norms.fold_affine(before) is before


def test_weight_of_two_layers_is_scaled_for_one() -> None:
    before = small_graph(
        ("Conv", "x w", "t"),
        ("Conv", "x w", "u"),
        ("Mul", "t v", "s"),
        ("Add", "s u", "y"),
        w=WEIGHT,
        v=channels("conv"),
    )
    after = norms.fold_affine(before)
    assert operators(after) == ["Conv", "Conv", "Add"]
    assert_same(before, after)


def test_integer_products_stay() -> None:
    """Whole numbers cannot be divided beforehand. The other weight makes it a float model."""
    before = small_graph(
        ("MatMul", "x m", "t"),
        ("Div", "t three", "y"),
        shape=("n", 6),
        dtype=np.int32,
        m=np.arange(24, dtype=np.int32).reshape(6, 4),
        three=np.int32(3),
        other=WEIGHT,
    )
    assert norms.fold_affine(before) is before


def test_products_of_stacked_matrices() -> None:
    before = small_graph(
        ("MatMul", "x m", "t"),
        ("Mul", "t v", "y"),
        m=WEIGHT[0, 0][:, :2].repeat(2, 0),
        v=np.float32([2, 3]),
    )
    after = norms.fold_affine(before)
    assert operators(after) == ["MatMul"]
    assert_same(before, after)
