"""Where a model comes from: an ONNX file, torchvision or timm, named by one string."""

from __future__ import annotations

import difflib
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.mobilenet import MobileNetV2, Preprocessing

TIMEOUT = 5.0
"""Seconds that a server has to answer before random weights are taken instead."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a loaded model besides its weights; None where nothing is."""

    name: str
    weights: str  # where they come from, for people to read
    pretrained: bool  # False for seeded random weights
    # (N, C, H, W), or (N, H, W, C) for some ONNX files; None for any size
    input_shape: tuple[int | None, ...] | None = None
    input_dtype: torch.dtype = torch.float32
    mean: tuple[float, ...] | None = None  # of pixels in [0, 1], per channel
    std: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None
    white: float | None = None  # the value of a white pixel, for models that normalise their input
    notes: tuple[str, ...] = ()  # how the module differs from what its source computes


def load_model(spec: str, *, pretrained: bool = True, seed: int = 0) -> tuple[nn.Module, ModelInfo]:
    """The model that `spec` names, in eval mode on the CPU, and what is known about it.

    spec: the path of an ONNX file, `torchvision:NAME` or `timm:NAME`.
    pretrained: use the library's default weights if they are in its cache or its server answers
        within a few seconds; else, and where there are none, random weights.
    seed: of the random weights. The global random state is left as it was.

    Raises ModelError for an unknown name or an unusable file, UnavailableError if the library is
    not installed.
    """
    source, _, name = spec.partition(":")
    if source == "torchvision":
        return _from_torchvision(name, pretrained, seed)
    if source == "timm":
        return _from_timm(name, pretrained, seed)
    if not spec.endswith(".onnx") and not Path(spec).exists():
        raise ModelError(
            f"{spec}: no such file; a model is an ONNX file, torchvision:NAME or timm:NAME"
        )
    return _from_onnx(spec)


def _from_onnx(path: str) -> tuple[nn.Module, ModelInfo]:
    from torch_mbv2.onnx import load

    loaded = load(path)
    model, dtype = loaded.module, loaded.dtype or torch.float32
    if dtype is torch.bool or dtype.is_complex:
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(f"{path}: the model's input must be of real numbers, it is of {kind}")
    white = None if dtype.is_floating_point else min(255.0, float(torch.iinfo(dtype).max))
    preprocessing = model.architecture.preprocessing if isinstance(model, MobileNetV2) else None
    if preprocessing is not None and white is None:
        white = _white(preprocessing)
    return model, ModelInfo(
        Path(path).name,
        f"the file {path}",
        True,
        loaded.shape,
        dtype,
        mean=None if white is None else (0.0,) * 3,
        std=None if white is None else (1 / white,) * 3,
        white=white,
        notes=loaded.notes,
    )


def _white(preprocessing: Preprocessing) -> float | None:
    """The value of a white pixel that a graph's own normalisation goes by; None if it has none."""
    scales, shifts = (map(abs, values) for values in (preprocessing.scale, preprocessing.shift))
    scale, shift = max(scales), max(shifts)
    if scale == 1.0 and shift == 0.0:
        return None
    # A mean of pixels from 0 to 255 is about 100, their standard deviation about 60.
    return 255.0 if scale < 0.1 or shift > 10 * scale else 1.0


def _from_torchvision(name: str, pretrained: bool, seed: int) -> tuple[nn.Module, ModelInfo]:
    try:
        import torchvision
    except ImportError as error:
        raise _missing("torchvision", error) from None
    models = torchvision.models
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    weights = models.get_model_weights(name).DEFAULT
    if pretrained:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name).is_file()
        why = None if cached else _unreachable(weights.url)
    else:
        why = "not asked for"
    if why is None:
        try:
            with _socket_timeout():
                model = models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:  # cut off, or a damaged file
            why = str(error)
    transform = weights.transforms()
    size = transform.crop_size[0]
    shape = (None, 3, size, size)
    text = f"torchvision's {weights}"
    if why is not None:
        with _seeded(seed):
            model = models.get_model(name, weights=None)
            _settle_norms(model, (3, size, size))
        text = _random_text(seed, text, why)
    return model.eval(), ModelInfo(
        name,
        text,
        why is None,
        shape,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        labels=tuple(weights.meta["categories"]),
    )


def _from_timm(name: str, pretrained: bool, seed: int) -> tuple[nn.Module, ModelInfo]:
    try:
        import timm
    except ImportError as error:
        raise _missing("timm", error) from None
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    why = "not asked for" if not pretrained else None
    if why is None:
        why = "there are none" if config is None else _timm_unreachable(config)
    if why is None:
        try:
            with _socket_timeout():
                model = timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            why = str(error)
    if why is not None:
        with _seeded(seed):
            model = timm.create_model(name, pretrained=False)
    settings: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    size = settings.get("input_size")
    text = f"timm's {name}" + (f".{settings['tag']}" if settings.get("tag") else "")
    if why is not None:
        if size is not None:
            with _seeded(seed):
                _settle_norms(model, size)
        text = _random_text(seed, text, why)
    return model.eval(), ModelInfo(
        name,
        text,
        why is None,
        None if size is None else (None, *size),
        mean=_floats(settings.get("mean")),
        std=_floats(settings.get("std")),
    )


def _timm_unreachable(config: Any) -> str | None:
    """Why timm's weights cannot be had; None if they can."""
    repository = config.hf_hub_id
    if config.file and Path(config.file).is_file():
        return None
    if repository:
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return "huggingface_hub is not installed"
        files = ("model.safetensors", "pytorch_model.bin")
        if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
            return None
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return _unreachable(f"{host}/{repository}/resolve/main/model.safetensors")
    return _unreachable(config.url) if config.url else "there are none"


def _unreachable(url: str) -> str | None:
    """Why the server of `url` cannot be reached within `TIMEOUT`; None if it can."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "torch-mbv2"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        return f"its server answers {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"its server cannot be reached: {reason}"


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """Downloads stop when nothing arrives for `TIMEOUT`; the libraries set no limit themselves."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _settle_norms(model: nn.Module, size: Sequence[int]) -> None:
    """Batch norms take the statistics of a small batch of noise.

    With those that they are made with, the signal of an untrained MobileNetV2 dies out layer by
    layer: its logits are all but the same for every image, so comparing them would show nothing.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(2, *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()


def _random_text(seed: int, wanted: str, why: str) -> str:
    return f"random, seed {seed} ({wanted}: {why})"


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _missing(package: str, error: ImportError) -> UnavailableError:
    extra = {"torchvision": "onnx", "timm": "test"}[package]
    return UnavailableError(
        f"{package} models need the package {error.name or package}: pip install {package}, "
        f"or pip install 'torch-mbv2[{extra}]'"
    )


def _unknown(library: str, name: str, names: Sequence[str]) -> ModelError:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    close = close or difflib.get_close_matches("mobilenetv2", names, n=3, cutoff=0.5)
    return ModelError(f"{library} has no model named {name!r}; it has {', '.join(close)}, ...")
