"""`profile`: where the time of a model goes, layer by layer, stock and patched side by side.

Both run eager, stock as the user has it: not in channels_last, batch norms not folded. A row is a
layer of the patched model against the stock layers and functions that it replaces, or something
that is stock in both. All time is in a row or in the gaps between them. `--json` writes what
torch_mbv2/measure/profile.schema.json describes: {"schema": 1, "verb": "profile", ..., "rows",
"totals": {"stock", "patched"}}.

`--ncu LAYER` prints how to profile one layer with NVIDIA Nsight Compute, which then starts this
verb with `--alone LAYER`.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_mbv2 import testing
from torch_mbv2.cli import models, output
from torch_mbv2.errors import Error
from torch_mbv2.measure import profiling
from torch_mbv2.measure.conditions import exact_settings, header, where
from torch_mbv2.measure.layers import short_names
from torch_mbv2.patch import LAYER_LEVELS, patch, report

HELP = "show where the time goes, layer by layer, in a stock and a patched model"
EXAMPLE = "profile torchvision:mobilenet_v2 --batch 32 --dtype float16 --trace traces"

STOCK, PATCHED = "stock", "patched"
_IDLE = 0.05  # of the time, up to which a GPU counts as busy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, what to run and what to do with it."""
    models.add_arguments(parser)
    models.add_case(parser)
    parser.add_argument(
        "--level", choices=LAYER_LEVELS, default="block", help="to patch at; default: block"
    )
    parser.add_argument(
        "--iterations",
        type=models.positive,
        default=20,
        metavar="N",
        help="runs of each model that are profiled; default: 20",
    )
    parser.add_argument(
        "--top",
        type=models.positive,
        metavar="N",
        help="print only the N layers that take stock the longest, and the sum of the others",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--trace",
        metavar="DIR",
        help="also write the traces of both models into DIR, for ui.perfetto.dev or Chrome",
    )
    instead.add_argument(
        "--ncu",
        metavar="LAYER",
        help="only print the command that profiles this layer of the patched model with ncu",
    )
    instead.add_argument(
        "--alone",
        metavar="LAYER",
        help="only run this layer of the patched model, on what it gets there, with the CUDA "
        "profiler on",
    )


def run(args: argparse.Namespace) -> int:
    """Print a row for each layer and the totals of both models.

    `--json` writes what this file's docstring describes.
    """
    layer = args.alone if args.ncu is None else args.ncu
    if layer is not None and args.json is not None:
        raise Error("--json: --ncu and --alone have no results to write; leave it out")
    device = models.device(args.device if args.ncu is None else "cpu")
    traces = None if args.trace is None else _trace_directory(args.trace)
    if traces is not None:
        written = [traces / f"{side}.json" for side in (STOCK, PATCHED)]
        output.check_other_targets(args.json, "--trace", written)
    model = models.load(args.model, args.resolution)
    batch = model.case_batch(args.batch)
    dtype = models.DTYPES[args.dtype]
    stock = model.to(device, dtype)
    patched = patch(stock, level=args.level)
    if layer is not None:
        layer = _find_layer("--alone" if args.ncu is None else "--ncu", layer, patched, stock)
    if args.ncu is not None:
        print(_ncu_command(args, batch))
        return 0
    images = model.noise(batch, dtype).to(device)
    with exact_settings():
        if args.alone is not None:
            models.call(patched, images)  # says what is wrong if it cannot run
            inputs = profiling.run_alone(patched, layer, images)
            print(f"{args.alone}: ran alone on {_describe(inputs)}, on {device.type}")
            return 0
        measured = _measure({STOCK: stock, PATCHED: patched}, images, args.iterations, traces)
    summary = report(patched)
    runs = [run for run, _ in measured.values()]
    rows = profiling.rows(stock, patched, *(run.calls for run in runs))
    result = {
        "schema": 1,
        **header("profile", args.command, device),
        "settings": {
            "tf32": False,
            "cudnn_benchmark": True,
            "stock": "eager, in its own memory format, batch norms apart",
            "images": f"noise, {batch} different ones",
        },
        "model": model.facts(),
        "report": {"summary": summary.summary(), "note": summary.note},
        "dtype": args.dtype,
        "batch": batch,
        "level": args.level,
        "iterations": args.iterations,
        "rows": [row.to_dict() for row in rows],
        "totals": {side: _total(*found, images.is_cuda) for side, found in measured.items()},
    }
    output.emit(args.json, result, lambda: _print(result, args.top, traces))
    return 0


def _measure(
    sides: dict[str, nn.Module], images: Tensor, iterations: int, traces: Path | None
) -> dict[str, tuple[profiling.Run, testing.Timing]]:
    """A typical run of each model, and how long one takes without the profiler."""
    with output.progress("warming up", iterations + len(sides)) as advance:
        for module in sides.values():
            models.call(module, images)  # says what is wrong if it cannot run
        with torch.inference_mode():
            # First, as some of the profiler may stay behind.
            timings = testing.time_interleaved(
                {side: functools.partial(module, images) for side, module in sides.items()},
                images.device,
                rounds=iterations,
                on_round=lambda: advance("timing"),
            )
        measured = {}
        for side, module in sides.items():
            path = None if traces is None else traces / f"{side}.json"
            measured[side] = profiling.record(module, images, iterations, path), timings[side]
            advance(f"profiling {side}")
    return measured


def _total(run: profiling.Run, timing: testing.Timing, cuda: bool) -> dict[str, Any]:
    unprofiled = 1e6 * timing.median
    return {
        "layers_us": run.layers,
        "gaps_us": run.gaps,
        "end_to_end_us": run.length,
        "kernels": sum(len(call.launched) for call in run.calls),
        "runs": run.count,
        "unprofiled_us": unprofiled,
        "unprofiled_p10_us": 1e6 * timing.p10,
        "unprofiled_p90_us": 1e6 * timing.p90,
        "idle": max(0.0, 1 - run.layers / unprofiled) if cuda else None,
    }


def _trace_directory(shown: str) -> Path:
    """The folder for traces, there and writable. Raises Error if it cannot be."""
    directory = Path(shown)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise Error(f"--trace {shown}: cannot be written: {error.strerror}") from None
    for side in (STOCK, PATCHED):
        if (directory / f"{side}.json").is_dir():
            raise Error(f"--trace {shown}: {side}.json in it is a directory")
    return directory


# ------------------------------------------------------------------------------------- one layer


def _find_layer(flag: str, layer: str, patched: nn.Module, stock: nn.Module) -> str:
    """The qualified name of a layer of the patched model, by this or as tables name it.

    Raises Error if the patched model has none of that name, or does not call it.
    """
    owners = profiling.owners(patched, stock)
    shown = {short: name for name, short in short_names(owners.values()).items()}
    layer = shown.get(layer, layer)
    if (owner := owners.get(layer, layer)) != layer:
        raise Error(f"{flag}: {layer} is a part of {owner} in the patched model; give that")
    names = [name for name, _ in patched.named_modules() if name and owners.get(name, name) == name]
    if layer not in names:
        close = difflib.get_close_matches(layer, names, n=3, cutoff=0.5)
        close = close or [name for name in names if name in owners][:3]
        raise Error(
            f"{flag}: the patched model has no layer {layer}; it has {', '.join(close)}, ..."
        )
    return layer


def _ncu_command(args: argparse.Namespace, batch: int) -> str:
    """The command that has Nsight Compute profile one call of a layer, on a GPU."""
    export = re.sub(r"[^\w.-]", "_", args.ncu)  # a file's name
    ncu = ["ncu", "--set", "full", "--profile-from-start", "off", "--force-overwrite"]
    command = ["python", "-m", "torch_mbv2", "profile", args.model, "--device", "cuda"]
    command += ["--dtype", args.dtype, "--batch", str(batch)]
    if args.resolution is not None:
        command += ["--resolution", str(args.resolution)]
    if args.level != "block":
        command += ["--level", args.level]
    return shlex.join([*ncu, "--export", export, *command, "--alone", args.ncu])


def _describe(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in tensors)


# ---------------------------------------------------------------------------------------- output


def _print(result: dict[str, Any], top: int | None, traces: Path | None) -> None:
    model, cuda = result["model"], result["device"] == "cuda"
    height, width = model["input"]
    print(
        f"{model['name']}, {model['weights']}, input {height}x{width}, {result['dtype']}, batch "
        f"{result['batch']}"
    )
    print(where(result))
    print(f"stock: {result['settings']['stock']}" + "; TF32 off, cudnn.benchmark on" * cuda)
    summary = result["report"]
    print(f"patched: {summary['summary']}" + f"; {summary['note']}" * bool(summary["note"]))
    counts = " and ".join(str(result["totals"][side]["runs"]) for side in (STOCK, PATCHED))
    print(
        f"{'GPU' if cuda else 'wall'} time of one run, means over {counts} of "
        f"{result['iterations']} runs: the middle half of those that launched the same\n"
    )
    what = "kernels" if cuda else "ops"
    columns = (
        "layer",
        "kind",
        "stock us",
        "patched us",
        "ratio",
        f"stock {what}",
        f"patched {what}",
    )
    short = short_names(row["layer"] for row in result["rows"])
    shown = _shortened(result["rows"], top)
    rows = [_row_cells(row | {"layer": short.get(row["layer"], row["layer"])}) for row in shown]
    output.print_table(
        columns,
        [*rows, [""] * len(columns), *_total_cells(result["totals"], cuda)],
        numbers=columns[2:],
    )
    print()
    for side, total in result["totals"].items() if cuda else ():
        idle = total["idle"]
        what = f"is busy {100 - 100 * idle:.0f} % of the time"
        if idle > _IDLE:
            what = (
                f"waits for the host {100 * idle:.0f} % of the time: use a CUDA graph, see README"
            )
        print(f"{side}: without the profiler the GPU {what}")
    if traces is not None:
        print(
            f"traces: {traces / STOCK}.json and {traces / PATCHED}.json open in ui.perfetto.dev or "
            "chrome://tracing"
        )


def _shortened(rows: Sequence[dict[str, Any]], top: int | None) -> list[dict[str, Any]]:
    """The `top` rows that take stock the longest, in their order, and one with the sums of the
    others; all without `top`."""
    slowest = sorted(range(len(rows)), key=lambda i: -rows[i]["stock_us"])[:top]
    others = [row for i, row in enumerate(rows) if i not in slowest]
    shown = [rows[i] for i in sorted(slowest)]
    if others:
        names = ("stock_us", "patched_us", "stock_kernels", "patched_kernels")
        sums = {name: sum(row[name] for row in others) for name in names}
        more = f"{len(others)} more layer" + "s" * (len(others) != 1)
        shown.append({"layer": more, "kind": "", "kernel": None, **sums})
    return shown


def _row_cells(row: dict[str, Any]) -> list[str]:
    kind = row["kind"]
    if row["kernel"] not in (None, kind):
        kind = f"{kind}, {row['kernel']}"
    return [
        row["layer"],
        kind,
        *_times(row["stock_us"], row["patched_us"]),
        str(row["stock_kernels"]),
        str(row["patched_kernels"]),
    ]


def _times(stock: float, patched: float) -> list[str]:
    ratio = f"{stock / patched:.2f}x" if patched > 0 else ""
    return [f"{stock:.1f}", f"{patched:.1f}", ratio]


def _total_cells(totals: dict[str, Any], cuda: bool) -> list[list[str]]:
    names = {
        "layers_us": "layers",
        "gaps_us": "host gaps (GPU idle)" if cuda else "between layers (Python, profiler)",
        "end_to_end_us": "end to end",
        "unprofiled_us": "end to end without the profiler, median",
    }
    cells = []
    for key, name in names.items():
        sides = [totals[side] for side in (STOCK, PATCHED)]
        launched = [str(side["kernels"]) for side in sides] if key == "layers_us" else ["", ""]
        cells.append([name, "", *_times(*(side[key] for side in sides)), *launched])
    return cells
