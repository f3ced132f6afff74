"""The operators `torch.ops.torch_mbv2.*`: for each, together, its schema, argument checks, stock
PyTorch implementation, fake (shapes and strides without data) and documented wrapper.

The wrappers take what the `torch.nn.functional` namesakes take, plus `activation`: None, "relu",
"relu6", or (min, max) with None for an open side. Every op takes float32, float16 and bfloat16,
accumulates in float32 or better, rounds once (a fused block at most once a layer), and is for
inference only. The stock implementation serves every device; the compiled library replaces it on
CUDA. Both, and the fake, refuse bad arguments with the same sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _extension, flops, packing, reference

Activation = str | tuple[float | None, float | None] | None

_ACTIVATIONS: dict[str | None, tuple[float | None, float | None]] = {
    None: (None, None),
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("torch_mbv2", "DEF")


def _define(schema: str, fake: Callable[..., Tensor], implementation: Callable[..., Tensor]) -> Any:
    """Register one op: its schema, its fake, and its implementation for every device.

    Returns what calls it. Plain tensors on the CPU skip the dispatcher, whose way through Python
    costs more than a small layer.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torch_mbv2::{name}", fake, lib=_library)
    op = getattr(torch.ops.torch_mbv2, name).default

    def call(input: Tensor, *arguments: Any) -> Tensor:
        if type(input) is Tensor and input.is_cpu and not torch.compiler.is_compiling():
            return implementation(input, *arguments)
        return op(input, *arguments)

    return call


# ---------------------------------------------------------------------------------------- checks


def _fail(op: str, sentence: str) -> RuntimeError:
    return RuntimeError(f"torch_mbv2::{op}: {sentence}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_float(op: str, x: Tensor, name: str = "input") -> None:
    if x.dtype not in DTYPES:
        raise _fail(op, f"{name} must be float32, float16 or bfloat16, got {_name(x.dtype)}")


def _check_image(op: str, input: Tensor) -> None:
    _check_float(op, input)
    if input.dim() != 4:
        raise _fail(op, f"input must have shape (N, C, H, W), got {_shape(input)}")
    _check_size(op, "input", *input.shape[1:])


def _check_size(op: str, name: str, channels: int, height: int, width: int) -> None:
    # Kernels address one image with 32-bit offsets; only the batch makes them 64-bit.
    if channels * height * width >= 2**31:
        raise _fail(
            op,
            f"one image of {name} must have fewer than 2147483648 elements, "
            f"got {(channels, height, width)}",
        )


def _check_alike(
    op: str, name: str, x: Tensor, input: Tensor, like: tuple[str, Tensor] | None = None
) -> None:
    """`x` must have the dtype of `input`, or of what `like` names, and the device of `input`."""
    model, tensor = ("input", input) if like is None else like
    if x.dtype != tensor.dtype:
        raise _fail(
            op,
            f"{name} must have the dtype of {model}, {_name(tensor.dtype)}, got {_name(x.dtype)}",
        )
    if x.device != input.device:
        raise _fail(op, f"{name} must be on the device of input, {input.device}, got {x.device}")


def _check_bias(
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
    _check_alike(op, name, bias, input, like)
    if bias.dim() != 1 or bias.shape[0] != channels:
        raise _fail(
            op, f"{name} must have shape ({channels},) from {part}weight, got {_shape(bias)}"
        )


def _check_channels(op: str, input: Tensor) -> None:
    if input.shape[1] < 1:
        raise _fail(op, f"input must have at least one channel, got {_shape(input)}")


def _check_pixels(op: str, input: Tensor) -> None:
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise _fail(op, f"input must have at least one pixel, got {_shape(input)}")


def _check_ints(op: str, name: str, values: Sequence[int], count: int, least: int) -> None:
    if len(values) != count:
        raise _fail(op, f"{name} must have {count} values, got {len(values)}")
    if min(values) < least:
        raise _fail(op, f"{name} must be at least {least}, got {tuple(values)}")
    if max(values) >= 2**31:
        raise _fail(op, f"{name} must be less than 2147483648, got {tuple(values)}")


def _check_activation(op: str, act_min: float | None, act_max: float | None) -> None:
    if act_min is not None and act_max is not None and not act_min <= act_max:
        raise _fail(op, f"act_min must not exceed act_max, got {act_min:g} and {act_max:g}")


def _check_kernel_fits(
    op: str,
    height: int,
    width: int,
    kernel_h: int,
    kernel_w: int,
    kernel: str = "kernel",
    image: str = "input",
) -> None:
    if kernel_h < 1 or kernel_w < 1 or height < kernel_h or width < kernel_w:
        raise _fail(
            op,
            f"the {kernel} must fit into the padded {image}: dilated kernel "
            f"{(kernel_h, kernel_w)}, padded {image} {(height, width)}",
        )


def _refuse_grad(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise _fail(
            op,
            "an argument requires grad, but torch_mbv2 is for inference only: "
            "call it under torch.inference_mode() (or torch.no_grad())",
        )


# ------------------------------------------------------------------------- shapes and layouts


def _empty_channels_last(input: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty(
        (n, c, h, w), dtype=input.dtype, device=input.device, memory_format=torch.channels_last
    )


def _as_channels_last(x: Tensor) -> Tensor:
    """`x` dense and channels_last, with the strides a fresh channels_last tensor has even where a
    size of 1 or 0 leaves them open (so that it equals the fake)."""
    n, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    strides = (h * w * c, 1, w * c, c)
    return x if x.stride() == strides else x.as_strided((n, c, h, w), strides)


def _bounds(op: str, activation: Activation) -> tuple[float | None, float | None]:
    if activation is None or isinstance(activation, str):
        known = _ACTIVATIONS.get(activation)
    else:
        sequence = isinstance(activation, Sequence) and len(activation) == 2
        known = tuple(activation) if sequence else None
    if known is None:
        raise _fail(
            op, f'activation must be None, "relu", "relu6" or (min, max), got {activation!r}'
        )
    return known


def _ints(op: str, name: str, value: int | Sequence[int]) -> int | list[int]:
    if isinstance(value, int | torch.SymInt):
        return value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _fail(op, f"{name} must be an int or ints, got {value!r}")
    return list(value)


def _pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    values = _ints(op, name, value)
    return values if isinstance(values, list) else [values, values]


def _sides(op: str, padding: int | Sequence[int], name: str = "padding") -> list[int]:
    """p, (vertical, horizontal) as in F.conv2d, or (left, right, top, bottom) as in F.pad."""
    values = _ints(op, name, padding)
    if not isinstance(values, list):
        return [values] * 4
    if len(values) == 2:
        vertical, horizontal = values
        return [horizontal, horizontal, vertical, vertical]
    return values


# ---------------------------------------------------------------------------------------- conv2d


def _conv2d_shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, int, int, int]:
    """Check all arguments of a convolution; its output shape."""
    _check_image(op, input)
    _check_alike(op, "weight", weight, input)
    _check_ints(op, "stride", stride, 2, 1)
    _check_ints(op, "padding", padding, 4, 0)
    _check_ints(op, "dilation", dilation, 2, 1)
    n, channels, height, width = input.shape
    _check_channels(op, input)
    if weight.dim() != 4:
        raise _fail(
            op, f"weight must have shape (Cout, Cin / groups, kH, kW), got {_shape(weight)}"
        )
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    if groups < 1 or channels % groups != 0 or out_channels % groups != 0:
        raise _fail(
            op,
            f"groups must divide Cin {channels} and Cout {out_channels}, got {groups}",
        )
    if group_channels != channels // groups:
        raise _fail(
            op,
            f"weight must have shape (Cout, {channels // groups}, kH, kW) from {channels} input "
            f"channels in {groups} groups, got {_shape(weight)}",
        )
    _check_bias(op, bias, out_channels, input)
    _check_activation(op, act_min, act_max)
    left, right, top, bottom = padding
    dilated_h = dilation[0] * (kernel_h - 1) + 1
    dilated_w = dilation[1] * (kernel_w - 1) + 1
    padded_h = height + top + bottom
    padded_w = width + left + right
    _check_kernel_fits(op, padded_h, padded_w, dilated_h, dilated_w)
    out_h = (padded_h - dilated_h) // stride[0] + 1
    out_w = (padded_w - dilated_w) // stride[1] + 1
    _check_size(op, "output", out_channels, out_h, out_w)
    return n, out_channels, out_h, out_w


def _conv2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    shape = _conv2d_shape(
        "conv2d", input, weight, bias, stride, padding, dilation, groups, act_min, act_max
    )
    return _empty_channels_last(input, *shape)


def _conv2d_stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    arguments = (input, weight, bias, stride, padding, dilation, groups, act_min, act_max)
    shape = _conv2d_shape("conv2d", *arguments)
    if 0 in shape:
        return _empty_channels_last(input, *shape)
    return _as_channels_last(reference.conv2d(*arguments))


_conv2d = _define(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
    "int[2] dilation, int groups, float? act_min, float? act_max) -> Tensor",
    _conv2d_fake,
    _conv2d_stock,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: Activation = None,
) -> Tensor:
    """2-D convolution with bias and activation in one kernel.

    Equivalent: `F.conv2d(F.pad(input, padding), weight, bias, stride, 0, dilation, groups)`
    followed by the activation. On CUDA, pointwise convolutions run as a GEMM, depthwise ones as a
    direct kernel, dense float32 3 x 3 ones with 64 channels or more as `conv2d_winograd`, and all
    others as an implicit GEMM.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16; channels_last is fastest.
        weight: (Cout, Cin / groups, kH, kW), dtype and device of `input`.
        bias: (Cout,) or None.
        stride: pixels; one value or (vertical, horizontal).
        padding: zeros added, in pixels: one value, (vertical, horizontal) as in `F.conv2d`, or
            (left, right, top, bottom) as in `F.pad`.
        dilation: pixels; one value or (vertical, horizontal).
        groups: must divide Cin and Cout.
        activation: None, "relu", "relu6", or (min, max).

    Returns:
        (N, Cout, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("conv2d", input, weight, bias)
    act_min, act_max = _bounds("conv2d", activation)
    return _conv2d(
        input,
        weight,
        bias,
        _pair("conv2d", "stride", stride),
        _sides("conv2d", padding),
        _pair("conv2d", "dilation", dilation),
        groups,
        act_min,
        act_max,
    )


# ------------------------------------------------------------------------------- conv2d_winograd


def _winograd_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, int, int, int]:
    op = "conv2d_winograd"
    shape = _conv2d_shape(op, input, weight, bias, (1, 1), padding, (1, 1), 1, act_min, act_max)
    if tuple(weight.shape[2:]) != (3, 3):
        raise _fail(op, f"weight must have a 3 x 3 kernel, got {_shape(weight)}")
    return shape


def _winograd_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    shape = _winograd_shape(input, weight, bias, padding, act_min, act_max)
    return _empty_channels_last(input, *shape)


def _winograd_stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    _winograd_shape(input, weight, bias, padding, act_min, act_max)
    return _conv2d_stock(input, weight, bias, (1, 1), padding, (1, 1), 1, act_min, act_max)


_conv2d_winograd = _define(
    "conv2d_winograd(Tensor input, Tensor weight, Tensor? bias, int[4] padding, "
    "float? act_min, float? act_max) -> Tensor",
    _winograd_fake,
    _winograd_stock,
)


def conv2d_winograd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | Sequence[int] = 0,
    activation: Activation = None,
) -> Tensor:
    """3 x 3 dense convolution of stride 1 by Winograd's F(2x2, 3x3): 2.25 times fewer products.

    Equivalent: `conv2d(input, weight, bias, padding=padding, activation=activation)`. Transforms
    and products are in float32 for every dtype. An input element that is infinite or NaN can reach
    all four pixels of the 2 x 2 output tiles whose 4 x 4 patches hold it, and infinity can become
    NaN. Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016,
    section 4.1.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16.
        weight: (Cout, Cin, 3, 3), dtype and device of `input`.
        bias: (Cout,) or None.
        padding: as for `conv2d`.
        activation: as for `conv2d`.

    Returns:
        (N, Cout, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("conv2d_winograd", input, weight, bias)
    act_min, act_max = _bounds("conv2d_winograd", activation)
    sides = _sides("conv2d_winograd", padding)
    return _conv2d_winograd(input, weight, bias, sides, act_min, act_max)


# ---------------------------------------------------------------------------------------- linear


def _linear_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, ...]:
    op = "linear"
    _check_float(op, input)
    _check_alike(op, "weight", weight, input)
    if input.dim() < 1:
        raise _fail(op, f"input must have shape (..., K), got {_shape(input)}")
    features = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != features:
        raise _fail(op, f"weight must have shape (N, {features}) from input, got {_shape(weight)}")
    _check_bias(op, bias, weight.shape[0], input)
    _check_activation(op, act_min, act_max)
    if max(weight.shape) >= 2**31:
        raise _fail(
            op,
            f"weight must have fewer than 2147483648 rows and columns, got {_shape(weight)}",
        )
    return (*input.shape[:-1], weight.shape[0])


def _linear_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    return input.new_empty(_linear_shape(input, weight, bias, act_min, act_max))


def _linear_stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    _linear_shape(input, weight, bias, act_min, act_max)
    return reference.linear(input, weight, bias, act_min, act_max).contiguous()


_linear = _define(
    "linear(Tensor input, Tensor weight, Tensor? bias, float? act_min, float? act_max) -> Tensor",
    _linear_fake,
    _linear_stock,
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Fully connected layer with bias and activation in one kernel.

    Equivalent: `F.linear(input, weight, bias)` followed by the activation.

    Args:
        input: (..., K), float32, float16 or bfloat16.
        weight: (N, K), dtype and device of `input`.
        bias: (N,) or None.
        activation: None, "relu", "relu6", or (min, max).

    Returns:
        (..., N), contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("linear", input, weight, bias)
    return _linear(input, weight, bias, *_bounds("linear", activation))


# ------------------------------------------------------------------------------------ avg_pool2d


def _pooled_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    out = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    # With ceil_mode the last window must still start inside the input or its left padding.
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _avg_pool2d_shape(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    divisor_override: int | None,
) -> tuple[int, int, int, int]:
    op = "avg_pool2d"
    _check_image(op, input)
    _check_ints(op, "kernel_size", kernel_size, 2, 1)
    _check_ints(op, "stride", stride, 2, 1)
    _check_ints(op, "padding", padding, 2, 0)
    if 2 * padding[0] > kernel_size[0] or 2 * padding[1] > kernel_size[1]:
        raise _fail(
            op,
            f"padding must be at most half of kernel_size {tuple(kernel_size)}, "
            f"got {tuple(padding)}",
        )
    if divisor_override == 0:
        raise _fail(op, "divisor_override must not be 0")
    n, channels, height, width = input.shape
    _check_kernel_fits(
        op, height + 2 * padding[0], width + 2 * padding[1], kernel_size[0], kernel_size[1]
    )
    out_h = _pooled_size(height, kernel_size[0], stride[0], padding[0], ceil_mode)
    out_w = _pooled_size(width, kernel_size[1], stride[1], padding[1], ceil_mode)
    _check_size(op, "output", channels, out_h, out_w)
    return n, channels, out_h, out_w


def _avg_pool2d_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    shape = _avg_pool2d_shape(input, kernel_size, stride, padding, ceil_mode, divisor_override)
    return _empty_channels_last(input, *shape)


def _avg_pool2d_stock(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    shape = _avg_pool2d_shape(input, kernel_size, stride, padding, ceil_mode, divisor_override)
    if 0 in shape:
        return _empty_channels_last(input, *shape)
    return _as_channels_last(
        reference.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    )


_avg_pool2d = _define(
    "avg_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
    "bool count_include_pad, int? divisor_override) -> Tensor",
    _avg_pool2d_fake,
    _avg_pool2d_stock,
)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling.

    Equivalent: `F.avg_pool2d` with the same arguments.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16; channels_last is fastest.
        kernel_size: pixels; one value or (vertical, horizontal).
        stride: pixels; None means `kernel_size`.
        padding: zeros on each side, at most half of `kernel_size`.
        ceil_mode: round the output size up instead of down.
        count_include_pad: count padding in the divisor.
        divisor_override: divide by this instead.

    Returns:
        (N, C, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("avg_pool2d", input)
    kernel = _pair("avg_pool2d", "kernel_size", kernel_size)
    return _avg_pool2d(
        input,
        kernel,
        kernel if stride is None else _pair("avg_pool2d", "stride", stride),
        _pair("avg_pool2d", "padding", padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


# ----------------------------------------------------------------------------- global_avg_pool2d


def _global_avg_pool2d_check(input: Tensor) -> None:
    op = "global_avg_pool2d"
    _check_image(op, input)
    _check_pixels(op, input)


def _global_avg_pool2d_fake(input: Tensor, keepdim: bool) -> Tensor:
    _global_avg_pool2d_check(input)
    n, channels = input.shape[:2]
    if keepdim:
        return _empty_channels_last(input, n, channels, 1, 1)
    return input.new_empty((n, channels))


def _global_avg_pool2d_stock(input: Tensor, keepdim: bool) -> Tensor:
    _global_avg_pool2d_check(input)
    out = reference.global_avg_pool2d(input, keepdim)
    return _as_channels_last(out) if keepdim else out.contiguous()


_global_avg_pool2d = _define(
    "global_avg_pool2d(Tensor input, bool keepdim) -> Tensor",
    _global_avg_pool2d_fake,
    _global_avg_pool2d_stock,
)


def global_avg_pool2d(input: Tensor, keepdim: bool = False) -> Tensor:
    """Mean over height and width.

    Equivalent: `input.mean((2, 3), keepdim=keepdim)`; with `keepdim`, `F.adaptive_avg_pool2d(input,
    1)`.

    Args:
        input: (N, C, H, W) with at least one pixel, float32, float16 or bfloat16; channels_last is
            fastest.
        keepdim: return (N, C, 1, 1) instead of (N, C).

    Returns:
        (N, C), contiguous, or (N, C, 1, 1), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("global_avg_pool2d", input)
    return _global_avg_pool2d(input, keepdim)


# ------------------------------------------------------------------------------------------- add


def _add_check(input: Tensor, other: Tensor, act_min: float | None, act_max: float | None) -> None:
    op = "add"
    _check_float(op, input)
    _check_alike(op, "other", other, input)
    if input.shape != other.shape:
        raise _fail(op, f"other must have the shape of input, {_shape(input)}, got {_shape(other)}")
    _check_activation(op, act_min, act_max)


def _add_fake(input: Tensor, other: Tensor, act_min: float | None, act_max: float | None) -> Tensor:
    _add_check(input, other, act_min, act_max)
    if input.dim() == 4:
        return _empty_channels_last(input, *input.shape)
    return input.new_empty(input.shape)


def _add_stock(
    input: Tensor, other: Tensor, act_min: float | None, act_max: float | None
) -> Tensor:
    _add_check(input, other, act_min, act_max)
    out = reference.add(input, other, act_min, act_max)
    return _as_channels_last(out) if out.dim() == 4 else out.contiguous()


_add = _define(
    "add(Tensor input, Tensor other, float? act_min, float? act_max) -> Tensor",
    _add_fake,
    _add_stock,
)


def add(input: Tensor, other: Tensor, activation: Activation = None) -> Tensor:
    """Elementwise sum of two tensors of one shape, with activation: the residual connection.

    Equivalent: `input + other` followed by the activation.

    Args:
        input: any shape, float32, float16 or bfloat16.
        other: shape, dtype and device of `input`.
        activation: None, "relu", "relu6", or (min, max).

    Returns:
        The sum, rounded once: channels_last if 4-D, else contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("add", input, other)
    return _add(input, other, *_bounds("add", activation))


# ---------------------------------------------------------------------------------------- im2col


def _im2col_shape(
    input: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> tuple[int, int, int]:
    op = "im2col"
    _check_image(op, input)
    _check_ints(op, "kernel_size", kernel_size, 2, 1)
    _check_ints(op, "dilation", dilation, 2, 1)
    _check_ints(op, "padding", padding, 2, 0)
    _check_ints(op, "stride", stride, 2, 1)
    n, channels, height, width = input.shape
    dilated_h = dilation[0] * (kernel_size[0] - 1) + 1
    dilated_w = dilation[1] * (kernel_size[1] - 1) + 1
    padded_h = height + 2 * padding[0]
    padded_w = width + 2 * padding[1]
    _check_kernel_fits(op, padded_h, padded_w, dilated_h, dilated_w)
    out_h = (padded_h - dilated_h) // stride[0] + 1
    out_w = (padded_w - dilated_w) // stride[1] + 1
    rows = channels * kernel_size[0] * kernel_size[1]
    _check_size(op, "output", rows, out_h, out_w)
    return n, rows, out_h * out_w


def _im2col_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    return input.new_empty(_im2col_shape(input, kernel_size, dilation, padding, stride))


def _im2col_stock(
    input: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    shape = _im2col_shape(input, kernel_size, dilation, padding, stride)
    if 0 in shape:
        return input.new_empty(shape)
    return reference.im2col(input, kernel_size, dilation, padding, stride).contiguous()


_im2col = _define(
    "im2col(Tensor input, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) "
    "-> Tensor",
    _im2col_fake,
    _im2col_stock,
)


def im2col(
    input: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """The sliding windows of an image as columns of a matrix.

    Equivalent: `F.unfold(input, kernel_size, dilation, padding, stride)`.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16.
        kernel_size: pixels; one value or (vertical, horizontal); so the others.
        dilation: distance of taps.
        padding: zeros on each side.
        stride: distance of windows.

    Returns:
        (N, C * kH * kW, windows), contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("im2col", input)
    return _im2col(
        input,
        _pair("im2col", "kernel_size", kernel_size),
        _pair("im2col", "dilation", dilation),
        _pair("im2col", "padding", padding),
        _pair("im2col", "stride", stride),
    )


# ---------------------------------------------------------------------------- inverted_residual


def _check_fills(op: str, name: str, weight: Tensor) -> None:
    if weight.shape[0] < 1:
        raise _fail(op, f"{name} must have at least one output channel, got {_shape(weight)}")


def _check_depthwise(op: str, weight: Tensor, channels: int, source: str) -> None:
    if weight.dim() != 4 or tuple(weight.shape[:2]) != (channels, 1):
        raise _fail(
            op,
            f"depthwise_weight must have shape ({channels}, 1, kH, kW) from {source}, "
            f"got {_shape(weight)}",
        )


def _check_project(op: str, weight: Tensor, channels: int) -> None:
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise _fail(
            op,
            f"project_weight must have shape (Cout, {channels}, 1, 1) from depthwise_weight, "
            f"got {_shape(weight)}",
        )


def _check_packed(
    op: str, packed: Tensor | None, input: Tensor, like: tuple[str, Tensor] | None = None
) -> None:
    if packed is None:
        return
    _check_alike(op, "packed", packed, input, like)
    if packed.dim() != 1:
        raise _fail(op, f"packed must have shape (L,), got {_shape(packed)}")


def _inverted_residual_shape(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: bool,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, int, int, int]:
    """Check all arguments; the output shape."""
    op = "inverted_residual"
    _check_image(op, input)
    _check_channels(op, input)
    n, channels, height, width = input.shape
    if expand_weight is not None:
        _check_alike(op, "expand_weight", expand_weight, input)
    _check_alike(op, "depthwise_weight", depthwise_weight, input)
    _check_alike(op, "project_weight", project_weight, input)
    expanded, source = channels, "input"
    if expand_weight is not None:
        if expand_weight.dim() != 4 or tuple(expand_weight.shape[1:]) != (channels, 1, 1):
            raise _fail(
                op,
                f"expand_weight must have shape (E, {channels}, 1, 1) from input, "
                f"got {_shape(expand_weight)}",
            )
        _check_fills(op, "expand_weight", expand_weight)
        expanded, source = expand_weight.shape[0], "expand_weight"
    _check_depthwise(op, depthwise_weight, expanded, source)
    _check_project(op, project_weight, expanded)
    if expand_weight is None and expand_bias is not None:
        raise _fail(op, "expand_bias must be None where expand_weight is None")
    _check_bias(op, expand_bias, expanded, input, "expand_")
    _check_bias(op, depthwise_bias, expanded, input, "depthwise_")
    _check_bias(op, project_bias, project_weight.shape[0], input, "project_")
    _check_packed(op, packed, input)
    _check_ints(op, "stride", stride, 2, 1)
    _check_ints(op, "padding", padding, 4, 0)
    _check_activation(op, act_min, act_max)
    kernel_h, kernel_w = depthwise_weight.shape[2:]
    padded_h = height + padding[2] + padding[3]
    padded_w = width + padding[0] + padding[1]
    _check_kernel_fits(op, padded_h, padded_w, kernel_h, kernel_w)
    out_h = (padded_h - kernel_h) // stride[0] + 1
    out_w = (padded_w - kernel_w) // stride[1] + 1
    out_channels = project_weight.shape[0]
    # The stock implementation, and CUDA where no fused kernel fits, make these too.
    _check_size(op, "expanded input", expanded, height, width)
    _check_size(op, "depthwise output", expanded, out_h, out_w)
    _check_size(op, "output", out_channels, out_h, out_w)
    if residual and (out_channels, out_h, out_w) != (channels, height, width):
        raise _fail(
            op,
            f"residual needs an output of the shape of input, {_shape(input)}, "
            f"got {(n, out_channels, out_h, out_w)}",
        )
    return n, out_channels, out_h, out_w


def _inverted_residual_fake(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: bool,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    shape = _inverted_residual_shape(
        input,
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        packed,
        stride,
        padding,
        residual,
        act_min,
        act_max,
    )
    return _empty_channels_last(input, *shape)


def _inverted_residual_stock(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: bool,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    weights = (
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
    )
    options = (stride, padding, residual, act_min, act_max)
    shape = _inverted_residual_shape(input, *weights, packed, *options)
    if 0 in shape:
        return _empty_channels_last(input, *shape)
    return _as_channels_last(reference.inverted_residual(input, *weights, *options))


_inverted_residual = _define(
    "inverted_residual(Tensor input, Tensor? expand_weight, Tensor? expand_bias, "
    "Tensor depthwise_weight, Tensor? depthwise_bias, Tensor project_weight, "
    "Tensor? project_bias, Tensor? packed, int[2] stride, int[4] padding, bool residual, "
    "float? act_min, float? act_max) -> Tensor",
    _inverted_residual_fake,
    _inverted_residual_stock,
)


def inverted_residual(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    residual: bool = False,
    activation: Activation = "relu6",
    packed: Tensor | None = None,
) -> Tensor:
    """MobileNetV2's block in one kernel: 1 x 1 expansion, depthwise convolution, 1 x 1 projection
    without activation, residual add.

    Equivalent: `y = act(F.conv2d(input, expand_weight, expand_bias))` (`y = input` without
    `expand_weight`); `y = act(F.conv2d(F.pad(y, padding), depthwise_weight, depthwise_bias, stride,
    groups=E))`; `y = F.conv2d(y, project_weight, project_bias)`; `input + y` with `residual`, else
    `y`. The padding is zeros of the expanded tensor. Where no fused kernel fits the sizes, the
    dtype or the activation (a lower bound other than 0), CUDA runs these steps one by one. The
    fused kernel's depthwise convolution is a matrix product with zeros: an infinite element becomes
    NaN in the channels beside it. Source: Sandler et al., "MobileNetV2: Inverted Residuals and
    Linear Bottlenecks", CVPR 2018, figure 4d and table 1.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16; channels_last is fastest.
        expand_weight: (E, Cin, 1, 1), or None, where E is Cin; dtype and device of `input`, as all
            other tensors.
        expand_bias: (E,) or None.
        depthwise_weight: (E, 1, kH, kW).
        depthwise_bias: (E,) or None.
        project_weight: (Cout, E, 1, 1).
        project_bias: (Cout,) or None.
        stride: pixels, of the depthwise convolution; one value or (vertical, horizontal).
        padding: zeros around the expanded tensor, in pixels: one value, (vertical, horizontal) as
            in `F.conv2d`, or (left, right, top, bottom) as in `F.pad`.
        residual: add `input`; the output must have its shape.
        activation: after the expansion and after the depthwise convolution: None, "relu", "relu6",
            or (min, max).
        packed: what `packing.pack_inverted_residual` makes of the weights and biases. On CUDA each
            call without it packs them again, so pack once and pass it.

    Returns:
        (N, Cout, Hout, Wout), channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    op = "inverted_residual"
    weights = (
        expand_weight,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
    )
    _refuse_grad(op, input, *weights, packed)
    act_min, act_max = _bounds(op, activation)
    options = (_pair(op, "stride", stride), _sides(op, padding), residual, act_min, act_max)
    if packed is None and input.is_cuda:
        _inverted_residual_shape(input, *weights, packed, *options)  # before anything is packed
        packed = packing.pack_inverted_residual(*weights)
    return _inverted_residual(input, *weights, packed, *options)


# ----------------------------------------------------------------------------------- stem_block


def _stem_block_shape(
    input: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stem_stride: Sequence[int],
    stem_padding: Sequence[int],
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, int, int, int]:
    """Check all arguments; the output shape."""
    op = "stem_block"
    _check_image(op, input)
    _check_channels(op, input)
    n, channels, height, width = input.shape
    like = ("stem_weight", stem_weight)
    _check_float(op, stem_weight, "stem_weight")
    _check_alike(op, "stem_weight", stem_weight, input, like)
    _check_alike(op, "depthwise_weight", depthwise_weight, input, like)
    _check_alike(op, "project_weight", project_weight, input, like)
    if stem_weight.dim() != 4 or stem_weight.shape[1] != channels:
        raise _fail(
            op,
            f"stem_weight must have shape (S, {channels}, kH, kW) from input, "
            f"got {_shape(stem_weight)}",
        )
    _check_fills(op, "stem_weight", stem_weight)
    hidden, _, stem_h, stem_w = stem_weight.shape
    _check_depthwise(op, depthwise_weight, hidden, "stem_weight")
    _check_project(op, project_weight, hidden)
    _check_bias(op, stem_bias, hidden, input, "stem_", like)
    _check_bias(op, depthwise_bias, hidden, input, "depthwise_", like)
    _check_bias(op, project_bias, project_weight.shape[0], input, "project_", like)
    _check_packed(op, packed, input, like)
    _check_ints(op, "stem_stride", stem_stride, 2, 1)
    _check_ints(op, "stem_padding", stem_padding, 4, 0)
    _check_ints(op, "padding", padding, 4, 0)
    _check_activation(op, act_min, act_max)
    padded_h = height + stem_padding[2] + stem_padding[3]
    padded_w = width + stem_padding[0] + stem_padding[1]
    _check_kernel_fits(op, padded_h, padded_w, stem_h, stem_w, "stem kernel")
    hidden_h = (padded_h - stem_h) // stem_stride[0] + 1
    hidden_w = (padded_w - stem_w) // stem_stride[1] + 1
    kernel_h, kernel_w = depthwise_weight.shape[2:]
    padded_h = hidden_h + padding[2] + padding[3]
    padded_w = hidden_w + padding[0] + padding[1]
    _check_kernel_fits(
        op, padded_h, padded_w, kernel_h, kernel_w, "depthwise kernel", "stem output"
    )
    out_h, out_w = padded_h - kernel_h + 1, padded_w - kernel_w + 1
    out_channels = project_weight.shape[0]
    _check_size(op, "stem output", hidden, hidden_h, hidden_w)
    _check_size(op, "depthwise output", hidden, out_h, out_w)
    _check_size(op, "output", out_channels, out_h, out_w)
    return n, out_channels, out_h, out_w


def _stem_block_fake(
    input: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stem_stride: Sequence[int],
    stem_padding: Sequence[int],
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    shape = _stem_block_shape(
        input,
        stem_weight,
        stem_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        packed,
        stem_stride,
        stem_padding,
        padding,
        act_min,
        act_max,
    )
    return _empty_channels_last(stem_weight, *shape)


def _stem_block_stock(
    input: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    packed: Tensor | None,
    stem_stride: Sequence[int],
    stem_padding: Sequence[int],
    padding: Sequence[int],
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    weights = (
        stem_weight,
        stem_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
    )
    options = (stem_stride, stem_padding, padding, act_min, act_max)
    shape = _stem_block_shape(input, *weights, packed, *options)
    if 0 in shape:
        return _empty_channels_last(stem_weight, *shape)
    return _as_channels_last(reference.stem_block(input, *weights, *options))


_stem_block = _define(
    "stem_block(Tensor input, Tensor stem_weight, Tensor? stem_bias, Tensor depthwise_weight, "
    "Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, Tensor? packed, "
    "int[2] stem_stride, int[4] stem_padding, int[4] padding, float? act_min, float? act_max) "
    "-> Tensor",
    _stem_block_fake,
    _stem_block_stock,
)


def stem_block(
    input: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stem_stride: int | Sequence[int] = 2,
    stem_padding: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    activation: Activation = "relu6",
    packed: Tensor | None = None,
) -> Tensor:
    """MobileNetV2's start in one kernel: the stem, a dense convolution, and the first block, which
    has no expansion and stride 1. It reads images of up to 3 channels, of any float dtype and
    layout, as they are; channels_last in the dtype of the weights is fastest.

    Equivalent: `y = act(F.conv2d(F.pad(input.to(stem_weight.dtype), stem_padding), stem_weight,
    stem_bias, stem_stride))`; `y = act(F.conv2d(F.pad(y, padding), depthwise_weight,
    depthwise_bias, groups=S))`; `F.conv2d(y, project_weight, project_bias)`. Where no fused kernel
    fits the sizes, the dtype or the activation (a lower bound other than 0), CUDA runs these steps
    one by one. The fused kernel multiplies by zeros: an infinite or NaN element becomes NaN in the
    channels beside it and in the pixel left or right of those that read it. Source: Sandler et al.,
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, rows 1 and 2 of table 2.

    Args:
        input: (N, Cin, H, W), float32, float16 or bfloat16, whatever the weights are.
        stem_weight: (S, Cin, kH, kW), float32, float16 or bfloat16, on the device of `input`.
        stem_bias: (S,) or None; dtype and device of `stem_weight`, as all other tensors.
        depthwise_weight: (S, 1, kH, kW).
        depthwise_bias: (S,) or None.
        project_weight: (Cout, S, 1, 1).
        project_bias: (Cout,) or None.
        stem_stride: pixels, of the stem; one value or (vertical, horizontal).
        stem_padding: zeros around `input`, in pixels: one value, (vertical, horizontal) as in
            `F.conv2d`, or (left, right, top, bottom) as in `F.pad`.
        padding: zeros around the stem's output, in the same forms.
        activation: after the stem and after the depthwise convolution: None, "relu", "relu6", or
            (min, max).
        packed: what `packing.pack_stem_block` makes of the weights and biases. On CUDA each call
            without it packs them again, so pack once and pass it.

    Returns:
        (N, Cout, Hout, Wout) of the dtype of `stem_weight`, channels_last.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    op = "stem_block"
    weights = (
        stem_weight,
        stem_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
    )
    _refuse_grad(op, input, *weights, packed)
    act_min, act_max = _bounds(op, activation)
    options = (
        _pair(op, "stem_stride", stem_stride),
        _sides(op, stem_padding, "stem_padding"),
        _sides(op, padding),
        act_min,
        act_max,
    )
    if packed is None and input.is_cuda:
        _stem_block_shape(input, *weights, packed, *options)  # before anything is packed
        packed = packing.pack_stem_block(*weights)
    return _stem_block(input, *weights, packed, *options)


# ------------------------------------------------------------------------------------ conv_pool


def _conv_pool_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> tuple[int, int]:
    op = "conv_pool"
    _check_image(op, input)
    _check_channels(op, input)
    _check_pixels(op, input)
    n, channels, height, width = input.shape
    _check_alike(op, "weight", weight, input)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise _fail(
            op,
            f"weight must have shape (Cout, {channels}, 1, 1) from input, got {_shape(weight)}",
        )
    out_channels = weight.shape[0]
    _check_bias(op, bias, out_channels, input)
    _check_activation(op, act_min, act_max)
    _check_size(op, "convolution output", out_channels, height, width)
    return n, out_channels


def _conv_pool_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    return input.new_empty(_conv_pool_shape(input, weight, bias, act_min, act_max))


def _conv_pool_stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_min: float | None,
    act_max: float | None,
) -> Tensor:
    shape = _conv_pool_shape(input, weight, bias, act_min, act_max)
    if 0 in shape:
        return input.new_empty(shape)
    return reference.conv_pool(input, weight, bias, act_min, act_max).contiguous()


_conv_pool = _define(
    "conv_pool(Tensor input, Tensor weight, Tensor? bias, float? act_min, float? act_max) "
    "-> Tensor",
    _conv_pool_fake,
    _conv_pool_stock,
)


def conv_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """MobileNetV2's head in one kernel: 1 x 1 convolution, activation, mean over height and width.

    Equivalent: `act(F.conv2d(input, weight, bias)).mean((2, 3))`. Source: Sandler et al.,
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.

    Args:
        input: (N, Cin, H, W) with at least one pixel, float32, float16 or bfloat16; channels_last
            is fastest.
        weight: (Cout, Cin, 1, 1), dtype and device of `input`.
        bias: (Cout,) or None.
        activation: between convolution and mean: None, "relu", "relu6", or (min, max).

    Returns:
        (N, Cout), contiguous.

    Raises:
        RuntimeError: an argument breaks a rule above, or requires grad in grad mode.
    """
    _refuse_grad("conv_pool", input, weight, bias)
    return _conv_pool(input, weight, bias, *_bounds("conv_pool", activation))


# With the schemas in place, the compiled library (where there is one) adds its CUDA kernels, and
# torch's FLOP counter can count them.
_extension.load()
flops.register()
