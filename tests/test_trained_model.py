"""A real trained MobileNetV2 on real photos: what it sees, and that its logits are ONNX Runtime's.

The model and the photos lie next to the checkout, in `shared` or in the folder that the variable
TORCH_MBV2_SHARED names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import torch_mbv2
from torch_mbv2 import testing
from torch_mbv2.cli.classify import read_labels
from torch_mbv2.cli.images import Preprocessing
from torch_mbv2.measure.conditions import exact_settings

SHARED = Path(os.environ.get("TORCH_MBV2_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODEL = SHARED / "models" / "mobilenetv2_imagenet_tf.onnx"
TF = Preprocessing((224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

# ONNX Runtime's top-1 and its probability, rounded to the digits given.
PHOTOS = {
    "cat.jpg": ("Egyptian cat", 0.78, 2),
    "chickadee.png": ("chickadee", 0.98, 2),
    "dragonfly.png": ("dragonfly", 0.98, 2),
    "hot_dog.jpg": ("hotdog", 0.82, 2),
    "parrot.jpg": ("macaw", 0.998, 3),
    "uniform.png": ("military uniform", 0.93, 2),
}
# Logits reach 17 here; float32 over 53 layers is off by some 1e-5.
BOUND = 1e-4

pytestmark = pytest.mark.skipif(
    not MODEL.is_file(), reason="the trained model is not there: no folder `shared`"
)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(scope="module")
def photos():
    return torch.stack([TF.load(SHARED / "images" / name) for name in PHOTOS])


@pytest.fixture(scope="module")
def stock():
    model = torch_mbv2.load_onnx(MODEL)
    assert isinstance(model, torch_mbv2.MobileNetV2)
    return model


@pytest.fixture(scope="module")
def expected(photos):
    """ONNX Runtime's logits, on the CPU."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    session = onnxruntime.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": photos.numpy()})[0])


def logits(stock, photos, patched, device, dtype=torch.float32):
    model = torch_mbv2.unpatch(stock).to(device, dtype)  # a copy
    if patched:
        model = torch_mbv2.patch(model, strict=True)
    with torch.inference_mode(), exact_settings():
        return model(photos.to(device, dtype)).cpu()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_sees_what_is_there(stock, photos, device, patched):
    labels = read_labels(str(SHARED / "models" / "imagenet_labels.txt"))
    best = logits(stock, photos, patched, device).softmax(1).max(1)
    found = {
        name: (labels[index].split(",")[0], round(probability, PHOTOS[name][2]))
        for name, index, probability in zip(
            PHOTOS, best.indices.tolist(), best.values.tolist(), strict=True
        )
    }
    assert found == {name: (label, value) for name, (label, value, _) in PHOTOS.items()}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_logits_are_those_of_onnx_runtime(stock, photos, expected, device, patched):
    found = logits(stock, photos, patched, device)
    assert testing.max_abs(found, expected) <= BOUND


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sees_the_same(stock, photos, expected, dtype):
    found = logits(stock, photos, True, "cuda", dtype)
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_half_as_much_again_as_that_of_stock(stock, photos, dtype):
    """Both against float64 on the same rounded weights and images."""
    rounded = torch_mbv2.unpatch(stock).to(dtype)
    exact = logits(rounded, photos.to(dtype), False, "cuda", torch.float64)
    errors = [
        testing.relative_l2(logits(rounded, photos, patched, "cuda", dtype), exact)
        for patched in (True, False)
    ]
    assert errors[0] <= testing.ERROR_RATIO * errors[1]
