"""Graphs that are no MobileNetV2, through onnx2torch."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import copy
import operator
import pickle
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")

import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_helpers import RELATIVE, export, randomise, relative_error, run
from torch import Tensor, fx, nn

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.mobilenet import MobileNetV2
from torch_mbv2.onnx import load_onnx

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class ResNet(nn.Module):
    """What a ResNet is made of, in small: two stages, a strided shortcut, two kinds of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 8, 3, 1, 1)
        self.second = nn.Conv2d(8, 12, 3, 2)
        self.shortcut = nn.Conv2d(8, 12, 1, 2)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = F.relu(x + self.first(x))
        x = F.relu(self.shortcut(x) + self.second(F.pad(x, (0, 1, 0, 1))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


@torch.inference_mode()
def check(proto: onnx.ModelProto, image: Tensor = BATCH) -> fx.GraphModule:
    module = load_onnx(proto)
    assert isinstance(module, fx.GraphModule)
    assert not module.training
    assert relative_error(module(image), run(proto, image)) < RELATIVE
    return module


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return randomise(ResNet())


@pytest.mark.parametrize("opset", [9, 13, 17, 18, 20])
def test_legacy_exporter(opset: int, resnet: nn.Module) -> None:
    check(export(resnet, IMAGE, opset_version=opset))


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_dynamo_exporter(opset: int, resnet: nn.Module) -> None:
    pytest.importorskip("onnxscript", reason="the dynamo exporter needs onnxscript")
    shapes = ({0: torch.export.Dim("batch")},)
    proto = export(
        resnet, BATCH, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
    )
    check(proto)
    check(proto, IMAGE)


def test_result_is_stock(resnet: nn.Module) -> None:
    """All that `patch` looks for: stock modules, `+`, and pads as `nn.ZeroPad2d`."""
    module = check(export(resnet, IMAGE))
    kinds = [type(child).__name__ for child in module.modules()]
    assert [kinds.count(kind) for kind in ("Conv2d", "ZeroPad2d", "Linear")] == [4, 1, 1]
    assert [kinds.count(kind) for kind in ("AdaptiveAvgPool2d", "ReLU", "MaxPool2d")] == [1, 3, 1]
    assert not [kind for kind in kinds if kind.startswith("Onnx")]
    added = [node for node in module.graph.nodes if node.target is operator.add]
    assert len(added) == 2
    used = {node.target.split(".")[0] for node in module.graph.nodes if node.op == "call_module"}
    assert used == {name for name, _ in module.named_children()}


def test_result_can_be_exported_copied_and_pickled(resnet: nn.Module) -> None:
    module = check(export(resnet, IMAGE))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (BATCH,), dynamic_shapes=shapes)
    image = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        expected = module(image)
        torch.testing.assert_close(program.module()(image), expected)
        assert torch.equal(copy.deepcopy(module)(image), expected)
        assert torch.equal(pickle.loads(pickle.dumps(module))(image), expected)


def test_torchvision_model() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision has the model")
    check(export(randomise(torchvision.models.shufflenet_v2_x0_5(num_classes=7)), IMAGE))


HOSTILE = 'x", __import__("pathlib").Path({target!r}).touch() or "'


def test_names_in_the_file_are_no_code(tmp_path: Path) -> None:
    """torch.fx writes the names of modules into source code; a file must not reach that."""
    target = tmp_path / "touched"
    proto = export(randomise(ResNet()), IMAGE)
    expected = run(proto, BATCH)
    names = iter(["forward", "training", "graph", "initializers", "1", "a.b", "für", "a b", "a_b"])
    for node in proto.graph.node:
        node.name = next(names, HOSTILE.format(target=str(target)))
    module = load_onnx(proto)
    with torch.inference_mode():
        assert relative_error(module(BATCH), expected) < RELATIVE
    assert not target.exists()
    assert "__import__(" not in module.code
    assert all(name.isidentifier() and name.isascii() for name, _ in module.named_children())


def single(
    operator: str, *, opset: int = 13, domain: str = "", **attributes: object
) -> onnx.ModelProto:
    """A model of one node, `x` to `y`."""
    node = helper.make_node(operator, ["x"], ["y"], name="only", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid(domain, 1)] * bool(domain)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize(
    "proto",
    [
        single("Det"),
        single("RegexFullMatch", opset=20),
        single("NoSuchOperator"),
        single("NoSuchOperator", opset=20),
        single("Anything", domain="custom.domain"),
        single("GlobalLpPool", p=2),
    ],
    ids=lambda proto: f"{proto.graph.node[0].op_type}-{proto.opset_import[0].version}",
)
def test_unsupported_operator(proto: onnx.ModelProto) -> None:
    with pytest.raises(ModelError) as caught:
        load_onnx(proto)
    operator, opset = proto.graph.node[0].op_type, proto.opset_import[0].version
    assert f"node 'only' ({operator}), opset {opset}, cannot be converted" in str(caught.value)
    assert "export the model without that operator" in str(caught.value)


def test_lstm() -> None:
    """Not an image model at all: one sentence that names the node."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    proto = export(Tagger().eval(), torch.randn(1, 5, 4), dynamic_axes={})
    with pytest.raises(ModelError, match=r"\(LSTM\), opset \d+, cannot be converted"):
        load_onnx(proto)


def test_input_that_is_no_image() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    check(export(model, torch.randn(1, 4)), torch.randn(3, 4))


def test_failing_converter_names_its_node() -> None:
    """onnx2torch raises a bare KeyError for a convolution whose weight is no constant."""
    proto = single("Conv")
    proto.graph.node[0].input.append("w")
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3])
    proto.graph.input.append(weight)
    with pytest.raises(ModelError, match=r"node 'only' \(Conv\), opset 13, .*\(KeyError: 'w'\)"):
        load_onnx(proto)


def test_without_onnx2torch(monkeypatch: pytest.MonkeyPatch, resnet: nn.Module) -> None:
    """A MobileNetV2 does not need it; anything else says what to install."""
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    small = randomise(MobileNetV2(10, inverted_residual_setting=[[1, 8, 1, 1]]))
    assert isinstance(load_onnx(export(small, IMAGE)), MobileNetV2)
    with pytest.raises(UnavailableError, match="needs the package onnx2torch: pip install"):
        load_onnx(export(resnet, IMAGE))
