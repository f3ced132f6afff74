"""Loading ONNX files as PyTorch modules."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from torch_mbv2.errors import Error, ModelError, UnavailableError

if TYPE_CHECKING:
    import onnx

__all__ = ["load_onnx"]


def load_onnx(path_or_proto: str | os.PathLike[str] | bytes | onnx.ModelProto) -> nn.Module:
    """The `nn.Module`, in eval mode on the CPU, that computes what an ONNX model computes.

    A graph that is a MobileNetV2 by its structure comes back as `MobileNetV2`, with torchvision's
    parameter names: `BatchNorm2d` where the file has it, convolutions with a bias where it is
    folded. Any other graph is converted by onnx2torch into an `fx.GraphModule`. Weights keep the
    file's dtype, and so do the outputs of a `MobileNetV2`. Nothing in the file is executed. A
    quantised model is loaded as its float equivalent, with a warning that says so.

    path_or_proto: a path (weights in a file next to it are read too), the bytes of such a file, or
        an `onnx.ModelProto`, which is left as it is.

    Raises ModelError for a file or graph that cannot be used, and UnavailableError if a package
    that this needs is not installed.
    """
    loaded = load(path_or_proto)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.module


@dataclass(frozen=True)
class Loaded:
    """A module, and what the file says about it.

    Attributes:
        shape, dtype: of its first input, as declared; None stands for a size that may vary, and
            for what is not declared.
        notes: sentences on how the module differs from what the file computes, such as that of a
            quantised model, which is loaded as its float equivalent.
    """

    module: nn.Module
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None
    notes: tuple[str, ...]


@torch.inference_mode(False)
def load(path_or_proto: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Loaded:
    """As `load_onnx`, with more than the module."""
    try:
        import onnx

        from torch_mbv2.onnx import clean, convert, graph, recognise
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("google", "numpy", "onnx"):
            raise
        raise UnavailableError(
            f"reading ONNX files needs the package {error.name}: pip install 'torch-mbv2[onnx]'"
        ) from None
    if not isinstance(path_or_proto, (str, os.PathLike, bytes, onnx.ModelProto)):
        raise TypeError(f"load_onnx takes a path, bytes or a ModelProto, got {type(path_or_proto)}")
    where = "the ONNX model"
    try:
        read = graph.read(path_or_proto)
        where = read.source
        cleaned = clean.clean(read)
        module = recognise.recognise(cleaned) or convert.convert(cleaned)
    except Error:
        raise
    except MemoryError:
        raise ModelError(f"{where}: there is not enough memory for it") from None
    except Exception as error:
        # A file whose parts do not fit each other, as nobody writes it.
        raise ModelError(
            f"{where}: damaged: {type(error).__name__}: {graph.first_line(error)}"
        ) from error
    image = cleaned.inputs[0] if cleaned.inputs else None
    return Loaded(
        module,
        None if image is None else graph.declared_shape(image),
        None if image is None else graph.declared_dtype(image),
        tuple(f"{where}: {note}" for note in cleaned.notes),
    )
