"""Writes the tables of README.md between its markers from scripts/results/*.json, which
`python -m torch_mbv2 bench MODEL --json FILE` and `scripts/bench_blocks.py --json FILE` make. With
--check it only says, by exit status 1, whether the README is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- results -->", "<!-- /results -->"
_FLOOR = (
    "Of floor: the time that the GPU needs at least, to move input, output and weights once or to "
    "multiply on tensor cores, whichever is longer, as a part of ours."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Render, or check; the exit status. argv: by default that of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts/results", metavar="DIR")
    args = parser.parse_args(argv)
    files = sorted(args.results.glob("*.json"))
    if not files:
        print(f"render_results: no *.json in {args.results}", file=sys.stderr)
        return 2
    text = args.readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        print(f"render_results: {args.readme} needs {START} and then {END}, once", file=sys.stderr)
        return 2
    results = [json.loads(path.read_text("utf-8")) for path in files]
    # GPUs first, whole networks before their blocks.
    results.sort(key=lambda found: (found["device"] == "cpu", found["verb"] == "bench_blocks"))
    tables = "\n\n".join(render(found) for found in results)
    before, rest = text.split(START)
    after = rest.split(END)[1]
    new = f"{before}{START}\n\n{tables}\n\n{END}{after}"
    if args.check:
        if new != text:
            print(f"{args.readme} is out of date: run scripts/render_results.py", file=sys.stderr)
        return int(new != text)
    args.readme.write_text(new, encoding="utf-8")
    return 0


def render(result: dict[str, Any]) -> str:
    """One result as Markdown: where it ran, and its tables."""
    return _blocks(result) if result["verb"] == "bench_blocks" else _bench(result)


def _bench(result: dict[str, Any]) -> str:
    """A row for each dtype and batch size."""
    cuda = result["device"] == "cuda"
    mode = "graph" if cuda else "eager"
    rows = {(r["dtype"], r["batch"], r["mode"], r["contender"]): r for r in result["rows"]}
    lines = [
        _heading(result),
        "",
        f"| dtype | batch | stock{', CUDA graph' * cuda} ms | patched{', CUDA graph' * cuda} ms "
        "| patched img/s | ratio | ratio to plain stock eager | agrees |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for dtype, batch in dict.fromkeys(key[:2] for key in rows):
        stock = rows[dtype, batch, mode, "stock channels_last folded"]
        patched = rows[dtype, batch, mode, "patched"]
        plain = rows[dtype, batch, "eager", "stock"]
        cells = [dtype, str(batch), _time(stock), _time(patched)]
        if "skipped" in patched:
            cells += ["", "", "", patched["skipped"]]
        else:
            cells += [
                f"{patched['images_per_s']:.0f}",
                "" if patched["ratio"] is None else f"**{patched['ratio']:.2f}x**",
                f"{plain['median_ms'] / patched['median_ms']:.2f}x",
                _agreement(patched),
            ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _heading(result: dict[str, Any]) -> str:
    model = result["model"]
    height, width = model["input"]
    return (
        f"{model['name']}, {height}x{width}, on {_where(result)} "
        "Stock is channels_last with batch norms folded."
    )


def _where(result: dict[str, Any]) -> str:
    """Machine, versions, commit, and how the times were taken."""
    found = result["environment"]
    if result["device"] == "cuda":
        machine = f"{found['gpus'][0]['name']}, driver {found['driver']}"
        versions = f"torch {found['torch']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}"
        settings = "TF32 off, cudnn.benchmark on"
    else:
        machine = f"{found['cpu']}, {found['threads']} threads"
        versions, settings = f"torch {found['torch']}", "wall time"
    return (
        f"{machine}; {versions}; commit {_short(found['commit'])}, {result['date'][:10]}. "
        f"Medians of {result['settings']['rounds']} interleaved rounds (quartiles); {settings}; "
        "warm caches."
    )


def _blocks(result: dict[str, Any]) -> str:
    """A table of the network, with columns for each contender, one of first calls, and, folded
    away, one of the pieces for each dtype, with columns for each batch size."""
    model, cuda = result["model"], result["device"] == "cuda"
    parts = [
        f"{model['name']}, width {model['width']:g}, {model['resolution']}x{model['resolution']}, "
        f"on {_where(result).replace(' (quartiles)', '')} "
        f"{'All are CUDA graphs, torch.compile its own' if cuda else 'All are eager'}; stock is "
        "channels_last with batch norms folded."
    ]
    if result["network"]:
        parts.append(_network(result))
    if result["first_calls"]:
        parts.append(_first_calls(result))
    for dtype in dict.fromkeys(row["dtype"] for row in result["pieces"]):
        summary = f"<summary>Each block against its stock layers, {dtype}</summary>"
        parts += [f"<details>{summary}", _pieces(result, dtype), *[_FLOOR] * cuda, "</details>"]
    return "\n\n".join(parts)


def _pieces(result: dict[str, Any], dtype: str) -> str:
    rows = {(r["piece"], r["batch"]): r for r in result["pieces"] if r["dtype"] == dtype}
    totals = {r["batch"]: r for r in result["totals"] if r["dtype"] == dtype}
    header, rule = [dtype], ["---"]
    for batch in totals:
        header += [f"batch {batch}: us", "stock us", "ratio", "of floor"]
        rule += ["--:"] * 4
    lines = [_line(header), f"|{'|'.join(rule)}|"]
    for piece in dict.fromkeys(name for name, _ in rows):
        cells = [piece]
        for batch in totals:
            row = rows[piece, batch]
            wrong = "" if row["agrees"] else " **DISAGREES**"
            floor = "" if row["of_floor"] is None else f"{row['of_floor']:.2f}"
            cells += [f"{row['us']:.1f}{wrong}", f"{row['stock_us']:.1f}"]
            cells += [f"**{row['ratio']:.2f}x**", floor]
        lines.append(_line(cells))
    cells = ["sum; geometric mean"]
    for row in totals.values():
        cells += [f"{row['us']:.1f}", f"{row['stock_us']:.1f}"]
        cells += [f"**{row['geometric_mean']:.2f}x**", ""]
    lines.append(_line(cells))
    return "\n".join(lines)


def _network(result: dict[str, Any]) -> str:
    rows = {(r["dtype"], r["batch"], r["contender"]): r for r in result["network"]}
    peaks = {(r["dtype"], r["batch"], r["contender"]): r["peak_mib"] for r in result["memory"]}
    contenders = list(dict.fromkeys(name for *_, name in rows))
    measured = list(dict.fromkeys(name for *_, name in peaks))
    header = ["dtype", "batch", *(f"{name}, img/s" for name in contenders)]
    header += [f"{name}, peak MiB" for name in measured]
    lines = [_line(header), f"|---{'|--:' * (len(header) - 1)}|"]
    for case in dict.fromkeys(key[:2] for key in rows):
        cells = [case[0], str(case[1])]
        for name in contenders:
            row = rows[(*case, name)]
            wrong = " **DISAGREES**" if row.get("agrees") is False else ""
            cells.append(
                "skipped"
                if "skipped" in row
                else f"{row['images_per_s']:.0f} ({row['ratio']:.2f}x){wrong}"
            )
        cells += [f"{peaks[(*case, name)]:.1f}" for name in measured]
        lines.append(_line(cells))
    return "\n".join(lines)


def _first_calls(result: dict[str, Any]) -> str:
    """What a fresh process waits for after `import torch`, in seconds."""
    rows = result["first_calls"]
    lines = [
        f"| fresh process, {rows[0]['dtype']}, one image | import, s | build and move the model | "
        "patch, fold or compile() | first call | sum | second call |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(_line([row["contender"], "skipped", *[""] * 5]))
            continue
        seconds = [row[key] for key in ("import_s", "load_s", "patch_s", "first_forward_s")]
        cells = [f"{found:.2f}" for found in (*seconds, sum(seconds))]
        lines.append(_line([row["contender"], *cells, f"{row['second_forward_s']:.4f}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(commit: str | None) -> str:
    """The first digits; "+", for files that differ from the commit, stays."""
    return "unknown" if commit is None else commit[:9] + "+" * commit.endswith("+")


def _time(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return "skipped"
    return f"{row['median_ms']:.3f} ({row['p25_ms']:.3f}-{row['p75_ms']:.3f})"


def _agreement(row: dict[str, Any]) -> str:
    """How far the logits are from float64, against plain stock."""
    if row["relative_l2"] is None or row["error_ratio"] is None:
        return "**NO**: not finite"
    verdict = "yes" if row["agrees"] else "**NO**"
    return f"{verdict}: error {row['relative_l2']:.1e}, {row['error_ratio']:.2f} of stock's"


if __name__ == "__main__":
    sys.exit(main())
