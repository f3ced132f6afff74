"""Layer by layer: what each layer of a patched model computes, against what stock does there."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from torch_mbv2 import modules
from torch_mbv2.comparison.differences import Tolerance, count_layers, differences
from torch_mbv2.modules import Swapped


@dataclass(frozen=True)
class Piece:
    """A layer of a patched model and the stock modules whose work it does, by qualified names.

    Attributes:
        name: of the layer.
        members: of the stock modules, in no order; none where stock calls a function.
        last: of the module whose output is the piece's: the layer, or the `Folded` with what could
            not go along with it.
    """

    name: str
    members: tuple[str, ...]
    last: str


def pieces(patched: nn.Module, stock: nn.Module) -> list[Piece]:
    """The layers that `patch` made of those of `stock`, in the order of `named_modules`."""
    swapped = {name: m for name, m in patched.named_modules() if isinstance(m, Swapped)}
    known = {name for name, _ in stock.named_modules()}
    members: dict[str, list[str]] = defaultdict(list)
    last: dict[str, str] = {}
    for name, module in swapped.items():
        owner = _owner(name, swapped)
        if name in known:
            members[owner].append(name)
        if isinstance(module, modules.Folded) and module.rest is not None:
            last[owner] = name
    return [
        Piece(name, tuple(members[name]), last.get(name, name))
        for name, module in swapped.items()
        if _owner(name, swapped) == name
    ]


def _owner(name: str, swapped: dict[str, Swapped]) -> str:
    """The layer that does the work of `name`: itself if no other does, "" for an idle one."""
    module = swapped.get(name)
    into = module.into if isinstance(module, modules.Folded) else None
    into = getattr(module, "absorbed_by", None) or into
    return name if into is None else _owner(into, swapped)


def _common(patched: nn.Module, stock: nn.Module) -> list[Piece]:
    """The modules that are there in both, with layers of their own inside or stock ones.

    Not identities, and not the plain Sequentials: patch looks through them, so that one may end
    before an activation that is now in its last layer, and else it ends as that layer does.
    """
    known = {name for name, _ in stock.named_modules()}
    looked_through = (nn.Sequential.forward, nn.Identity.forward)
    opaque: set[int] = set()
    found = []
    for name, module in patched.named_modules():
        if isinstance(module, Swapped):
            opaque.update(map(id, module.modules()))
        elif id(module) not in opaque and type(module).forward not in looked_through:
            found.append(name)
    return [Piece(name, (name,), name) for name in found if name and name in known]


@dataclass(frozen=True)
class _Call:
    """What a stock module was given and returned, copied at the time; `start` and `end` number the
    events of the run."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    start: int
    end: int


class _Known(WeakTensorKeyDictionary):
    """What is known of tensors, until something writes to them."""

    def of(self, tensor: Tensor) -> Any:
        version, what = self.get(tensor, (None, None))
        return what if version == tensor._version else None

    def learn(self, tensor: Tensor, what: Any) -> None:
        self[tensor] = (tensor._version, what)


@contextmanager
def _hooked(
    model: nn.Module,
    names: Iterable[str],
    after: Callable[[str, Any, Any], None],
    before: Callable[[str, Any, Any], None] | None = None,
) -> Iterator[None]:
    """Call `before(name, args, kwargs)` and `after(name, args, result)` around the modules' calls.

    Outside inference mode, whose tensors do not count what is written to them.
    """
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            if before is not None:
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                )
                stack.callback(handle.remove)
            handle = module.register_forward_hook(
                lambda _, args, result, name=name: after(name, args, result)
            )
            stack.callback(handle.remove)
        yield


class _Functions(TorchFunctionMode):
    """Sees the clamps and adds that stock does in function calls, which hooks do not."""

    def __init__(self, copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copy = copy
        #: from the copy of an operand to the copy of the result, by what `_WATCHED` calls it
        self.results: MutableMapping[Tensor, dict[str, Tensor]] = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _WATCHED.get(getattr(func, "__name__", ""))
        if kind is None:
            return func(*args, **(kwargs or {}))
        # Copied before a function that works in place overwrites them.
        operands = [self.copy(x) for x in args if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        for operand in operands:
            self.results.setdefault(operand, {})[kind] = self.copy(result)
        return result

    def result(self, kind: str, operand: Tensor) -> Tensor:
        """What a call makes of the copy `operand`; `operand` itself if there is none."""
        return self.results.get(operand, {}).get(kind, operand)


_CLAMP, _ADD = "clamp", "add"
_WATCHED = {
    **dict.fromkeys(("relu", "relu_", "relu6", "hardtanh", "hardtanh_"), _CLAMP),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), _CLAMP),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _ADD),
}


def _record(
    stock: nn.Module, names: Iterable[str], images: Tensor
) -> tuple[dict[str, list[_Call]], _Functions]:
    """The calls of the modules, and of functions, while the whole model runs."""
    copies = _Known()
    calls: dict[str, list[_Call]] = {name: [] for name in names}
    running: dict[str, list[tuple[Any, Any, int]]] = {name: [] for name in calls}
    events = itertools.count()

    def copy(tensor: Tensor) -> Tensor:
        known: Tensor | None = copies.of(tensor)
        if known is None:
            known = tensor.detach().clone()
            copies.learn(tensor, known)
        return known

    def before(name: str, args: Any, kwargs: Any) -> None:
        # Now: a layer that works in place overwrites them.
        running[name].append((*tree_map_only(Tensor, copy, (args, kwargs)), next(events)))

    def after(name: str, args: Any, result: Any) -> None:
        args, kwargs, start = running[name].pop()
        result = tree_map_only(Tensor, copy, result)
        calls[name].append(_Call(args, kwargs, result, start, next(events)))

    with _hooked(stock, calls, after, before), _Functions(copy) as functions:
        stock(images)
    return calls, functions


class _Unmatched(Exception):
    """Why nothing that stock does can be compared with a layer."""


@dataclass(frozen=True)
class _Match:
    """What stock does where the patched model calls a layer: what that is given, what comes out,
    and how many layers with weights do it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Tensor
    layers: int


class _LayerByLayer:
    """Compares two forms of one model while the patched one runs."""

    def __init__(
        self, stock: nn.Module, patched: nn.Module, images: Tensor, tolerance: Tolerance
    ) -> None:
        self.stock, self.patched, self.tolerance = stock, patched, tolerance
        self.swapped = pieces(patched, stock)
        self.points = {p.last: p for p in [*self.swapped, *_common(patched, stock)]}
        members = dict.fromkeys(name for p in self.points.values() for name in p.members)
        self.calls, self.functions = _record(stock, members, images)
        self.counts: Counter[str] = Counter()
        with _hooked(patched, self.points, lambda name, *_: self.counts.update([name])):
            patched(images)
        self.seen: Counter[str] = Counter()
        self.depth = 0
        # Stock's tensor at the point where the patched model has this one.
        self.twins = _Known()
        self.twins.learn(images, images)
        self.found: list[tuple[Piece, dict[str, Any], _Match | None]] = []
        with _hooked(patched, self.points, self.after):
            patched(images)

    def after(self, last: str, args: Any, result: Any) -> None:
        """The patched model has called what `last` names."""
        point, call = self.points[last], self.seen[last]
        self.seen[last] += 1
        module = self.patched.get_submodule(point.name)
        try:
            match = self.match(point, module, call, args)
            if getattr(result, "shape", None) != match.expected.shape:
                raise _Unmatched("its output has not the shape of stock's")
        except _Unmatched as why:
            # Of a module that stays stock, say one called elsewhere, there is nothing to prove.
            if isinstance(module, Swapped):
                self.found.append((point, _row(point, module, call, skipped=str(why)), None))
            return
        self.twins.learn(result, match.expected)
        if isinstance(module, Swapped) or next(module.children(), None) is None:
            self.depth += match.layers
        bounds = self.tolerance.bounds(match.expected, self.depth, growth=1)
        row = _row(point, module, call, accumulated=differences(result, match.expected, *bounds))
        self.found.append((point, row, match))

    def match(self, point: Piece, module: nn.Module, call: int, args: Any) -> _Match:
        runs = {name: self.calls[name] for name in point.members if self.calls[name]}
        if not runs:
            operands = [self.twins.of(x) if isinstance(x, Tensor) else x for x in args]
            return _Match(tuple(operands), {}, _function(module, operands), 0)
        for name, calls in runs.items():
            if len(calls) != self.counts[point.last]:
                raise _Unmatched(
                    f"stock calls {name} {len(calls)} times, the patched model calls this "
                    f"{self.counts[point.last]} times"
                )
        first = min(runs, key=lambda name: runs[name][call].start)
        last = max(runs, key=lambda name: runs[name][call].end)
        begin, end = runs[first][call], runs[last][call]
        given, kwargs, expected = begin.args, begin.kwargs, end.result
        if isinstance(module, Swapped):
            given, kwargs = (*given, *kwargs.values()), {}
            given = _unpadded(module, self.stock.get_submodule(first), given)
            bare = last == point.name or _is_bare(self.stock.get_submodule(last))
            expected = _finished(module, end, self.functions, bare)
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            raise _Unmatched("stock's output is not a tensor of floats")
        layers = count_layers(*map(self.stock.get_submodule, runs))
        return _Match(given, kwargs, expected, layers)

    def isolated(self, point: Piece, match: _Match) -> dict[str, Any]:
        """The differences when the layer is given what stock's was."""
        with torch.no_grad():
            result = self.patched.get_submodule(point.name)(*match.args, **match.kwargs)
            if point.last != point.name:
                result = self.patched.get_submodule(point.last)(result)
        return differences(
            result, match.expected, *self.tolerance.bounds(match.expected, match.layers)
        )


def _row(point: Piece, module: nn.Module, call: int, **found: Any) -> dict[str, Any]:
    swapped = isinstance(module, Swapped)
    return {
        "layer": point.name,
        "call": call,
        "kind": module.kind if swapped else type(module).__name__,
        "kernel": module.kernel if swapped else None,
        "skipped": None,
        "accumulated": None,
        "isolated": None,
        **found,
    }


def _function(module: nn.Module, operands: Sequence[Any]) -> Tensor:
    """What the function call makes of `operands` that `module` was put in the place of."""
    if not operands or any(operand is None for operand in operands):
        raise _Unmatched("its input comes from a function call, which cannot be seen in stock")
    if isinstance(module, modules.Add):
        value: Tensor = operands[0] + operands[1]
        open_ended = module.act_min is None and module.act_max is None
        return value if open_ended else value.clamp(module.act_min, module.act_max)
    if isinstance(module, modules.GlobalAvgPool2d):
        mean: Tensor = operands[0].mean(module.dims, keepdim=module.keepdim)
        return mean
    if isinstance(module, modules.AvgPool2d):
        return F.avg_pool2d(
            operands[0],
            _pair(module.kernel_size),
            None if module.stride is None else _pair(module.stride),
            _pair(module.padding),
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
    raise _Unmatched("stock does not call its layers")


def _pair(sizes: int | Sequence[int]) -> int | tuple[int, ...]:
    return sizes if isinstance(sizes, int) else tuple(sizes)


def _unpadded(module: Swapped, first: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The input of stock's module `first` without the zeros that a function call has put around it
    and that `module` adds itself."""
    sides = None
    if isinstance(module, modules.FusedStemBlock):
        sides = module.stem_padding
    elif isinstance(module, modules.FusedConv2d) or (
        isinstance(module, modules.FusedInvertedResidual) and module.expand_weight is None
    ):
        sides = module.padding
    if sides is None or not isinstance(first, nn.Conv2d):
        return args
    extra = [a - b for a, b in zip(sides, modules.conv_padding(first), strict=True)]
    return (F.pad(args[0], [-n for n in extra]),) if any(extra) else args


def _is_bare(module: nn.Module) -> bool:
    """Whether it is a convolution or norm, without an activation inside as timm's may have one."""
    activation = getattr(module, "act", None)
    none = activation is None or isinstance(activation, nn.Identity)
    return isinstance(module, nn.Conv2d | nn.BatchNorm2d) and none


def _finished(module: Swapped, end: _Call, functions: _Functions, bare: bool) -> Any:
    """Stock's value at the end of a patched layer: what the last of its modules returned or, where
    the layer does more, what function calls make of that.

    bare: whether that module is before an activation, if there is one.
    """
    value = end.result
    if isinstance(module, modules.FusedInvertedResidual):
        added = sum(isinstance(x, Tensor) for x in end.args) > 1
        return functions.result(_ADD, value) if module.residual and not added else value
    clamps = (getattr(module, "act_min", None), getattr(module, "act_max", None)) != (None, None)
    if bare and clamps and not isinstance(module, modules.FusedStemBlock):
        value = functions.result(_CLAMP, value)
    if isinstance(module, modules.FusedConvPool) and value.dim() == 4:
        pooled = module.keepdim and value.shape[2:] == (1, 1)
        value = value if pooled else value.mean(module.dims, keepdim=module.keepdim)
    return value


def compare_layers(
    stock: nn.Module, patched: nn.Module, images: Tensor, tolerance: Tolerance
) -> dict[str, Any]:
    """Compare every point that both models have: {"first_isolated", "first_accumulated", "rows"}.

    A patched layer is compared with stock's value after everything that was folded into it, a
    module that is there in both, a layer or one with a forward of its own, with the same one. Rows
    are in the order in which the patched model comes to the points' ends.

    stock, patched: two forms of one model, on one device. images: a batch that they take; what
    stock's layers make of it is kept in memory.
    """
    run = _LayerByLayer(stock, patched, images, tolerance)
    rows = []
    for point, row, match in run.found:
        rows.append(row if match is None else row | {"isolated": run.isolated(point, match)})
    rows += [
        _row(
            point, patched.get_submodule(point.name), 0, skipped="it is not called on these images"
        )
        for point in run.swapped
        if not run.counts[point.last]
    ]
    return {
        **{f"first_{how}": _first_over(rows, how) for how in ("isolated", "accumulated")},
        "rows": rows,
    }


def _first_over(rows: Sequence[dict[str, Any]], how: str) -> str | None:
    over = (row["layer"] for row in rows if row[how] is not None and not row[how]["agrees"])
    return next(over, None)
