"""The MODEL argument: loading it and making sure that it maps images to one score a class."""

from __future__ import annotations

import argparse
import copy
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_mbv2.errors import Error, ModelError, UnavailableError
from torch_mbv2.mobilenet import MobileNetV2
from torch_mbv2.sources import ModelInfo, load_model

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_DEFAULT_SIZE = 224
_LARGEST = 4096  # images beyond this only exhaust the memory


@dataclass(frozen=True)
class ImageModel:
    """A stock model of (N, 3, H, W) images, on the CPU in its own dtype.

    Attributes:
        size: height and width of its input.
        batch: the only batch size that it takes, or None if it takes any.
    """

    module: nn.Module
    info: ModelInfo
    size: tuple[int, int]
    batch: int | None

    def to(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A copy of the module on a device, in a dtype."""
        return copy.deepcopy(self.module).to(device, dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and `--device`."""
    parser.add_argument(
        "model", metavar="MODEL", help="an ONNX file, torchvision:NAME or timm:NAME"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto (the default) is the GPU if there is one",
    )


def positive(text: str) -> int:
    """The type of an argument that counts something: a whole number from 1 up."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return number


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
    inputs = _count_inputs(module)
    if inputs != 1:
        raise ModelError(f"{spec}: the model must have one input, an image; it has {inputs}")
    shape = info.input_shape
    if shape is None:
        channels = module.architecture.in_channels if isinstance(module, MobileNetV2) else None
        shape = (None, channels, None, None)
    if len(shape) != 4 or shape[1] not in (3, None):
        declared = ", ".join("?" if n is None else str(n) for n in shape)
        raise ModelError(
            f"{spec}: the model's input must be images of shape (N, 3, H, W), it is ({declared})"
        )
    height, width = (size or n or _DEFAULT_SIZE for n in shape[2:])
    # A MobileNetV2 is rebuilt, without the sizes that other graphs have written into them.
    batch = None if isinstance(module, MobileNetV2) else shape[0]
    return ImageModel(module, info, (height, width), batch)


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
    rows = [_run(module, piece, batch) for piece in images.split(batch)]
    return torch.cat(rows)


def _run(module: nn.Module, images: Tensor, batch: int) -> Tensor:
    count = len(images)
    if count < batch:
        images = torch.cat([images, images[-1:].expand(batch - count, *images.shape[1:])])
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    try:
        with torch.inference_mode():
            output = module(images)
    except torch.OutOfMemoryError:
        raise Error(f"not enough GPU memory for images of shape {shape}") from None
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"the model cannot be run on {dtype} images of shape {shape}: {first}"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the model's output must be one score a class, it is a {type(output).__name__}"
        )
    if output.dim() != 2 or len(output) != batch or not output.is_floating_point():
        raise ModelError(
            f"the model's output must be scores of shape ({batch}, classes), "
            f"it is {str(output.dtype).removeprefix('torch.')} of shape {tuple(output.shape)}"
        )
    return output[:count]
