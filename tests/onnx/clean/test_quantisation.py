"""Quantised graphs as their float equivalent, on small graphs."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx import TensorProto, helper
from onnx_helpers import IMAGE, WEIGHT, assert_same, compute, operators, small_graph, small_model

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.clean.quantisation import NOTE, dequantise
from torch_mbv2.onnx.graph import Graph, read

RNG = np.random.default_rng(0)
# Weights of 7 bits: on CPUs without VNNI, ONNX Runtime adds two products of a uint8 and an int8
# with saturation at 16 bits.
LEVELS = RNG.integers(-64, 64, (4, 3, 3, 3)).astype(np.int8)
MATRIX = RNG.integers(-64, 64, (6, 5)).astype(np.int8)
TALL = RNG.integers(-64, 64, (108, 5)).astype(np.int8)
# IMAGE lies within -3.4 and 3.4: with these nothing saturates.
SCALE, ZERO = np.float32(0.03), np.uint8(128)
COMMON = {"s": SCALE, "z": ZERO, "t": np.float32(0.09)}
MICROSOFT = {"domain": "com.microsoft"}

QUANTISE = ("QuantizeLinear", "x s z", "q")


def compare(quantised: Graph, plain: Graph, image: np.ndarray = IMAGE) -> None:
    """`quantised`, in float, is `plain`."""
    after = dequantise(quantised)
    assert NOTE in after.notes
    assert_same(plain, after, image)


def close_to_runtime(*nodes: tuple, steps: float, **options: object) -> None:
    """The float equivalent is within `steps` of what ONNX Runtime computes in integers, and that
    is no constant."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")
    model = small_model(*nodes, **options)
    session = runtime.InferenceSession(model.SerializeToString(), None, ["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": IMAGE})
    (computed,) = compute(dequantise(small_graph(*nodes, **options)))
    assert np.ptp(expected) > 10 * steps
    assert computed.shape == expected.shape
    assert np.abs(computed - expected).max() < steps


def refused(*nodes: tuple, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        dequantise(small_graph(*nodes, **options))
    assert "load the float model that it was made from" in str(caught.value)
    return str(caught.value)


def test_float_graphs_are_left_alone() -> None:
    before = small_graph(("Relu", "x", "y"))
    assert dequantise(before) is before


# ------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("scale", "zero", "axis"),
    [
        (0.1, 3, None),
        (0.1, None, None),
        ([0.1, 0.2, 0.3, 0.4], [1, 2, -3, 4], 0),
        ([0.1, 0.2, 0.3, 0.4], None, -4),
        ([0.1, 0.2, 0.3], [1, 2, -3], 1),
        ([0.1, 0.2, 0.3], [1, 2, -3], None),
    ],
    ids=["tensor", "no zero point", "axis 0", "axis -4", "axis 1", "axis 1 by default"],
)
@pytest.mark.parametrize("kind", ["int8", "uint8", "int16"])
def test_dequantised_weights(scale: object, zero: object, axis: int | None, kind: str) -> None:
    levels = LEVELS.astype(kind)
    if zero is not None:
        zero = np.abs(zero) if kind == "uint8" else zero
    shape = [1] * 4
    shape[1 if axis is None else axis] = np.size(scale)
    tensors = {"w": levels, "s": np.float32(scale)}
    inputs = "w s"
    offset = np.zeros(())
    if zero is not None:
        tensors["z"], inputs = np.array(zero, kind), "w s z"
        offset = np.asarray(zero, np.float64).reshape(shape if np.ndim(zero) else ())
    means = (levels - offset) * np.float32(scale).reshape(shape if np.ndim(scale) else ())
    quantised = small_graph(
        ("DequantizeLinear", inputs, "f", {} if axis is None else {"axis": axis}),
        ("Conv", "x f", "y"),
        opset=21,
        **tensors,
    )
    assert operators(dequantise(quantised)) == ["Conv"]
    compare(quantised, small_graph(("Conv", "x w", "y"), w=means.astype(np.float32)))


def test_weights_of_four_bits() -> None:
    values = [7, -8, 3, 0, 1, -1]
    nodes = ("DequantizeLinear", "w s", "f"), ("Mul", "x f", "y")
    model = small_model(*nodes, opset=21, shape=("n", 6), s=np.float32(0.5))
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [6], values))
    plain = small_graph(("Mul", "x w", "y"), shape=("n", 6), w=np.float32(values) / 2)
    compare(read(model), plain, RNG.normal(size=(2, 6)).astype(np.float32))


def test_weights_in_blocks_are_refused() -> None:
    message = refused(
        ("DequantizeLinear", "w s", "f", {"axis": 0, "block_size": 2}),
        ("Conv", "x f", "y"),
        opset=21,
        w=LEVELS,
        s=np.ones((2, 3, 3, 3), np.float32),
    )
    assert "is quantised in blocks" in message


def test_float_weights_that_are_quantised_are_rounded() -> None:
    """Unlike activations: the integers are what the file means."""
    quantised = small_graph(
        ("QuantizeLinear", "w s z", "q"),
        ("DequantizeLinear", "q s z", "f"),
        ("Conv", "x f", "y"),
        w=WEIGHT,
        s=np.float32(0.02),
        z=np.int8(3),
    )
    levels = (np.rint(WEIGHT / np.float32(0.02)) + 3).clip(-128, 127)
    rounded = (levels - 3).astype(np.float32) * np.float32(0.02)
    compare(quantised, small_graph(("Conv", "x w", "y"), w=rounded))


# -------------------------------------------------------------------------------- activations


def test_activations_are_not_rounded() -> None:
    quantised = small_graph(
        QUANTISE, ("DequantizeLinear", "q s z", "d"), ("Sigmoid", "d", "y"), **COMMON
    )
    assert operators(dequantise(quantised)) == ["Sigmoid"]
    compare(quantised, small_graph(("Sigmoid", "x", "y")))


@pytest.mark.parametrize(
    "move",
    [
        ("MaxPool", "q", "m", {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}),
        ("Transpose", "q", "m", {"perm": [0, 2, 3, 1]}),
        ("Flatten", "q", "m"),
        ("Reshape", "q size", "m"),
        ("Concat", "q q", "m", {"axis": 1}),
        ("Gather", "q one", "m", {"axis": 1}),
    ],
    ids=lambda move: move[0],
)
def test_moves_of_integers(move: tuple) -> None:
    tensors = {"size": np.array([0, -1]), "one": np.array([1])}
    quantised = small_graph(
        QUANTISE, move, ("DequantizeLinear", "m s z", "d"), ("Neg", "d", "y"), **COMMON, **tensors
    )
    plain = small_graph(("Identity", "x", "q"), move, ("Neg", "m", "y"), **tensors)
    compare(quantised, plain)


@pytest.mark.parametrize("zero", [None, 0, 7])
def test_integer_images(zero: int | None) -> None:
    tensors = {} if zero is None else {"z": np.uint8(zero)}
    quantised = small_graph(
        ("DequantizeLinear", "x s" if zero is None else "x s z", "d"),
        ("Cast", "d", "y", {"to": 1}),
        dtype=np.uint8,
        s=np.float32(0.25),
        **tensors,
    )
    image = RNG.integers(0, 256, (2, 3, 6, 6)).astype(np.uint8)
    (computed,) = compute(dequantise(quantised), image)
    np.testing.assert_array_equal(computed, (image.astype(np.float32) - (zero or 0)) / 4)


def test_integer_output_becomes_its_float_meaning() -> None:
    after = dequantise(small_graph(("Neg", "x", "n"), ("QuantizeLinear", "n s z", "y"), **COMMON))
    assert operators(after) == ["Neg"]
    assert after.outputs[0].type.tensor_type.elem_type == TensorProto.FLOAT
    np.testing.assert_array_equal(compute(after)[0], -IMAGE)


@pytest.mark.parametrize(
    ("read", "options"),
    [
        ("q t z", {}),
        ("q s other", {"other": np.uint8(127)}),
        ("q s", {}),
    ],
    ids=["scale", "zero point", "no zero point"],
)
def test_values_read_in_another_way_are_refused(read: str, options: dict) -> None:
    nodes = QUANTISE, ("DequantizeLinear", read, "y")
    message = refused(*nodes, **COMMON, **options)
    assert "node 'y' (DequantizeLinear) works on quantised values" in message


@pytest.mark.parametrize("inputs", ["q r", "q k"], ids=["scales", "constant"])
def test_concat_of_values_that_mean_different_things_is_refused(inputs: str) -> None:
    message = refused(
        QUANTISE,
        ("QuantizeLinear", "x t z", "r"),
        ("Concat", inputs, "c", {"axis": 1}),
        ("DequantizeLinear", "c s z", "y"),
        **COMMON,
        k=np.zeros((2, 3, 6, 6), np.uint8),
    )
    assert "(Concat) works on quantised values" in message


@pytest.mark.parametrize("node", [("Cast", "q", "y", {"to": 6}), ("Add", "q q", "y")])
def test_arithmetic_on_integers_is_refused(node: tuple) -> None:
    assert "works on quantised values in a way" in refused(QUANTISE, node, **COMMON)


@pytest.mark.parametrize("part", ["s", "z"])
def test_computed_parameters_are_refused(part: str) -> None:
    tensors = {name: array for name, array in COMMON.items() if name != part}
    kind = 1 if part == "s" else 2
    message = refused(
        ("ReduceMax", "x", "m", {"keepdims": 0}),
        ("Cast", "m", part, {"to": kind}),
        QUANTISE,
        ("DequantizeLinear", "q s z", "y"),
        **tensors,
    )
    assert "node 'q' (QuantizeLinear) has a scale or zero point that is no constant" in message


# ------------------------------------------------------------------- activations that were dropped

NARROW = np.float32(6 / 255)


def dropped(
    scale: float,
    zero: np.generic,
    *between: tuple,
    opset: int = 13,
    inputs: str = "s z",
    **attributes: object,
) -> Graph:
    """A convolution, what is `between`, and the quantisation of its output `t`, in float."""
    return dequantise(
        small_graph(
            ("Conv", "x w", "c" if between else "t"),
            *between,
            ("QuantizeLinear", f"t {inputs}", "q", attributes),
            ("DequantizeLinear", f"q {inputs}", "y"),
            opset=opset,
            w=WEIGHT,
            s=np.float32(scale),
            z=np.asarray(zero),
        )
    )


@pytest.mark.parametrize(
    ("scale", "zero", "expected"),
    [
        (6 / 255, np.uint8(0), ["Conv", "Clip"]),
        (6 / 255, np.int8(-128), ["Conv", "Clip"]),
        (5.98 / 255, np.uint8(0), ["Conv", "Clip"]),
        (9 / 255, np.uint8(0), ["Conv", "Relu"]),
        (3 / 255, np.uint8(0), ["Conv", "Relu"]),
        (6 / 255, np.uint8(1), ["Conv"]),
        (6 / 255, np.int8(0), ["Conv"]),
        (6 / 255, np.int8(-127), ["Conv"]),
    ],
)
def test_dropped_activation(scale: float, zero: np.generic, expected: list[str]) -> None:
    """It is put back where the range starts at 0, with the bound 6 where it ends there."""
    after = dropped(scale, zero)
    assert operators(after) == expected


def test_dropped_activation_clamps() -> None:
    tensors = {"w": WEIGHT, "low": np.float32(0), "high": np.float32(6)}
    plain = small_graph(("Conv", "x w", "c"), ("Clip", "c low high", "y"), **tensors)
    assert_same(plain, dropped(6 / 255, np.uint8(0)))


def test_dropped_activation_before_opset_11() -> None:
    after = dropped(6 / 255, np.uint8(0), opset=10)
    assert after.nodes[1].attributes == {"min": 0.0, "max": 6.0}


@pytest.mark.parametrize(
    ("node", "activation"),
    [
        (("Add", "c c", "t"), "Relu"),
        (("BatchNormalization", "c v v v v", "t"), "Clip"),
        (("MatMul", "c m", "t"), "Clip"),
    ],
    ids=["Add", "BatchNormalization", "MatMul"],
)
def test_activations_are_dropped_behind_sums_and_products(node: tuple, activation: str) -> None:
    after = dequantise(
        small_graph(
            ("Conv", "x w", "c"),
            node,
            ("QuantizeLinear", "t s z", "q"),
            ("DequantizeLinear", "q s z", "y"),
            w=WEIGHT,
            s=NARROW,
            z=np.uint8(0),
            v=np.ones(4, np.float32),
            m=np.ones((4, 4), np.float32),
        )
    )
    assert operators(after) == ["Conv", node[0], activation]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [({}, ["Conv", "Clip"]), ({"output_dtype": 3}, ["Conv"])],
    ids=["uint8", "int8"],
)
def test_dropped_activation_without_a_zero_point(attributes: dict, expected: list[str]) -> None:
    """0 is the lowest of uint8, and in the middle of int8."""
    after = dropped(6 / 255, np.uint8(0), opset=21, inputs="s", **attributes)
    assert operators(after) == expected


def test_activation_that_was_not_dropped() -> None:
    assert operators(dropped(6 / 255, np.uint8(0), ("Relu", "c", "t"))) == ["Conv", "Relu"]


def test_image_has_no_activation() -> None:
    """A range from 0 is that of the image itself."""
    tensors = {"s": NARROW, "z": np.uint8(0)}
    after = dequantise(
        small_graph(QUANTISE, ("DequantizeLinear", "q s z", "d"), ("Neg", "d", "y"), **tensors)
    )
    assert operators(after) == ["Neg"]


# ---------------------------------------------------------------------- operators on integers


def test_qlinear_conv() -> None:
    tensors = {
        "w": LEVELS,
        "ws": np.float32([0.01, 0.02, 0.03, 0.02]),
        "wz": np.int8([0, 0, 0, 0]),
        "b": np.array([100, -2000, 300, 0], np.int32),
        "t": np.float32(0.3),
    }
    nodes = (
        QUANTISE,
        ("QLinearConv", "q s z w ws wz t z b", "r", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("DequantizeLinear", "r t z", "y"),
    )
    close_to_runtime(*nodes, steps=0.6, **(COMMON | tensors))


def test_qlinear_matmul() -> None:
    tensors = {"w": MATRIX, "ws": np.float32(0.01), "wz": np.int8(5), "t": np.float32(0.05)}
    nodes = (
        QUANTISE,
        ("QLinearMatMul", "q s z w ws wz t z", "r"),
        ("DequantizeLinear", "r t z", "y"),
    )
    close_to_runtime(*nodes, steps=0.1, **(COMMON | tensors))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "steps"),
    [
        ("QLinearAdd", "q s z q s z t z", {}, 0.12),
        ("QLinearMul", "q s z q s z t z", {}, 0.2),
        ("QLinearConcat", "t z q s z q s z", {"axis": 1}, 0.1),
        ("QLinearSigmoid", "q s z u zero", {}, 0.02),
        ("QLinearLeakyRelu", "q s z t z", {"alpha": 0.3}, 0.1),
        ("QLinearGlobalAveragePool", "q s z u z", {"channels_last": 0}, 0.03),
        ("QLinearAveragePool", "q s z t z", {"kernel_shape": [2, 2], "strides": [2, 2]}, 0.1),
        ("QLinearSoftmax", "q s z u zero", {"axis": -1, "opset": 13}, 0.02),
    ],
)
def test_operators_of_onnx_runtime(op: str, inputs: str, attributes: dict, steps: float) -> None:
    scale, zero = inputs.split()[:2] if op == "QLinearConcat" else inputs.split()[-2:]
    close_to_runtime(
        QUANTISE,
        (op, inputs, "r", MICROSOFT | attributes),
        ("DequantizeLinear", f"r {scale} {zero}", "y"),
        steps=steps,
        u=np.float32(1 / 256),
        zero=np.uint8(0),
        **COMMON,
    )


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("QLinearGlobalAveragePool", {"channels_last": 1}),
        ("QLinearSoftmax", {"axis": 1, "opset": 11}),
    ],
)
def test_other_settings_are_refused(op: str, attributes: dict) -> None:
    nodes = QUANTISE, (op, "q s z t z", "r", MICROSOFT | attributes)
    message = refused(*nodes, ("DequantizeLinear", "r t z", "y"), **COMMON)
    assert f"({op}) works on quantised values in a way that is not supported" in message


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "integers"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("transposed", [0, 1])
def test_qgemm(transposed: int, alpha: float, quantised: bool) -> None:
    """The bias, in integers, is scaled by `alpha` as well."""
    tensors = {
        "w": TALL.T.copy() if transposed else TALL,
        "ws": np.float32([0.01, 0.02, 0.01, 0.005, 0.02]),
        "wz": np.int8([0, 0, 0, 0, 0]),
        "b": np.array([10000, -20000, 30000, 0, 1000], np.int32),
        "t": np.float32(0.4),
    }
    more = " t z" if quantised else ""
    gemm = {"transB": transposed, "alpha": alpha}
    nodes = [
        ("Flatten", "x", "f"),
        ("QuantizeLinear", "f s z", "q"),
        ("QGemm", f"q s z w ws wz b{more}", "r", MICROSOFT | gemm),
        ("DequantizeLinear", "r t z", "y") if quantised else ("Identity", "r", "y"),
    ]
    close_to_runtime(*nodes, steps=0.5, **(COMMON | tensors))


# ----------------------------------------------------------------------- dynamic quantisation


def dynamic(op: str, weight: np.ndarray, scale: object, *quantise: tuple, **more: object) -> tuple:
    """An integer product of an image that is quantised as it comes, and what scales it."""
    nodes = (
        *(quantise or (("DynamicQuantizeLinear", "x", "q s z"),)),
        (op, "q w z wz", "i"),
        ("Cast", "i", "f", {"to": 1}),
        ("Mul", "s ws", "both"),
        ("Mul", "f both", "y"),
    )
    return nodes, {"w": weight, "ws": np.float32(scale), "wz": np.int8(2), **more}


STATIC = {"s": SCALE, "z": ZERO}


@pytest.mark.parametrize("static", [False, True], ids=["as it comes", "with constants"])
@pytest.mark.parametrize("op", ["ConvInteger", "MatMulInteger"])
def test_integer_products(op: str, static: bool) -> None:
    weight = LEVELS if op == "ConvInteger" else MATRIX
    quantise, more = ((QUANTISE,), STATIC) if static else ((), {})
    nodes, tensors = dynamic(op, weight, 0.01, *quantise, **more)
    close_to_runtime(*nodes, steps=0.25, **tensors)


def test_integer_product_with_another_zero_point_is_refused() -> None:
    nodes, tensors = dynamic("ConvInteger", LEVELS, 0.01, QUANTISE, **STATIC)
    nodes = tuple(
        (op, inputs.replace("q w z wz", "q w other wz"), *rest) for op, inputs, *rest in nodes
    )
    message = refused(*nodes, **tensors, other=np.uint8(5))
    assert "(ConvInteger) works on quantised values in a way that is not supported" in message


def test_integer_product_of_an_image_is_refused() -> None:
    nodes = ("ConvInteger", "x w", "i"), ("Cast", "i", "y", {"to": 1})
    message = refused(*nodes, dtype=np.uint8, w=LEVELS)
    assert "node 'i' (ConvInteger) works on quantised values" in message


@pytest.mark.parametrize("bias", ["", " b"])
def test_dynamic_quantise_matmul(bias: str) -> None:
    node = ("DynamicQuantizeMatMul", f"x w ws wz{bias}", "y", MICROSOFT)
    tensors = {
        "w": MATRIX,
        "ws": np.float32([0.01] * 5),
        "wz": np.int8([2] * 5),
        "b": np.arange(5, dtype=np.float32),
    }
    close_to_runtime(node, steps=0.1, **tensors)


@pytest.mark.parametrize("static", [False, True], ids=["as it comes", "with constants"])
def test_matmul_integer_to_float(static: bool) -> None:
    quantise = QUANTISE if static else ("DynamicQuantizeLinear", "x", "q s z")
    node = ("MatMulIntegerToFloat", "q w s ws z wz", "y", MICROSOFT)
    tensors = {"w": MATRIX, "ws": np.float32(0.01), "wz": np.int8(2)}
    close_to_runtime(quantise, node, steps=0.1, **tensors, **(STATIC if static else {}))


def test_matmul_integer_to_float_with_another_scale_is_refused() -> None:
    node = ("MatMulIntegerToFloat", "q w t ws z wz", "y", MICROSOFT)
    refused(QUANTISE, node, **COMMON, w=MATRIX, ws=np.float32(0.01), wz=np.int8(2))


def test_positive_values_are_no_activation_among_relu6() -> None:
    """A residual sum, and logits, that were positive in calibration."""
    after = dequantise(
        small_graph(
            ("Conv", "x w", "a"),
            ("QuantizeLinear", "a s z", "aq"),
            ("DequantizeLinear", "aq s z", "ad"),
            ("Conv", "ad u", "b"),
            ("QuantizeLinear", "b s z", "bq"),
            ("DequantizeLinear", "bq s z", "bd"),
            ("Add", "bd bd", "c"),
            ("QuantizeLinear", "c s z", "cq"),
            ("DequantizeLinear", "cq s z", "cd"),
            ("Conv", "cd u", "d"),
            ("QuantizeLinear", "d wide z", "dq"),
            ("DequantizeLinear", "dq wide z", "y"),
            w=WEIGHT,
            u=np.ones((4, 4, 1, 1), np.float32),
            s=np.float32(6 / 255),
            wide=np.float32(80 / 255),
            z=np.uint8(0),
        )
    )
    assert operators(after) == ["Conv", "Clip", "Conv", "Clip", "Add", "Conv"]
