"""Where the time of a model goes, stock and patched, layer by layer: from traces of torch.profiler.

Hooks put a range with the name of the module around every call of a module. An operator that is not
part of another one belongs to the innermost range around it. So a run of the model is a sequence of
calls: of layers, and of functions in the forwards of other modules.

On a GPU a call owns the kernels, copies and fills that its operators launch, and it is their
timeline that is divided. A kernel may start before the one before it has finished, so that their
durations may sum up to more than has passed: each gets what is left of it after the end of all that
started before. Where nothing runs, the GPU is idle. A run lasts from its first kernel to the first
one of the next run. On a CPU a call owns the time from its begin to its end, and a run lasts as
long as the range of the model.

The sequences of both models are then aligned. What stock calls and the patched model does not, such
as the add of a residual, is done there by a patched layer, and belongs to that one's row.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_mbv2.comparison.layers import pieces
from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.modules import Folded, Swapped

ROOT = "(model)"
"""The name of the range of the model itself, and of the row of what is outside of its modules."""

_SETTLE = 3  # runs before those that count, while the profiler gets going
_RANGE, _OPERATOR = "user_annotation", "cpu_op"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Call:
    """A call of a layer or, in the forward of another module, of a function.

    Attributes:
        module: the qualified name of the layer, or of the module whose forward calls the function.
        function: as the dispatcher names it, such as "aten::add"; None for a layer.
        begin, end: on the CPU, in ns.
        launched: the names of its kernels, or on a CPU of its outermost operators, in order.
        time: that is its own, in ns; as a mean of several runs, in us.
    """

    module: str
    function: str | None
    begin: int
    end: int
    launched: list[str] = field(default_factory=list)
    time: float = 0

    def __str__(self) -> str:
        return self.module if self.function is None else f"{self.module}: {self.function}"


@dataclass(frozen=True)
class Run:
    """A run of a model, in ns, or the mean of several, in us.

    Attributes:
        calls: in the order of execution.
        gaps: the time that is no call's own.
        count: how many runs it is the mean of.
    """

    calls: list[Call]
    gaps: float
    count: int = 1

    @property
    def layers(self) -> float:
        """The time of all calls."""
        return math.fsum(call.time for call in self.calls)

    @property
    def length(self) -> float:
        """From end to end."""
        return self.layers + self.gaps


# ------------------------------------------------------------------------------------- recording


def _visible(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that get ranges, by the names of these: all but those inside patched layers."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inside:
            found[name or ROOT] = module
            if isinstance(module, Swapped):
                inside.update(map(id, module.modules()))
    return found


def layers(model: nn.Module) -> set[str]:
    """The names of the ranges that none is inside of, those of layers, stock or patched."""
    return {
        name
        for name, module in _visible(model).items()
        if name != ROOT and (isinstance(module, Swapped) or next(module.children(), None) is None)
    }


@contextmanager
def ranges(model: nn.Module) -> Iterator[None]:
    """Every call of a module of `model` is a range of the profiler, with the module's name."""
    running: list[record_function] = []

    def enter(name: str) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for name, module in _visible(model).items():
            handle = module.register_forward_pre_hook(lambda *_, name=name: enter(name))
            stack.callback(handle.remove)
            handle = module.register_forward_hook(leave, always_call=True)
            stack.callback(handle.remove)
        try:
            yield
        finally:
            while running:  # what is no Exception, such as Ctrl-C, calls no hooks
                leave()


def record(model: nn.Module, images: Tensor, runs: int, path: Path | None = None) -> Run:
    """What `model(images)` does: the mean of the typical ones among so many runs, in us.

    path: of a file for the whole trace, in Chrome's format.

    Raises UnavailableError if the profiler has seen no kernels of a GPU.
    """
    # Kineto reports each step on stderr; it reads this when it is used for the first time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * images.is_cuda
    profiler = torch.profiler.profile(activities=activities, acc_events=True)  # no warning
    with torch.inference_mode(), ranges(model), profiler:
        for _ in range(_SETTLE + runs + 1):  # the last one tells where the one before it ends
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    found = read(trace, set(_visible(model)), layers(model), images.is_cuda)[_SETTLE:-1]
    whole = [run for run in found if run is not None]
    if not whole:
        raise UnavailableError(
            "the profiler has seen no kernels of the GPU; KINETO_LOG_LEVEL=0 in the environment "
            "makes it tell why"
        )
    return typical(whole)


def run_alone(model: nn.Module, layer: str, images: Tensor) -> list[Tensor]:
    """Call one module of a model alone, on what it gets when `model(images)` runs. On a GPU, the
    CUDA profiler is on during this call alone, which comes after three that warm up.

    layer: the qualified name of the module. Returns the tensors that it gets.

    Raises ModelError if the model does not call it.
    """
    module, given = model.get_submodule(layer), []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        try:
            model(images)
        finally:
            handle.remove()
        if not given:
            raise ModelError(f"{layer}: the model does not call it on these images")
        args, kwargs = given[0]
        for _ in range(3):
            module(*args, **kwargs)
        with torch.cuda.profiler.profile() if images.is_cuda else nullcontext():
            module(*args, **kwargs)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
    return [x for x in tree_leaves(given[0]) if isinstance(x, Tensor)]


# --------------------------------------------------------------------------------------- reading


class _Event(NamedTuple):
    """Something in a trace that takes time, in ns."""

    category: str
    name: str
    start: int
    end: int
    thread: tuple[Any, Any]
    arguments: Mapping[str, Any]


def _events(trace: Mapping[str, Any]) -> Iterator[_Event]:
    for entry in trace["traceEvents"]:
        if entry["ph"] == "X":
            start, duration = (round(1000 * entry[key]) for key in ("ts", "dur"))
            yield _Event(
                entry.get("cat", ""),
                entry["name"],
                start,
                start + duration,
                (entry["pid"], entry["tid"]),
                entry.get("args", {}),
            )


def read(
    trace: Mapping[str, Any], modules: set[str], layers: set[str], cuda: bool
) -> list[Run | None]:
    """The runs in a trace, in order, in ns; None for one on a GPU that has no kernels, or no next
    one to tell where it ends.

    trace: as torch.profiler exports it for Chrome.
    modules: the names of the ranges, ROOT among them.
    layers: those that none is inside of.
    cuda: whether it is the time of a GPU that is divided.
    """
    events = list(_events(trace))
    found = _calls(events, modules, layers)
    if cuda:
        return _on_gpu(events, [calls for _, calls in found])
    for _, calls in found:
        for call in calls:
            call.time = call.end - call.begin
    return [
        Run(calls, run.end - run.start - sum(call.time for call in calls)) for run, calls in found
    ]


def _calls(
    events: Sequence[_Event], modules: set[str], layers: set[str]
) -> list[tuple[_Event, list[Call]]]:
    """The ranges of the model, and the calls in each with their operators."""
    spans = [event for event in events if event.category == _RANGE and event.name in modules]
    threads = {span.thread for span in spans}
    spans += [event for event in events if event.category == _OPERATOR and event.thread in threads]
    found: list[tuple[_Event, list[Call]]] = []
    around: list[str] = []
    ends: list[int] = []
    operator_end = 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while ends and ends[-1] <= span.start:
            ends.pop()
            around.pop()
        if span.category == _RANGE:
            around.append(span.name)
            ends.append(span.end)
            if span.name == ROOT:
                found.append((span, []))
            elif span.name in layers:
                found[-1][1].append(Call(span.name, None, span.start, span.end))
        elif around and span.start >= operator_end:
            operator_end = span.end
            calls = found[-1][1]
            if around[-1] not in layers:
                calls.append(Call(around[-1], span.name, span.start, span.end))
            calls[-1].launched.append(span.name)
    return found


def _on_gpu(events: Sequence[_Event], runs: Sequence[list[Call]]) -> list[Run | None]:
    """The runs on the GPU, by the calls that the CPU makes in each."""
    kernels = [event for event in events if event.category in _KERNELS]
    kernels.sort(key=lambda kernel: (kernel.start, kernel.end))
    parts = partition([(kernel.start, kernel.end) for kernel in kernels])
    owners = _owners(events, kernels, runs)
    firsts: dict[int, int] = {}
    for position, (run, _) in enumerate(owners):
        firsts.setdefault(run, position)
    found: list[Run | None] = []
    for run, calls in enumerate(runs):
        if run not in firsts or run + 1 not in firsts:
            found.append(None)
            continue
        for call in calls:
            call.launched.clear()
        first, after = firsts[run], firsts[run + 1]
        for kernel, (begin, end), (owner, launcher) in zip(
            kernels[first:after], parts[first:after], owners[first:after], strict=True
        ):
            if launcher is None or owner != run:
                launcher = Call(ROOT, kernel.name, kernel.start, kernel.end)
                calls.append(launcher)
            launcher.launched.append(kernel.name)
            launcher.time += end - begin
        length = parts[after][0] - parts[first][0]
        found.append(Run(calls, length - sum(call.time for call in calls)))
    return found


def _owners(
    events: Sequence[_Event], kernels: Sequence[_Event], runs: Sequence[Sequence[Call]]
) -> list[tuple[int, Call | None]]:
    """The run, counted from 0, and the call that launched each kernel; (-1, None) if none did."""
    calls = [(run, call) for run, calls in enumerate(runs) for call in calls]
    begins = [call.begin for _, call in calls]
    operators, launches = (
        {e.arguments[key]: e.start for e in events if e.category in kinds and key in e.arguments}
        for key, kinds in (("External id", (_OPERATOR,)), ("correlation", _LAUNCHES))
    )
    found: list[tuple[int, Call | None]] = []
    for kernel in kernels:
        # By the operator, as the clock of launches may be another than that of the ranges.
        time = operators.get(kernel.arguments.get("External id"))
        if time is None:
            time = launches.get(kernel.arguments.get("correlation"), -1)
        index = bisect.bisect_right(begins, time) - 1
        owned = index >= 0 and time <= calls[index][1].end
        found.append(calls[index] if owned else (-1, None))
    return found


def partition(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What each span of a timeline has for itself: from its start, or the end of all before it if
    that comes later, to its end.

    spans: (start, end), in order of start. Returns as many, in order, that do not overlap; one that
    lies within those before it is empty.
    """
    parts: list[tuple[int, int]] = []
    busy_until = spans[0][0] if spans else 0
    for start, end in spans:
        start = max(start, busy_until)
        busy_until = max(start, end)
        parts.append((start, busy_until))
    return parts


def typical(runs: Sequence[Run]) -> Run:
    """The mean, in us, of the middle half by length of those runs that did the same, the most that
    did so; so a pause of the machine does not count, nor does what the profiler has seen partly.
    """

    def done(run: Run) -> tuple[Any, ...]:
        return tuple((call.module, call.function, *call.launched) for call in run.calls)

    ((most, _),) = Counter(map(done, runs)).most_common(1)
    alike = sorted((run for run in runs if done(run) == most), key=lambda run: run.length)
    cut = len(alike) // 4
    kept = alike[cut : len(alike) - cut]
    calls = [
        replace(group[0], time=sum(call.time for call in group) / len(kept) / 1000)
        for group in zip(*(run.calls for run in kept), strict=True)
    ]
    return Run(calls, sum(run.gaps for run in kept) / len(kept) / 1000, len(kept))


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Row:
    """What is compared: a patched layer, or something that is stock in both models.

    Attributes:
        name: of the patched or stock layer, or of the module whose forward calls the functions.
        kind: of the layer, or the names of the functions.
        kernel: of the patched layer; None for what is stock.
        stock, patched: its calls in a run of each model.
    """

    name: str
    kind: str
    kernel: str | None
    stock: list[Call]
    patched: list[Call]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, as profile.schema.json describes it."""
        sides = (self.stock, self.patched)
        stock_us, patched_us = (math.fsum(call.time for call in calls) for calls in sides)
        stock, patched = ([name for call in calls for name in call.launched] for calls in sides)
        return {
            "layer": self.name,
            "kind": self.kind,
            "kernel": self.kernel,
            "stock_calls": [str(call) for call in self.stock],
            "stock_us": stock_us,
            "patched_us": patched_us,
            "ratio": stock_us / patched_us if patched_us else math.nan,
            "stock_kernels": len(stock),
            "patched_kernels": len(patched),
            "stock_launched": stock,
            "patched_launched": patched,
        }


def rows(
    stock: nn.Module, patched: nn.Module, stock_calls: Sequence[Call], patched_calls: Sequence[Call]
) -> list[Row]:
    """The calls of a run of each model, side by side, in the order of execution. Each is in one
    row, but for those that neither launch anything nor take time.

    patched: what `patch` made of `stock`.
    """
    known = owners(patched, stock)
    folded = {name for name, module in patched.named_modules() if isinstance(module, Folded)}
    for before, call in itertools.pairwise(patched_calls):
        # What went into a layer that stands for a function is called right after that.
        if call.module in folded - known.keys() and before.module in known:
            known[call.module] = known[before.module]
    added = {piece.name for piece in pieces(patched, stock) if not piece.members}
    found = []
    for name, sides in align(stock_calls, patched_calls, known, added).items():
        calls = [call for side in sides for call in side]
        if not any(call.time or call.launched for call in calls):
            continue
        functions = [call.function for call in calls if call.function is not None]
        kind, kernel = ", ".join(dict.fromkeys(f.removeprefix("aten::") for f in functions)), None
        if name in known:
            layer = patched.get_submodule(name)
            assert isinstance(layer, Swapped)
            kind, kernel = layer.kind, None if isinstance(layer, Folded) else layer.kernel
        elif len(functions) < len(calls):
            kind = type(stock.get_submodule(name)).__name__
        found.append(Row(name, kind, kernel, *sides))
    return found


def owners(patched: nn.Module, stock: nn.Module) -> dict[str, str]:
    """The patched layers, by their names and by those of the modules whose work they do; one that
    is idle in eval mode does its own.

    patched: what `patch` made of `stock`.
    """
    idle = (n for n, m in patched.named_modules() if isinstance(m, Folded) and not m.into)
    return {name: name for name in idle} | {
        name: piece.name
        for piece in pieces(patched, stock)
        for name in (*piece.members, piece.name, piece.last)
    }


def align(
    stock: Sequence[Call], patched: Sequence[Call], owners: Mapping[str, str], added: set[str]
) -> dict[str, tuple[list[Call], list[Call]]]:
    """The calls of both models by the names of the rows that they belong to, in order.

    A call belongs to the patched layer that does the work of its module. Any other has a row of its
    own if both models make it. If stock alone does, it belongs to the layer that the patched model
    alone calls there or, if there is none, to the one before it (padding to the one after it).

    owners: as `owners` returns them.
    added: those of them that only do the work of calls of functions.
    """
    theirs, ours = ([_owner(call.module, owners) for call in side] for side in (stock, patched))
    their_keys, our_keys = (
        [(name, None if name else call.function or call.module) for name, call in side]
        for side in (zip(theirs, stock, strict=True), zip(ours, patched, strict=True))
    )

    def beside(i: int) -> str | None:
        before, after = theirs[:i][::-1], theirs[i + 1 :]
        first, second = (after, before) if "pad" in str(stock[i]) else (before, after)
        return next((name for name in (*first, *second) if name), None)

    found: dict[str, tuple[list[Call], list[Call]]] = defaultdict(lambda: ([], []))
    matcher = SequenceMatcher(None, their_keys, our_keys, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        takers = [name for name in ours[j1:j2] if name in added]
        for i in range(i1, i2):
            name = theirs[i]
            if name is None and tag != "equal":
                name = (takers.pop(0) if takers[1:] else takers[0]) if takers else beside(i)
            found[name or stock[i].module][0].append(stock[i])
        for j in range(j1, j2):
            twin = stock[i1 + j - j1] if tag == "equal" else patched[j]
            found[ours[j] or twin.module][1].append(patched[j])
    return found


def _owner(name: str, owners: Mapping[str, str]) -> str | None:
    """The patched layer that does the work of a module, or of one that it is inside of."""
    while name and name not in owners:
        name = name.rpartition(".")[0]
    return owners.get(name)
