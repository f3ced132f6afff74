"""Models by name: torchvision, timm, ONNX files, and what happens without a network."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_mbv2 import sources
from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.sources import load_model


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No download in tests: no server is there, and the caches are empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "_unreachable", lambda url: "no server in tests")


def test_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision", reason="the extra `onnx` is not installed")
    state = torch.get_rng_state()
    model, info = load_model("torchvision:mobilenet_v2", seed=3)
    assert type(model) is torchvision.models.MobileNetV2
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert (info.name, info.pretrained, info.input_shape) == (
        "mobilenet_v2",
        False,
        (None, 3, 224, 224),
    )
    assert info.mean == (0.485, 0.456, 0.406)
    assert info.std == (0.229, 0.224, 0.225)
    assert info.labels is not None
    assert info.labels[:2] == ("tench", "goldfish")
    assert info.weights.startswith("random, seed 3 (torchvision's MobileNet_V2_Weights")
    assert "no server in tests" in info.weights


def test_timm() -> None:
    pytest.importorskip("timm", reason="the extra `test` is not installed")
    model, info = load_model("timm:mobilenetv2_050", seed=3)
    assert type(model).__name__ == "EfficientNet"
    assert not model.training
    assert not info.pretrained
    assert info.input_shape == (None, 3, 224, 224)
    assert info.mean == (0.485, 0.456, 0.406)
    assert "timm's mobilenetv2_050" in info.weights


@pytest.mark.parametrize("pretrained", [True, False])
def test_random_weights_are_seeded_and_alive(pretrained: bool) -> None:
    """The logits depend on the seed and on the image: a comparison of models shows something."""
    pytest.importorskip("torchvision", reason="the extra `onnx` is not installed")
    images = torch.randn(2, 3, 96, 96)
    spec = "torchvision:mobilenet_v2"
    with torch.inference_mode():
        first, again, other = (
            load_model(spec, pretrained=pretrained, seed=seed)[0](images) for seed in (1, 1, 2)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[0] - first[1]).norm() > 0.05 * first.norm()


def test_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    onnx_helpers = pytest.importorskip("onnx_helpers", reason="ONNX Runtime is not installed")
    from torch_mbv2.mobilenet import MobileNetV2

    small = MobileNetV2(10, inverted_residual_setting=[[1, 8, 1, 1]]).eval()
    path = tmp_path / "small.onnx"
    path.write_bytes(onnx_helpers.export(small, torch.randn(1, 3, 48, 40)).SerializeToString())
    model, info = load_model(str(path))
    assert isinstance(model, MobileNetV2)
    assert info == sources.ModelInfo(
        "small.onnx", f"the file {path}", True, input_shape=(None, 3, 48, 40)
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "torchvision:mobilnet_v2",
            "torchvision has no model named 'mobilnet_v2'; it has mobilenet_v2",
        ),
        ("torchvision:", "torchvision has no model named ''; it has mobilenet_v2"),
        ("timm:mobilenetv2_99", "timm has no model named 'mobilenetv2_99'; it has mobilenetv2_"),
        ("nothing.onnx", "nothing.onnx: No such file or directory"),
        (
            "mobilenet_v2",
            "mobilenet_v2: no such file; a model is an ONNX file, torchvision:NAME or",
        ),
        ("C:model", "C:model: no such file; a model is"),
    ],
)
def test_unknown(spec: str, message: str) -> None:
    for library in ("torchvision", "timm"):
        if spec.startswith(library):
            pytest.importorskip(library, reason=f"{library} is not installed")
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnavailableError, match=f"need the package {library}: pip install"):
        load_model(f"{library}:mobilenet_v2")


def test_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that hangs costs the timeout, no more."""
    monkeypatch.undo()
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.perf_counter()
        why = sources._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth")
        assert time.perf_counter() - start < 3
    assert why is not None
    assert why.startswith("its server cannot be reached: ")


@pytest.mark.parametrize(("status", "reachable"), [(b"200 OK", True), (b"404 Not Found", False)])
def test_server_that_answers(
    status: bytes, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        why = sources._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth")
        thread.join()
    assert (why is None) == reachable
    assert reachable or "answers 404" in why


def test_settled_norms_keep_their_settings() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03))
    sources._settle_norms(model, (3, 8, 8))
    norm = model[1]
    assert norm.momentum == 0.03
    assert int(norm.num_batches_tracked) == 0
    assert not torch.equal(norm.running_var, torch.ones(4))
