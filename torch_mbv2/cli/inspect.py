"""`inspect`: the operators of a model with their shapes, parameters, multiply-adds and memory
traffic, and the kernel that takes each. Nothing is computed: fake tensors run through the model.

Bytes are those that must move between the memory and the processor if nothing stays in a cache:
each operator reads its tensors, weights included, once and writes its results once, in the dtype
that is asked for. A view (flatten, chunk) moves nothing; an activation in place reads and writes.
They are summed in three ways:

    stock   layer-wise, as eager PyTorch runs the model: batch norms, activations, paddings and
            residual adds are operators of their own
    op      patched at level "op": those are parts of the convolutions' kernels and move no bytes
            of their own; a residual add is still an operator
    block   patched at level "block": a fused block reads its input and its weights and writes its
            output; where it has no fused kernel (float32, channels that are no multiples of 8),
            its convolutions and its add count one by one, as at level "op"

A row of the table is a layer of torch.nn or, outside of these, a call of a function; what does
nothing in eval mode (Identity, Dropout) has none. `--json` writes

    {"schema": 1, "verb": "inspect", "command",
     "model": {"name", "weights", "pretrained", "class", "architecture": text, null unless the
               class is MobileNetV2},
     "dtype", "input": [N, 3, H, W], or [N, H, W, 3] where the model takes that,
     "operators": {name: how many}, "convolutions": {"pointwise" | "depthwise" | "grouped" |
                                                      "dense": how many},
     "parameters": of the stock model, "macs": multiply-adds of the batch,
     "traffic": [{"way": "stock" | "op" | "block", "bytes": of the batch, "bytes_per_image",
                  "flops_per_byte": the arithmetic intensity, two FLOPs a multiply-add}],
     "blocks_without_kernel": how many blocks count one by one at level "block",
     "report": {"summary", "note"}: of `torch_mbv2.report`,
     "layers": [one for each row, in the order of execution]}

and a layer is

    {"name": qualified; of a call, that of the module whose forward makes it,
     "operator", "input", "output": shapes of the first tensors, or null,
     "kernel_size", "stride", "groups": null where there are none,
     "parameters", "macs", "bytes": of the stock operator,
     "kernel": the torch_mbv2 kernel that takes it, or null,
     "folded_into": the layer whose kernel does its work, "" if it has no name, or null,
     "stock": why it stays stock, or null; all three are null for a view and where it cannot be
              told}
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_mbv2 import ops, reference
from torch_mbv2.cli import models, output
from torch_mbv2.errors import ModelError, first_line
from torch_mbv2.mobilenet import MobileNetV2
from torch_mbv2.modules import Swapped, _FusedBlock
from torch_mbv2.patch import (
    LAYER_LEVELS,
    Report,
    Row,
    _is_plain_sequential,
    _is_torch_leaf,
    patch,
    report,
)

HELP = "show a model's operators, shapes, parameters, multiply-adds, bytes and kernels"
EXAMPLE = "inspect torchvision:mobilenet_v2 --batch 32 --dtype float16"

WAYS = {
    "stock": "stock, layer-wise",
    "op": 'patched, level "op"',
    "block": 'patched, level "block"',
}
_GLOBAL_POOL = "global average pool"  # adaptive to 1 x 1, or a mean over height and width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what to count for."""
    models.add_model(parser)
    models.add_case(parser)


def run(args: argparse.Namespace) -> int:
    """Print what the model is, a row for each operator, and the totals.

    `--json` writes what this file's docstring describes.
    """
    model = models.load(args.model, args.resolution)
    batch = model.case_batch(args.batch)
    dtype = models.DTYPES[args.dtype]
    shape = (batch, *model.size, 3) if model.channels_last else (batch, 3, *model.size)
    taken = dtype if model.info.input_dtype.is_floating_point else model.info.input_dtype
    module = model.to(torch.device("cpu"), dtype)
    try:
        stock = operators(module, shape, taken)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"{args.model}: the model cannot be inspected: what it does depends on the values of "
            f"the images, which are not computed ({error.func})"
        ) from error
    except Exception as error:  # the code of a model may raise anything
        raise ModelError(
            f"{args.model}: the model cannot be run on {args.dtype} images of shape {shape}: "
            f"{first_line(error)}"
        ) from error
    patched = {level: patch(module, level=level) for level in LAYER_LEVELS}
    runs = {"stock": stock}
    runs |= {level: operators(fast, shape, taken) for level, fast in patched.items()}
    found = report(patched["block"])
    result = {
        "schema": 1,
        "verb": "inspect",
        "command": args.command,
        "model": {
            "name": model.info.name,
            "weights": model.info.weights,
            "pretrained": model.info.pretrained,
            "class": _class(module),
            "architecture": _architecture(module),
        },
        "dtype": args.dtype,
        "input": list(shape),
        "operators": dict(Counter(row.operator for row in stock).most_common()),
        "convolutions": dict(Counter(row.convolution for row in stock if row.convolution)),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "macs": sum(row.macs for row in stock),
        "traffic": [_traffic(way, rows, stock, batch) for way, rows in runs.items()],
        "blocks_without_kernel": sum(
            isinstance(row.module, _FusedBlock) and row.module.plan().reason is not None
            for row in runs["block"]
        ),
        "report": {"summary": found.summary(), "note": found.note},
        "layers": [
            row.to_dict() | fate
            for row, fate in zip(stock, _fates(stock, runs["block"], found), strict=True)
        ],
    }
    output.emit(args.json, result, lambda: _print(result))
    if result["blocks_without_kernel"]:
        output.note(
            f"{result['blocks_without_kernel']} fused blocks have no kernel (in float32, or for "
            'their channels): their layers count one by one at level "block" too'
        )
    return 0


def _traffic(
    way: str, rows: Sequence[Operator], stock: Sequence[Operator], batch: int
) -> dict[str, Any]:
    moved = sum(row.bytes for row in rows)
    return {
        "way": way,
        "bytes": moved,
        "bytes_per_image": moved / batch,
        "flops_per_byte": 2 * sum(row.macs for row in stock) / moved if moved else math.nan,
    }


def _class(module: nn.Module) -> str:
    # Each GraphModule has a class of its own.
    cls = fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _architecture(module: nn.Module) -> str | None:
    if not isinstance(module, MobileNetV2):
        return None
    a = module.architecture
    paddings = [a.stem_padding, *(block.padding for block in a.blocks)]
    residuals = sum(block.residual for block in a.blocks)
    return (
        f"stem of {a.stem} channels, {len(a.blocks)} inverted residuals ({residuals} with an add), "
        f"{a.last} channels before the pooling, {a.num_classes} classes; {a.activation}; "
        f"batch norms {'apart' if a.norm else 'folded'}; "
        f"{'SAME' if 'same' in paddings else 'explicit'} padding"
    )


# ------------------------------------------------------------------------------------- recording


@dataclass
class Operator:
    """A layer of torch.nn, or a call of a function outside of these, in one run of a model.

    Attributes:
        name: qualified, of the layer or of the module whose forward makes the call.
        scope: the qualified name of the module whose forward holds it, Sequentials looked through.
        module: the layer; None for a call.
        operator: the class of the layer; a call has the name of the layer that does the same.
        convolution: "pointwise", "depthwise", "grouped" or "dense".
        macs: multiply-adds, as torch's FLOP counter counts them.
        bytes: read and written.
    """

    name: str
    scope: str
    module: nn.Module | None
    operator: str
    parameters: int = 0
    input: list[int] | None = None
    output: list[int] | None = None
    kernel_size: list[int] | None = None
    stride: list[int] | None = None
    groups: int | None = None
    convolution: str | None = None
    macs: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What `--json` writes of it."""
        names = ("name", "operator", "input", "output", "kernel_size", "stride", "groups")
        return {name: getattr(self, name) for name in (*names, "parameters", "macs", "bytes")}


def operators(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> list[Operator]:
    """What `model` executes on images of `shape`, such as (N, C, H, W), and `dtype`, in order.

    model: in eval mode, on the CPU. Nothing is computed: the tensors are fake.
    """
    # Imported here since it loads all of Triton.
    from torch.utils.flop_counter import flop_registry

    recorder = _Recorder(model, flop_registry)
    handles = (
        register_module_forward_pre_hook(recorder.enter),
        register_module_forward_hook(recorder.leave, with_kwargs=True),
    )
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True  # whatever it has to say is raised, too
    try:
        # no_grad, since inference_mode would hand composite operators on undecomposed.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            images = torch.empty(tuple(shape), dtype=dtype)
            with _Calls(recorder), _Dispatches(recorder):
                model(images)
    finally:
        log.disabled = False
        for handle in handles:
            handle.remove()
    return recorder.rows


class _Recorder:
    """Gathers the rows of one run. Layers come by hooks, calls of functions by `_Calls`, and what
    either dispatches, by `_Dispatches`; what dispatches nothing is dropped."""

    def __init__(self, model: nn.Module, formulas: Mapping[Any, Callable[..., int]]) -> None:
        self.rows: list[Operator] = []
        self._formulas = formulas
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self._row: Operator | None = None

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the forward of a module."""
        if self._row is None and _is_torch_leaf(module):
            name, parameters = self._names.get(module, ""), module.parameters()
            self._row = Operator(name, self._scope(), module, type(module).__name__)
            self._row.parameters = sum(parameter.numel() for parameter in parameters)
        self._running.append(module)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """After it."""
        self._running.pop()
        if self._row is not None and self._row.module is module:
            self._close((args, kwargs), result)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call `function`: a row of its own if it is not a part of a layer."""
        if self._row is not None:
            return function(*args, **kwargs)
        self._row = self._call_of(getattr(function, "__name__", str(function)))
        weights = [x for x in _tensors((args, kwargs)) if isinstance(x, nn.Parameter)]
        self._row.parameters = sum(weight.numel() for weight in weights)
        result = None
        try:
            result = function(*args, **kwargs)
        finally:  # a model may catch what this raises
            self._close((args, kwargs), result)
        return result

    def dispatch(
        self, function: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any
    ) -> None:
        """Count an operator that was dispatched."""
        outputs = _tensors(result)
        if not outputs:
            return
        row = self._row
        if row is None:  # not by way of Python's functions, so that it is a call of its own
            row = self._call_of(function._opname)
            row.input, row.output = _first_shape((args, kwargs)), _first_shape(result)
        if not self.rows or self.rows[-1] is not row:
            self.rows.append(row)
        named = _named(function, args, kwargs)
        row.bytes += _bytes_moved(function, named, outputs)
        if (formula := self._formulas.get(function.overloadpacket)) is not None:
            row.macs += formula(*args, **kwargs, out_val=result) // 2
        _describe(row, function, named)

    def _call_of(self, function: str) -> Operator:
        # Of `x += y`, `2 - x` and `relu_` as of `x + y`, `x - 2` and `relu`.
        text = re.sub(r"^[ir](?=(add|sub|mul|truediv)$)", "", function.strip("_"))
        name = self._names.get(self._running[-1], "") if self._running else ""
        operator = _LAYER_NAMES.get(text.replace("_", ""), text)
        return Operator(name, self._scope(), None, operator)

    def _scope(self) -> str:
        around = [module for module in self._running if not _is_plain_sequential(module)]
        return self._names.get(around[-1], "") if around else ""

    def _close(self, arguments: Any, result: Any) -> None:
        assert self._row is not None
        self._row.input, self._row.output = _first_shape(arguments), _first_shape(result)
        self._row = None


_LAYER_NAMES = {
    name.lower(): name
    for name, value in vars(nn).items()
    if isinstance(value, type) and issubclass(value, nn.Module)
}


class _Calls(TorchFunctionMode):
    """Sees the functions and methods of torch that Python calls, not those inside of them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._recorder.call(func, args, kwargs or {})


class _Dispatches(TorchDispatchMode):
    """Sees the operators that are dispatched, with their tensors."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        named = _named(func, args, kwargs)
        if "packed" in named and not _is_fused(func, named):
            layer_by_layer = getattr(reference, _name(func))
            with self:  # what CUDA runs instead
                return layer_by_layer(**named, layers=torch.ops.torch_mbv2)
        inputs = _tensors((args, kwargs))
        if inputs and all(map(_is_real_integers, inputs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._recorder.dispatch(func, args, kwargs, result)
        return result


def _named(
    function: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by the names of the schema."""
    names = [argument.name for argument in function._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _name(function: torch._ops.OpOverload) -> str:
    return str(function._schema.name.removeprefix("torch_mbv2::"))


def _is_fused(function: torch._ops.OpOverload, named: dict[str, Any]) -> bool:
    """Whether a block runs as one kernel."""
    x, *arguments = named.values()
    # Not of a batch that no memory could hold: the choice does not depend on it.
    size = (1, *x.shape[1:])
    return ops.plan(_name(function), [size], x.dtype, arguments).reason is None


def _bytes_moved(
    function: torch._ops.OpOverload, named: dict[str, Any], outputs: Sequence[Tensor]
) -> int:
    """What an operator reads and writes: nothing if it only makes views."""
    # `packed` holds the weights once more; a kernel reads one of the two.
    inputs = _tensors([value for name, value in named.items() if name != "packed"])
    storages = {x.untyped_storage()._cdata for x in inputs}
    same = all(x.untyped_storage()._cdata in storages for x in outputs)
    if function.is_view or (same and not function._schema.is_mutable):
        return 0
    return sum(x.nbytes for x in inputs) + sum(x.nbytes for x in outputs)


def _describe(row: Operator, function: torch._ops.OpOverload, named: dict[str, Any]) -> None:
    """Fill in the window of a convolution or pooling, and the name of what has several forms."""
    aten = torch.ops.aten
    if function is aten.convolution.default:
        weight, groups = named["weight"], named["groups"]
        row.kernel_size, row.stride = list(weight.shape[2:]), list(named["stride"])
        row.groups = groups
        row.convolution = "grouped"
        if groups == 1:
            row.convolution = "pointwise" if set(row.kernel_size) == {1} else "dense"
        elif groups == named["input"].shape[1] == weight.shape[0]:
            row.convolution = "depthwise"
    elif "kernel_size" in named:
        row.kernel_size = list(named["kernel_size"])
        row.stride = list(named.get("stride") or row.kernel_size)
    elif function is aten.mean.dim and isinstance(row.module, nn.AdaptiveAvgPool2d | None):
        if named["self"].dim() == 4 and sorted(d % 4 for d in named["dim"] or ()) == [2, 3]:
            row.operator = _GLOBAL_POOL
    elif function is aten.native_batch_norm.default and row.module is None:
        row.operator = f"BatchNorm{named['input'].dim() - 2}d"


def _tensors(tree: Any) -> list[Tensor]:
    """Its tensors, each once."""
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def _is_real_integers(x: Tensor) -> bool:
    """Whether `x` comes of sizes and constants alone. What graphs from ONNX calculate their shapes
    with has to be computed, and does not count."""
    return not isinstance(x, FakeTensor) and not x.is_floating_point()


def _first_shape(tree: Any) -> list[int] | None:
    return next((list(x.shape) for x in _tensors(tree)), None)


# --------------------------------------------------------------------------------------- kernels

# The kinds of our modules that do what is a call in the stock model, and whether they do just that.
_TAKERS = {
    "add": {"add": True, "inverted_residual": False},
    _GLOBAL_POOL: {"global_avg_pool2d": True, "conv_pool": False},
    "AvgPool2d": {"avg_pool2d": True},
}


def _fates(
    stock: Sequence[Operator], patched: Sequence[Operator], found: Report
) -> Iterator[dict[str, str | None]]:
    """What becomes of each operator of a stock model: {"kernel", "folded_into", "stock"}.

    patched: the operators of the model after `patch`. found: the report on that.
    """
    lines = {line.name: line for line in found.rows}
    executed = {row.name for row in patched}
    calls: dict[tuple[str, str], Iterator[dict[str, str | None]]] = {}
    for row in stock:
        line, call = _line_about(row, lines), (row.scope, row.operator)
        if row.bytes == 0:
            yield _fate()  # a view: nothing to run
        elif line is None:
            if call not in calls:
                alike = [r for r in stock if r.bytes and (r.scope, r.operator) == call]
                alike = [r for r in alike if _line_about(r, lines) is None]
                calls[call] = _fates_of_calls(alike, patched, lines)
            yield next(calls[call])
        elif line.kernel == "folded":
            yield _fate(folded_into=line.detail.removeprefix("into "))
        elif line.kernel is not None:
            yield _fate(kernel=line.kernel)
        elif line.name.removesuffix(".rest") in executed:
            yield _fate(stock=line.reason)
        else:
            yield _fate(folded_into="")  # called in several places, folded in each


def _fate(
    kernel: str | None = None, folded_into: str | None = None, stock: str | None = None
) -> dict[str, str | None]:
    return {"kernel": kernel, "folded_into": folded_into, "stock": stock}


def _line_about(row: Operator, lines: Mapping[str, Row]) -> Row | None:
    """The line of the report on a layer, or on the module that a call or layer is a part of."""
    line = lines.get(row.name)
    if line is not None and (row.module is not None or line.kernel is not None):
        return line
    path = row.name.split(".")
    for i in range(len(path) - 1, 0, -1):
        name = ".".join(path[:i])
        line, rest = lines.get(name), lines.get(f"{name}.rest")
        if line is not None and line.kernel is not None:
            return rest if rest is not None and rest.kind == row.operator else line
    return None


def _fates_of_calls(
    calls: Sequence[Operator], patched: Sequence[Operator], lines: Mapping[str, Row]
) -> Iterator[dict[str, str | None]]:
    """The same for all calls of one function in one forward, which the report does not name: in the
    patched model, the same forward executes what took their places, in the same order."""
    first = calls[0]
    takers = _TAKERS.get(first.operator, {})
    doers = [
        row
        for row in patched
        if row.scope == first.scope
        and (
            (row.module is None and row.operator == first.operator and row.bytes)
            or (isinstance(row.module, Swapped) and row.module.kind in takers)
        )
        and getattr(row.module, "residual", True)
    ]
    for index in range(len(calls)):
        if not doers:
            yield _fate(folded_into="")
        elif len(doers) != len(calls):
            yield _fate()  # some are folded, but it cannot be told which
        elif not isinstance(module := doers[index].module, Swapped):
            line = lines.get(first.name)
            reason = None if line is None else line.reason
            yield _fate(stock=reason or "no pattern with a kernel matches this call")
        elif takers[module.kind]:
            yield _fate(kernel=module.kernel)
        else:
            yield _fate(folded_into=doers[index].name)


# ---------------------------------------------------------------------------------------- output


def _print(result: dict[str, Any]) -> None:
    model, convolutions = result["model"], result["convolutions"]
    counts = ", ".join(f"{count} {name}" for name, count in result["operators"].items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in convolutions.items())
    summary = result["report"]["summary"]
    output.print_pairs(
        {
            "model": model["name"],
            "weights": model["weights"],
            "class": model["class"],
            **({"architecture": model["architecture"]} if model["architecture"] else {}),
            "input": f"{' x '.join(map(str, result['input']))}, {result['dtype']}",
            "operators": counts,
            "convolutions": kinds or "none",
            "patched": summary,
            "parameters": f"{result['parameters']:,}",
            "multiply-adds": f"{result['macs']:,}",
        }
    )
    print()
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "layer": lambda row: row["name"] or "(the model)",
        "operator": lambda row: row["operator"],
        "input": lambda row: _sizes(row["input"]),
        "output": lambda row: _sizes(row["output"]),
        "kernel": lambda row: _sizes(row["kernel_size"]),
        "stride": lambda row: _sizes(row["stride"]),
        "groups": lambda row: _number(row["groups"]),
        "parameters": lambda row: _number(row["parameters"]),
        "MACs": lambda row: _number(row["macs"]),
        "bytes": lambda row: _number(row["bytes"]),
        "runs on": _runs_on,
    }
    numbers = ("groups", "parameters", "MACs", "bytes")
    rows = [[render(row) for render in columns.values()] for row in result["layers"]]
    output.print_table(list(columns), rows, numbers=numbers)
    print()
    output.print_table(
        ("memory traffic", "MB", "MB per image", "FLOPs per byte"),
        [
            (
                WAYS[row["way"]],
                f"{row['bytes'] / 1e6:.3f}",
                f"{row['bytes_per_image'] / 1e6:.3f}",
                f"{row['flops_per_byte']:.1f}",
            )
            for row in result["traffic"]
        ],
        numbers=("MB", "MB per image", "FLOPs per byte"),
    )


def _sizes(sizes: Sequence[int] | None) -> str:
    return "" if sizes is None else "x".join(str(size) for size in sizes)


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""


def _runs_on(row: dict[str, Any]) -> str:
    kernel: str | None = row["kernel"]
    if kernel is not None:
        return kernel
    if row["folded_into"] is not None:
        return f"folded into {row['folded_into']}" if row["folded_into"] else "folded"
    return "" if row["stock"] is None else f"stock: {row['stock']}"
