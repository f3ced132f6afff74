"""MobileNetV2 out of ONNX files: recognised by structure, and equal to ONNX Runtime."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")

import numpy as np
import onnx
import torch
from onnx_helpers import RELATIVE, SHARED, export, randomise, relative_error, run
from torch import Tensor, fx, nn

from torch_mbv2.mobilenet import Architecture, Block, MobileNetV2, SamePad2d
from torch_mbv2.onnx import load_onnx

SMALL = [[1, 8, 1, 1], [6, 16, 2, 2], [4, 24, 1, 2]]
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BATCH = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def small(**options: object) -> MobileNetV2:
    return randomise(MobileNetV2(num_classes=10, inverted_residual_setting=SMALL, **options))


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.inference_mode()
def check(proto: onnx.ModelProto, image: Tensor = BATCH) -> MobileNetV2:
    """`proto` is recognised, and computes what ONNX Runtime does."""
    model = load_onnx(proto)
    assert type(model) is MobileNetV2
    assert not model.training
    assert relative_error(model(image), run(proto, image)) < RELATIVE
    return model


@pytest.fixture(scope="module")
def full() -> MobileNetV2:
    """All 52 convolutions, narrow."""
    return randomise(MobileNetV2(width_mult=0.25, num_classes=10))


def test_legacy_exporter_with_batch_norms(full: MobileNetV2) -> None:
    """Batch norms that are in the file come back: the state dict is the original's, bit by bit."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the reference here")
    preserve = torch.onnx.TrainingMode.PRESERVE
    proto = export(full, IMAGE, training=preserve, do_constant_folding=False)
    model = check(proto)
    expected = full.state_dict()
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert {norm.eps for norm in norms(model)} == {1e-5}
    with torch.inference_mode():
        assert torch.equal(model(BATCH), full(BATCH))
    theirs = torchvision.models.MobileNetV2(width_mult=0.25, num_classes=10).eval()
    theirs.load_state_dict(state)


def test_dynamo_exporter_default(full: MobileNetV2, tmp_path: Path) -> None:
    """As torch.onnx.export writes it when nothing is asked for: weights in a second file."""
    pytest.importorskip("onnxscript", reason="the dynamo exporter needs onnxscript")
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(full, (BATCH,), path, dynamic_shapes=shapes, verbose=False)
    assert path.with_suffix(".onnx.data").exists()
    model = load_onnx(path)
    assert type(model) is MobileNetV2
    with torch.inference_mode():
        assert relative_error(model(BATCH), run(str(path), BATCH)) < RELATIVE
        assert relative_error(model(IMAGE), run(str(path), IMAGE)) < RELATIVE


@pytest.mark.parametrize("source", ["str", "path", "bytes", "proto"])
def test_sources(source: str, tmp_path: Path) -> None:
    proto = export(small(), IMAGE)
    before = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(before)
    given = {"str": str(path), "path": path, "bytes": before, "proto": proto}[source]
    with torch.inference_mode():
        assert relative_error(load_onnx(given)(BATCH), run(proto, BATCH)) < RELATIVE
    assert proto.SerializeToString() == before


def test_loading_leaves_random_state_and_owns_its_weights() -> None:
    proto = export(small(), IMAGE)
    state = torch.get_rng_state()
    model = load_onnx(proto)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with torch.inference_mode():
        assert load_onnx(proto)(IMAGE).abs().sum() > 0


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(5, (Block(None, 7), Block(11, 7, residual=True), Block(13, 3, 2)), 17, 4),
        Architecture(8, (Block(16, 8),), 16, 4),  # no residual where torchvision has one
        Architecture(8, (Block(None, 8, residual=True),), 16, 4, activation="relu"),
        Architecture(8, (Block(None, 4),), 16, 1, in_channels=1, stem_stride=1, norm=False),
        Architecture(8, (Block(9, 4, 2, (1, 0, 2, 1)),), 16, 4, stem_padding=(0, 1, 0, 1)),
        Architecture(8, (Block(9, 4, 2, (0, 0, 0, 0)),), 16, 4, stem_padding=(2, 2, 1, 1)),
    ],
    ids=["odd-channels", "no-residual", "relu", "grey", "uneven-pads", "even-pads"],
)
@pytest.mark.parametrize(
    "training", [torch.onnx.TrainingMode.EVAL, torch.onnx.TrainingMode.PRESERVE]
)
def test_architecture_survives(architecture: Architecture, training: object) -> None:
    original = randomise(MobileNetV2.from_architecture(architecture))
    image = torch.randn(2, architecture.in_channels, 32, 32)
    keep = training is torch.onnx.TrainingMode.PRESERVE
    proto = export(original, image, training=training, do_constant_folding=not keep)
    model = check(proto, image)
    norm = keep and architecture.norm
    assert model.architecture == dataclasses.replace(architecture, norm=norm)
    pads = [m.padding for m in model.modules() if type(m) is nn.ZeroPad2d]
    assert pads == [m.padding for m in original.modules() if type(m) is nn.ZeroPad2d]


def test_same_padding_of_a_fixed_size_becomes_zero_pads() -> None:
    """The legacy exporter writes the module's pads as Pad nodes with numbers."""
    model = check(export(small(padding="same"), IMAGE))
    pads = [module.padding for module in model.modules() if type(module) is nn.ZeroPad2d]
    assert pads == [(0, 1, 0, 1)] * 3


@pytest.mark.parametrize("opset", [10, 13])
@pytest.mark.parametrize("sizes", [(64, 64), (63, 50), (None, None)])
def test_auto_pad_same_upper(sizes: tuple[int | None, int | None], opset: int) -> None:
    """SAME_UPPER becomes numbers where the image has a fixed size, else padding at run time."""
    proto = auto_padded(small(padding="same"), "SAME_UPPER", sizes, opset)
    for size in [sizes] if None not in sizes else [(64, 64), (63, 50), (33, 33)]:
        model = check(proto, torch.randn(2, 3, *size))
    dynamic = any(isinstance(module, SamePad2d) for module in model.modules())
    assert dynamic == (None in sizes)


def test_auto_pad_same_lower() -> None:
    model = check(auto_padded(small(padding="same"), "SAME_LOWER", (64, 64), 13))
    pads = [module.padding for module in model.modules() if type(module) is nn.ZeroPad2d]
    assert pads == [(1, 0, 1, 0)] * 3


def auto_padded(
    model: nn.Module, mode: str, sizes: tuple[int | None, int | None], opset: int
) -> onnx.ModelProto:
    """As Keras converters write it: 3x3 convolutions with `auto_pad`, and no Pad nodes."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, SamePad2d):
            parent, _, child = name.rpartition(".")
            delattr(plain.get_submodule(parent), child)
    for conv in convolutions(plain):
        if conv.kernel_size == (3, 3):
            conv.padding = (1, 1)
    proto = export(plain, torch.randn(1, 3, *(size or 64 for size in sizes)), opset_version=opset)
    for node in proto.graph.node:
        kernels = [list(a.ints) for a in node.attribute if a.name == "kernel_shape"]
        if node.op_type == "Conv" and kernels == [[3, 3]]:
            kept = [a for a in node.attribute if a.name != "pads"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("auto_pad", mode)])
    for axis, size in zip((2, 3), sizes, strict=True):
        if size is None:
            proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"axis{axis}"
    del proto.graph.value_info[:]
    return proto


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_low_precision_keeps_its_dtype(dtype: torch.dtype, bits: int) -> None:
    original = small().to(dtype)
    proto = export(original, IMAGE.to(dtype))
    model = load_onnx(proto)
    assert type(model) is MobileNetV2
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.inference_mode():
        # Folding batch norm rounds every weight once more, in each of 13 layers.
        error = relative_error(model(BATCH.to(dtype)), original(BATCH.to(dtype)))
    assert error < 13 * 2.0**-bits


def test_missing_norm_makes_the_rest_fold() -> None:
    """With batch norm behind some convolutions only, the network is rebuilt folded."""
    original = small()
    original.features[0][1] = nn.Identity()
    proto = export(
        original, IMAGE, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False
    )
    assert not norms(check(proto))


class Extra(nn.Module):
    """A MobileNetV2 with one thing more or else."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.net = small()
        self.what = what
        if what == "sigmoid":
            self.net.features[1].conv[0][2] = nn.Sigmoid()
        elif what == "relu among relu6":
            self.net.features[1].conv[0][2] = nn.ReLU()
        elif what == "dilation":
            self.net.features[1].conv[0][0].dilation = (2, 2)
        elif what == "clip":
            self.net.features[1].conv[0][2] = nn.Hardtanh(0.0, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "scaled pixels":
            return self.net(x * torch.linspace(0, 2, 64))
        if self.what == "softmax of images":
            return self.net(x).softmax(0)
        if self.what == "squared logits":
            return self.net(x).square()
        return self.net(x)


@pytest.mark.parametrize(
    "what",
    [
        "sigmoid",
        "relu among relu6",
        "dilation",
        "clip",
        "scaled pixels",
        "softmax of images",
        "squared logits",
    ],
)
def test_almost_a_mobilenet_is_converted(what: str) -> None:
    """Nothing is dropped or bent to fit: what is not exactly a MobileNetV2 keeps its graph."""
    pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")
    proto = export(Extra(what).eval(), IMAGE)
    model = load_onnx(proto)
    assert isinstance(model, fx.GraphModule)
    with torch.inference_mode():
        assert relative_error(model(BATCH), run(proto, BATCH)) < RELATIVE


PHOTOS = {  # top-1 and its probability, by ONNX Runtime after a bilinear resize to 224x224
    "cat.jpg": ("Egyptian cat", 0.78),
    "chickadee.png": ("chickadee", 0.98),
    "dragonfly.png": ("dragonfly", 0.98),
    "hot_dog.jpg": ("hotdog", 0.82),
    "parrot.jpg": ("macaw", 0.998),
    "uniform.png": ("military uniform", 0.93),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the trained model and photos of ../shared")
@pytest.mark.parametrize("photo", PHOTOS)
def test_trained_model(photo: str) -> None:
    from PIL import Image

    path = SHARED / "models" / "mobilenetv2_imagenet_tf.onnx"
    labels = (SHARED / "models" / "imagenet_labels.txt").read_text().splitlines()
    with Image.open(SHARED / "images" / photo) as file:
        resized = file.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / 127.5 - 1
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    model = load_onnx(path)
    assert type(model) is MobileNetV2
    assert len(convolutions(model)) == 52
    with torch.inference_mode():
        logits = model(image)
    assert (logits - run(str(path), image)).abs().max() < 1e-4
    probability, index = logits.softmax(1)[0].max(0)
    name, expected = PHOTOS[photo]
    assert name in labels[int(index)]
    assert abs(float(probability) - expected) < 0.01
