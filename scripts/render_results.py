"""Writes, from each scripts/results/NAME.json, the part about it in README.md, between its markers;
NAME.md, which has all of it; and the pictures that both show. The JSON is what
`python -m torch_mbv2 bench MODEL --layers --json FILE` writes and scripts/renew_results.py renews.
With --check it changes nothing, and says by exit status 1 that one of these files is not what the
JSON renders to.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_mbv2.cli import output
from torch_mbv2.errors import Error
from torch_mbv2.measure import baseline, contenders, figures
from torch_mbv2.measure.conditions import where
from torch_mbv2.measure.contenders import PATCHED

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results -->", "<!-- /results -->"

_ALT = {
    "batches": "time and throughput against the batch size",
    "layers": "time of each block, stock and patched",
    "roofline": "FLOP/s of each layer against its FLOPs per byte, under the roof of the machine",
}
"""The name of a picture -> what it shows. Others of `figures.draw_all` are too large to be kept."""
_CALLED = ("eager", "channels_last", "compile")
"""Rivals that are called from Python each time, as `patched` is, and are no bare CUDA graph."""
_NONE = "\N{EN DASH}"
_LEVELS = {
    "block": "Each block against its stock layers",
    "op": "Layer by layer: the patched model at level `op`, where nothing is fused into blocks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Render, or check; the exit status. argv: by default that of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts/results", metavar="DIR")
    args = parser.parse_args(argv)
    try:
        return _run(args.readme, args.results, args.check)
    except (Error, OSError) as error:
        print(f"render_results: error: {error}", file=sys.stderr)
        return 2


def _run(readme: Path, directory: Path, check: bool) -> int:
    # costs-*.json are of fit_costs.py.
    files = sorted(p for p in directory.glob("*.json") if not p.name.startswith("costs-"))
    results = {path: baseline.load(path, "render_results") for path in files}
    if not results:
        raise Error(f"{directory}: there is no *.json in it")
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise Error(f"{readme}: must have {START} and then {END}, once")
    parts: list[str] = []
    texts: dict[Path, str] = {}
    stale: list[Path] = []
    for path, result in sorted(results.items(), key=lambda item: item[1]["device"] == "cpu"):
        drawn = _names(result, path) if check else _draw(result, path)
        if check:
            stale += [picture for picture in drawn.values() if not _shows(picture, result)]
        page = path.with_suffix(".md")
        texts[page] = render_page(result, _links(drawn, page), path.name)
        parts.append(render_part(result, _links(drawn, readme), _link(page, readme)))
    before, rest = text.split(START)
    texts[readme] = "\n\n".join([before + START, *parts, END + rest.split(END)[1]])
    for path, new in texts.items():
        if not check:
            path.write_text(new, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != new:
            stale.append(path)
    for path in stale:
        print(f"{path} is out of date: run scripts/render_results.py", file=sys.stderr)
    return int(bool(stale))


# -------------------------------------------------------------------------------------- pictures


def _draw(result: dict[str, Any], path: Path) -> dict[str, Path]:
    """Draw a result's pictures beside its JSON; the files, by the names of the pictures."""
    drawn = {name: found for name, found in figures.draw_all(result).items() if name in _ALT}
    return dict(zip(drawn, figures.save(drawn, path.with_suffix(".png")), strict=True))


def _names(result: dict[str, Any], path: Path) -> dict[str, Path]:
    """What `_draw` returns, without a change to those files."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = _draw(result, Path(folder) / path.name)
    return {name: path.with_name(picture.name) for name, picture in drawn.items()}


def _shows(picture: Path, result: dict[str, Any]) -> bool:
    return picture.is_file() and figures.digest_of_picture(picture) == figures.digest(result)


def _links(pictures: Mapping[str, Path], page: Path) -> dict[str, str]:
    """What shows each picture on a page, in Markdown."""
    return {name: f"![{_ALT[name]}]({_link(path, page)})" for name, path in pictures.items()}


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


# ----------------------------------------------------------------------------------------- pages


def render_part(result: dict[str, Any], pictures: Mapping[str, str], page: str) -> str:
    """The README's part about a result of `bench`, as Markdown: where and how it ran, and the
    network against its rivals.

    pictures: what shows those of `figures.draw_all`, by their names. page: the link to the rest.
    """
    parts = [_heading(result), _network(result), *_left_out(result)]
    parts += [pictures[name] for name in ("batches",) if name in pictures]
    rest = "time, first call and memory of each contender" + ", each layer" * bool(result["layers"])
    parts.append(f"[More of this run]({page}): {rest}.")
    return "\n\n".join(parts)


def render_page(result: dict[str, Any], pictures: Mapping[str, str], name: str) -> str:
    """The page about a result of `bench`, as Markdown: what the README has, each contender's needs,
    and the layers, a table folded away for each dtype and batch size.

    pictures: what shows those of `figures.draw_all`, by their names. name: of the JSON.
    """
    shown = dict(pictures)
    batches = [shown.pop("batches")] if "batches" in shown else []
    parts = ["# Results of bench", _heading(result), f"```bash\n{result['command']}\n```"]
    parts.append(f"Rendered from [{name}]({name}) by scripts/render_results.py.")
    parts += ["## The network", _network(result), *_left_out(result), *batches]
    parts += ["### Time, first call and memory of each contender", *_contenders(result)]
    if result["layers"]:
        parts += ["## The layers", _explain(result), *shown.values()]
    for level, title in _LEVELS.items():
        totals = [row for row in result["layer_totals"] if row["level"] == level]
        if totals:
            parts += [f"### {title}", _table_of(_TOTALS, totals)]
        for total in totals:
            case = {key: total[key] for key in ("level", "dtype", "batch")}
            rows = [row for row in result["layers"] if case.items() <= row.items()]
            parts.append(
                _folded(f"{total['dtype']}, batch {total['batch']}", _table_of(_LAYERS, rows))
            )
    return "\n\n".join(parts) + "\n"


def _folded(summary: str, *parts: str) -> str:
    # GitHub renders Markdown inside only behind an empty line.
    return "\n\n".join([f"<details><summary>{summary}</summary>", *parts, "</details>"])


# ---------------------------------------------------------------------------------------- tables


def _heading(result: dict[str, Any]) -> str:
    model, settings, noise = result["model"], result["settings"], result["noise"]
    cuda = result["device"] == "cuda"
    precision = "TF32 off, cudnn.benchmark on" if cuda else "wall time"
    weights = "" if model["pretrained"] else ", random weights"
    sentences = [
        f"{_text(model['name'])}{weights}, {'x'.join(map(str, model['input']))}, on "
        f"{_text(where(result))}.",
        f"Medians of {settings['rounds']} interleaved rounds (10 %{_NONE}90 %), each of at least "
        f"{1e3 * settings['min_time_s']:g} ms; {precision}; caches "
        f"{_text(settings['caches'])}.",
    ]
    if noise["over"]:
        worst = "" if noise["worst"] is None else f", the worst {noise['worst']:.0%}"
        sentences.append(
            f"Noisy: of {noise['of']} spreads, (90 % - 10 %) / median, {noise['over']} are over "
            f"{noise['limit']:.0%}{worst}."
        )
    if cuda:
        titles = _titles(result)
        called = ", ".join(f"`{titles[name]}`" for name in _CALLED)
        sentences.append(
            f"N.NNx is a rival's time over that of `{titles['patched_cudagraph']}`; of those that "
            f"are called from Python ({called}), over that of `{titles['patched']}`, which is, too."
        )
    else:
        sentences.append("N.NNx is a rival's time over ours.")
    return " ".join(sentences)


def _network(result: dict[str, Any]) -> str:
    """A row for each dtype and batch size: the patched model, and its rivals as multiples."""
    rows, titles = _by_case(result), _titles(result)
    cuda = result["device"] == "cuda"
    ours = PATCHED[cuda]
    rivals = [name for name in _timed(result) if name not in PATCHED]
    header = ["dtype", "batch", f"{titles[ours]}: ms", "img/s", *map(titles.get, rivals), "agrees"]
    lines = []
    for (dtype, batch), found in rows.items():
        cells = [dtype, str(batch)]
        row = found[ours]
        if "skipped" in row:
            cells += ["skipped", ""]
        else:
            cells += [_time(row), f"{row['images_per_s']:.0f}"]
        for name in rivals:
            base = "over_patched_cudagraph" if cuda and name not in _CALLED else "over_patched"
            cells.append(_ratio(found.get(name, {}), base))
        lines.append([*cells, _agreement(row)])
    return _table(header, lines, words=("dtype", "agrees"))


def _ratio(row: dict[str, Any], base: str) -> str:
    if row.get(base) is None:
        return _NONE
    return f"{row[base]:.2f}x" + " (**disagrees**)" * (row["agrees"] is False)


def _left_out(result: dict[str, Any]) -> Iterator[str]:
    """Which rivals are not there, and why, and how to get them."""
    titles = _titles(result)
    missing = [
        f"{rival['title']} ({_text(rival['missing'])})"
        for rival in result["rivals"]
        if rival["missing"] is not None
    ]
    if missing:
        yield f"Missing on this machine: {'; '.join(missing)}."
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in result["rows"]:
        if "skipped" in row and row["contender"] not in PATCHED:
            cases = reasons.setdefault((row["contender"], row["skipped"]), {})
            cases.setdefault(row["dtype"], []).append(str(row["batch"]))
    for (name, why), cases in reasons.items():
        where = " and ".join(f"{dtype} at batch {', '.join(b)}" for dtype, b in cases.items())
        yield f"{_NONE} {titles[name]}, {where}: {_text(why)}"


def _contenders(result: dict[str, Any]) -> Iterator[str]:
    """A table with a row for each dtype and batch size, a column for each contender, and what its
    cells are."""
    titles, names = _titles(result), _timed(result)
    lines = []
    for (dtype, batch), found in _by_case(result).items():
        cells = [dtype, str(batch)]
        for name in names:
            row = found.get(name, {"skipped": ""})
            if "skipped" in row:
                cells.append(_NONE)
                continue
            memory = "" if row["peak_mib"] is None else f", {row['peak_mib']:.1f} MiB"
            cells.append(f"{row['median_ms']:.3f} ms, {row['first_call_s']:.2f} s{memory}")
        lines.append(cells)
    yield _table(["dtype", "batch", *map(titles.get, names)], lines, words=("dtype",))
    yield (
        "The median of a call; the seconds from the stock model on the device to the first logits, "
        "with all folding, patching, compiling, exporting, tuning and capturing"
        + ("." if result["device"] == "cpu" else "; the device memory that it needs in all.")
    )


_TOTALS: dict[str, output.Cell] = {
    "dtype": lambda row: row["dtype"],
    "batch": output.number("batch", "d"),
    "us": output.number("us", ".1f"),
    "stock us": output.number("stock_us", ".1f"),
    "untuned us": output.number("heuristic_us", ".1f"),
    "ratio": output.number("geometric_mean", ".2f", "x"),
    "untuned ratio": output.number("heuristic_geometric_mean", ".2f", "x"),
}
_LAYERS: dict[str, output.Cell] = {
    "layer": lambda row: _text(row["layer"]),
    "kernel": lambda row: f"`{row['kernel']}`",
    "us": lambda row: f"{row['us']:.1f}" + " **DISAGREES**" * (not row["agrees"]),
    "stock us": lambda row: (
        f"{row['stock_us']:.1f}" + " (**disagrees**)" * (not row["stock_agrees"])
    ),
    "untuned us": output.number("heuristic_us", ".1f"),
    "ratio": output.number("ratio", ".2f", "x"),
    "untuned ratio": output.number("heuristic_ratio", ".2f", "x"),
    "GB/s": output.number("gb_per_s", ".0f"),
    "TFLOP/s": output.number("tflop_per_s", ".1f"),
    "of floor": output.number("of_floor", ".2f"),
    "stock of floor": output.number("stock_of_floor", ".2f"),
    "caches": lambda row: row["caches"],
}


def _table_of(columns: dict[str, output.Cell], rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row, without the columns that say nothing: what cuDNN does on a CPU, say."""
    cells = output.cells(columns, rows)
    words = ("dtype", "layer", "kernel", "caches")
    return _table(list(cells), list(zip(*cells.values(), strict=True)), words)


def _explain(result: dict[str, Any]) -> str:
    """What the columns of the tables of layers are."""
    stock = "the same work by stock layers, channels_last, norms folded"
    if result["device"] == "cuda":
        stock += ", as CUDA graphs, cudnn.benchmark on; untuned: cudnn.benchmark off"
    sentences = [
        "Of all layers of a level the sums of the times and the geometric means of the ratios, and "
        "below them each layer.",
        f"Stock: {stock}.",
        "Ratio: stock's time over ours.",
    ]
    if result["ceilings"] is not None:
        speeds = ", ".join(
            f"{1e-12 * speed:.4g} TFLOP/s ({dtype})"
            for dtype, speed in result["ceilings"]["flops_per_s"].items()
        )
        sentences.append(
            "Of floor: the time to move input, output and weights once at "
            f"{1e-9 * result['ceilings']['bytes_per_s']:.4g} GB/s or to multiply at {speeds}, "
            "whichever is longer, as a part of ours; these speeds were measured in this run, of a "
            "large copy and large matrix products. Warm caches may beat them."
        )
    sentences.append("GB/s and TFLOP/s are ours.")
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------- cells


def _by_case(result: dict[str, Any]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """The rows of each contender, by dtype and batch size."""
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["dtype"], row["batch"]), {})[row["contender"]] = row
    return cases


def _timed(result: dict[str, Any]) -> list[str]:
    """The contenders that ran at all."""
    return _different(row["contender"] for row in result["rows"] if "skipped" not in row)


def _titles(result: dict[str, Any]) -> dict[str, str]:
    return {name: _text(title) for name, title in contenders.titles(result).items()}


def _different(values: Iterable[Any]) -> list[Any]:
    """The different ones, in order."""
    return list(dict.fromkeys(values))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], words: Sequence[str]) -> str:
    """A table in Markdown; words: the columns that are no numbers."""
    rule = "|".join("---" if name in words else "--:" for name in header)
    return "\n".join([_line(header), f"|{rule}|", *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(words: str) -> str:
    """Words of others, on one line, that Markdown shows as they are."""
    words = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[|*`\[\]]", r"\\\g<0>", words)


def _time(row: dict[str, Any]) -> str:
    return f"{row['median_ms']:.3f} ({row['p10_ms']:.3f}{_NONE}{row['p90_ms']:.3f})"


def _agreement(row: dict[str, Any]) -> str:
    """How far the logits are from float64, against plain stock."""
    if "skipped" in row:
        return f"skipped: {_text(row['skipped'])}"
    if row["relative_l2"] is None or row["error_ratio"] is None:
        return "**NO**: not finite"
    verdict = "yes" if row["agrees"] else "**NO**"
    differs = f", top-1 of {row['top1_differs']} images" if row["top1_differs"] else ""
    return (
        f"{verdict}: error {row['relative_l2']:.1e}, {row['error_ratio']:.2f} of stock's{differs}"
    )


if __name__ == "__main__":
    sys.exit(main())
