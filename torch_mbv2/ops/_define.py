"""What makes an op of its schema, its shape and its meaning in stock operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from .. import _extension

P = ParamSpec("P")

SCHEMAS: dict[str, str] = {}
"""The schema of each op, by the op's name."""

# The library first: a schema that it has is not defined again. What it implements without having
# the schema waits for it.
_extension.load()
_library = torch.library.Library("torch_mbv2", "FRAGMENT")


def define(
    schema: str,
    shape: Callable[Concatenate[str, P], tuple[int, ...]],
    reference: Callable[P, Tensor],
    *,
    layout: torch.memory_format = torch.channels_last,
    like: str = "input",
) -> Callable[P, Tensor]:
    """Register one op: its schema, its fake (shape and strides without data), and its
    implementation for every device, which the compiled library replaces on CUDA.

    Args:
        schema: of `torch.ops.torch_mbv2.NAME`, from NAME on.
        shape: checks all arguments, and gives the output's shape; it gets the op's name first.
        reference: what the op means, in stock operators; called with arguments that `shape` let
            pass, and only for outputs with elements.
        layout: of an output with 4 dimensions; any other is contiguous.
        like: the argument whose dtype the output has.

    Returns:
        What calls the op. Plain tensors on the CPU skip the dispatcher, whose way through Python
        costs more than a small layer.
    """
    name = schema.split("(", 1)[0]
    names = [argument.split("=")[0].split()[-1] for argument in _arguments(schema)]
    position = names.index(like)

    def empty(size: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        model = args[position] if position < len(args) else kwargs[like]
        return torch.empty(
            size,
            dtype=model.dtype,
            device=model.device,
            memory_format=layout if len(size) == 4 else torch.contiguous_format,
        )

    def fake(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return empty(shape(name, *args, **kwargs), args, kwargs)

    def implementation(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        size = shape(name, *args, **kwargs)
        if 0 in size:
            return empty(size, args, kwargs)
        return _dense(reference(*args, **kwargs), layout)

    return register(schema, fake, implementation)


def register(
    schema: str, fake: Callable[P, Tensor], implementation: Callable[P, Tensor]
) -> Callable[P, Tensor]:
    """Register one op by its schema, its fake, and its implementation for every device.

    Returns:
        What calls the op, as `define` says.
    """
    name = schema.split("(", 1)[0]
    SCHEMAS[name] = schema
    tag = torch.Tag.pt2_compliant_tag
    if not hasattr(torch.ops.torch_mbv2, name):
        _library.define(schema, tags=(tag,))
    op = getattr(torch.ops.torch_mbv2, name).default
    if tag not in op.tags:  # the library's, whose ABI has no tags before torch 2.12
        op.tags.append(tag)

    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        input: Any = args[0] if args else kwargs["input"]
        if type(input) is Tensor and input.is_cpu and not torch.compiler.is_compiling():
            return implementation(*args, **kwargs)
        out: Tensor = op(*args, **kwargs)
        return out

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torch_mbv2::{name}", fake, lib=_library)
    return call


def _arguments(schema: str) -> list[str]:
    """The arguments of a schema, each with its type."""
    return schema[schema.index("(") + 1 : schema.index(")")].split(", ")


def _dense(x: Tensor, layout: torch.memory_format) -> Tensor:
    """`x` in `layout`; in channels_last, with the strides a fresh tensor has even where a size of 1
    leaves them open (so that it equals the fake)."""
    if x.dim() != 4 or layout != torch.channels_last:
        return x.contiguous()
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    strides = (h * w * c, 1, w * c, c)
    return x if x.stride() == strides else x.as_strided((n, c, h, w), strides)
