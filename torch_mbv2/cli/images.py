"""From image files to the batch that a model takes: reading, resizing, normalising."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from torch_mbv2.cli import models
from torch_mbv2.errors import Error
from torch_mbv2.sources import ModelInfo

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CROP = 224 / 256  # of the short side, as torchvision's and the paper's evaluation


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image: `(resize(image) / 255 - mean) / std`, per channel.

    Attributes:
        size: height and width that the model takes.
        mean, std: of pixels in [0, 1].
        crop: keep the aspect ratio and cut the centre out, instead of stretching the whole image.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop: bool = False

    def load(self, path: str | Path) -> Tensor:
        """The image in a file as (3, H, W), float32. Raises Error if it cannot be read."""
        image = self.resize(read(path))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)

    def resize(self, image: Image.Image) -> Image.Image:
        """The image at `size`, bilinear with antialiasing, cut to the centre first if `crop`."""
        height, width = self.size
        box = None
        if self.crop:
            # Cutting out of the original what would be left of the resized image saves pixels.
            scale = _CROP * min(image.width / width, image.height / height)
            left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def read(path: str | Path) -> Image.Image:
    """The image in a file, upright and in RGB. Raises Error if it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                grey = np.asarray(upright, dtype=np.float32) / 257
                upright = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
            return upright.convert("RGB")
    except FileNotFoundError:
        raise Error(f"{path}: no such image") from None
    except Exception as error:  # decoders raise whatever they stumble over
        if isinstance(error, OSError) and error.strerror is not None:
            why = error.strerror
        elif isinstance(error, UnidentifiedImageError):
            why = "not in a format that Pillow knows"
        else:
            why = str(error) or type(error).__name__
        raise Error(f"{path}: cannot be read as an image: {why}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is done to an image."""
    group = parser.add_argument_group(
        "preprocessing",
        "By default the image is stretched to the model's input size, bilinear, and normalised "
        "with the mean and standard deviation that the model is known to take, else ImageNet's.",
    )
    group.add_argument("--tf", action="store_true", help="scale pixels to [-1, 1], as TensorFlow")
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            nargs=3,
            type=float,
            metavar=("R", "G", "B"),
            help=f"{name} of pixels in [0, 1]",
        )
    group.add_argument(
        "--size",
        type=models.image_size,
        metavar="N",
        help="height and width of the input; default: the model's",
    )
    group.add_argument(
        "--crop",
        action="store_true",
        help="resize the short side to size * 256 / 224 and cut out the centre",
    )


def from_args(args: argparse.Namespace, info: ModelInfo, size: tuple[int, int]) -> Preprocessing:
    """What the flags ask for, else what is known about the model, else ImageNet's."""
    if args.tf and (args.mean is not None or args.std is not None):
        raise Error("--tf is mean 0.5 and std 0.5: give it, or --mean and --std")
    if not all(map(math.isfinite, [*(args.mean or ()), *(args.std or ())])):
        raise Error("--mean and --std must be finite numbers")
    if args.std is not None and 0 in args.std:
        raise Error("--std: a standard deviation cannot be 0")
    if info.white is not None and (args.tf or args.mean is not None or args.std is not None):
        raise Error(
            f"{info.name} normalises its input itself: leave out --tf, --mean and --std; it takes "
            f"pixels from 0 to {info.white:g}"
        )
    mean: Sequence[float]
    std: Sequence[float]
    if args.tf:
        mean, std = (0.5,) * 3, (0.5,) * 3
    else:
        mean = args.mean or info.mean or IMAGENET_MEAN
        std = args.std or info.std or IMAGENET_STD
    return Preprocessing(size, _three("mean", mean), _three("std", std), args.crop)


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise Error(f"the model's {name} has {len(values)} channels; an image has 3")
    first, second, third = values
    return first, second, third
