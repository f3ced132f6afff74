"""Operators of ONNX Runtime's optimiser, written out."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx_helpers import WEIGHT, assert_same, operators, small_graph

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.clean.runtime import split_fused

RNG = np.random.default_rng(0)
BIAS = RNG.normal(size=4).astype(np.float32)
OTHER = RNG.normal(size=(2, 4, 4, 4)).astype(np.float32)
MATRIX = RNG.normal(size=(5, 6)).astype(np.float32)
ROW = RNG.normal(size=5).astype(np.float32)

# What is fused, and the nodes that it stands for.
ACTIVATIONS = {
    "none": ({}, ("Identity", "t", "y")),
    "Relu": ({}, ("Relu", "t", "y")),
    "Sigmoid": ({}, ("Sigmoid", "t", "y")),
    "Tanh": ({}, ("Tanh", "t", "y")),
    "LeakyRelu": ({"alpha": 0.3}, ("LeakyRelu", "t", "y", {"alpha": 0.3})),
    "HardSigmoid": (
        {"alpha": 0.3, "beta": 0.4},
        ("HardSigmoid", "t", "y", {"alpha": 0.3, "beta": 0.4}),
    ),
    "Clip": ({"low": -0.5, "high": 0.5}, ("Clip", "t low high", "y")),
}


def fused_conv(activation: str, inputs: str, opset: int = 13, **attributes: object) -> object:
    given = {} if activation == "none" else {"activation": activation}
    parameters = list(ACTIVATIONS.get(activation, ({},))[0].values())
    if parameters:
        given["activation_params"] = parameters
    node = ("FusedConv", inputs, "y", {"domain": "com.microsoft", **given, **attributes})
    return small_graph(node, opset=opset, w=WEIGHT, b=BIAS, z=OTHER)


@pytest.mark.parametrize("inputs", ["x w", "x w b", "x w b z", "x w - z"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_fused_conv(activation: str, inputs: str) -> None:
    """The fourth input is added before the activation."""
    added = inputs.endswith("z")
    plain = small_graph(
        ("Conv", inputs.removesuffix(" z"), "c", {"strides": [1, 1]}),
        ("Add", "c z", "t") if added else ("Identity", "c", "t"),
        ACTIVATIONS[activation][1],
        w=WEIGHT,
        b=BIAS,
        z=OTHER,
        low=np.float32(-0.5),
        high=np.float32(0.5),
    )
    after = split_fused(fused_conv(activation, inputs, strides=[1, 1]))
    follow = ["Add"] * added + [activation] * (activation != "none")
    assert operators(after) == ["Conv", *follow]
    assert not any(name.startswith("activation") for name in after.nodes[0].attributes)
    assert_same(plain, after)


def test_fused_clip_before_opset_11() -> None:
    after = split_fused(fused_conv("Clip", "x w", opset=9))
    assert after.nodes[1].attributes == {"min": -0.5, "max": 0.5}


@pytest.mark.parametrize("activation", ["none", "Relu", "LeakyRelu", "HardSigmoid"])
def test_fused_gemm(activation: str) -> None:
    parameters, after_gemm = ACTIVATIONS[activation]
    given = {} if activation == "none" else {"activation": activation}
    given |= {f"activation_{name}": value for name, value in parameters.items()}
    gemm = {"transB": 1, "alpha": 0.5, "beta": 2.0}
    options = {"shape": ("n", 6), "m": MATRIX, "b": ROW}
    fused = ("FusedGemm", "x m b", "y", {"domain": "com.microsoft", **given, **gemm})
    plain = small_graph(("Gemm", "x m b", "t", gemm), after_gemm, **options)
    image = RNG.normal(size=(2, 6)).astype(np.float32)
    assert_same(plain, split_fused(small_graph(fused, **options)), image)


def fused_matmul(**attributes: object) -> object:
    node = ("FusedMatMul", "x m", "y", {"domain": "com.microsoft", **attributes})
    return small_graph(node, m=MATRIX.T.copy())


@pytest.mark.parametrize("attributes", [{}, {"alpha": 1.0, "transA": 0, "transBatchB": 0}], ids=str)
def test_fused_matmul(attributes: dict) -> None:
    plain = small_graph(("MatMul", "x m", "y"), m=MATRIX.T.copy())
    assert_same(plain, split_fused(fused_matmul(**attributes)))


@pytest.mark.parametrize(
    "attributes",
    [{"alpha": 2.0}, {"transA": 1}, {"transB": 1}, {"transBatchA": 1}, {"transBatchB": 1}],
    ids=str,
)
def test_fused_matmul_that_does_more_is_refused(attributes: dict) -> None:
    with pytest.raises(ModelError, match=r"'y' \(FusedMatMul\) transposes or scales its operands"):
        split_fused(fused_matmul(**attributes))


def test_other_activation_is_refused() -> None:
    with pytest.raises(ModelError, match="has the activation 'Softmax', which is not supported"):
        split_fused(fused_conv("Softmax", "x w"))


@pytest.mark.parametrize(
    ("op", "domain"), [("BiasGelu", "com.microsoft"), ("Conv", "com.microsoft.nchwc")]
)
def test_other_operators_are_refused(op: str, domain: str) -> None:
    graph = small_graph((op, "x w", "y", {"domain": domain}), w=WEIGHT)
    with pytest.raises(ModelError, match="load the file that was optimised"):
        split_fused(graph)
