"""Whole networks: every contender timed in turns, and its logits compared with float64."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_mbv2 import ops, testing
from torch_mbv2.errors import first_line, is_out_of_memory
from torch_mbv2.measure.conditions import dtype_of
from torch_mbv2.measure.contenders import CONTENDERS, PATCHED, Ready, Work

NO_MEMORY = "not enough memory"
"""Why a row is skipped."""


@dataclass(frozen=True)
class Yardstick:
    """What the logits of a contender are measured by.

    Attributes:
        images: to compare on, (N, ...), as the model takes them: others than those that it was
            prepared with, since a compiler that took these for constants would compute nothing.
        stock: the logits of plain eager stock, (N, classes).
        exact: those in float64 of the same, already rounded, weights and images.
    """

    images: Tensor
    stock: Tensor
    exact: Tensor


def bench_network(
    work: Work,
    yardstick: Yardstick,
    names: Sequence[str],
    *,
    rounds: int,
    min_time: float,
    on_step: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The rows of one dtype and one batch size, as bench.schema.json has them.

    work: for every contender. names: of `CONTENDERS`. rounds, min_time: as
    `testing.time_interleaved` takes them. on_step: called `len(names) + rounds` times, with what is
    being done.

    A contender that fails has a row that says why, except for the patched model: what that raises,
    this does, unless it is for want of memory.
    """
    # What networks of before keep would be let go while the memory of these is measured.
    ops.forget_replays()
    try:
        return _rows(work, yardstick, names, rounds, min_time, on_step)
    finally:
        if _is_compiled(names):
            torch.compiler.reset()  # else the next batch size would be compiled for any
        _free()


def _rows(
    work: Work,
    yardstick: Yardstick,
    names: Sequence[str],
    rounds: int,
    min_time: float,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    dtype, batch = dtype_of(work.stock, yardstick.stock), len(work.images)
    common = {"dtype": dtype, "batch": batch}
    where = f"{dtype}, batch {batch}"
    ready: dict[str, Ready] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        on_step(f"{where}: preparing {name}")
        try:
            ready[name], facts[name] = _prepare(name, work, yardstick)
        except Exception as error:  # what others have written may raise anything
            if name == "patched" and not is_out_of_memory(error):
                raise
            facts[name] = {"skipped": NO_MEMORY if is_out_of_memory(error) else first_line(error)}
            _free()
    with _fixed(ready):
        timings = testing.time_interleaved(
            {name: contender.call for name, contender in ready.items()},
            work.images.device,
            rounds=rounds,
            min_time=min_time,
            on_round=lambda: on_step(where),
        )
    medians = {name: timing.median for name, timing in timings.items()}
    rows = []
    for name in names:
        if name not in ready:
            rows.append({**common, "contender": name, **facts[name]})
            continue
        timing = timings[name]
        rows.append(
            {
                **common,
                "contender": name,
                "median_ms": 1e3 * timing.median,
                "p10_ms": 1e3 * timing.p10,
                "p90_ms": 1e3 * timing.p90,
                "calls": timing.calls,
                "images_per_s": batch / timing.median,
                **facts[name],
                **{f"over_{p}": timing.median / medians.get(p, math.nan) for p in PATCHED},
            }
        )
    return rows


def _prepare(name: str, work: Work, yardstick: Yardstick) -> tuple[Ready, dict[str, Any]]:
    """A contender whose first call is done, what that took, and whether its logits are right."""
    cuda = work.images.is_cuda
    if cuda:
        _free()
        allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    ready = CONTENDERS[name].prepare(work)
    ready.call()
    if cuda:
        torch.cuda.synchronize()
    facts: dict[str, Any] = {"first_call_s": time.perf_counter() - start, "peak_mib": None}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        ready.call()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - allocated + ready.captured_bytes
        if ready.foreign:
            _free()
            taken = free - torch.cuda.mem_get_info()[0]
        facts["peak_mib"] = taken / 2**20
    with _fixed([name]):
        facts |= agreement(logits(ready, yardstick.images), yardstick)
    if name == "eager":
        facts["agrees"] = None
    return ready, facts


def _fixed(names: Iterable[str]) -> AbstractContextManager[Any]:
    """Where nothing is compiled any more: it would be without the settings of the preparation."""
    if not _is_compiled(names):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("fail_on_recompile")
    return stance


def _is_compiled(names: Iterable[str]) -> bool:
    return any(CONTENDERS[name].compiles for name in names)


def logits(ready: Ready, images: Tensor) -> Tensor:
    """The logits of `images`, again from the first where they do not fill the last batch, by the
    calls that are timed: (N, classes) on the CPU, N at least the number of images."""
    batch, parts = len(ready.input), []
    for first in range(0, len(images), batch):
        chosen = torch.arange(first, first + batch, device=images.device) % len(images)
        ready.input.copy_(images[chosen])
        parts.append(ready.call().cpu().clone())
    return torch.cat(parts)


def agreement(logits: Tensor, yardstick: Yardstick) -> dict[str, Any]:
    """Whether logits are as good as stock PyTorch's: an error against float64 that is at most
    `testing.allowed_ratio` times stock's, and the same top-1.

    A top-1 may differ from stock's where the float64 logits of the two classes are closer than the
    errors that both may have: there it is a near tie, which rounding decides.

    logits: (N, classes), of the yardstick's images, as often as there are N, in stock's dtype: what
    computes in another one does not agree.
    """
    again = torch.arange(len(logits)) % len(yardstick.stock)
    stock, exact = yardstick.stock[again], yardstick.exact[again]
    ratio = testing.error_ratio(logits, stock, exact)
    mine, theirs = (x.argmax(1, keepdim=True) for x in (logits, stock))
    gap = (exact.gather(1, mine) - exact.gather(1, theirs)).abs()
    differs = mine != theirs
    near = differs & (gap <= 2 * testing.ERROR_RATIO * testing.max_abs(stock, exact))
    wrong = int((differs & ~near).sum())
    return {
        "relative_l2": testing.relative_l2(logits, exact),
        "max_abs": testing.max_abs(logits, exact),
        "error_ratio": ratio,
        "top1_differs": wrong,
        "near_ties": int(near.sum()),
        "agrees": ratio <= testing.allowed_ratio(yardstick.stock.numel())
        and wrong == 0
        and logits.dtype == stock.dtype,
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # of 32 MiB, kept for whoever comes next
        torch.cuda.empty_cache()
