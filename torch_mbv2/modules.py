"""The modules that `patch` puts in the place of stock ones, one per fused piece.

Each is for inference only, keeps the stock module that it replaces in `stock` (outside the module
tree: no parameters, no state_dict entries), and keeps it in step through `.to()` and `.half()`.
A fused block is made from the modules of its layers and shares their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .weights import fold, packing
from .weights.derived import Sources

#: Rows and columns of a map, as `Swapped.plan` supposes them.
_COMMON_SIZE = 28


class Swapped(nn.Module):
    """Base of all modules that stand for a stock one.

    Args:
        stock: the module replaced, or None where the stock form was a function call.
    """

    stock: nn.Module | None
    #: the op that does its work, if it is one call: `ops.raw.OP(input, *self.arguments(input))`
    op: str | None = None
    #: the chains that hold what is made of its weights
    networks: list[Any]
    #: the qualified name of the fused block that does its work when the whole model runs
    absorbed_by: str | None = None
    #: why no fused block does, where one might have
    alone: str | None = None

    def __init__(self, stock: nn.Module | None) -> None:
        super().__init__()
        # Not a registered child: it must not show in parameters(), state_dict() or modules().
        self.__dict__["stock"] = stock
        self.__dict__["networks"] = []
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Swapped:
        super()._apply(fn, recurse)
        if self.stock is not None:
            self.stock._apply(fn, recurse)
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _changed(self) -> None:
        """Its weights are others now."""
        for network in self.networks:
            network.forget()

    @property
    def kind(self) -> str:
        """What `report` calls the layer."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a layer alone does not take its chains along; chains tell theirs again.
        return {**self.__dict__, "networks": []}

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        """What follows its inputs in the schema of `op`.

        Args:
            input: its first input, of which only the size counts, and only if `pads_same`.
        """
        raise NotImplementedError

    @property
    def pads_same(self) -> bool:
        """Whether it pads as TensorFlow's SAME, as the size of its input has it."""
        return False

    def sizes(self) -> list[tuple[int, ...]]:
        """Of inputs as it may get them, for a plan."""
        raise NotImplementedError

    def plan(self) -> ops.Plan:
        """What runs it on CUDA, in the dtype of its weights. (For maps of a size that is common in
        this place: on that the choice of kernels does not depend, but for tiles.)"""
        assert self.op is not None
        tensors = [*self.parameters(recurse=False)]
        dtype = tensors[0].dtype if tensors else torch.float32
        sizes = self.sizes()
        model = torch.empty(sizes[0], device="meta")
        return ops.plan(self.op, sizes, dtype, self.arguments(model))

    @property
    def kernel(self) -> str:
        """The kernels that run it, as `report` names them."""
        return str(self.plan())

    def _require_eval(self) -> None:
        if self.training:
            raise RuntimeError(
                f"torch_mbv2: {type(self).__name__} is for inference only: "
                "call model.eval(), or train torch_mbv2.unpatch(model)"
            )


def _batched(input: Tensor) -> Tensor:
    """A (C, H, W) image as a batch of one; anything else as it is, for the op to judge."""
    return input.unsqueeze(0) if input.dim() == 3 else input


def _fit(x: Tensor, memory: Tensor) -> bool:
    return x.shape == memory.shape and x.device == memory.device


def _frozen(x: Tensor | None) -> nn.Parameter | None:
    return None if x is None else nn.Parameter(x.detach().clone(), requires_grad=False)


def _activation_repr(act_min: float | None, act_max: float | None) -> str:
    if act_min is None and act_max is None:
        return ""
    if act_min == 0 and act_max is None:
        return ", activation=relu"
    if act_min == 0 and act_max == 6:
        return ", activation=relu6"
    return f", activation=({act_min}, {act_max})"


class FusedConv2d(Swapped):
    """nn.Conv2d with the zero padding before it and the batch norm and activation after it.

    Equivalent: `act(norm(conv(F.pad(x, padding))))`; see `ops.conv2d`. A (C, H, W) input is one
    image, as for stock.
    """

    op = "conv2d"
    #: the bias in float32, as blocks that this is a part of use it
    exact_bias: Tensor | None

    def __init__(
        self,
        stock: nn.Conv2d,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int] | None,
        act_min: float | None,
        act_max: float | None,
    ) -> None:
        super().__init__(stock)
        self.weight = nn.Parameter(fold.pack_conv_weight(weight), requires_grad=False)
        self.bias = None if bias is None else _frozen(bias.to(weight.dtype))
        self.__dict__["exact_bias"] = None if bias is None else bias.detach().float()
        self.in_channels = stock.in_channels
        self.out_channels = stock.out_channels
        self.kernel_size = tuple(stock.kernel_size)
        self.stride = tuple(stock.stride)
        #: (left, right, top, bottom), or None for TensorFlow's SAME, found from the input's size
        self.padding = None if padding is None else tuple(padding)
        self.dilation = tuple(stock.dilation)
        self.groups = stock.groups
        self.act_min = act_min
        self.act_max = act_max

    @classmethod
    def from_stock(
        cls,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        extra_padding: Sequence[int] = (0, 0, 0, 0),
        same: bool = False,
        act_min: float | None = None,
        act_max: float | None = None,
    ) -> FusedConv2d:
        """Fuse `conv` with what stands around it.

        Args:
            conv: zero padding mode.
            norm: the batch norm after it, in eval mode.
            extra_padding: zeros added before it, (left, right, top, bottom).
            same: pad as TensorFlow's SAME instead, from the input's size.
            act_min, act_max: the activation's bounds; None is open.
        """
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            weight, bias = fold.fold_batch_norm(weight, bias, norm)
        own = conv_padding(conv)
        padding = None if same else [a + b for a, b in zip(own, extra_padding, strict=True)]
        return cls(conv, weight, bias, padding, act_min, act_max)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Swapped:
        super()._apply(fn, recurse)
        if self.exact_bias is not None:
            self.__dict__["exact_bias"] = self.exact_bias.to(self.weight.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.__dict__["exact_bias"] = None if self.bias is None else self.bias.detach().float()

    @property
    def kind(self) -> str:
        if self.groups == self.in_channels == self.out_channels and self.groups > 1:
            return "depthwise"
        if self.kernel_size == (1, 1) and self.groups == 1:
            return "pointwise"
        return "conv2d"

    @property
    def pads_same(self) -> bool:
        return self.padding is None

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        padding = self.padding
        if padding is None:
            assert input is not None
            padding = same_padding(input, self.kernel_size, self.stride, self.dilation)
        return (
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.act_min,
            self.act_max,
        )

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        ops.refuse_grad("conv2d", input)
        batched = _batched(input)
        out = ops.raw.conv2d(batched, *self.arguments(batched))
        return out.squeeze(0) if input.dim() == 3 else out

    def sizes(self) -> list[tuple[int, ...]]:
        reach = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return [(1, self.in_channels, *(max(_COMMON_SIZE, n) for n in reach))]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={'same' if self.padding is None else self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
            + _activation_repr(self.act_min, self.act_max)
        )


def conv_padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """The zeros that `conv` adds: (left, right, top, bottom), in pixels."""
    if isinstance(conv.padding, str):
        same = conv.padding == "same"  # else "valid"
        return _sides_of(conv.kernel_size, conv.dilation) if same else (0, 0, 0, 0)
    vertical, horizontal = conv.padding
    return horizontal, horizontal, vertical, vertical


def _sides_of(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """The (left, right, top, bottom) zeros that keep the size at stride 1."""
    sides = []
    for kernel, distance in zip(kernel_size, dilation, strict=True):
        total = distance * (kernel - 1)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    return left, right, top, bottom


def same_padding(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding of `input` (N, C, H, W): (left, right, top, bottom), such that the
    output has ceil(size / stride) pixels and the odd zero goes to the right and the bottom."""
    sides = []
    for axis in range(2):
        size = input.shape[2 + axis]
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        total = max((-(-size // stride[axis]) - 1) * stride[axis] + reach - size, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    return left, right, top, bottom


class FusedLinear(Swapped):
    """nn.Linear with the activation after it. Equivalent: `act(linear(x))`; see `ops.linear`."""

    kind = "linear"
    op = "linear"

    def __init__(
        self, stock: nn.Linear, act_min: float | None = None, act_max: float | None = None
    ) -> None:
        super().__init__(stock)
        self.weight = nn.Parameter(stock.weight.detach().clone(), requires_grad=False)
        self.bias = _frozen(stock.bias)
        self.in_features = stock.in_features
        self.out_features = stock.out_features
        self.act_min = act_min
        self.act_max = act_max

    @classmethod
    def from_stock(
        cls, linear: nn.Linear, act_min: float | None = None, act_max: float | None = None
    ) -> FusedLinear:
        """Fuse `linear` with an activation of these bounds; None is open."""
        return cls(linear, act_min, act_max)

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        return self.weight, self.bias, self.act_min, self.act_max

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        ops.refuse_grad("linear", input)
        return ops.raw.linear(input, *self.arguments(input))

    def sizes(self) -> list[tuple[int, ...]]:
        return [(1, self.in_features)]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}" + _activation_repr(self.act_min, self.act_max)
        )


class AvgPool2d(Swapped):
    """nn.AvgPool2d; see `ops.avg_pool2d`. A (C, H, W) input is one image, as for stock."""

    kind = "avg_pool2d"
    op = "avg_pool2d"

    def __init__(
        self,
        stock: nn.Module | None,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__(stock)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    @classmethod
    def from_stock(cls, pool: nn.AvgPool2d) -> AvgPool2d:
        """The same pooling on our kernel."""
        return cls(
            pool,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
        )

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        kernel = ops.pair(self.op, "kernel_size", self.kernel_size)
        return (
            kernel,
            kernel if self.stride is None else ops.pair(self.op, "stride", self.stride),
            ops.pair(self.op, "padding", self.padding),
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        ops.refuse_grad(self.op, input)
        out = ops.raw.avg_pool2d(_batched(input), *self.arguments(input))
        return out.squeeze(0) if input.dim() == 3 else out

    def sizes(self) -> list[tuple[int, ...]]:
        kernel = ops.pair("avg_pool2d", "kernel_size", self.kernel_size)
        return [(1, 8, *(max(_COMMON_SIZE, n) for n in kernel))]

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"ceil_mode={self.ceil_mode}, count_include_pad={self.count_include_pad}, "
            f"divisor_override={self.divisor_override}"
        )


class GlobalAvgPool2d(Swapped):
    """Adaptive average pooling to 1 x 1, or a mean over height and width; see
    `ops.global_avg_pool2d`. What is no (N, C, H, W) image of floats is averaged by stock PyTorch.

    Args:
        stock: the module replaced, if any.
        keepdim: return (N, C, 1, 1).
        dims: the dimensions the stock form averages, to serve inputs that are not 4-D.
    """

    kind = "global_avg_pool2d"
    op = "global_avg_pool2d"

    def __init__(
        self, stock: nn.Module | None, keepdim: bool, dims: Sequence[int] = (-2, -1)
    ) -> None:
        super().__init__(stock)
        self.keepdim = keepdim
        self.dims = tuple(dims)

    @classmethod
    def from_stock(cls, pool: nn.Module) -> GlobalAvgPool2d:
        """The same as an adaptive pooling to 1 x 1 on our kernel."""
        return cls(pool, keepdim=True)

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        return (self.keepdim,)

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        if input.dim() != 4 or input.dtype not in ops.DTYPES:
            return input.mean(self.dims, keepdim=self.keepdim)
        return ops.global_avg_pool2d(input, self.keepdim)

    def sizes(self) -> list[tuple[int, ...]]:
        return [(1, 8, _COMMON_SIZE, _COMMON_SIZE)]

    def extra_repr(self) -> str:
        return f"keepdim={self.keepdim}"


class Add(Swapped):
    """The residual add, with the activation after it; see `ops.add`. Operands that are not two
    tensors of one shape and float dtype are added by stock PyTorch."""

    kind = "add"
    op = "add"

    def __init__(
        self,
        stock: nn.Module | None = None,
        act_min: float | None = None,
        act_max: float | None = None,
    ) -> None:
        super().__init__(stock)
        self.act_min = act_min
        self.act_max = act_max

    @classmethod
    def from_stock(
        cls, add: nn.Module, act_min: float | None = None, act_max: float | None = None
    ) -> Add:
        """Stand for `add`, a module that adds its two inputs."""
        return cls(add, act_min, act_max)

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        return self.act_min, self.act_max

    def forward(self, input: Any, other: Any) -> Any:
        self._require_eval()
        if (
            isinstance(input, Tensor)
            and isinstance(other, Tensor)
            and input.shape == other.shape
            and input.dtype == other.dtype
            and input.dtype in ops.DTYPES
        ):
            ops.refuse_grad("add", input, other)
            return ops.raw.add(input, other, *self.arguments(input))
        out = input + other
        if self.act_min is None and self.act_max is None:
            return out
        return torch.clamp(out, self.act_min, self.act_max)

    def sizes(self) -> list[tuple[int, ...]]:
        return [(1, 8, _COMMON_SIZE, _COMMON_SIZE)] * 2

    def extra_repr(self) -> str:
        return _activation_repr(self.act_min, self.act_max).removeprefix(", ")


class _FusedBlock(Swapped):
    """Base of the blocks that read `packed`, their weights and biases in the order of the kernel,
    which follows these through `.to()`, `.half()`, `load_state_dict`, edits and replacements.

    Args:
        stock: the module replaced, if any.
        parameters: by name, in the order in which the op takes them.
        exact_biases: the biases among them in float32, by name.
    """

    packed: Tensor | None
    #: the biases in float32, as the kernel reads them, by name
    exact_biases: dict[str, Tensor | None]
    #: the parameters that both were made of
    sources: Sources
    in_channels: int
    kernel_size: tuple[int, ...]
    project_weight: nn.Parameter

    def __init__(
        self,
        stock: nn.Module | None,
        parameters: Mapping[str, nn.Parameter | None],
        exact_biases: Mapping[str, Tensor | None],
        act_min: float | None,
        act_max: float | None,
    ) -> None:
        super().__init__(stock)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.__dict__["exact_biases"] = dict(exact_biases)
        self.act_min = act_min
        self.act_max = act_max
        self.register_buffer("packed", self._pack(), persistent=False)
        self._note_sources()

    def _note_sources(self) -> None:
        self.__dict__["sources"] = Sources([self])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._note_sources()  # a copy's parameters are others

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["sources"]
        return state

    def _packed_now(self) -> Tensor | None:
        """`packed`, made anew if a parameter was edited or replaced; None, with which the op reads
        the parameters themselves, if that is impossible for now. (torch.compile and export take it
        as the last call left it: they cannot trace this.)"""
        if torch.compiler.is_compiling() or self.sources.are_as_they_were():
            return self.packed
        if self.project_weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the graph would own the memory
        with torch.no_grad():
            for name, exact in self.exact_biases.items():
                bias = self._parameters[name]
                # The exact one stands for as long as the parameter is what it rounds to.
                if bias is None or exact is None or not torch.equal(exact.to(bias), bias):
                    self.exact_biases[name] = None if bias is None else bias.detach().float()
            self._renew(self._pack())
        self._note_sources()
        return self.packed

    def _renew(self, packed: Tensor | None) -> None:
        """Put `packed` where the old one is, if that is possible: graphs that users captured read
        there."""
        old = self.packed
        if packed is not None and old is not None and _fit(packed, old):
            with torch.inference_mode(old.is_inference()):
                old.copy_(packed)
        else:
            self.packed = packed

    def _pack(self) -> Tensor | None:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Swapped:
        super()._apply(fn, recurse)
        device = next(self.parameters()).device
        for name, bias in self.exact_biases.items():
            self.exact_biases[name] = None if bias is None else bias.to(device)
        self.packed = self._pack()
        self._note_sources()
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.exact_biases:
            bias = self._parameters[name]
            self.exact_biases[name] = None if bias is None else bias.detach().float()
        self.packed = self._pack()
        self._note_sources()
        self._changed()

    def sizes(self) -> list[tuple[int, ...]]:
        size = max(_COMMON_SIZE, *self.kernel_size)
        return [(1, self.in_channels, 2 * size, 2 * size)]

    def _parameters_repr(self) -> str:
        biases = [name for name in self._parameters if name.endswith("bias")]
        return ", ".join(f"{name}={self._parameters[name] is not None}" for name in biases)


class FusedInvertedResidual(_FusedBlock):
    """MobileNetV2's block: pointwise expansion (or none), depthwise convolution and pointwise
    projection, and the residual add; see `ops.inverted_residual`. A (C, H, W) input is one image,
    as for stock.
    """

    kind = "inverted_residual"
    op = "inverted_residual"
    expand_weight: nn.Parameter | None
    expand_bias: nn.Parameter | None
    depthwise_weight: nn.Parameter
    depthwise_bias: nn.Parameter | None
    project_weight: nn.Parameter
    project_bias: nn.Parameter | None

    def __init__(
        self,
        stock: nn.Module | None,
        parameters: Mapping[str, nn.Parameter | None],
        exact_biases: Mapping[str, Tensor | None],
        stride: Sequence[int],
        padding: Sequence[int] | None,
        residual: bool,
        act_min: float | None,
        act_max: float | None,
    ) -> None:
        super().__init__(stock, parameters, exact_biases, act_min, act_max)
        self.out_channels, self.hidden_channels = self.project_weight.shape[:2]
        expand = self.expand_weight
        self.in_channels = self.hidden_channels if expand is None else expand.shape[1]
        self.kernel_size = tuple(self.depthwise_weight.shape[2:])
        self.stride = tuple(stride)
        #: (left, right, top, bottom), or None for TensorFlow's SAME, found from the input's size
        self.padding = None if padding is None else tuple(padding)
        self.residual = residual

    @classmethod
    def from_stock(
        cls,
        expand: FusedConv2d | None,
        depthwise: FusedConv2d,
        project: FusedConv2d,
        residual: bool = False,
        stock: nn.Module | None = None,
    ) -> FusedInvertedResidual:
        """Fuse the convolutions of a block, each with what stands around it.

        Args:
            expand: 1 x 1, with the activation of `depthwise`; None where there is none.
            depthwise: of dilation 1.
            project: 1 x 1, without activation.
            residual: whether the block's input is added.
            stock: the module that the block replaces, if any.
        """
        pieces = {"expand": expand, "depthwise": depthwise, "project": project}
        parameters: dict[str, nn.Parameter | None] = {}
        for name, piece in pieces.items():
            parameters[f"{name}_weight"] = None if piece is None else piece.weight
            parameters[f"{name}_bias"] = None if piece is None else piece.bias
        return cls(
            stock,
            parameters,
            {f"{n}_bias": None if p is None else p.exact_bias for n, p in pieces.items()},
            depthwise.stride,
            depthwise.padding,
            residual,
            depthwise.act_min,
            depthwise.act_max,
        )

    def _pack(self) -> Tensor | None:
        return packing.pack_inverted_residual(*self._tensors())

    def _tensors(
        self,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
        """The weights, and the biases in float32, in the order in which the op takes them."""
        exact = self.exact_biases
        return (
            self.expand_weight,
            exact["expand_bias"],
            self.depthwise_weight,
            exact["depthwise_bias"],
            self.project_weight,
            exact["project_bias"],
        )

    @property
    def pads_same(self) -> bool:
        return self.padding is None

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        padding = self.padding
        if padding is None:
            assert input is not None
            padding = same_padding(input, self.kernel_size, self.stride, (1, 1))
        return (
            self.expand_weight,
            self.expand_bias,
            self.depthwise_weight,
            self.depthwise_bias,
            self.project_weight,
            self.project_bias,
            self._packed_now(),
            self.stride,
            padding,
            self.residual,
            self.act_min,
            self.act_max,
        )

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        ops.refuse_grad(self.kind, input)
        batched = _batched(input)
        out = ops.raw.inverted_residual(batched, *self.arguments(batched))
        return out.squeeze(0) if input.dim() == 3 else out

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}, "
            f"expand={self.expand_weight is not None}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={'same' if self.padding is None else self.padding}, "
            f"residual={self.residual}, {self._parameters_repr()}"
            + _activation_repr(self.act_min, self.act_max)
        )


class FusedStemBlock(_FusedBlock):
    """MobileNetV2's stem, a dense convolution, with the first block, which has no expansion and
    stride 1; see `ops.stem_block`. A (C, H, W) input is one image, as for stock.
    """

    kind = "stem_block"
    op = "stem_block"
    stem_weight: nn.Parameter
    stem_bias: nn.Parameter | None
    depthwise_weight: nn.Parameter
    depthwise_bias: nn.Parameter | None
    project_weight: nn.Parameter
    project_bias: nn.Parameter | None

    def __init__(
        self,
        stock: nn.Module | None,
        parameters: Mapping[str, nn.Parameter | None],
        exact_biases: Mapping[str, Tensor | None],
        stem_stride: Sequence[int],
        stem_padding: Sequence[int] | None,
        padding: Sequence[int],
        act_min: float | None,
        act_max: float | None,
    ) -> None:
        super().__init__(stock, parameters, exact_biases, act_min, act_max)
        self.hidden_channels, self.in_channels = self.stem_weight.shape[:2]
        self.out_channels = self.project_weight.shape[0]
        self.stem_kernel_size = tuple(self.stem_weight.shape[2:])
        self.kernel_size = tuple(self.depthwise_weight.shape[2:])
        self.stem_stride = tuple(stem_stride)
        #: (left, right, top, bottom), or None for TensorFlow's SAME, found from the input's size
        self.stem_padding = None if stem_padding is None else tuple(stem_padding)
        self.padding = tuple(padding)

    @classmethod
    def from_stock(
        cls, stem: FusedConv2d, block: FusedInvertedResidual, stock: nn.Module | None = None
    ) -> FusedStemBlock:
        """Fuse `stem` with the block after it.

        Args:
            stem: one group, dilation 1, with the activation of `block`.
            block: without expansion and residual, of stride 1.
            stock: the module that both replace, if any.
        """
        parameters: dict[str, nn.Parameter | None] = {
            "stem_weight": stem.weight,
            "stem_bias": stem.bias,
            "depthwise_weight": block.depthwise_weight,
            "depthwise_bias": block.depthwise_bias,
            "project_weight": block.project_weight,
            "project_bias": block.project_bias,
        }
        padding = block.padding
        if padding is None:
            padding = _sides_of(block.kernel_size, (1, 1))  # at stride 1 for any size
        exact = {name: bias for name, bias in block.exact_biases.items() if name in parameters}
        return cls(
            stock,
            parameters,
            {"stem_bias": stem.exact_bias, **exact},
            stem.stride,
            stem.padding,
            padding,
            stem.act_min,
            stem.act_max,
        )

    def _pack(self) -> Tensor | None:
        return packing.pack_stem_block(*self._tensors())

    def _tensors(
        self,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
        """The weights, and the biases in float32, in the order in which the op takes them."""
        exact = self.exact_biases
        return (
            self.stem_weight,
            exact["stem_bias"],
            self.depthwise_weight,
            exact["depthwise_bias"],
            self.project_weight,
            exact["project_bias"],
        )

    @property
    def pads_same(self) -> bool:
        return self.stem_padding is None

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        stem_padding = self.stem_padding
        if stem_padding is None:
            assert input is not None
            stem_padding = same_padding(input, self.stem_kernel_size, self.stem_stride, (1, 1))
        return (
            self.stem_weight,
            self.stem_bias,
            self.depthwise_weight,
            self.depthwise_bias,
            self.project_weight,
            self.project_bias,
            self._packed_now(),
            self.stem_stride,
            stem_padding,
            self.padding,
            self.act_min,
            self.act_max,
        )

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        ops.refuse_grad(self.kind, input)
        batched = _batched(input)
        out = ops.raw.stem_block(batched, *self.arguments(batched))
        return out.squeeze(0) if input.dim() == 3 else out

    def extra_repr(self) -> str:
        stem_padding = "same" if self.stem_padding is None else self.stem_padding
        return (
            f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}, "
            f"stem_kernel_size={self.stem_kernel_size}, stem_stride={self.stem_stride}, "
            f"stem_padding={stem_padding}, kernel_size={self.kernel_size}, "
            f"padding={self.padding}, {self._parameters_repr()}"
            + _activation_repr(self.act_min, self.act_max)
        )


class FusedConvPool(Swapped):
    """A pointwise convolution with its activation and the global average pooling after it; see
    `ops.conv_pool`. A (C, H, W) input is one image, where the stock pooling takes one.

    Args:
        stock: the module replaced, if any.
        keepdim: return (N, C, 1, 1) instead of (N, C).
        dims: the dimensions the stock form averages, to serve inputs that are not 4-D.
    """

    kind = "conv_pool"
    op = "conv_pool"

    def __init__(
        self,
        stock: nn.Module | None,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        keepdim: bool,
        dims: Sequence[int],
        act_min: float | None,
        act_max: float | None,
    ) -> None:
        super().__init__(stock)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_channels, self.in_channels = weight.shape[:2]
        self.keepdim = keepdim
        self.dims = tuple(dims)
        self.act_min = act_min
        self.act_max = act_max

    @classmethod
    def from_stock(
        cls, conv: FusedConv2d, pool: GlobalAvgPool2d, stock: nn.Module | None = None
    ) -> FusedConvPool:
        """Fuse `conv`, a 1 x 1 convolution of stride 1 without padding, with the `pool` after it;
        `stock` is the module that both replace, if any."""
        return cls(
            stock, conv.weight, conv.bias, pool.keepdim, pool.dims, conv.act_min, conv.act_max
        )

    def arguments(self, input: Tensor | None) -> tuple[Any, ...]:
        return self.weight, self.bias, self.act_min, self.act_max

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        ops.refuse_grad(self.kind, input)
        out = ops.raw.conv_pool(_batched(input), *self.arguments(input))
        if input.dim() == 3:
            # Of one pixel, by stock's rules.
            return out[0, :, None, None].mean(self.dims, keepdim=self.keepdim)
        return out[:, :, None, None] if self.keepdim else out

    def sizes(self) -> list[tuple[int, ...]]:
        return [(1, self.in_channels, _COMMON_SIZE, _COMMON_SIZE)]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, keepdim={self.keepdim}, "
            f"bias={self.bias is not None}" + _activation_repr(self.act_min, self.act_max)
        )


class Folded(Swapped):
    """What is left where a stock module went into another's kernel: the identity, or the part of it
    that could not go along.

    Args:
        stock: the module folded away.
        into: the qualified name of the module that does its work now; "" for one that does nothing
            in eval mode, as dropout.
        rest: what remains to be done here.
    """

    def __init__(self, stock: nn.Module, into: str, rest: nn.Module | None = None) -> None:
        super().__init__(stock)
        self.into = into
        self.rest = rest

    @property
    def kind(self) -> str:
        return type(self.stock).__name__

    @property
    def kernel(self) -> str:
        return "folded"

    def forward(self, input: Tensor) -> Tensor:
        self._require_eval()
        return input if self.rest is None else self.rest(input)

    def extra_repr(self) -> str:
        return f"{self.kind} into {self.into}" if self.into else f"{self.kind}, idle in eval mode"


def pad_of(module: nn.Module) -> tuple[int, int, int, int] | None:
    """The (left, right, top, bottom) zeros that a stock padding module adds, or None if it is no
    constant zero padding of an image."""
    if type(module) is nn.ConstantPad2d and module.value != 0:
        return None
    if type(module) is nn.ZeroPad2d or type(module) is nn.ConstantPad2d:
        left, right, top, bottom = module.padding
        return (left, right, top, bottom) if min(module.padding) >= 0 else None
    return None


def bounds_of(module: nn.Module) -> tuple[float | None, float | None] | None:
    """The (min, max) of an activation that is a clamp, or None if it is another function."""
    if type(module) is nn.ReLU:
        return (0.0, None)
    if type(module) is nn.ReLU6 or type(module) is nn.Hardtanh:
        return (float(module.min_val), float(module.max_val))
    return None


def adaptive_to_one(size: Any) -> bool:
    """Whether an adaptive pooling's output size is 1 x 1."""
    return size in (1, (1, 1), [1, 1])
