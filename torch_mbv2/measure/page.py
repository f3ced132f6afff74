"""A result of `bench` as a web page: one HTML file with the pictures inside, which needs nothing
else, no network and no script."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_mbv2.errors import Error
from torch_mbv2.measure import baseline, figures
from torch_mbv2.measure.conditions import check_target, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

_ALTS = {
    "batches": "Latency in ms and throughput in images per second of each contender against the "
    "batch size. The table of the whole network has the numbers.",
    "layers": "Time of each layer at level block, patched and stock, at the smallest and the "
    "largest batch size. The tables of the layers have the numbers.",
    "layers-op": "Time of each layer at level op, patched and stock, at the smallest and the "
    "largest batch size. The tables of the layers have the numbers.",
    "roofline": "TFLOP/s of each layer, patched and stock, against its FLOPs per byte, under the "
    "measured roof. The tables of the layers have the numbers.",
}
_YES, _NO = "yes", "NO"


@dataclass(frozen=True)
class _Table:
    """Cells as text. The last cell of a row that is short spans the columns that are left.

    Attributes:
        words: the columns that are no numbers and align left.
        totals: rows for the foot.
    """

    caption: str
    columns: Sequence[str]
    words: frozenset[str]
    rows: Sequence[Sequence[str]]
    totals: Sequence[Sequence[str]] = ()


def check_directory(path: str) -> None:
    """Raise Error now, before any work is done, if `write` for `--report path` would fail later."""
    if Path(path).exists() and not Path(path).is_dir():
        raise Error(f"--report {path}: is not a directory")
    check_target("--report", target(path) if Path(path).is_dir() else path)
    figures.require_matplotlib("--report")


def target(directory: str | Path) -> Path:
    """The file that `write` writes to."""
    return Path(directory) / "index.html"


def write(
    result: Result, directory: str | Path, pictures: Mapping[str, Figure] | None = None
) -> Path:
    """Write the page to index.html in a directory, which is made if it is missing, and return the
    file's path.

    result: as bench.schema.json has it. pictures: its `figures.draw_all`, if they are drawn.
    Raises UnavailableError if matplotlib is not installed.
    """
    text = _render(result, figures.draw_all(result) if pictures is None else pictures)
    path = target(directory)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _render(result: Result, pictures: Mapping[str, Figure]) -> str:
    import jinja2  # only who asks for a page waits for it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    encoded = {
        _ALTS[name]: base64.b64encode(figures.png(figure)).decode()
        for name, figure in pictures.items()
    }
    return environment.get_template("page.html.j2").render(
        result=result,
        where=where(result),
        facts=_facts(result),
        pictures=encoded,
        rivals=_rivals(result),
        network=_network(result),
        layers=_layers(result),
        baseline=_baseline(result),
        json=json.dumps(result, indent=1, sort_keys=True),
        digest=figures.digest(result),
        no=_NO,
    )


# ------------------------------------------------------------------------------------------ facts


def _facts(result: Result) -> dict[str, str]:
    """What ran, where and how, by name."""
    found, settings, model = result["environment"], result["settings"], result["model"]
    report, why = result["report"], result["kernels"]["why_not_available"]
    packages = [f"{name} {number}" for name, number in found["packages"].items() if number]
    return {
        "model": f"{model['name']}, input {_shape(model['input'])}",
        "weights": model["weights"],
        "patched": "; ".join(filter(None, (report["summary"], report["note"]))),
        "ran on": "the GPU" if result["device"] == "cuda" else "the CPU",
        "GPU": "; ".join(gpu["name"] for gpu in found["gpus"]) or "none",
        "driver": found["driver"] or "none",
        "clocks at the end": _clocks(result["clocks"]),
        "measured ceilings": _ceilings(result["ceilings"]),
        "CPU": f"{found['cpu']}, {found['threads']} threads",
        "system": found["system"],
        "Python": found["python"],
        "torch": found["torch"],
        "CUDA": found["cuda"] or "none",
        "cuDNN": found["cudnn"] or "none",
        "packages": ", ".join(packages) or "none",
        "kernels": "can run" if why is None else f"cannot run: {why}",
        "commit": found["commit"] or "unknown",
        "date": result["date"],
        "command": result["command"],
        **_settings_of_a_gpu(result),
        "caches": settings["caches"],
        "images": settings["images"],
        "samples": f"{settings['rounds']} of each contender, taken in turns, each of at least "
        f"{settings['min_time_s']:g} s",
    }


def _settings_of_a_gpu(result: Result) -> dict[str, str]:
    """They mean nothing on a CPU."""
    if result["device"] != "cuda":
        return {}
    settings = result["settings"]
    return {"TF32": _on(settings["tf32"]), "cudnn.benchmark": _on(settings["cudnn_benchmark"])}


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _clocks(clocks: Row | None) -> str:
    if clocks is None:
        return "unknown"
    known = {key: _number(value, ".0f") for key, value in clocks.items()}
    return (
        "SM {sm_mhz} of {max_sm_mhz} MHz, memory {memory_mhz} of {max_memory_mhz} MHz, "
        "{temperature_c} °C, {power_w} W"
    ).format_map(known)


def _ceilings(ceilings: Row | None) -> str:
    if ceilings is None:
        return "not measured"
    products = [f"{1e-12 * x:.3g} TFLOP/s in {name}" for name, x in ceilings["flops_per_s"].items()]
    return ", ".join([f"{1e-9 * ceilings['bytes_per_s']:.4g} GB/s", *products])


# ----------------------------------------------------------------------------------------- tables


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _column(key: str, spec: str = "", *, unit: float = 1, suffix: str = "") -> Callable[[Row], str]:
    """What writes the number of that key in units of `unit`, or the word that is there."""

    def write(row: Row) -> str:
        value = row[key]
        if isinstance(value, bool):
            return _YES if value else _NO
        if value is None or isinstance(value, str):
            return value or "-"
        return format(value / unit if unit != 1 else value, spec) + suffix

    return write


_NETWORK: Columns = {
    "dtype": _column("dtype"),
    "batch": _column("batch"),
    "contender": _column("contender"),
    "median, ms": _column("median_ms", ",.3f"),
    "10 %": _column("p10_ms", ",.3f"),
    "90 %": _column("p90_ms", ",.3f"),
    "calls a sample": _column("calls"),
    "images/s": _column("images_per_s", ",.0f"),
    "first call, s": _column("first_call_s", ",.2f"),
    "peak, MiB": _column("peak_mib", ",.1f"),
    "over patched": _column("over_patched", ".2f", suffix="x"),
    "over patched, CUDA graph": _column("over_patched_cudagraph", ".2f", suffix="x"),
    "relative L2": _column("relative_l2", ".1e"),
    "largest error": _column("max_abs", ".1e"),
    "L2 over eager's": _column("error_ratio", ".2f"),
    "top-1 differs": _column("top1_differs"),
    "near ties": _column("near_ties"),
    "agrees": _column("agrees"),
}
_LAYERS: Columns = {
    "layer": _column("layer"),
    "kernel": _column("kernel"),
    "input": lambda row: _shape(row["input"]),
    "output": lambda row: _shape(row["output"]),
    "patched, us": _column("us", ",.2f"),
    "10 %": _column("p10_us", ",.2f"),
    "90 %": _column("p90_us", ",.2f"),
    "stock, us": _column("stock_us", ",.2f"),
    "stock 10 %": _column("stock_p10_us", ",.2f"),
    "stock 90 %": _column("stock_p90_us", ",.2f"),
    "ratio": _column("ratio", ".2f", suffix="x"),
    "untuned, us": _column("heuristic_us", ",.2f"),
    "untuned 10 %": _column("heuristic_p10_us", ",.2f"),
    "untuned 90 %": _column("heuristic_p90_us", ",.2f"),
    "untuned ratio": _column("heuristic_ratio", ".2f", suffix="x"),
    "floor, us": _column("floor_us", ",.2f"),
    "of floor": _column("of_floor", ".2f"),
    "stock of floor": _column("stock_of_floor", ".2f"),
    "MB": _column("bytes", ",.2f", unit=1e6),
    "GB/s": _column("gb_per_s", ",.0f"),
    "stock GB/s": _column("stock_gb_per_s", ",.0f"),
    "MFLOP": _column("flops", ",.1f", unit=1e6),
    "TFLOP/s": _column("tflop_per_s", ".3g"),
    "stock TFLOP/s": _column("stock_tflop_per_s", ".3g"),
    "caches": _column("caches"),
    "relative L2": _column("relative_l2", ".1e"),
    "stock L2": _column("stock_relative_l2", ".1e"),
    "untuned L2": _column("heuristic_relative_l2", ".1e"),
    "agrees": _column("agrees"),
    "stock agrees": _column("stock_agrees"),
}
_TOTALS: Columns = {
    "layer": lambda row: "sum; geometric mean",
    "patched, us": _column("us", ",.1f"),
    "stock, us": _column("stock_us", ",.1f"),
    "ratio": _column("geometric_mean", ".2f", suffix="x"),
    "untuned, us": _column("heuristic_us", ",.1f"),
    "untuned ratio": _column("heuristic_geometric_mean", ".2f", suffix="x"),
}
_WORDS = frozenset(
    ("dtype", "contender", "layer", "kernel", "input", "output", "caches", "agrees", "stock agrees")
)


def _rivals(result: Result) -> _Table:
    columns = ("contender", "what it is", "can it run here?")
    return _Table(
        "What was asked for",
        columns,
        frozenset(columns),
        [[row["name"], row["title"], row["missing"] or _YES] for row in result["rivals"]],
    )


def _network(result: Result) -> _Table:
    return _Table(
        "Medians, with 10 % and 90 % of the samples. “Over patched” is the time as a multiple of "
        "the patched model's: how many times faster that is",
        tuple(_NETWORK),
        _WORDS,
        [
            [row["dtype"], str(row["batch"]), row["contender"], f"skipped: {row['skipped']}"]
            if "skipped" in row
            else [write(row) for write in _NETWORK.values()]
            for row in result["rows"]
        ],
    )


def _baseline(result: Result) -> _Table | None:
    """The comparison with an older run, if there was one."""
    found = result.get("baseline")
    if found is None:
        return None
    columns, rows, numbers = baseline.table(found)
    text = "; ".join([baseline.summary(found), *found["comparable"]])
    return _Table(text, columns, frozenset(columns) - frozenset(numbers), rows)


def _layers(result: Result) -> list[_Table]:
    """A table for each dtype, batch size and level."""

    def case(row: Row) -> tuple[str, int, str]:
        return row["dtype"], row["batch"], row["level"]

    return [
        _Table(
            f"{dtype}, batch {batch}, level {level}",
            tuple(_LAYERS),
            _WORDS,
            [
                [write(row) for write in _LAYERS.values()]
                for row in result["layers"]
                if case(row) == (dtype, batch, level)
            ],
            [
                [_TOTALS[name](row) if name in _TOTALS else "" for name in _LAYERS]
                for row in result["layer_totals"]
                if case(row) == (dtype, batch, level)
            ],
        )
        for dtype, batch, level in dict.fromkeys(map(case, result["layers"]))
    ]
