"""`bench`: how fast a patched model is against stock PyTorch, and whether both agree.

`--json FILE` writes

    {"schema": 1, "verb": "bench", "date": ISO 8601 in UTC, "args": {every argument},
     "device": "cpu" | "cuda",
     "environment": {"gpus", "driver", "cpu", "threads", "torch", "cuda", "cudnn", "commit", ...},
     "kernels": {"available", "why_not_available", "archs", "build"},
     "settings": {"tf32", "cudnn_benchmark", "caches", "images"},
     "model": {"name", "weights", "pretrained", "input": [H, W]},
     "report": {"summary", "note"},
     "agree": whether every patched row agrees,
     "rows": [one for each dtype, batch, contender and mode]}

and a row is

    {"dtype", "batch", "contender": "stock" | "stock channels_last folded" | "patched",
     "mode": "eager" | "graph", "median_ms", "p10_ms", "p90_ms", "images_per_s",
     "rounds", "calls": calls that a sample is the mean of,
     "speedup": median of the fastest stock contender of the same mode / this median,
     "memory_mib": GPU memory at the peak of a call, weights included and the input not; null on a
         CPU,
     "relative_l2", "max_abs": error of the logits against float64,
     "error_ratio": relative_l2 / that of plain eager stock, neither taken for less than one rounding,
     "top1_differs": images whose top-1 is not plain eager stock's, near ties aside,
     "near_ties": images where it is not, but whose two classes are closer than rounding can tell,
     "agrees": null for stock}

or, where a model cannot be captured into a CUDA graph, {"dtype", "batch", "contender", "mode",
"skipped": why}.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from torch_mbv2 import testing
from torch_mbv2.cli import info, models, output
from torch_mbv2.errors import Error
from torch_mbv2.patch import fold_norms, patch, report

HELP = "time a patched model against stock PyTorch and check that both agree"
EXAMPLE = "bench torchvision:mobilenet_v2 --batches 1,32 --dtypes float32,float16"

STOCK, FOLDED, PATCHED = "stock", "stock channels_last folded", "patched"
EAGER, GRAPH = "eager", "graph"

_DISTINCT = 32
"""Different images in a batch; a larger one repeats them, so that every row has a reference."""
_REFERENCE_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what to time."""
    models.add_arguments(parser)
    parser.add_argument(
        "--batches",
        type=_batches,
        metavar="N,...",
        help="batch sizes; default: 1,32, or the only one that the model takes",
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        metavar="T,...",
        help=f"of {', '.join(models.DTYPES)}; default: float32, on a GPU float32,float16",
    )
    parser.add_argument(
        "--resolution", type=int, metavar="N", help="height and width; default: the model's"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=20, help="samples of each contender; default: 20"
    )
    parser.add_argument(
        "--min-time",
        type=_seconds,
        default=0.02,
        metavar="S",
        help="seconds that a sample lasts at least, by repeating the call; default: 0.02",
    )


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds from 0 up, got {text!r}")
    return number


def _batches(text: str) -> list[int]:
    return list(dict.fromkeys(_positive(part) for part in text.split(",")))


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in models.DTYPES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(models.DTYPES)}, got {name!r}")
    return list(dict.fromkeys(names))


def run(args: argparse.Namespace) -> int:
    """Print a row for each contender; 1 if a patched model does not agree with stock.

    `--json` writes what this file's docstring describes.
    """
    device = models.device(args.device)
    model = models.load(args.model, args.resolution)
    batches = args.batches or ([1, 32] if model.batch is None else [model.batch])
    dtypes = args.dtypes or ["float32", *(["float16"] if device.type == "cuda" else [])]
    if model.batch is not None and batches != [model.batch]:
        raise Error(
            f"--batches: the model takes batches of {model.batch} only; export it with a batch of "
            "any size to time others"
        )
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows: list[dict[str, Any]] = []
    rounds = len(dtypes) * len(batches) * args.rounds
    with _settings(), output.progress("warming up", rounds) as advance:
        for dtype in dtypes:
            contenders = _contenders(model.to(device, models.DTYPES[dtype]))
            summary = report(contenders[PATCHED].module)
            images = _images(model.size, max(batches)).to(device, models.DTYPES[dtype])
            reference = _reference(contenders[STOCK].module, images, model.batch)
            for batch in batches:
                rows += _bench(
                    contenders, images, reference, batch, args.rounds, args.min_time, advance
                )
            del contenders
            _release()
    disagreements = [row for row in rows if row.get("agrees") is False]
    environment = info.environment()
    output.write_json(
        args.json,
        {
            "schema": 1,
            "verb": "bench",
            "date": started,
            "args": {key: value for key, value in vars(args).items() if key != "run"},
            "device": device.type,
            "environment": environment,
            "kernels": info.kernels(),
            "settings": {
                "tf32": False,
                "cudnn_benchmark": True,
                "caches": "warm: every call reads the same input and weights",
                "images": f"normal noise, {_DISTINCT} different ones at most",
            },
            "model": {
                "name": model.info.name,
                "weights": model.info.weights,
                "pretrained": model.info.pretrained,
                "input": list(model.size),
            },
            "report": {"summary": summary.summary(), "note": summary.note},
            "agree": not disagreements,
            "rows": rows,
        },
    )
    _print_header(device, environment, f"{model.info.name}, {model.info.weights}", args.rounds)
    print(f"patched: {summary.summary()}" + (f"; {summary.note}" if summary.note else ""))
    print()
    _print_rows(rows, device)
    for row in disagreements:
        print(f"DISAGREES: {_disagreement(row)}")
    return 1 if disagreements else 0


@contextmanager
def _settings() -> Iterator[None]:
    """Stock at its best that is still exact: cuDNN tries its algorithms, and TF32 is off."""
    wanted = (
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
    )
    before = [getattr(owner, name) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(wanted, before, strict=True):
            setattr(owner, name, value)


# ------------------------------------------------------------------------------------ contenders


@dataclass
class _Contender:
    """A model on its device, and the GPU memory that it holds by itself."""

    module: nn.Module
    held: int
    channels_last: bool


@dataclass
class _Entry:
    """A contender in one mode, at one batch size: what is timed, and what it computed."""

    contender: str
    mode: str
    call: Callable[[], Any]
    logits: Tensor
    memory: int
    keep: list[Any] = field(default_factory=list)  # tensors at the addresses that a graph knows


def _contenders(stock: nn.Module) -> dict[str, _Contender]:
    """The stock model, the strongest form of it that needs no other library, and the patched one.

    The latter two get their images in channels_last, as in a model that works in it throughout.
    """
    device = next(iter(stock.state_dict().values())).device
    size = sum(tensor.nbytes for tensor in stock.state_dict().values())
    found = {STOCK: _Contender(stock, size if device.type == "cuda" else 0, False)}
    for name, build in (
        (FOLDED, lambda: fold_norms(stock).to(memory_format=torch.channels_last)),
        (PATCHED, lambda: patch(stock)),
    ):
        before = _allocated(device)
        module = build()
        _release()
        found[name] = _Contender(module, _allocated(device) - before, True)
    return found


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _images(size: tuple[int, int], largest_batch: int) -> Tensor:
    count = min(_DISTINCT, largest_batch)
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def _reference(stock: nn.Module, images: Tensor, batch: int | None) -> Tensor:
    """The logits of the same weights and images, both already rounded, in float64."""
    exact = copy.deepcopy(stock).double()
    batch = batch or min(_REFERENCE_BATCH, len(images))
    return models.scores(exact, images.double(), batch).cpu()


# ---------------------------------------------------------------------------------------- timing


def _bench(
    contenders: dict[str, _Contender],
    images: Tensor,
    reference: Tensor,
    batch: int,
    rounds: int,
    min_time: float,
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one dtype and one batch size."""
    repeat = torch.arange(batch) % len(images)
    common = {"dtype": str(images.dtype).removeprefix("torch."), "batch": batch}
    nchw = images[repeat.to(images.device)]
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    entries: list[_Entry] = []
    rows: list[dict[str, Any]] = []
    try:
        with torch.inference_mode():
            for name, contender in contenders.items():
                x = nhwc if contender.channels_last else nchw
                entries.append(_eager(name, contender, x))
                if images.device.type == "cuda":
                    try:
                        entries.append(_graph(name, contender, x))
                    except torch.OutOfMemoryError:
                        raise
                    except RuntimeError as error:
                        why = f"cannot be captured: {str(error).splitlines()[0]}"
                        skipped = {"contender": name, "mode": GRAPH, "skipped": why}
                        rows.append({**common, **skipped})
            timings = testing.time_interleaved(
                {str(index): entry.call for index, entry in enumerate(entries)},
                images.device,
                rounds=rounds,
                min_time=min_time,
                on_round=lambda: advance(f"{common['dtype']}, batch {batch}"),
            )
    except torch.OutOfMemoryError:
        raise Error(
            f"not enough GPU memory for batch {batch} in {common['dtype']}: give smaller --batches"
        ) from None
    measured = sorted(
        zip(entries, timings.values(), strict=True), key=lambda pair: pair[0].mode == GRAPH
    )
    fastest = {
        mode: min(
            (t.median for e, t in measured if e.mode == mode and e.contender != PATCHED),
            default=math.nan,
        )
        for mode in (EAGER, GRAPH)
    }
    expected = reference[repeat]
    for entry, timing in measured:
        rows.append(
            {
                **common,
                "contender": entry.contender,
                "mode": entry.mode,
                "median_ms": 1e3 * timing.median,
                "p10_ms": 1e3 * timing.p10,
                "p90_ms": 1e3 * timing.p90,
                "images_per_s": batch / timing.median,
                "rounds": len(timing.samples),
                "calls": timing.calls,
                "speedup": fastest[entry.mode] / timing.median,
                "memory_mib": entry.memory / 2**20 if images.is_cuda else None,
                **agreement(entry.logits, entries[0].logits, expected),
            }
        )
        if entry.contender != PATCHED:
            rows[-1]["agrees"] = None
    return rows


def _eager(name: str, contender: _Contender, x: Tensor) -> _Entry:
    logits = models.scores(contender.module, x)  # also warms up
    before = _allocated(x.device)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    contender.module(x)
    peak = torch.cuda.max_memory_allocated() - before if x.is_cuda else 0
    return _Entry(name, EAGER, lambda: contender.module(x), logits.cpu(), contender.held + peak)


def _graph(name: str, contender: _Contender, x: Tensor) -> _Entry:
    before = _allocated(x.device)
    torch.cuda.reset_peak_memory_stats()
    replay, logits = testing.capture(lambda: contender.module(x))
    peak = torch.cuda.max_memory_allocated() - before
    replay()
    return _Entry(name, GRAPH, replay, logits.cpu(), contender.held + peak, [x, logits])


# ------------------------------------------------------------------------------------- agreement


def agreement(logits: Tensor, stock: Tensor, expected: Tensor) -> dict[str, Any]:
    """Whether logits are as good as stock PyTorch's: an error against float64 that is at most
    `testing.ERROR_RATIO` times stock's, and the same top-1.

    A top-1 may differ from stock's where the float64 logits of the two classes are closer than the
    errors that both may have: there it is a near tie, which rounding decides.

    logits, stock: (N, classes) in the dtype that is judged. expected: the same in float64.
    """
    unit = testing.unit_roundoff(logits.dtype)
    error, stock_error = (testing.relative_l2(x, expected) for x in (logits, stock))
    ratio = max(error, unit) / max(stock_error, unit)
    if not (math.isfinite(error) and math.isfinite(stock_error)):
        ratio = math.nan
    mine, theirs = (x.argmax(1, keepdim=True) for x in (logits, stock))
    gap = (expected.gather(1, mine) - expected.gather(1, theirs)).abs()
    differs = mine != theirs
    near = differs & (gap <= 2 * testing.ERROR_RATIO * testing.max_abs(stock, expected))
    wrong = int((differs & ~near).sum())
    return {
        "relative_l2": error,
        "max_abs": testing.max_abs(logits, expected),
        "error_ratio": ratio,
        "top1_differs": wrong,
        "near_ties": int(near.sum()),
        "agrees": ratio <= testing.ERROR_RATIO and wrong == 0,
    }


def _disagreement(row: dict[str, Any]) -> str:
    where = f"{row['dtype']}, batch {row['batch']}, {row['mode']}"
    if math.isnan(row["error_ratio"]):
        return f"{where}: the logits of stock or patched are not finite"
    return (
        f"{where}: relative L2 error {row['relative_l2']:.2e}, {row['error_ratio']:.2f} times "
        f"stock's (allowed {testing.ERROR_RATIO}); top-1 differs in {row['top1_differs']} images"
    )


# ---------------------------------------------------------------------------------------- output


def _print_header(
    device: torch.device, environment: dict[str, Any], model: str, rounds: int
) -> None:
    if device.type == "cuda":
        machine = (
            f"{torch.cuda.get_device_name()}, driver {environment['driver']}, "
            f"CUDA {environment['cuda']}, cuDNN {environment['cudnn']}"
        )
        settings = "CUDA events; TF32 off, cudnn.benchmark on"
    else:
        machine = f"{environment['cpu']}, {environment['threads']} threads"
        settings = "wall time"
    print(model)
    print(f"{machine}, torch {environment['torch']}, commit {environment['commit'] or 'unknown'}")
    print(
        f"{settings}; warm caches; {rounds} interleaved rounds; "
        "speedup is over the fastest stock row of the same mode"
    )


def _print_rows(rows: list[dict[str, Any]], device: torch.device) -> None:
    columns = {
        "dtype": lambda row: row["dtype"],
        "batch": lambda row: str(row["batch"]),
        "mode": lambda row: row["mode"],
        "contender": lambda row: row["contender"],
        "median ms": lambda row: f"{row['median_ms']:.3f}",
        "p10": lambda row: f"{row['p10_ms']:.3f}",
        "p90": lambda row: f"{row['p90_ms']:.3f}",
        "img/s": lambda row: f"{row['images_per_s']:.0f}",
        "speedup": lambda row: f"{row['speedup']:.2f}x",
        "MiB": lambda row: f"{row['memory_mib']:.0f}",
        "error": lambda row: f"{row['relative_l2']:.1e}",
        "agrees": lambda row: {True: "yes", False: "NO", None: ""}[row["agrees"]],
    }
    if device.type != "cuda":
        del columns["MiB"]
    timed = [row for row in rows if "skipped" not in row]
    output.print_table(
        list(columns),
        [[render(row) for render in columns.values()] for row in timed],
        numbers=("batch", "median ms", "p10", "p90", "img/s", "speedup", "MiB", "error"),
    )
    for row in rows:
        if "skipped" in row:
            print(
                f"skipped: {row['dtype']}, batch {row['batch']}, {row['contender']}, "
                f"{row['mode']}: {row['skipped']}"
            )
