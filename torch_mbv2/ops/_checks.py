"""What the ops share: their checks, with one sentence for each refusal, and the forms that their
arguments may have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Activation = str | tuple[float | None, float | None] | None

_ACTIVATIONS: dict[str | None, tuple[float | None, float | None]] = {
    None: (None, None),
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fail(op: str, sentence: str) -> RuntimeError:
    """What is raised where an argument of `op` breaks a rule."""
    return RuntimeError(f"torch_mbv2::{op}: {sentence}")


def dtype_name(dtype: torch.dtype) -> str:
    """As messages name it: \"float32\"."""
    return str(dtype).removeprefix("torch.")


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_float(op: str, x: Tensor, name: str = "input") -> None:
    if x.dtype not in DTYPES:
        raise fail(op, f"{name} must be float32, float16 or bfloat16, got {dtype_name(x.dtype)}")


def check_image(op: str, input: Tensor) -> None:
    check_float(op, input)
    if input.dim() != 4:
        raise fail(op, f"input must have shape (N, C, H, W), got {shape_of(input)}")
    check_size(op, "input", *input.shape[1:])


def check_size(op: str, name: str, channels: int, height: int, width: int) -> None:
    # Kernels address one image with 32-bit offsets; only the batch makes them 64-bit.
    if channels * height * width >= 2**31:
        raise fail(
            op,
            f"one image of {name} must have fewer than 2147483648 elements, "
            f"got {(channels, height, width)}",
        )


def check_alike(
    op: str, name: str, x: Tensor, input: Tensor, like: tuple[str, Tensor] | None = None
) -> None:
    """`x` must have the dtype of `input`, or of what `like` names, and the device of `input`."""
    model, tensor = ("input", input) if like is None else like
    if x.dtype != tensor.dtype:
        raise fail(
            op,
            f"{name} must have the dtype of {model}, {dtype_name(tensor.dtype)}, "
            f"got {dtype_name(x.dtype)}",
        )
    if x.device != input.device:
        raise fail(op, f"{name} must be on the device of input, {input.device}, got {x.device}")


def check_bias(
    op: str,
    bias: Tensor | None,
    channels: int,
    input: Tensor,
    part: str = "",
    like: tuple[str, Tensor] | None = None,
) -> None:
    """`part` is what comes before "bias" and "weight" in the arguments' names."""
    if bias is None:
        return
    name = f"{part}bias"
    check_alike(op, name, bias, input, like)
    if bias.dim() != 1 or bias.shape[0] != channels:
        raise fail(
            op, f"{name} must have shape ({channels},) from {part}weight, got {shape_of(bias)}"
        )


def check_channels(op: str, input: Tensor) -> None:
    if input.shape[1] < 1:
        raise fail(op, f"input must have at least one channel, got {shape_of(input)}")


def check_pixels(op: str, input: Tensor) -> None:
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise fail(op, f"input must have at least one pixel, got {shape_of(input)}")


def check_ints(op: str, name: str, values: Sequence[int], count: int, least: int) -> None:
    if len(values) != count:
        raise fail(op, f"{name} must have {count} values, got {len(values)}")
    if min(values) < least:
        raise fail(op, f"{name} must be at least {least}, got {tuple(values)}")
    if max(values) >= 2**31:
        raise fail(op, f"{name} must be less than 2147483648, got {tuple(values)}")


def check_activation(op: str, act_min: float | None, act_max: float | None) -> None:
    if act_min is not None and act_max is not None and not act_min <= act_max:
        raise fail(op, f"act_min must not exceed act_max, got {act_min:g} and {act_max:g}")
    for name, bound in (("act_min", act_min), ("act_max", act_max)):
        if bound is not None and math.isnan(bound):
            raise fail(op, f"{name} must be a number or None, got nan")


def check_kernel_fits(
    op: str,
    height: int,
    width: int,
    kernel_h: int,
    kernel_w: int,
    kernel: str = "kernel",
    image: str = "input",
) -> None:
    if kernel_h < 1 or kernel_w < 1 or height < kernel_h or width < kernel_w:
        raise fail(
            op,
            f"the {kernel} must fit into the padded {image}: dilated kernel "
            f"{(kernel_h, kernel_w)}, padded {image} {(height, width)}",
        )


def check_fills(op: str, name: str, weight: Tensor) -> None:
    if weight.shape[0] < 1:
        raise fail(op, f"{name} must have at least one output channel, got {shape_of(weight)}")


def check_depthwise(op: str, weight: Tensor, channels: int, source: str) -> None:
    if weight.dim() != 4 or tuple(weight.shape[:2]) != (channels, 1):
        raise fail(
            op,
            f"depthwise_weight must have shape ({channels}, 1, kH, kW) from {source}, "
            f"got {shape_of(weight)}",
        )


def check_project(op: str, weight: Tensor, channels: int) -> None:
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise fail(
            op,
            f"project_weight must have shape (Cout, {channels}, 1, 1) from depthwise_weight, "
            f"got {shape_of(weight)}",
        )


def check_packed(
    op: str, packed: Tensor | None, input: Tensor, like: tuple[str, Tensor] | None = None
) -> None:
    if packed is None:
        return
    check_alike(op, "packed", packed, input, like)
    if packed.dim() != 1:
        raise fail(op, f"packed must have shape (L,), got {shape_of(packed)}")


def output_size(
    op: str,
    size: tuple[int, int],
    kernel: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    *,
    kernel_name: str = "kernel",
    image_name: str = "input",
) -> tuple[int, int]:
    """Height and width of what a sliding window makes of `size`, into which it must fit; padding is
    (left, right, top, bottom)."""
    left, right, top, bottom = padding
    height, width = size[0] + top + bottom, size[1] + left + right
    dilated_h = dilation[0] * (kernel[0] - 1) + 1
    dilated_w = dilation[1] * (kernel[1] - 1) + 1
    check_kernel_fits(op, height, width, dilated_h, dilated_w, kernel_name, image_name)
    return (height - dilated_h) // stride[0] + 1, (width - dilated_w) // stride[1] + 1


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Raise if, in grad mode, a tensor requires grad, for which no op has a backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise fail(
            op,
            "an argument requires grad, but torch_mbv2 is for inference only: "
            "call it under torch.inference_mode() (or torch.no_grad())",
        )


def bounds(op: str, activation: Activation) -> tuple[float | None, float | None]:
    """The (min, max) that `activation` stands for; None is an open side."""
    if activation is None or isinstance(activation, str):
        known = _ACTIVATIONS.get(activation)
    else:
        two = isinstance(activation, Sequence) and len(activation) == 2
        known = activation if two else None
    if known is None:
        raise fail(
            op, f'activation must be None, "relu", "relu6" or (min, max), got {activation!r}'
        )
    act_min, act_max = known
    return act_min, act_max


def _ints(op: str, name: str, value: int | Sequence[int]) -> int | list[int]:
    if isinstance(value, int | torch.SymInt):
        return value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise fail(op, f"{name} must be an int or ints, got {value!r}")
    return list(value)


def pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """One value for both directions, or (vertical, horizontal)."""
    values = _ints(op, name, value)
    return values if isinstance(values, list) else [values, values]


def sides(op: str, padding: int | Sequence[int], name: str = "padding") -> list[int]:
    """p, (vertical, horizontal) as in F.conv2d, or (left, right, top, bottom) as in F.pad."""
    values = _ints(op, name, padding)
    if not isinstance(values, list):
        return [values] * 4
    if len(values) == 2:
        vertical, horizontal = values
        return [horizontal, horizontal, vertical, vertical]
    return values
