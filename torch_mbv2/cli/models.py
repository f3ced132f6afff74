"""The MODEL argument: loading it and making sure that it maps images to one score a class."""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mbv2.cli import output
from torch_mbv2.errors import Error, ModelError, UnavailableError, first_line, is_out_of_memory
from torch_mbv2.mobilenet import MobileNetV2
from torch_mbv2.sources import ModelInfo, load_model

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ONNX_DTYPES = {  # as ONNX Runtime names them
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}
_DEFAULT_SIZE = 224
_LARGEST = 4096  # images beyond this only exhaust the memory
_MOST = 2**31 - 1  # of anything that is counted; their bytes still fit into 64 bits


@dataclass(frozen=True)
class ImageModel:
    """A stock model of images with three channels, on the CPU in its own dtype.

    Attributes:
        size: height and width of its input.
        batch: the only batch size that it takes, or None if it takes any.
        channels_last: its input is (N, H, W, 3) instead of (N, 3, H, W).
    """

    module: nn.Module
    info: ModelInfo
    size: tuple[int, int]
    batch: int | None
    channels_last: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A copy of the module on a device, in a dtype."""
        return copy.deepcopy(self.module).to(device, dtype)

    def inputs(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """What the module takes for images (N, 3, H, W), float: in its layout, and in `dtype` or,
        if it takes whole numbers, in these."""
        if self.channels_last:
            images = images.permute(0, 2, 3, 1).contiguous()
        if self.info.input_dtype.is_floating_point:
            return images.to(dtype)
        info = torch.iinfo(self.info.input_dtype)
        return images.round().clamp(info.min, info.max).to(self.info.input_dtype)

    def facts(self) -> dict[str, Any]:
        """What the JSON of a measurement says of it."""
        return {
            "name": self.info.name,
            "weights": self.info.weights,
            "pretrained": self.info.pretrained,
            "input": list(self.size),
        }

    def case_batch(self, wanted: int | None) -> int:
        """The batch size for `--batch`, by default 1 or the only one that the model takes. Raises
        Error for one that it does not take."""
        batch = wanted or self.batch or 1
        if self.batch not in (None, batch):
            raise Error(
                f"--batch: the model takes batches of {self.batch} only; export it with a batch of "
                "any size for others"
            )
        return batch

    def noise(self, count: int, dtype: torch.dtype) -> Tensor:
        """`inputs` of so many seeded images: normal noise, or even up to white where the model
        normalises its input itself."""
        generator = torch.Generator().manual_seed(0)
        shape = (count, 3, *self.size)
        if self.info.white is None:
            return self.inputs(torch.randn(shape, generator=generator), dtype)
        return self.inputs(torch.rand(shape, generator=generator) * self.info.white, dtype)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL."""
    parser.add_argument(
        "model", metavar="MODEL", help="an ONNX file, torchvision:NAME or timm:NAME"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and `--device`."""
    add_model(parser)
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto (the default) is the GPU if there is one",
    )


def add_resolution(parser: argparse.ArgumentParser) -> None:
    """`--resolution`."""
    parser.add_argument(
        "--resolution",
        type=image_size,
        metavar="N",
        help="height and width; default: the model's",
    )


def add_case(parser: argparse.ArgumentParser) -> None:
    """`--resolution`, `--batch` and `--dtype` of a verb that runs the model on one batch."""
    add_resolution(parser)
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="images at a time; default: 1, or the only number that the model takes",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the weights and activations; default: float32",
    )


def positive(text: str) -> int:
    """The type of an argument that counts something: a whole number from 1 up."""
    digits = text.strip()
    if not digits.isdecimal() or not digits.strip("0"):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    if len(digits) > len(str(_MOST)) or int(digits) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}")
    return int(digits)


def image_size(text: str) -> int:
    """The type of an argument that is the height and width of images."""
    number = positive(text)
    if number > _LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {_LARGEST} pixels, got {text!r}")
    return number


def device(name: str) -> torch.device:
    """The device that `--device` names. Raises UnavailableError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device cuda: no CUDA GPU is visible to torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load(spec: str, size: int | None = None) -> ImageModel:
    """The model that `spec` names, for images of `size` or of the size that it declares, else 224.

    Raises ModelError if it takes anything but one batch of three-channel images.
    """
    module, info = load_model(spec)
    for note in info.notes:
        output.note(note)
    inputs = _count_inputs(module)
    if inputs != 1:
        raise ModelError(f"{spec}: the model must have one input, an image; it has {inputs}")
    shape = info.input_shape
    if shape is None:
        channels = module.architecture.in_channels if isinstance(module, MobileNetV2) else None
        shape = (None, channels, None, None)
    channels_last = len(shape) == 4 and shape[1] != 3 and shape[3] == 3
    if len(shape) != 4 or (shape[1] not in (3, None) and not channels_last):
        declared = ", ".join("?" if n is None else str(n) for n in shape)
        raise ModelError(
            f"{spec}: the model's input must be images of shape (N, 3, H, W), it is ({declared})"
        )
    sides = shape[1:3] if channels_last else shape[2:]
    if any(n is not None and n > _LARGEST for n in sides):
        raise ModelError(
            f"{spec}: the model's images are {sides[0]} x {sides[1]} pixels; at most {_LARGEST} "
            "are read"
        )
    height, width = (size or n or _DEFAULT_SIZE for n in sides)
    # A MobileNetV2 is rebuilt, without the sizes that other graphs have written into them.
    batch = None if isinstance(module, MobileNetV2) else shape[0]
    return ImageModel(module, info, (height, width), batch, channels_last)


def _count_inputs(module: nn.Module) -> int:
    """How many arguments `forward` needs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def scores(module: nn.Module, images: Tensor, batch: int | None = None) -> Tensor:
    """`module(images)`, checked to be (N, classes); in pieces of `batch`, the last one filled up.

    Raises ModelError for another output, or if the model cannot be run on such images.
    """
    batch = batch or len(images)
    return torch.cat(
        [
            _scores(call(module, fill(piece, batch)), batch)[: len(piece)]
            for piece in images.split(batch)
        ]
    )


def fill(images: Tensor, batch: int) -> Tensor:
    """`images`, (N, ...), and the last of them again until there are `batch`."""
    missing = images[-1:].expand(batch - len(images), *images.shape[1:])
    return torch.cat([images, missing]) if len(missing) else images


def call(module: nn.Module, images: Tensor) -> Any:
    """`module(images)`, whatever it returns. Raises ModelError if it cannot be run on them, and
    Error if there is too little memory."""
    try:
        with running_on(images), torch.inference_mode():
            return module(images)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise Error(f"not enough memory for images of shape {tuple(images.shape)}") from None


@contextmanager
def running_on(images: Tensor) -> Iterator[None]:
    """Around calls of a model, which may raise anything: that becomes a ModelError, unless it is
    for want of memory."""
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    try:
        yield
    except Error:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the model cannot be run on {dtype} images of shape {shape}: {first_line(error)}"
        ) from error


def _scores(output: Any, batch: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the model's output must be one score a class, it is a {type(output).__name__}"
        )
    if output.dim() != 2 or len(output) != batch or not output.is_floating_point():
        raise ModelError(
            f"the model's output must be scores of shape ({batch}, classes), "
            f"it is {str(output.dtype).removeprefix('torch.')} of shape {tuple(output.shape)}"
        )
    return output


class OnnxRuntime(nn.Module):
    """An ONNX file as ONNX Runtime computes it on the CPU, in the file's own dtype.

    Takes images in any dtype and returns what the file has as its outputs, a tensor or a list.

    Attributes:
        batch: the only batch size that the file takes, or None if it takes any.

    Raises UnavailableError if onnxruntime is not installed, ModelError if it cannot run the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UnavailableError(
                "comparing with ONNX Runtime needs the package onnxruntime: "
                "pip install 'torch-mbv2[onnx]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; these are raised too
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no base of their own
            raise self._failed(path, error) from error
        self.path = path
        self.input = self.session.get_inputs()[0]
        size = self.input.shape[0] if self.input.shape else None
        self.batch = size if isinstance(size, int) else None

    @staticmethod
    def _failed(path: str, error: Exception) -> ModelError:
        return ModelError(f"{path}: ONNX Runtime cannot run it: {first_line(error)}")

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        wanted = self.input.shape
        fits = len(wanted) == images.dim() and all(
            not isinstance(n, int) or n == size
            for n, size in zip(wanted, images.shape, strict=True)
        )
        if not fits:
            declared = ", ".join(str(n) if isinstance(n, int) else "?" for n in wanted)
            raise ModelError(
                f"{self.path}: ONNX Runtime takes images of shape ({declared}) only, got "
                f"{tuple(images.shape)}"
            )
        array = images.cpu().to(_ONNX_DTYPES.get(self.input.type, images.dtype)).numpy()
        try:
            outputs = self.session.run(None, {self.input.name: array})
        except Exception as error:
            raise self._failed(self.path, error) from error
        tensors = [torch.from_numpy(output) for output in outputs]
        return tensors[0] if len(tensors) == 1 else tensors
