"""`bench`: how fast a patched model is against stock PyTorch, and whether both agree.

Every contender runs eager and, on a GPU, as a CUDA graph; all take turns, in one process. `--json`
writes

    {"schema": 1, "verb": "bench", "command", "date": ISO 8601 in UTC, "device": "cpu" | "cuda",
     "environment", "kernels": as `info` writes them,
     "settings": {"tf32", "cudnn_benchmark", "caches", "images", "rounds", "min_time_s"},
     "model": {"name", "weights", "pretrained", "input": [H, W]},
     "report": {"summary", "note"},
     "agree": whether every patched row agrees,
     "rows": [one for each dtype, batch, mode and contender]}

and a row is

    {"dtype", "batch", "mode": "eager" | "graph",
     "contender": "stock" | "stock channels_last folded" | "patched",
     "median_ms", "p25_ms", "p75_ms", "images_per_s",
     "calls": calls that a sample is the mean of,
     "ratio": median of stock channels_last folded in the same mode / this median,
     "ratio_stock": median of plain stock in the same mode / this median,
     "relative_l2", "max_abs": error of the logits against float64,
     "error_ratio": relative_l2 / that of plain eager stock, neither taken for less than a rounding,
     "top1_differs": images whose top-1 is not plain eager stock's, near ties aside,
     "near_ties": images where it is not, but rounding cannot tell the classes apart,
     "agrees": null for stock}

or, where a model cannot be captured into a CUDA graph, {"dtype", "batch", "mode", "contender",
"skipped": why}.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

IMAGES = 32
"""Different images: every contender's logits are checked on all of them, whatever its batch size. A
larger batch repeats them."""
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
        "--resolution",
        type=models.image_size,
        metavar="N",
        help="height and width; default: the model's",
    )
    parser.add_argument(
        "--rounds",
        type=models.positive,
        default=20,
        metavar="N",
        help="samples of each contender; default: 20",
    )
    parser.add_argument(
        "--min-time",
        type=_seconds,
        default=0.02,
        metavar="S",
        help="seconds that a sample lasts at least, by repeating the call; default: 0.02",
    )


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds from 0 up, got {text!r}")
    return number


def _batches(text: str) -> list[int]:
    return list(dict.fromkeys(models.positive(part) for part in text.split(",")))


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
    result = header("bench", args.command, device, args.rounds, args.min_time)
    rows: list[dict[str, Any]] = []
    rounds = len(dtypes) * len(batches) * args.rounds
    with exact_settings(), output.progress("warming up", rounds) as advance:
        for dtype in dtypes:
            contenders = _contenders(model.to(device, models.DTYPES[dtype]))
            summary = report(contenders[PATCHED])
            images = model.noise(IMAGES, models.DTYPES[dtype]).to(device)
            layout = torch.contiguous_format if model.channels_last else torch.channels_last
            reference = _reference(contenders[STOCK], images, model.batch)
            for batch in batches:
                rows += _bench(
                    contenders,
                    dtype,
                    images,
                    layout,
                    reference,
                    batch,
                    args.rounds,
                    args.min_time,
                    advance,
                )
    result |= {
        "model": {
            "name": model.info.name,
            "weights": model.info.weights,
            "pretrained": model.info.pretrained,
            "input": list(model.size),
        },
        "report": {"summary": summary.summary(), "note": summary.note},
        "agree": all(row.get("agrees") is not False for row in rows),
        "rows": rows,
    }
    output.emit(args.json, result, lambda: _print(result))
    return 0 if result["agree"] else 1


def header(
    verb: str, command: str, device: torch.device, rounds: int, min_time: float
) -> dict[str, Any]:
    """How the JSON of a bench starts: what ran, where and how."""
    return {
        "schema": 1,
        "verb": verb,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "environment": info.environment(),
        "kernels": info.kernels(),
        "settings": {
            "tf32": False,
            "cudnn_benchmark": True,
            "caches": "warm: every call reads the same input and weights",
            "images": f"normal noise, {IMAGES} different ones",
            "rounds": rounds,
            "min_time_s": min_time,
        },
    }


@contextmanager
def exact_settings() -> Iterator[None]:
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


# ---------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class _Entry:
    """A contender in one mode, at one batch size: what is timed, its static input, and the logits
    of the last call, given what that returned."""

    contender: str
    mode: str
    call: Callable[[], Any]
    input: Tensor
    logits: Callable[[Any], Tensor]

    def check(self, images: Tensor) -> Tensor:
        """The logits of all `images`, (N, classes) on the CPU, by the calls that are timed."""
        batch, parts = len(self.input), []
        for first in range(0, len(images), batch):
            chosen = torch.arange(first, first + batch, device=images.device) % len(images)
            self.input.copy_(images[chosen])
            parts.append(self.logits(self.call()).cpu())
        return torch.cat(parts)[: len(images)]


def _contenders(stock: nn.Module) -> dict[str, nn.Module]:
    """The stock model, the strongest form of it that needs no other library, and the patched one.

    The latter two get their images in channels_last, as in a model that works in it throughout.
    """
    return {
        STOCK: stock,
        FOLDED: fold_norms(stock).to(memory_format=torch.channels_last),
        PATCHED: patch(stock),
    }


def _reference(stock: nn.Module, images: Tensor, batch: int | None) -> Tensor:
    """The logits of the same weights and images, both already rounded, in float64."""
    exact = copy.deepcopy(stock).double()
    images = images.double() if images.is_floating_point() else images
    return models.scores(exact, images, batch or _REFERENCE_BATCH).cpu()


def _bench(
    contenders: dict[str, nn.Module],
    dtype: str,
    images: Tensor,
    layout: torch.memory_format,
    reference: Tensor,
    batch: int,
    rounds: int,
    min_time: float,
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one dtype and one batch size."""
    repeat = torch.arange(batch) % len(images)
    common = {"dtype": dtype, "batch": batch}
    nchw = images[repeat.to(images.device)]
    nhwc = nchw.contiguous(memory_format=layout)
    entries: list[_Entry] = []
    rows: list[dict[str, Any]] = []
    try:
        with torch.inference_mode():
            for name, module in contenders.items():
                x = nchw if name == STOCK else nhwc
                models.scores(module, x)  # warms up, and complains about what is no classifier
                call = functools.partial(module, x)
                entries.append(_Entry(name, EAGER, call, x, lambda logits: logits))
            for eager in list(entries) if images.is_cuda else ():
                name = eager.contender
                try:
                    replay, logits = testing.capture(eager.call)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    first = next(iter(str(error).splitlines()), type(error).__name__)
                    why = f"cannot be captured: {first}"
                    rows.append({**common, "mode": GRAPH, "contender": name, "skipped": why})
                else:
                    # A replay writes its logits to where the graph was captured.
                    entries.append(
                        _Entry(name, GRAPH, replay, eager.input, lambda _, logits=logits: logits)
                    )
            timings = testing.time_interleaved(
                {f"{entry.mode} {entry.contender}": entry.call for entry in entries},
                images.device,
                rounds=rounds,
                min_time=min_time,
                on_round=lambda: advance(f"{dtype}, batch {batch}"),
            )
            found = [entry.check(images) for entry in entries]
    except torch.OutOfMemoryError:
        raise Error(
            f"not enough GPU memory for batch {batch} in {dtype}: give smaller --batches"
        ) from None
    medians = {
        (entry.mode, entry.contender): timing.median
        for entry, timing in zip(entries, timings.values(), strict=True)
    }
    for entry, timing, logits in zip(entries, timings.values(), found, strict=True):
        judged = agreement(logits, found[0], reference)
        if entry.contender != PATCHED:
            judged["agrees"] = None
        rows.append(
            {
                **common,
                "mode": entry.mode,
                "contender": entry.contender,
                "median_ms": 1e3 * timing.median,
                "p25_ms": 1e3 * timing.quantile(0.25),
                "p75_ms": 1e3 * timing.quantile(0.75),
                "images_per_s": batch / timing.median,
                "calls": timing.calls,
                "ratio": medians.get((entry.mode, FOLDED), math.nan) / timing.median,
                "ratio_stock": medians.get((entry.mode, STOCK), math.nan) / timing.median,
                **judged,
            }
        )
    return rows


# ------------------------------------------------------------------------------------- agreement


def agreement(logits: Tensor, stock: Tensor, expected: Tensor) -> dict[str, Any]:
    """Whether logits are as good as stock PyTorch's: an error against float64 that is at most
    `testing.ERROR_RATIO` times stock's, and the same top-1.

    A top-1 may differ from stock's where the float64 logits of the two classes are closer than the
    errors that both may have: there it is a near tie, which rounding decides.

    logits, stock: (N, classes) in the dtype that is judged. expected: the same in float64.
    """
    ratio = testing.error_ratio(logits, stock, expected)
    mine, theirs = (x.argmax(1, keepdim=True) for x in (logits, stock))
    gap = (expected.gather(1, mine) - expected.gather(1, theirs)).abs()
    differs = mine != theirs
    near = differs & (gap <= 2 * testing.ERROR_RATIO * testing.max_abs(stock, expected))
    wrong = int((differs & ~near).sum())
    return {
        "relative_l2": testing.relative_l2(logits, expected),
        "max_abs": testing.max_abs(logits, expected),
        "error_ratio": ratio,
        "top1_differs": wrong,
        "near_ties": int(near.sum()),
        "agrees": ratio <= testing.ERROR_RATIO and wrong == 0,
    }


# ---------------------------------------------------------------------------------------- output


def _print(result: dict[str, Any]) -> None:
    found, model, summary = result["environment"], result["model"], result["report"]
    if result["device"] == "cuda":
        machine = (
            f"{found['gpus'][0]['name']}, driver {found['driver']}, "
            f"CUDA {found['cuda']}, cuDNN {found['cudnn']}"
        )
        clock = "CUDA events; TF32 off, cudnn.benchmark on"
    else:
        machine = f"{found['cpu']}, {found['threads']} threads"
        clock = "wall time"
    print(f"{model['name']}, {model['weights']}, input {model['input'][0]}x{model['input'][1]}")
    print(f"{machine}, torch {found['torch']}, commit {found['commit'] or 'unknown'}")
    print(
        f"{clock}; warm caches; {result['settings']['rounds']} interleaved rounds; both ratios are "
        "over rows of the same mode"
    )
    print(f"patched: {summary['summary']}" + f"; {summary['note']}" * bool(summary["note"]))
    print()
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "dtype": lambda row: row["dtype"],
        "batch": lambda row: str(row["batch"]),
        "mode": lambda row: row["mode"],
        "contender": lambda row: row["contender"],
        "median ms": lambda row: f"{row['median_ms']:.3f}",
        "25%": lambda row: f"{row['p25_ms']:.3f}",
        "75%": lambda row: f"{row['p75_ms']:.3f}",
        "img/s": lambda row: f"{row['images_per_s']:.0f}",
        "vs stock": lambda row: f"{row['ratio_stock']:.2f}x",
        "vs folded": lambda row: f"{row['ratio']:.2f}x",
        "error": lambda row: f"{row['relative_l2']:.1e}",
        "agrees": lambda row: {True: "yes", False: "NO", None: ""}[row["agrees"]],
    }
    words = ("dtype", "mode", "contender", "agrees")
    output.print_table(
        list(columns),
        [
            [render(row) for render in columns.values()]
            for row in result["rows"]
            if "skipped" not in row
        ],
        numbers=[name for name in columns if name not in words],
    )
    for row in result["rows"]:
        where = f"{row['dtype']}, batch {row['batch']}, {row['mode']}"
        if "skipped" in row:
            print(f"skipped: {where}, {row['contender']}: {row['skipped']}")
        elif row["agrees"] is False:
            print(f"DISAGREES: {where}: {_disagreement(row)}")


def _disagreement(row: dict[str, Any]) -> str:
    if math.isnan(row["error_ratio"]):
        return "the logits of stock or patched are not finite"
    return (
        f"relative L2 error {row['relative_l2']:.2e}, {row['error_ratio']:.2f} times "
        f"stock's (allowed {testing.ERROR_RATIO}); top-1 differs in {row['top1_differs']} images"
    )
