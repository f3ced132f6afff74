"""Files that are no usable model: one clear sentence each."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
from onnx import TensorProto, helper

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.onnx import load_onnx


def model(nodes: list[onnx.NodeProto], opset: int = 13, **tensors: np.ndarray) -> onnx.ModelProto:
    """A model from `x` (N, 3, 8, 8) to `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def convolution() -> onnx.ModelProto:
    weight = np.ones((4, 3, 3, 3), np.float32)
    return model([helper.make_node("Conv", ["x", "weight"], ["y"], name="first")], weight=weight)


def rejected(source: object) -> str:
    """The sentence with which `source` is refused."""
    with pytest.raises(ModelError) as caught:
        load_onnx(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    assert rejected(path) == f"{path}: No such file or directory"


def test_folder(tmp_path: Path) -> None:
    assert rejected(str(tmp_path)) == f"{tmp_path}: Is a directory"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"This is a text, not a model.\n" * 20,
        b"{}",
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        bytes(64),
    ],
    ids=["empty", "text", "json", "image", "zeros"],
)
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert rejected(path).startswith(f"{path}: not an ONNX model")


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file(part: float, tmp_path: Path) -> None:
    data = convolution().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(part * len(data))])
    assert str(path) in rejected(path)


def test_truncated_behind_the_graph() -> None:
    """The opset comes last in a file: a cut there leaves a graph that says no version."""
    cut = convolution()
    del cut.opset_import[:]
    assert "names no ONNX opset; is the file complete?" in rejected(cut)


def test_tensor_of_another_size_than_declared() -> None:
    damaged = convolution()
    damaged.graph.initializer[0].dims[0] = 5
    assert "the ONNX model: damaged: " in rejected(damaged)


def test_attribute_that_does_not_exist() -> None:
    """A misspelt attribute would silently mean its default."""
    damaged = convolution()
    damaged.graph.node[0].attribute.append(helper.make_attribute("padz", [1, 1, 1, 1]))
    assert "node 'first' (Conv) has an attribute 'padz'" in rejected(damaged)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes(seed: int) -> None:
    """Whatever a byte turns into: a model or one sentence, no other exception."""
    rng = np.random.default_rng(seed)
    data = bytearray(convolution().SerializeToString())
    for position in rng.integers(0, len(data), 3):
        data[position] = rng.integers(256)
    with contextlib.suppress(ModelError):
        load_onnx(bytes(data))


def test_missing_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(convolution(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert load_onnx(path) is not None
    assert "weights are in another file" in rejected(path.read_bytes())
    (tmp_path / "w.data").unlink()
    message = rejected(path)
    assert message.startswith(f"{path}: its weights, in w.data beside it, cannot be read")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_external_data_elsewhere(location: str, tmp_path: Path) -> None:
    """A model cannot make the loader read files outside its folder."""
    (tmp_path / "secret").write_bytes(bytes(432))
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    onnx.save(convolution(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    outside = onnx.load(path, load_external_data=False)
    for entry in outside.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(outside.SerializeToString())
    assert "cannot be read" in rejected(path)


def test_node_that_reads_nothing() -> None:
    broken = model([helper.make_node("Relu", ["missing"], ["y"], name="act")])
    assert "node 'act' (Relu) reads 'missing', which nothing computes" in rejected(broken)


def test_output_that_nothing_computes() -> None:
    broken = model([helper.make_node("Relu", ["x"], ["z"])])
    assert "nothing computes the output 'y'" in rejected(broken)


def test_old_opset() -> None:
    assert "opset 5 is too old" in rejected(model([helper.make_node("Relu", ["x"], ["y"])], 5))


def test_scale_that_is_computed() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["scale"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
    ]
    message = rejected(model(nodes))
    assert (
        "node 'quantise' (QuantizeLinear) has a scale or zero point that is no constant" in message
    )


def test_operator_of_the_optimiser() -> None:
    node = helper.make_node("BiasGelu", ["x", "weight"], ["y"], domain="com.microsoft")
    message = rejected(model([node], weight=np.ones(8, np.float32)))
    assert "comes from ONNX Runtime's optimiser: load the file that was optimised" in message


def test_integer_model() -> None:
    integers = convolution()
    weight = np.ones((4, 3, 3, 3), np.int32)
    integers.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    assert "not a float model" in rejected(integers)


@pytest.mark.parametrize("operator", ["BatchNormalization", "Dropout"])
def test_training_mode(operator: str) -> None:
    if operator == "Dropout":
        inputs, attributes = ["x", "ratio", "training"], {}
        tensors = {"ratio": np.float32(0.5), "training": np.array(True)}
    else:
        inputs, attributes = ["x", "v", "v", "v", "v"], {"training_mode": 1}
        tensors = {"v": np.ones(3, np.float32)}
    node = helper.make_node(operator, inputs, ["y"], name="layer", **attributes)
    message = rejected(model([node], 15, **tensors))
    assert "is in training mode: call model.eval() and export the model again" in message


def test_control_flow() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])],
        "body",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    node = helper.make_node(
        "If", ["flag"], ["y"], name="branch", then_branch=body, else_branch=body
    )
    message = rejected(model([node], flag=np.array(True)))
    assert "node 'branch' (If, opset 13) has a graph attribute" in message


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="load_onnx takes a path, bytes or a ModelProto"):
        load_onnx(3)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_mbv2.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delattr("torch_mbv2.onnx.graph", raising=False)
    monkeypatch.delattr("torch_mbv2.onnx.clean", raising=False)
    with pytest.raises(UnavailableError, match=r"needs the package onnx: pip install"):
        load_onnx("model.onnx")
