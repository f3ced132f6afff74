"""`bench`: how fast a patched model is against every other way to run it, and whether all agree.

The contenders of `torch_mbv2.measure.contenders` take turns in one process; with `--layers` each
layer is timed against the same work by stock PyTorch, too. What `--json` writes is described by
torch_mbv2/measure/bench.schema.json, a JSON Schema; `--baseline` compares with such a file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_mbv2 import testing
from torch_mbv2.cli import models, output
from torch_mbv2.errors import Error, is_out_of_memory
from torch_mbv2.measure import baseline, ceilings, figures, layers, page
from torch_mbv2.measure.conditions import exact_settings, header, noise, where
from torch_mbv2.measure.contenders import CONTENDERS, PATCHED, RIVALS, Work, in_new_thread
from torch_mbv2.measure.environment import clocks
from torch_mbv2.measure.network import NO_MEMORY, Yardstick, bench_network
from torch_mbv2.patch import Report, patch, report

HELP = "time a patched model against stock PyTorch and other engines, and check that all agree"
EXAMPLE = "bench torchvision:mobilenet_v2 --batches 1,32 --dtypes float32,float16 --layers"

IMAGES = 32
"""Different images: every contender's logits are checked on all of them, whatever its batch size. A
larger batch repeats them."""
_REFERENCE_BATCH = 8
_LAYER_SHARE = 4
"""A sample of a layer lasts at least this part of that of a network, and there are half as many
samples: there are some 80 layers to a network."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, what to time, and what to make of it."""
    models.add_arguments(parser)
    parser.add_argument(
        "--batches",
        type=_batches,
        metavar="N,...",
        help="batch sizes; default: 1,32, or the only one that the model takes",
    )
    parser.add_argument(
        "--dtypes",
        type=_names(models.DTYPES),
        metavar="T,...",
        help=f"of {', '.join(models.DTYPES)}; default: float32, on a GPU float32,float16",
    )
    parser.add_argument(
        "--rivals",
        type=_names(RIVALS),
        default=list(RIVALS),
        metavar="R,...",
        help=f"of {', '.join(RIVALS)}; default: all that are installed",
    )
    models.add_resolution(parser)
    parser.add_argument(
        "--layers",
        action="store_true",
        help="time each layer and block against cuDNN and cuBLAS through stock PyTorch, too",
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
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw the times against the batch size; with --layers also FILE-layers.png and so on",
    )
    parser.add_argument(
        "--report", metavar="DIR", help="write tables and pictures as one page, DIR/index.html"
    )
    parser.add_argument(
        "--baseline",
        metavar="OLD.json",
        help="compare with a run that --json wrote: exit status 1 if something is slower now",
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


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an argument that lists some of the `known` names."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {name!r}")
        return [name for name in known if name in names]

    return parse


def run(args: argparse.Namespace) -> int:
    """Print a row for each contender, and what else is asked for; 1 if a patched model does not
    agree with stock, or is slower than the baseline; 130 if interrupted, after the same for what
    was measured until then.

    `--json` writes what bench.schema.json describes.
    """
    if args.plot is not None:
        figures.check_path(args.plot)
        output.check_other_targets(args.json, "--plot", figures.targets(args.plot))
    if args.report is not None:
        page.check_directory(args.report)
        output.check_other_targets(args.json, "--report", [page.target(args.report)])
    old = None if args.baseline is None else baseline.load(args.baseline)
    device = models.device(args.device)
    model = models.load(args.model, args.resolution)
    batches = args.batches or ([1, 32] if model.batch is None else [model.batch])
    dtypes = args.dtypes or ["float32", *(["float16"] if device.type == "cuda" else [])]
    if model.batch is not None and batches != [model.batch]:
        raise Error(
            f"--batches: the model takes batches of {model.batch} only; export it with a batch of "
            "any size to time others"
        )
    result = {
        "schema": 2,
        **header("bench", args.command, device),
        "model": model.facts(),
    }
    if old is not None:
        baseline.require_alike(result, old, args.baseline)
    missing = {name: CONTENDERS[name].missing(device) for name in args.rivals}
    names = [name for name, why in missing.items() if why is None]
    names += [name for name in PATCHED if CONTENDERS[name].missing(device) is None]
    rows, layer_rows, totals, found = [], [], [], None
    steps = len(names) + args.rounds
    with exact_settings():
        ceiling = None
        if args.layers:
            ceiling = ceilings.measure(device, [models.DTYPES[dtype] for dtype in dtypes])
            plain = model.to(torch.device("cpu"), torch.float32)
            images = model.noise(model.batch or 1, torch.float32)
            with models.running_on(images):
                steps += layers.count_layers(plain, images)
        with output.progress("loading", len(dtypes) * len(batches) * steps) as advance:
            measured = _measure(model, device, dtypes, batches, names, ceiling, args, advance)
            try:
                for found_now, timed, by_layer, sums in measured:
                    found = found_now
                    rows += timed
                    layer_rows += by_layer
                    totals += sums
            except KeyboardInterrupt:  # what was measured before is not lost
                if not rows:
                    raise
    assert found is not None  # there are rows
    if all("skipped" in row for row in rows if row["contender"] in PATCHED):
        sizes = ", ".join(dict.fromkeys(str(row["batch"]) for row in rows))
        raise Error(f"the patched model has {NO_MEMORY} for any of these batch sizes: {sizes}")
    result |= {
        "clocks": clocks() if device.type == "cuda" else None,
        "settings": {
            "tf32": False,
            "cudnn_benchmark": True,
            "caches": "warm: every call reads the same input and weights",
            "images": f"normal noise, {IMAGES} different ones",
            "rounds": args.rounds,
            "min_time_s": args.min_time,
        },
        "ceilings": None if ceiling is None else ceiling.to_dict(),
        "report": {"summary": found.summary(), "note": found.note},
        "rivals": [
            {"name": name, "title": CONTENDERS[name].title, "missing": why}
            for name, why in missing.items()
        ],
        "noise": noise(_spreads(rows, layer_rows)),
        "agree": all(
            row.get("agrees") is not False
            for row in [*(row for row in rows if row["contender"] in PATCHED), *layer_rows]
        ),
        "rows": rows,
        "layers": layer_rows,
        "layer_totals": totals,
    }
    result = output.finite(result)
    if old is not None:
        try:
            result["baseline"] = baseline.compare(result, old, args.baseline)
        except Error:  # nothing in common; what was measured is not lost
            output.emit(args.json, result, lambda: _print(result))
            raise
    output.emit(args.json, result, lambda: _print(result))
    if args.plot is not None or args.report is not None:
        pictures = figures.draw_all(result)
        if args.plot is not None:
            for path in figures.save(pictures, args.plot):
                output.note(f"wrote {path}")
        if args.report is not None:
            output.note(f"wrote {page.write(result, args.report, pictures)}")
    done, wanted = len({(row["dtype"], row["batch"]) for row in rows}), len(dtypes) * len(batches)
    if done < wanted:
        output.note(f"interrupted: {done} of {wanted} cases were measured")
        return 130
    slower = old is not None and result["baseline"]["slower"] > 0
    return 0 if result["agree"] and not slower else 1


_Rows = list[dict[str, Any]]


def _measure(
    model: models.ImageModel,
    device: torch.device,
    dtypes: Sequence[str],
    batches: Sequence[int],
    names: Sequence[str],
    ceiling: ceilings.Ceilings | None,
    args: argparse.Namespace,
    advance: Callable[[str], None],
) -> Iterator[tuple[Report, _Rows, _Rows, _Rows]]:
    """For each dtype and batch size the report of the patched model, and what `_bench` finds. Rows
    are skipped where there is too little memory: too large a batch ends no run."""
    for dtype in dtypes:
        stock = model.to(device, models.DTYPES[dtype])
        found = report(patch(stock))
        images = model.noise(IMAGES, models.DTYPES[dtype]).to(device)
        yardstick = in_new_thread(functools.partial(_yardstick, stock, images, model.batch))
        for batch in batches:
            work = functools.partial(_work, stock, images, batch, model.channels_last)
            rows, layer_rows, totals = _bench(work, yardstick, names, ceiling, args, advance)
            case = {"dtype": dtype, "batch": batch}
            skipped = [{**case, "contender": name, "skipped": NO_MEMORY} for name in names]
            yield found, rows or skipped, layer_rows, totals


def _bench(
    make_work: Callable[[], Work],
    yardstick: Yardstick,
    names: Sequence[str],
    ceiling: ceilings.Ceilings | None,
    args: argparse.Namespace,
    advance: Callable[[str], None],
) -> tuple[_Rows, _Rows, _Rows]:
    """What `bench_network` and, if there is a ceiling, `bench_layers` find; nothing where there is
    too little memory."""
    rows: _Rows = []
    layer_rows: _Rows = []
    totals: _Rows = []
    try:
        work = make_work()
        with models.running_on(work.images):  # what a patched model raises
            rows = bench_network(
                work,
                yardstick,
                names,
                rounds=args.rounds,
                min_time=args.min_time,
                on_step=advance,
            )
        if ceiling is not None:
            layer_rows, totals = layers.bench_layers(
                work.stock,
                work.images.contiguous(memory_format=work.layout),
                ceiling,
                rounds=max(1, args.rounds // 2),
                min_time=args.min_time / _LAYER_SHARE,
                on_row=advance,
            )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if rows:
            case = f"{rows[0]['dtype']}, batch {rows[0]['batch']}"
            output.note(f"layers of {case} are not timed: {NO_MEMORY}")
    return rows, layer_rows, totals


def _yardstick(stock: nn.Module, images: Tensor, batch: int | None) -> Yardstick:
    """Of images that are prepared for, and mirrored so that nobody has seen them."""
    images = images.flip(-1)
    exact = copy.deepcopy(stock).double()
    doubles = images.double() if images.is_floating_point() else images
    batch = batch or _REFERENCE_BATCH
    logits, expected = (
        models.scores(module, x, batch).cpu() for module, x in ((stock, images), (exact, doubles))
    )
    return Yardstick(images, logits, expected)


def _work(stock: nn.Module, images: Tensor, batch: int, channels_last: bool) -> Work:
    repeated = images.repeat(math.ceil(batch / len(images)), 1, 1, 1)[:batch]
    layout = torch.contiguous_format if channels_last else torch.channels_last
    return Work(stock, repeated, layout)


def _spreads(
    rows: Sequence[dict[str, Any]], layer_rows: Sequence[dict[str, Any]]
) -> Iterator[float]:
    """(90 % - 10 %) / median of everything that was timed."""
    for row in rows:
        if "skipped" not in row:
            yield (row["p90_ms"] - row["p10_ms"]) / row["median_ms"]
    for row in layer_rows:
        for side in ("", "stock_", "heuristic_"):
            if row[f"{side}us"] is not None:
                yield (row[f"{side}p90_us"] - row[f"{side}p10_us"]) / row[f"{side}us"]


# ---------------------------------------------------------------------------------------- output


def _print(result: dict[str, Any]) -> None:
    model, summary, settings = result["model"], result["report"], result["settings"]
    print(f"{model['name']}, {model['weights']}, input {model['input'][0]}x{model['input'][1]}")
    print(where(result))
    if result["clocks"] is not None:
        known = {name: value for name, value in result["clocks"].items() if value is not None}
        print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in known.items()))
    cuda = result["device"] == "cuda"
    print(
        f"{'CUDA events' if cuda else 'wall time'}, {settings['rounds']} interleaved rounds; "
        + "TF32 off, cudnn.benchmark on; " * cuda
        + f"caches {settings['caches']}"
    )
    print(f"patched: {summary['summary']}" + f"; {summary['note']}" * bool(summary["note"]))
    for rival in result["rivals"]:
        if rival["missing"] is not None:
            print(f"not timed: {rival['title']}: {rival['missing']}")
    print()
    _print_table(_NETWORK, [row for row in result["rows"] if "skipped" not in row])
    for row in result["rows"]:
        case = f"{row['dtype']}, batch {row['batch']}, {row['contender']}"
        if "skipped" in row:
            print(f"skipped: {case}: {row['skipped']}")
        elif row["agrees"] is False:
            print(f"DISAGREES: {case}: {_disagreement(row)}")
    _print_layers(result)
    if "baseline" in result:
        columns, rows, numbers = baseline.table(result["baseline"])
        print()
        output.print_table(columns, rows, numbers=numbers)
        for sentence in result["baseline"]["comparable"]:
            print(sentence)
        print(baseline.summary(result["baseline"]))
    found = result["noise"]
    if found["over"]:
        output.note(
            f"the machine is noisy: {found['over']} of {found['of']} times spread over "
            f"{found['limit']:.0%} (10 % to 90 % of the samples), up to {found['worst']:.0%}"
        )


def _word(key: str) -> output.Cell:
    return lambda row: str(row[key])


def _times(key: str) -> output.Cell:
    return output.number(key, ".2f", "x")


def _agrees(row: Mapping[str, Any]) -> str:
    return {True: "yes", False: "NO", None: ""}[row["agrees"]]


_WORDS = ("dtype", "contender", "agrees", "layer", "kernel", "caches", "stock agrees")
_NETWORK: dict[str, output.Cell] = {
    "dtype": _word("dtype"),
    "batch": _word("batch"),
    "contender": _word("contender"),
    "ms": output.number("median_ms", ".3f"),
    "10%": output.number("p10_ms", ".3f"),
    "90%": output.number("p90_ms", ".3f"),
    "img/s": output.number("images_per_s", ".0f"),
    "first call s": output.number("first_call_s", ".2f"),
    "peak MiB": output.number("peak_mib", ".0f"),
    "patched is": _times("over_patched"),
    "as CUDA graph": _times("over_patched_cudagraph"),
    "error": output.number("relative_l2", ".1e"),
    "agrees": _agrees,
}
_LAYERS: dict[str, output.Cell] = {
    "layer": _word("layer"),
    "kernel": _word("kernel"),
    "us": output.number("us", ".2f"),
    "10%": output.number("p10_us", ".2f"),
    "90%": output.number("p90_us", ".2f"),
    "stock us": output.number("stock_us", ".2f"),
    "untuned us": output.number("heuristic_us", ".2f"),
    "ratio": _times("ratio"),
    "untuned": _times("heuristic_ratio"),
    "GB/s": output.number("gb_per_s", ".0f"),
    "TFLOP/s": output.number("tflop_per_s", ".2f"),
    "of floor": output.number("of_floor", ".2f"),
    "stock of floor": output.number("stock_of_floor", ".2f"),
    "caches": _word("caches"),
    "error": output.number("relative_l2", ".1e"),
    "stock's": output.number("stock_relative_l2", ".1e"),
    "agrees": _agrees,
    "stock agrees": lambda row: "yes" if row["stock_agrees"] else "NO",
}


def _print_table(columns: dict[str, output.Cell], rows: Sequence[dict[str, Any]]) -> None:
    cells = output.cells(columns, rows)
    output.print_table(
        list(cells),
        list(zip(*cells.values(), strict=True)),
        numbers=[name for name in cells if name not in _WORDS],
    )


def _print_layers(result: dict[str, Any]) -> None:
    """A table for each dtype, batch size and level: stock is the same work by stock PyTorch in
    channels_last, norms folded, with cudnn.benchmark on and, "untuned", off."""
    for total in result["layer_totals"]:
        case = {key: total[key] for key in ("dtype", "batch", "level")}
        print(f"\nlayers at level {case['level']}, {case['dtype']}, batch {case['batch']}")
        _print_table(_LAYERS, [row for row in result["layers"] if case.items() <= row.items()])
        text = (
            f"sum {total['us']:.1f} us, stock {total['stock_us']:.1f} us; geometric mean of the "
            f"ratios {total['geometric_mean']:.2f}x"
        )
        if total["heuristic_us"] is not None:
            text += (
                f"; untuned {total['heuristic_us']:.1f} us, "
                f"{total['heuristic_geometric_mean']:.2f}x"
            )
        print(text)


def _disagreement(row: dict[str, Any]) -> str:
    if row["error_ratio"] is None:
        return "the logits are not finite, or stock's are not"
    return (
        f"relative L2 error {row['relative_l2']:.2e}, {row['error_ratio']:.2f} times "
        f"stock's (allowed {testing.ERROR_RATIO}, and what chance may add); top-1 differs in "
        f"{row['top1_differs']} images"
    )
