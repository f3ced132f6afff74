"""`bench`: how fast a patched model is against stock PyTorch, and whether both agree.

`--json FILE` writes

    {"schema": 1, "verb": "bench", "date": ISO 8601 in UTC, "args": {every argument},
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
     "error_ratio": relative_l2 / that of plain stock in the same mode,
     "top1": share of images whose top-1 is plain stock's, near ties aside; "near_ties": their count,
     "agrees": null for stock}

or, where a model cannot be captured into a CUDA graph, {"dtype", "batch", "contender", "mode",
"skipped": why}.
"""

from __future__ import annotations

import argparse
import gc
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
_DISTINCT = 32
"""Different images in a batch; a larger one repeats them, so that every row has a reference."""


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
            raise argparse.ArgumentTypeError(
                f"must be of {', '.join(models.DTYPES)}, got {name!r}"
            )
    return list(dict.fromkeys(names))


def run(args: argparse.Namespace) -> int:
    """Print a row for each contender; 1 if a patched model does not agree with stock."""
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
    with _settings(), output.progress("", len(dtypes) * len(batches) * args.rounds) as advance:
        for name in dtypes:
            stock = model.to(device, models.DTYPES[name])
            candidates = _candidates(stock)
            patched = report(candidates[PATCHED].module)
            images = _images(min(_DISTINCT, max(batches)), model.size).to(stock_dtype(name))
            reference = _reference(stock, images, model.batch)
            for batch in batches:
                case = _Case(name, batch, device, images, reference[: min(batch, len(images))])

                def on_round(text: str = f"{name}, batch {batch}") -> None:
                    advance(text)

                rows += _time(case, candidates, args.rounds, args.min_time, on_round)
    agree = all(row["agrees"] for row in rows if row.get("agrees") is not None)
    output.write_json(
        args.json,
        {
            "schema": 1,
            "verb": "bench",
            "date": started,
            "args": {key: value for key, value in vars(args).items() if key != "run"},
            "environment": info.environment(),
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
            "report": {"summary": patched.summary(), "note": patched.note},
            "agree": agree,
            "rows": rows,
        },
    )
    return 0 if agree else 1
