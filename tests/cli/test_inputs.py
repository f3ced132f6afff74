"""The verbs on ONNX files that take other images than PyTorch's: uint8, NHWC, raw pixels."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import json

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")

import numpy as np
import torch
from onnx import TensorProto
from onnx_forms import append, prepend
from onnx_helpers import export, randomise, run
from PIL import Image

from torch_mbv2 import cli
from torch_mbv2.cli import models
from torch_mbv2.mobilenet import MobileNetV2

SIZE, CLASSES = 32, 7
SETTING = [[1, 8, 1, 1], [6, 16, 2, 2]]
MEAN, STD = np.float32([124, 116, 104]), np.float32([58, 57, 57])


def network() -> MobileNetV2:
    return randomise(MobileNetV2(CLASSES, width_mult=0.25, inverted_residual_setting=SETTING))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    plain = export(network(), torch.zeros(1, 3, SIZE, SIZE))

    def save(name, steps, dtype, shape, **tensors):
        proto = onnx.ModelProto()
        proto.CopyFrom(plain)
        prepend(proto, steps, dtype, shape, **tensors)
        append(proto, "Softmax", axis=1)
        onnx.save(proto, folder / name)

    to_nchw = ("Transpose", "scaled", "nchw", {"perm": [0, 3, 1, 2]})
    cast = ("Cast", "pixels", "floats", {"to": TensorProto.FLOAT})
    normalise = [("Sub", "floats mean", "centred", {}), ("Div", "centred std", "scaled", {})]
    nhwc, statistics = ["n", SIZE, SIZE, 3], {"mean": MEAN, "std": STD}
    save("uint8.onnx", [cast, *normalise, to_nchw], TensorProto.UINT8, nhwc, **statistics)
    rename = ("Identity", "pixels", "floats", {})
    save("floats.onnx", [rename, *normalise, to_nchw], TensorProto.FLOAT, nhwc, **statistics)
    unit = {"mean": MEAN.reshape(3, 1, 1) / 255, "std": STD.reshape(3, 1, 1) / 255}
    nchw = ["n", 3, SIZE, SIZE]
    save("unit.onnx", [rename, *normalise], TensorProto.FLOAT, nchw, **unit)
    # No MobileNetV2, so that it goes through onnx2torch.
    head = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.LazyLinear(4)
    )
    head(torch.zeros(1, 3, SIZE, SIZE))
    plain = export(randomise(head), torch.zeros(1, 3, SIZE, SIZE))
    save("other.onnx", [cast, *normalise, to_nchw], TensorProto.UINT8, nhwc, **statistics)
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


FILES = ["uint8.onnx", "floats.onnx", "unit.onnx", "other.onnx"]


@pytest.fixture
def main(folder, monkeypatch, capsys):
    """Runs a verb in the folder: its exit status, its JSON, and what it says on stderr."""
    monkeypatch.chdir(folder)

    def call(*argv):
        status = cli.main([*argv, "--json", "-"])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return call


@pytest.mark.parametrize("file", FILES)
def test_classify_feeds_raw_pixels(main, folder, file):
    """The probabilities are ONNX Runtime's on the pixels of the image, in the file's own layout."""
    pixels = torch.from_numpy(np.asarray(Image.open(folder / "image.png")).copy())[None]
    if file == "unit.onnx":
        pixels = pixels.permute(0, 3, 1, 2) / 255
    elif file == "floats.onnx":
        pixels = pixels.float()
    expected = run(str(folder / file), pixels.contiguous())[0]
    status, found, _ = main("classify", file, "image.png", "--top", "3")
    assert status == 0
    best = {entry["class"]: entry["probability"] for entry in found["images"][0]["top"]}
    assert list(best) == expected.topk(3).indices.tolist()
    for index, probability in best.items():
        assert probability == pytest.approx(float(expected[index]), abs=1e-5)


@pytest.mark.parametrize("flag", ["--tf", "--mean 0.5 0.5 0.5", "--std 0.5 0.5 0.5"])
def test_classify_refuses_to_normalise_twice(main, flag):
    status, _, err = main("classify", "uint8.onnx", "image.png", *flag.split())
    assert status == 2
    assert "uint8.onnx normalises its input itself: leave out --tf, --mean and --std" in err


@pytest.mark.parametrize("file", FILES)
def test_compare(main, file):
    status, found, err = main("compare", file, "--batch", "3", "--layers")
    assert (status, err) == (0, "")
    assert [row["against"] for row in found["rivals"]] == ["stock", "onnxruntime"]
    assert found["input"] == [3, *((3, SIZE, SIZE) if file == "unit.onnx" else (SIZE, SIZE, 3))]


@pytest.mark.parametrize("file", FILES)
def test_bench(main, file):
    argv = ["--batches", "2", "--dtypes", "float32", "--rounds", "1", "--min-time", "0"]
    status, found, _ = main("bench", file, "--device", "cpu", "--rivals", "channels_last", *argv)
    assert (status, found["agree"]) == (0, True)


@pytest.mark.parametrize("file", FILES)
def test_inspect(main, file):
    status, found, _ = main("inspect", file, "--batch", "2")
    assert status == 0
    assert found["input"] == [2, *((3, SIZE, SIZE) if file == "unit.onnx" else (SIZE, SIZE, 3))]
    assert found["operators"]["Conv2d"] == (1 if file == "other.onnx" else 10)


@pytest.mark.parametrize("file", FILES)
def test_weights(main, file, tmp_path):
    assert main("weights", "export", file, str(tmp_path / "out"))[0] == 0
    assert main("weights", "check", file, str(tmp_path / "out"))[0] == 0


@pytest.mark.parametrize(
    ("file", "layout", "dtype", "largest"),
    [
        ("uint8.onnx", (2, SIZE, SIZE, 3), torch.uint8, 255),
        ("floats.onnx", (2, SIZE, SIZE, 3), torch.float16, 255),
        ("unit.onnx", (2, 3, SIZE, SIZE), torch.float16, 1),
    ],
)
def test_noise_is_what_the_model_takes(folder, file, layout, dtype, largest):
    model = models.load(str(folder / file))
    noise = model.noise(2, torch.float16)
    assert (tuple(noise.shape), noise.dtype) == (layout, dtype)
    assert float(noise.float().max()) == pytest.approx(largest, rel=0.01)
    assert float(noise.float().min()) == pytest.approx(0, abs=0.01 * largest)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, model.noise(2, torch.float16))


def test_quantised_model_is_noted(main, folder, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    onnx.save(export(network(), torch.zeros(1, 3, SIZE, SIZE)), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    status, _, err = main("inspect", str(tmp_path / "int8.onnx"))
    assert status == 0
    assert "note: " in err
    assert "int8.onnx: a quantised model, loaded as its float equivalent" in err


def test_image_of_booleans(main, tmp_path):
    proto = export(network(), torch.zeros(1, 3, SIZE, SIZE))
    cast = ("Cast", "pixels", "floats", {"to": TensorProto.FLOAT})
    prepend(proto, [cast], TensorProto.BOOL, ["n", 3, SIZE, SIZE])
    onnx.save(proto, tmp_path / "bool.onnx")
    status, _, err = main("inspect", str(tmp_path / "bool.onnx"))
    assert status == 2
    assert "the model's input must be of real numbers, it is of bool" in err


def test_image_that_is_declared_too_large(main, tmp_path):
    proto = export(network(), torch.zeros(1, 3, SIZE, SIZE))
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 10**6
    onnx.save(proto, tmp_path / "large.onnx")
    status, _, err = main("inspect", str(tmp_path / "large.onnx"))
    assert status == 2
    assert "the model's images are 1000000 x 1000000 pixels; at most 4096 are read" in err
