"""Two runs of `bench`: what became slower, what became faster, and what counts.

A row is slower if its median is more than 5 % longer and that is beyond noise: the samples of the
two runs, between their 10 % and 90 % quantiles, do not overlap, and the medians differ by more than
`RESOLUTION_US`. The same the other way round is faster.

Only our own times count as a failure: those of the patched contenders and of our side of each
layer. Rivals are compared and marked too, but cuDNN chooses its algorithms anew in each process, so
their times differ by up to 20 % between two runs of the same code. `patched` is called from Python,
and so depends on the host: where `eager`, of which no line is ours, is slower as well, `patched`
counts only if it has become slower than that.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch_mbv2.errors import Error, UnavailableError
from torch_mbv2.measure.contenders import PATCHED

SLOWER = 1.05
"""The ratio of two medians that is more than the same code shows on a quiet machine."""
RESOLUTION_US = 0.3
"""No smaller difference counts. Kernels of 2 us differ by up to 0.21 us, 10 %, between runs of the
same code on H100s, and hardly within a run."""

_SCHEMA = Path(__file__).with_name("bench.schema.json")
_LONGEST_RULE = 160


# --------------------------------------------------------------------------------------- reading


def require_jsonschema(needed_by: str) -> None:
    """Raise UnavailableError if jsonschema is not installed. needed_by: a flag or a script."""
    try:
        import jsonschema  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "jsonschema":
            raise
        raise UnavailableError(
            f"{needed_by} needs the package jsonschema: pip install 'torch-mbv2[bench]'"
        ) from None


def load(path: str | Path, needed_by: str = "--baseline") -> dict[str, Any]:
    """What `bench --json` wrote to the file `path`, as bench.schema.json describes it.

    needed_by: the flag or script that reads it, for the message about a missing package.

    Raises Error for any other file, and UnavailableError if jsonschema is not installed.
    """
    require_jsonschema(needed_by)
    from jsonschema import Draft202012Validator

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Error(f"{path}: must be JSON that bench wrote, and is no text in UTF-8") from None
    try:
        found = json.loads(
            text, parse_constant=_no_constant, parse_float=_number, parse_int=_number
        )
    except (ValueError, RecursionError) as error:
        raise Error(f"{path}: must be JSON that bench wrote, and is not JSON: {error}") from None
    schema = json.loads(_SCHEMA.read_text("utf-8"))
    _check_origin(found, path, schema["properties"]["schema"]["const"])
    cause = _cause(Draft202012Validator(schema).iter_errors(found))
    if cause is not None:
        place = cause.json_path.removeprefix("$").removeprefix(".") or "the top level"
        rule = textwrap.shorten(cause.message, _LONGEST_RULE, placeholder=" ...")
        raise Error(f"{path}: {place} is not as {_SCHEMA.name} wants it: {rule}")
    result: dict[str, Any] = found
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text) if text.lstrip("-").isdigit() else number


def _check_origin(found: Any, path: str | Path, known: int) -> None:
    """Raise Error unless a `bench` of this version of torch_mbv2 may have written it."""
    if not isinstance(found, dict) or "verb" not in found:
        raise Error(f"{path}: was not written by bench --json")
    if found["verb"] != "bench":
        raise Error(f"{path}: must be written by bench --json, and is by {found['verb']!r}")
    number = found.get("schema")
    if number == known:
        return
    if not isinstance(number, int):
        raise Error(f"{path}: its schema must be the number {known}, got {number!r}")
    age = "an older" if number < known else "a newer"
    raise Error(
        f"{path}: was written by {age} torch_mbv2, in schema {number} instead of {known}: run "
        "bench again"
    )


def _cause(errors: Iterator[Any]) -> Any:
    """The error that says most. Where none of several alternatives fits, it is one of that which
    comes closest: "is not valid under any of the given schemas" helps nobody."""
    from jsonschema.exceptions import best_match

    error = best_match(errors)
    while error is not None and error.context:
        alternatives = defaultdict(list)
        for inner in error.context:
            alternatives[inner.schema_path[0]].append(inner)
        error = min(
            alternatives.values(), key=lambda found: (found[0].validator == "type", len(found))
        )[0]
    return error


# ------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class _Change:
    """From a time of the old run to the same of the new one.

    Attributes:
        ratio: new median / old median.
        low, high: the same of the samples, between their 10 % and 90 % quantiles.
        us: new median - old median.
    """

    ratio: float
    low: float
    high: float
    us: float

    @property
    def slower(self) -> bool:
        return self.ratio > SLOWER and self.low > 1 and self.us > RESOLUTION_US

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / SLOWER and self.high < 1 and -self.us > RESOLUTION_US

    def like(self, other: _Change) -> bool:
        """Whether both are slower, or faster, and that by as much, as far as noise can tell."""
        same = (self.slower and other.slower) or (self.faster and other.faster)
        return same and self.low <= other.high and self.high >= other.low


@dataclass(frozen=True)
class _Kind:
    """A list of timed rows in a result: its name, what a row is known by, and its time."""

    name: str
    key: tuple[str, ...]
    median: str
    unit: str

    def by_key(self, result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(row[name] for name in self.key): row for row in result[self.name]}

    def change(self, new: dict[str, Any], old: dict[str, Any]) -> _Change | None:
        """None if a run skipped it."""
        if "skipped" in new or "skipped" in old:
            return None
        p10, p90 = f"p10_{self.unit}", f"p90_{self.unit}"
        return _Change(
            ratio=new[self.median] / old[self.median],
            low=new[p10] / old[p90],
            high=new[p90] / old[p10],
            us=(new[self.median] - old[self.median]) * _US[self.unit],
        )


_US = {"ms": 1e3, "us": 1.0}
_KINDS = (
    _Kind("rows", ("dtype", "batch", "contender"), "median_ms", "ms"),
    _Kind("layers", ("dtype", "batch", "level", "layer"), "us", "us"),
)


def require_alike(new: dict[str, Any], old: dict[str, Any], path: str | None = None) -> None:
    """Raise Error if the runs are of another model, input or device.

    new: a result, of which "device" and "model" are enough.
    """
    for name, read in _MUST_BE_ALIKE.items():
        if read(new) != read(old):
            raise Error(
                f"the runs cannot be compared: {name} is {read(new)} now and {read(old)} in "
                f"{path or 'the old one'}"
            )


def compare(new: dict[str, Any], old: dict[str, Any], path: str | None = None) -> dict[str, Any]:
    """How the times of one result of `bench` differ from those of an older one.

    path: where the older one was read.

    Returns what bench.schema.json calls "baseline". Its "slower" is above 0 if the comparison
    failed. Raises Error for another model, input or device, and if no row is in both.
    """
    require_alike(new, old, path)
    rows: list[dict[str, Any]] = []
    only_new: list[str] = []
    only_old: list[str] = []
    for kind in _KINDS:
        mine, theirs = kind.by_key(new), kind.by_key(old)
        only_new += [_words(key) for key in mine if key not in theirs]
        only_old += [_words(key) for key in theirs if key not in mine]
        pairs = {key: (row, theirs[key]) for key, row in mine.items() if key in theirs}
        changes = {key: kind.change(*pair) for key, pair in pairs.items()}
        for key, pair in pairs.items():
            if any("skipped" not in row for row in pair):
                control = changes.get((*key[:-1], "eager")) if key[-1] == "patched" else None
                rows.append(_compare_row(kind, *pair, changes[key], control))
    if not rows:
        raise Error(
            f"the runs have nothing in common that could be compared: this one timed {_span(new)}, "
            f"{path or 'the old one'} {_span(old)}"
        )
    return {
        "path": path,
        "date": old["date"],
        "commit": old["environment"]["commit"],
        "comparable": [*_differences(new, old), *_not_counted(rows)],
        "rows": rows,
        "only_new": only_new,
        "only_old": only_old,
        "slower": sum(_fails(row) for row in rows),
    }


def _words(key: tuple[Any, ...]) -> str:
    dtype, batch, *rest = key
    return ", ".join((dtype, f"batch {batch}", *rest))


def _span(result: dict[str, Any]) -> str:
    timed = [row for row in result["rows"] if "skipped" not in row]
    if not timed:
        return "nothing"
    dtypes = dict.fromkeys(row["dtype"] for row in timed)
    batches = dict.fromkeys(str(row["batch"]) for row in timed)
    return f"{' and '.join(dtypes)} at batch {', '.join(batches)}"


def _compare_row(
    kind: _Kind,
    new: dict[str, Any],
    old: dict[str, Any],
    change: _Change | None,
    control: _Change | None,
) -> dict[str, Any]:
    """control: the change of what is not our code and depends on the host as this row does."""
    ours = kind.name == "layers" or new["contender"] in PATCHED
    as_control = change is not None and control is not None and change.like(control)
    return {
        **{name: new[name] for name in kind.key},
        kind.unit: new.get(kind.median),
        f"old_{kind.unit}": old.get(kind.median),
        "ratio": None if change is None else change.ratio,
        "slower": change is not None and change.slower,
        "faster": change is not None and change.faster,
        "skipped": new.get("skipped"),
        "old_skipped": old.get("skipped"),
        "counts": ours and not as_control,
    }


def _fails(row: dict[str, Any]) -> bool:
    """What ran before and is skipped now is worse than slower."""
    return row["counts"] and (row["slower"] or row["skipped"] is not None)


def _on_gpu(found: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """What does not matter on a CPU is None there."""
    return lambda result: found(result) if result["device"] == "cuda" else None


_MUST_BE_ALIKE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "device": lambda result: result["device"],
    "model": lambda result: result["model"]["name"],
    "input": lambda result: "x".join(map(str, result["model"]["input"])),
}
_CONDITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "GPU": _on_gpu(lambda result: next((g["name"] for g in result["environment"]["gpus"]), None)),
    "driver": _on_gpu(lambda result: result["environment"]["driver"]),
    "CUDA": _on_gpu(lambda result: result["environment"]["cuda"]),
    "cuDNN": _on_gpu(lambda result: result["environment"]["cudnn"]),
    "kernels can run": _on_gpu(lambda result: result["kernels"]["available"]),
    "CPU": lambda result: result["environment"]["cpu"],
    "threads": lambda result: result["environment"]["threads"],
    "torch": lambda result: result["environment"]["torch"],
    "caches": lambda result: result["settings"]["caches"],
    "images": lambda result: result["settings"]["images"],
    "rounds": lambda result: result["settings"]["rounds"],
    "seconds of a sample": lambda result: result["settings"]["min_time_s"],
}


def _differences(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """A sentence for all that differs besides the code and may explain a ratio."""
    found = {name: (read(new), read(old)) for name, read in _CONDITIONS.items()}
    clocks = tuple(result["clocks"] and result["clocks"]["sm_mhz"] for result in (new, old))
    if all(clocks) and max(clocks) > SLOWER * min(clocks):
        found["SM clock in MHz"] = clocks
    sentences = [
        f"{name}: {mine} now, {theirs} in the old run"
        for name, (mine, theirs) in found.items()
        if mine != theirs
    ]
    mine, theirs = (_KINDS[1].by_key(result) for result in (new, old))
    changed = sum(mine[key]["caches"] != theirs[key]["caches"] for key in mine if key in theirs)
    if changed:
        sentences.append(f"caches: cold in one run and warm in the other for {changed} layers")
    return sentences


def _not_counted(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each time of ours that does not count, as the host has changed."""
    return [
        f"{row['contender']} does not count for {row['dtype']} at batch {row['batch']}: eager, "
        f"called from Python like it, is {'slower' if row['slower'] else 'faster'}, too"
        for row in rows
        if row.get("contender") in PATCHED and not row["counts"]
    ]


# -------------------------------------------------------------------------------------- printing


def table(
    comparison: dict[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
    """(columns, rows, columns of numbers) for `output.print_table`: every row of whole networks,
    and of the layers those that changed."""
    columns = ("dtype", "batch", "row", "old", "now", "ratio", "verdict")
    rows: list[tuple[str, ...]] = [
        (
            row["dtype"],
            str(row["batch"]),
            row["contender"] if "contender" in row else f"{row['layer']} ({row['level']})",
            _time(row, "old_"),
            _time(row, ""),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
            _verdict(row),
        )
        for row in comparison["rows"]
        if "contender" in row or row["slower"] or row["faster"]
    ]
    return columns, rows, ("batch", "old", "now", "ratio")


def _time(row: dict[str, Any], prefix: str) -> str:
    if row[f"{prefix}skipped"] is not None:
        return "skipped"
    if "contender" in row:
        return f"{row[f'{prefix}ms']:.3f} ms"
    return f"{row[f'{prefix}us']:.1f} us"


def _verdict(row: dict[str, Any]) -> str:
    if row["skipped"] is not None:
        return f"{'NO LONGER RUNS' if row['counts'] else 'skipped now'}: {row['skipped']}"
    if row["old_skipped"] is not None:
        return f"skipped in the old run: {row['old_skipped']}"
    if row["slower"]:
        return "SLOWER" if row["counts"] else "slower, not counted"
    return "faster" if row["faster"] else ""


def summary(comparison: dict[str, Any]) -> str:
    """One line: how many of the rows that count are slower, and against what."""
    rows = [row for row in comparison["rows"] if row["counts"]]
    slower, faster, lost = (
        sum(bool(row[name]) for row in rows) for name in ("slower", "faster", "skipped")
    )
    commit = (comparison["commit"] or "unknown")[:9]
    parts = [
        f"against {comparison['path'] or 'the old run'} ({comparison['date'][:10]}, commit "
        f"{commit}): of {len(rows)} patched rows and layers {slower} slower, {faster} faster, by "
        f"over {SLOWER - 1:.0%} and beyond noise"
    ]
    if lost:
        parts.append(f"{lost} no longer run")
    for name, run in (("only_new", "this run"), ("only_old", "the old run")):
        if comparison[name]:
            parts.append(f"{len(comparison[name])} only in {run}")
    return "; ".join(parts)
