"""Single layers: each one of a patched model against the stock layers whose work it does.

A layer is timed while the model runs, on the inputs that it has there. On a GPU, where it takes
microseconds, what is timed is a CUDA graph of several calls, so that starting the graph hardly
counts. Each call has its own copy of inputs, weights and output, so that, as far as the copies go,
nothing is still in the L2 cache from the last time.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_mbv2 import modules, ops, testing
from torch_mbv2.measure.ceilings import Ceilings
from torch_mbv2.measure.conditions import dtype_of
from torch_mbv2.modules import Swapped
from torch_mbv2.patch import LAYER_LEVELS, patch

CHECKED = 8
"""Images of a batch whose outputs are compared with float64, the first and the last ones."""

_FEWEST, _MOST = 8, 64
"""Copies that a graph rotates among, as far as memory allows."""

Calls = Callable[[], Sequence[Tensor]]
"""What is timed: one call for each copy; their outputs, which the next time may overwrite."""


@dataclass(frozen=True)
class Layer:
    """A call of a layer of a patched model.

    Attributes:
        name: its qualified name, as the rows have it.
        module: that is called.
        inputs: what it is given, all of one shape.
    """

    name: str
    module: Swapped
    inputs: tuple[Tensor, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in; a stem may read images of another one."""
        return self.parameters[0].dtype if self.parameters else self.inputs[0].dtype

    @property
    def has_convolution(self) -> bool:
        return isinstance(self.module, modules.FusedConv2d) or self.fused

    @property
    def fused(self) -> bool:
        """Whether it is a convolution together with more convolutions or a pooling."""
        return isinstance(self.module, modules._FusedBlock | modules.FusedConvPool)

    @property
    def on_gpu(self) -> bool:
        return self.inputs[0].is_cuda

    def copy(self) -> Layer:
        """The same with its own inputs and weights."""
        stock = self.module.stock
        module = copy.deepcopy(self.module, {id(stock): stock})  # nobody calls that one
        return Layer(self.name, module, tuple(x.clone() for x in self.inputs))

    def checked(self, x: Tensor) -> Tensor:
        """Of an input or output, the part that is compared with float64."""
        batched = self.inputs[0].dim() in (2, 4)  # (N, C) or (N, C, H, W)
        if not batched or len(x) <= CHECKED:
            return x
        return torch.cat([x[: CHECKED // 2], x[-CHECKED // 2 :]])


def bench_layers(
    stock: nn.Module,
    images: Tensor,
    ceilings: Ceilings,
    *,
    levels: Sequence[str] = LAYER_LEVELS,
    rounds: int,
    min_time: float,
    on_row: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows "layer" and "layer_total" of bench.schema.json for one dtype and one batch size.

    Every layer that runs on a kernel has a row for each of its calls, in their order. Those that
    stay stock, and calls that a layer leaves to stock PyTorch for what they are given, have none; a
    level without rows has no total.

    Args:
        stock: in eval mode, on its device and in its dtype.
        images: a batch that it takes, on that device, in the layout that a patched model gets.
        ceilings: of that device, with the model's dtype.
        levels: to patch at.
        rounds, min_time: as `testing.time_interleaved` takes them.
        on_row: called for every row with what it is about; `count_layers` says how often.

    Raises torch.OutOfMemoryError if a batch is too large for the GPU.
    """
    dtype = dtype_of(stock, images)
    rows: list[dict[str, Any]] = []
    totals: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=1) as apart, _cudnn_benchmark(True):
        for level in levels:
            common = {"dtype": dtype, "batch": len(images), "level": level}
            bench = _Bench(common, ceilings, apart, rounds, min_time, on_row, [])
            _visit(patch(stock, level=level), images, bench)
            rows += bench.rows
            if bench.rows:
                totals.append(common | _total(bench.rows, images.is_cuda))
    return rows, totals


def count_layers(stock: nn.Module, images: Tensor, levels: Sequence[str] = LAYER_LEVELS) -> int:
    """How many rows `bench_layers` makes; the batch may be any that the model takes."""
    names: list[str] = []
    for level in levels:
        _visit(patch(stock, level=level), images, lambda layer: names.append(layer.name))
    return len(names)


def _visit(patched: nn.Module, images: Tensor, visitor: Callable[[Layer], None]) -> None:
    """Run `patched`, a copy that nobody else uses, and call `visitor` for every layer behind its
    call: so only the inputs of one have to be kept."""
    seen: Counter[str] = Counter()
    for shown, module in _named_layers(patched).items():

        def hook(module: Swapped, args: Any, kwargs: Any, _: Any, shown: str = shown) -> None:
            inputs = (*args, *kwargs.values())
            if _takes(inputs):
                seen[shown] += 1
                again = f" ({seen[shown]})" if seen[shown] > 1 else ""
                visitor(Layer(shown + again, module, inputs))

        module.register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        patched(images)


def _named_layers(patched: nn.Module) -> dict[str, Swapped]:
    """The layers with a kernel by their `short_names`."""
    layers = {
        name: module
        for name, module in patched.named_modules()
        if isinstance(module, Swapped) and not isinstance(module, modules.Folded)
    }
    short = short_names(layers)
    return {short[name]: module for name, module in layers.items()}


def short_names(layers: Iterable[str]) -> dict[str, str]:
    """What tables call the layers of a patched model, by their qualified names: these, but a layer
    that `patch` gave to the forward of a module has the name of that and, at the top, that of its
    kind, if it is the only one there."""
    short = {
        name: re.sub(r"^torch_mbv2_(\w+)_\d+$", r"\1", re.sub(r"\.torch_mbv2_\w+$", "", name))
        for name in layers
    }
    count = Counter(short.values())
    return {name: found if count[found] == 1 else name for name, found in short.items()}


def _takes(inputs: Sequence[Any]) -> bool:
    """Whether a kernel takes these, or the layer leaves them to stock PyTorch."""
    return all(
        isinstance(x, Tensor) and x.dtype in ops.DTYPES and x.shape == inputs[0].shape
        for x in inputs
    )


# ----------------------------------------------------------------------------------------- stock


def stock_of(module: Swapped, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What `module` does, by stock PyTorch in `dtype` on the same (folded) weights, channels_last.

    The function takes the inputs of the module and, in float64, is the reference.
    """
    forms: dict[type[Swapped], Callable[..., Tensor]] = {
        modules.FusedConv2d: _Stock.conv2d,
        modules.FusedLinear: _Stock.linear,
        modules.AvgPool2d: _Stock.avg_pool2d,
        modules.GlobalAvgPool2d: _Stock.global_avg_pool2d,
        modules.Add: _Stock.add,
        modules.FusedStemBlock: _Stock.stem_block,
        modules.FusedInvertedResidual: _Stock.inverted_residual,
        modules.FusedConvPool: _Stock.conv_pool,
    }
    return functools.partial(forms[type(module)], _Stock(module, dtype))


class _Stock:
    """A layer's sizes and weights, and what each kind of layer makes of its inputs with these."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
            self.weights[name] = parameter.detach().to(dtype, memory_format=layout)

    def conv2d(self, x: Tensor) -> Tensor:
        module = self.module
        return self._act(self._conv("", x, module.stride, module.padding, module.dilation))

    def linear(self, x: Tensor) -> Tensor:
        return self._act(F.linear(x, self.weights["weight"], self.weights.get("bias")))

    def avg_pool2d(self, x: Tensor) -> Tensor:
        pool = self.module
        window = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
        return F.avg_pool2d(x, *window, pool.count_include_pad, pool.divisor_override)

    def global_avg_pool2d(self, x: Tensor) -> Tensor:
        return x.mean(self.module.dims, keepdim=self.module.keepdim)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._act(x + y)

    def stem_block(self, x: Tensor) -> Tensor:
        module = self.module
        x = x.to(self.dtype)  # the kernel reads images of any float dtype
        x = self._act(self._conv("stem_", x, module.stem_stride, module.stem_padding))
        x = self._act(self._conv("depthwise_", x, (1, 1), module.padding))
        return self._conv("project_", x)

    def inverted_residual(self, x: Tensor) -> Tensor:
        module = self.module
        y = self._act(self._conv("expand_", x)) if "expand_weight" in self.weights else x
        y = self._act(self._conv("depthwise_", y, module.stride, module.padding))
        y = self._conv("project_", y)
        return x + y if module.residual else y

    def conv_pool(self, x: Tensor) -> Tensor:
        return self.global_avg_pool2d(self._act(self._conv("", x)))

    def _act(self, x: Tensor) -> Tensor:
        """Clamp `x`, which nothing else reads, in place."""
        bounds = (self.module.act_min, self.module.act_max)
        return x if bounds == (None, None) else x.clamp_(*bounds)

    def _conv(
        self,
        name: str,
        x: Tensor,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | None = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
    ) -> Tensor:
        weight, bias = self.weights[f"{name}weight"], self.weights.get(f"{name}bias")
        if padding is None:
            image = modules._batched(x)
            padding = modules.same_padding(image, weight.shape[2:], stride, dilation)
        left, right, top, bottom = padding
        if (left, top) != (right, bottom):
            x, left, top = F.pad(x, tuple(padding)), 0, 0
        groups = x.shape[-3] // weight.shape[1]
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class _Bench:
    """Makes the row of every layer that it is called with.

    Attributes:
        common: what all rows start with.
        apart: a thread in which cuDNN has only ever chosen by its heuristics.
        rows: of the layers so far.
    """

    common: dict[str, Any]
    ceilings: Ceilings
    apart: ThreadPoolExecutor
    rounds: int
    min_time: float
    on_row: Callable[[str], None]
    rows: list[dict[str, Any]]

    def __call__(self, layer: Layer) -> None:
        x = layer.inputs[0]
        result, flops = _counted(layer)
        moved = _bytes([*layer.inputs, result, *layer.parameters])
        copies, caches = _rotation(layer, moved) if layer.on_gpu else (1, "warm")
        sides = self._sides([layer, *(layer.copy() for _ in range(copies - 1))])
        timings = testing.time_interleaved(
            sides, x.device, rounds=self.rounds, min_time=self.min_time
        )
        row = {
            **self.common,
            "layer": layer.name,
            "kernel": layer.module.kernel,
            "input": list(x.shape),
            "output": list(result.shape),
            "caches": caches,
            **_microseconds("", timings["ours"], copies),
            **_microseconds("stock_", timings["stock"], copies),
            **_microseconds("heuristic_", timings.get("heuristic"), copies),
        }
        us, stock_us, heuristic_us = (row[f"{side}us"] for side in ("", "stock_", "heuristic_"))
        floor_us = 1e6 * self.ceilings.floor(moved, flops, self.common["dtype"])
        row |= {
            "ratio": stock_us / us,
            "heuristic_ratio": None if heuristic_us is None else heuristic_us / us,
            "bytes": moved,
            "gb_per_s": moved / us / 1e3,
            "stock_gb_per_s": moved / stock_us / 1e3,
            "flops": flops,
            "tflop_per_s": flops / us / 1e6,
            "stock_tflop_per_s": flops / stock_us / 1e6,
            "floor_us": floor_us,
            "of_floor": floor_us / us,
            "stock_of_floor": floor_us / stock_us,
            **_errors(layer, {side: _poisoned(calls) for side, calls in sides.items()}),
        }
        self.rows.append(row)
        self.on_row("{dtype}, batch {batch}, level {level}: {layer}".format_map(row))

    def _sides(self, copies: Sequence[Layer]) -> dict[str, Calls]:
        """Ours, stock with cuDNN's algorithms timed and, on a GPU, chosen by its heuristics."""
        ours = [functools.partial(c.module.forward, *c.inputs) for c in copies]
        stock = [functools.partial(stock_of(c.module, c.dtype), *c.inputs) for c in copies]
        on_gpu = copies[0].on_gpu
        sides = {"ours": _prepare(ours, on_gpu), "stock": _prepare(stock, on_gpu)}
        if on_gpu and copies[0].has_convolution:
            # PyTorch keeps the algorithm of a convolution by its sizes, in a cache of the thread,
            # whether it was timed or not: the first one stays. So the heuristics' are prepared in a
            # thread that never timed any. The graphs hold them, and can be replayed anywhere.
            stream = torch.cuda.current_stream(copies[0].inputs[0].device)
            sides["heuristic"] = self.apart.submit(_prepare_by_heuristics, stock, stream).result()
        return sides


def _prepare(functions: Sequence[Callable[[], Tensor]], on_gpu: bool) -> Calls:
    """The calls of all functions, on a GPU warmed up and captured in one CUDA graph."""

    def calls() -> list[Tensor]:
        return [function() for function in functions]

    if not on_gpu:
        return calls
    replay, outputs = testing.capture(calls)

    def replayed() -> list[Tensor]:
        replay()
        return outputs

    return replayed


def _prepare_by_heuristics(
    functions: Sequence[Callable[[], Tensor]], stream: torch.cuda.Stream
) -> Calls:
    """The same with cudnn.benchmark off, in a thread that knows no modes and streams of others."""
    with (
        torch.inference_mode(),
        torch.cuda.device(stream.device),
        torch.cuda.stream(stream),
        _cudnn_benchmark(False),  # of all threads, but the others wait
    ):
        return _prepare(functions, on_gpu=True)


@contextmanager
def _cudnn_benchmark(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _counted(layer: Layer) -> tuple[Tensor, int]:
    """The layer's output and FLOPs."""
    # Imported here since it loads all of Triton.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        result = layer.module.forward(*layer.inputs)
    return result, counter.get_total_flops()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _rotation(layer: Layer, moved: int) -> tuple[int, str]:
    """Of a layer on a GPU, which moves so many bytes: `_copies`."""
    device = layer.inputs[0].device
    stock = functools.partial(stock_of(layer.module, layer.dtype), *layer.inputs)
    stock()  # tries algorithms, which takes more memory than any later call
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    stock()
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # and so gives back the graphs of the layer before
    # Stock needs most: its output and what is between its layers. There are up to three sides.
    each = _bytes([*layer.inputs, *layer.parameters, *layer.module.buffers()]) + 3 * peak
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return _copies(moved, l2, fitting=torch.cuda.mem_get_info(device)[0] // 4 // each)


def _copies(moved: int, l2: int, fitting: int) -> tuple[int, str]:
    """How many copies of a layer a graph rotates among, and how that leaves the caches: cold if all
    together move at least twice what the L2 holds.

    moved: bytes of one. l2: bytes. fitting: copies that there is memory for.
    """
    cold = math.ceil(2 * l2 / moved)
    copies = max(1, min(max(cold, _FEWEST), _MOST, fitting))
    return copies, "cold" if copies >= cold else "warm"


def _microseconds(side: str, timing: testing.Timing | None, copies: int) -> dict[str, float | None]:
    """The quantiles of one call, where `timing` is of `copies` of them."""
    found = (None,) * 3 if timing is None else (timing.median, timing.p10, timing.p90)
    names = (f"{side}us", f"{side}p10_us", f"{side}p90_us")
    return {n: None if s is None else 1e6 * s / copies for n, s in zip(names, found, strict=True)}


def _poisoned(calls: Calls) -> Tensor:
    """The last output of the calls as they were timed, which write all of it anew."""
    for output in calls():
        output.fill_(math.nan)
    return calls()[-1]


def _errors(layer: Layer, outputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the outputs of the sides are worth, against float64."""
    exact = stock_of(layer.module, torch.float64)
    expected = exact(*(layer.checked(x).double() for x in layer.inputs)).cpu()
    found = {side: layer.checked(output).cpu() for side, output in outputs.items()}
    errors = {side: testing.relative_l2(output, expected) for side, output in found.items()}
    return {
        "relative_l2": errors["ours"],
        "stock_relative_l2": errors["stock"],
        "heuristic_relative_l2": errors.get("heuristic"),
        "agrees": testing.error_ratio(found["ours"], found["stock"], expected)
        <= testing.allowed_ratio(expected.numel()),
        "stock_agrees": all(
            errors[side] <= _bound(layer).relative for side in errors if side != "ours"
        ),
    }


def _bound(layer: Layer) -> testing.Bound:
    """Of stock's error: cuDNN's convolutions are rounded, and once more with the bias added, so
    that they need what a fused block is allowed."""
    once = not layer.has_convolution or getattr(layer.module, "bias", None) is None
    bounds = testing.BOUNDS if once and not layer.fused else testing.BLOCK_BOUNDS
    return bounds[layer.dtype]


def _total(rows: Sequence[dict[str, Any]], on_gpu: bool) -> dict[str, float | None]:
    """The sums and means of the rows of one level. Of a layer without a convolution, which cuDNN's
    choice has no part in, the time of stock is that by heuristics, too."""
    by_heuristics = [row["heuristic_us"] or row["stock_us"] for row in rows]
    ratios = [row["heuristic_ratio"] or row["ratio"] for row in rows]
    return {
        "us": sum(row["us"] for row in rows),
        "stock_us": sum(row["stock_us"] for row in rows),
        "heuristic_us": sum(by_heuristics) if on_gpu else None,
        "geometric_mean": statistics.geometric_mean(row["ratio"] for row in rows),
        "heuristic_geometric_mean": statistics.geometric_mean(ratios) if on_gpu else None,
    }
