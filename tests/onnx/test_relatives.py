"""Relatives of MobileNetV2 out of ONNX files equal ONNX Runtime, and patch as far as they match."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import reports

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")
torchvision = pytest.importorskip("torchvision", reason="torchvision has the models")
timm = pytest.importorskip("timm", reason="timm has the models")

import torch
from onnx_helpers import RELATIVE, export, randomise, relative_error, run
from torch import nn

import torch_mbv2
from torch_mbv2.mobilenet import MobileNetV2
from torch_mbv2.onnx import load_onnx

BATCH = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
BLOCKS = {"inverted_residual": 16, "stem_block": 1, "conv_pool": 1, "gemm": 1}

# How many layers each kernel takes, at least; what is not listed may stay stock, and is named.
RELATIVES: dict[str, tuple[Callable[..., nn.Module], dict[str, int]]] = {
    "torchvision mobilenet_v3_small": (
        torchvision.models.mobilenet_v3_small,
        {"gemm": 38, "conv_depthwise": 9, "inverted_residual": 2, "add": 5},
    ),
    "torchvision mnasnet0_5": (torchvision.models.mnasnet0_5, BLOCKS),
    "torchvision efficientnet_b0": (
        torchvision.models.efficientnet_b0,
        {"gemm": 65, "conv_depthwise": 16, "global_avg_pool2d": 17, "add": 9},
    ),
    "torchvision shufflenet_v2_x0_5": (
        torchvision.models.shufflenet_v2_x0_5,
        {"gemm": 36, "conv_depthwise": 19, "conv_pool": 1},
    ),
    "torchvision resnet18": (
        torchvision.models.resnet18,
        {"conv_winograd": 13, "add": 8, "gemm": 1, "conv_implicit_gemm": 7},
    ),
    "torchvision squeezenet1_1": (
        torchvision.models.squeezenet1_1,
        {"gemm": 16, "conv_pool": 1, "conv_winograd": 2},
    ),
    "torchvision regnet_y_400mf": (
        torchvision.models.regnet_y_400mf,
        {"gemm": 65, "conv_implicit_gemm": 21, "add": 16},
    ),
    "timm mobilenetv1_100": (
        lambda **options: timm.create_model("mobilenetv1_100", **options),
        {"gemm": 13, "conv_depthwise": 13, "conv_pool": 1},
    ),
    "timm mobilenetv2_035": (
        lambda **options: timm.create_model("mobilenetv2_035", **options),
        BLOCKS,
    ),
    "timm mobilenetv2_140": (
        lambda **options: timm.create_model("mobilenetv2_140", **options),
        BLOCKS,
    ),
    "timm tf_efficientnet_lite0": (
        lambda **options: timm.create_model("tf_efficientnet_lite0", **options),
        {**BLOCKS, "inverted_residual": 15},
    ),
    "timm tf_mobilenetv3_small_100": (
        lambda **options: timm.create_model("tf_mobilenetv3_small_100", **options),
        {"gemm": 38, "conv_depthwise": 9, "inverted_residual": 2},
    ),
}


@pytest.mark.parametrize("exporter", ["legacy", "legacy, any height and width", "dynamo"])
@pytest.mark.parametrize("name", [*RELATIVES])
def test_relative(name: str, exporter: str) -> None:
    make, wanted = RELATIVES[name]
    network = randomise(make(num_classes=10).eval())
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="the dynamo exporter needs onnxscript")
        shapes = ({0: torch.export.Dim("batch")},)
        proto = export(network, BATCH, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        axes = {0: "n"} if exporter == "legacy" else {0: "n", 2: "h", 3: "w"}
        proto = export(network, BATCH, dynamic_axes={"image": axes, "logits": {0: "n"}})
    model = load_onnx(proto)
    assert (type(model) is MobileNetV2) == ("mobilenetv2" in name)
    with torch.inference_mode():
        assert relative_error(model(BATCH), network(BATCH)) < RELATIVE
        assert relative_error(model(MORE), run(proto, MORE)) < RELATIVE
        if "height" in exporter:
            odd = torch.randn(1, 3, 79, 96)
            assert relative_error(model(odd), run(proto, odd)) < RELATIVE
    report = torch_mbv2.report(model)
    kernels = Counter(reports.takes(row) for row in report.patched)
    assert {kernel: kernels[kernel] for kernel in wanted} == wanted
    assert all(row.name and row.reason for row in report.stock)
    patched = torch_mbv2.patch(model)
    with torch.inference_mode():
        assert relative_error(patched(MORE), model(MORE)) < RELATIVE


@pytest.mark.parametrize(
    "name", ["torchvision shufflenet_v2_x0_5", "torchvision mobilenet_v3_small"]
)
def test_relative_exports_with_a_dynamic_batch(name: str) -> None:
    network = randomise(RELATIVES[name][0](num_classes=10).eval())
    model = load_onnx(export(network, BATCH))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (BATCH,), dynamic_shapes=shapes)
    with torch.inference_mode():
        assert relative_error(program.module()(MORE), model(MORE)) < RELATIVE
