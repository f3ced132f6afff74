"""Pictures of a result of `bench`: networks against the batch size, layers, and a roofline.

They are drawn from nothing but the result (a dictionary as bench.schema.json has it), whose digest
goes into the files, so that anyone can tell whether a picture and a JSON belong together.
matplotlib, of the extra `bench`, is imported only when something is drawn.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import numpy as np
from PIL import Image

from torch_mbv2.errors import Error, UnavailableError
from torch_mbv2.measure import conditions
from torch_mbv2.measure.conditions import check_target
from torch_mbv2.measure.contenders import titles

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.container import Container
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

Result = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Style:
    """How a contender is drawn, in every picture alike: told apart without colours too."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    hatch: str


# The colours are those of Okabe and Ito, "Color Universal Design", with a grey for their yellow.
STYLES = {
    "eager": Style("#7F7F7F", "s", ":", "..."),
    "channels_last": Style("#56B4E9", "D", "--", "///"),
    "cudagraph": Style("#0072B2", "^", "-.", "\\\\\\"),
    "compile": Style("#009E73", "v", (0, (5, 1)), "xxx"),
    "compile_cudagraph": Style("#117733", "<", (0, (8, 2, 2, 2)), "||"),
    "onnxruntime": Style("#E69F00", "P", (0, (3, 1, 1, 1)), "+++"),
    "tensorrt": Style("#CC79A7", ">", (0, (1, 1)), "ooo"),
    "patched": Style("#000000", "*", (0, (5, 4)), "---"),
    "patched_cudagraph": Style("#D55E00", "o", "-", ""),
}
_STOCK, _OURS = STYLES["cudagraph"], STYLES["patched_cudagraph"]

LEVELS = {"block": "layers", "op": "layers-op"}
"""The level of a result's layers -> the name of their picture."""

_DIGEST = "bench-sha256"
# The format -> the key of its metadata for the digest; no dates: the same result, the same file.
_METADATA: dict[str, Callable[[str], dict[str, str | None]]] = {
    ".png": lambda digest: {_DIGEST: digest},
    ".svg": lambda digest: {"Identifier": f"{_DIGEST}:{digest}", "Date": None},
    ".pdf": lambda digest: {"Subject": f"{_DIGEST}:{digest}", "CreationDate": None},
}
_WIDTH = 8.0  # inches: 1200 pixels
_CAPTION_LETTERS, _TITLE_LETTERS = 118, 95  # that surely fit into a line of that width
_RC = {
    "figure.dpi": 150,
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "svg.hashsalt": "torch_mbv2",
    "text.parse_math": False,  # a "$" in a name is a "$"
}


# ----------------------------------------------------------------------------------------- public


def draw_all(result: Result) -> dict[str, Figure]:
    """The pictures that the result has data for: "batches", "layers" (level block), "layers-op",
    "roofline".

    Raises UnavailableError if matplotlib is not installed.
    """
    figures = {}
    if any("skipped" not in row for row in result["rows"]):
        figures["batches"] = draw_batches(result)
    for level, name in LEVELS.items():
        if any(row["level"] == level for row in result["layers"]):
            figures[name] = draw_layers(result, level)
    if result["ceilings"] is not None and any(map(_on_roofline, result["layers"])):
        figures["roofline"] = draw_roofline(result)
    return figures


def digest(result: Result) -> str:
    """The SHA-256 of the result as canonical JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def digest_of_picture(path: str | Path) -> str | None:
    """The `digest` of the result that a PNG shows; None if `save` did not write it."""
    with Image.open(path) as image:
        found: str | None = image.info.get(_DIGEST)
        return found


def check_path(path: str) -> None:
    """Raise Error now, before any work is done, if drawing for `--plot path` would fail later."""
    if Path(path).suffix.lower() not in _METADATA:
        raise Error(f"--plot {path}: must end in one of {', '.join(_METADATA)}")
    for target in targets(path):
        check_target("--plot", target)
    require_matplotlib("--plot")


def targets(path: str | Path) -> list[Path]:
    """The files that `save` may write to."""
    return [_target(path, name) for name in ("batches", *LEVELS.values(), "roofline")]


def _target(path: str | Path, name: str) -> Path:
    path = Path(path)
    return path if name == "batches" else path.with_name(f"{path.stem}-{name}{path.suffix}")


def require_matplotlib(purpose: str) -> None:
    """Raise UnavailableError if matplotlib is not installed. purpose: what needs it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError(f"{purpose} needs matplotlib: pip install 'torch-mbv2[bench]'")


def save(figures: Mapping[str, Figure], path: str | Path) -> list[Path]:
    """Write the picture "batches" to the file `path`, and each other one, beside it, to a file with
    its name behind the stem: FILE-roofline.png. Returns the paths of what was written.

    path: ends in .png, .svg or .pdf, see `check_path`.
    """
    path = Path(path)
    paths = []
    for name, figure in figures.items():
        paths.append(_target(path, name))
        _write(figure, paths[-1], path.suffix.lower())
    return paths


def png(figure: Figure) -> bytes:
    """What `save` writes to a PNG file."""
    buffer = io.BytesIO()
    _write(figure, buffer, ".png")
    return buffer.getvalue()


def _write(figure: Figure, target: Path | BinaryIO, suffix: str) -> None:
    with _style():
        metadata = _METADATA[suffix](str(figure.get_label()))
        figure.savefig(target, format=suffix[1:], metadata=metadata)


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's settings; they are back afterwards."""
    require_matplotlib("drawing")
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        yield


# ---------------------------------------------------------------------------------------- batches


@_style()
def draw_batches(result: Result) -> Figure:
    """Latency (ms) and throughput (images/s) of every contender against the batch size, a row of
    two panels for each dtype; bars instead of lines if there is one batch size only.

    result: with at least one row that was not skipped.
    """
    rows = [row for row in result["rows"] if "skipped" not in row]
    dtypes, batches = _values(rows, "dtype"), sorted(_values(rows, "batch"))
    contenders = [name for name in STYLES if name in _values(rows, "contender")]
    shown = titles(result)
    names = {name: shown[name] for name in contenders}
    one = len(batches) == 1
    height = 0.7 + 0.3 * len(contenders) if one else 2.7
    figure = _figure(result, height * len(dtypes))
    grid = figure.subplots(len(dtypes), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for dtype, panels in zip(dtypes, grid, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        for axes, quantity in zip(panels, (_latency, _throughput), strict=True):
            if one:
                axes.set_title(f"{dtype}, batch {batches[0]}")
                _draw_bars(axes, chosen, names if quantity is _latency else {}, quantity)
            else:
                axes.set_title(dtype)
                handles |= _draw_lines(axes, chosen, batches, quantity)
    _finish(
        figure,
        result,
        "latency and throughput of the whole network",
        f"Medians of {result['settings']['rounds']} samples of each contender, taken in turns, "
        "with the range from 10 % to 90 % of them. " + _exceptions(result, shown),
        {names[name]: handles[name] for name in contenders if name in handles},
    )
    return figure


def _latency(row: Row) -> tuple[float, float, float]:
    """The median, and what lies between 10 % and 90 %."""
    return row["median_ms"], row["p10_ms"], row["p90_ms"]


def _throughput(row: Row) -> tuple[float, float, float]:
    return row["images_per_s"], *(1e3 * row["batch"] / row[key] for key in ("p90_ms", "p10_ms"))


_Quantity = Callable[[Row], tuple[float, float, float]]
_LABELS: dict[_Quantity, str] = {
    _latency: "latency, ms",
    _throughput: "throughput, images/s",
}


def _draw_lines(
    axes: Axes, rows: Sequence[Row], batches: Sequence[int], quantity: _Quantity
) -> dict[str, Artist | Container]:
    """A line for each contender, with gaps where it was skipped; returns them."""
    handles: dict[str, Artist | Container] = {}
    for name in _values(rows, "contender"):
        found = {row["batch"]: quantity(row) for row in rows if row["contender"] == name}
        points = np.array([found.get(batch, (math.nan,) * 3) for batch in batches])
        style, ours = STYLES[name], name == "patched_cudagraph"
        handles[name] = axes.errorbar(
            batches,
            points[:, 0],
            yerr=_errors(points),
            color=style.color,
            marker=style.marker,
            linestyle=style.line,
            linewidth=1.8 if ours else None,
            zorder=3 if ours else 2,
            elinewidth=0.8,
        )
    axes.set_xlabel("batch size, images")
    axes.set_ylabel(_LABELS[quantity])
    axes.set_xscale("log", base=2)
    ticks = _apart(batches)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    if quantity is _latency:
        _log_axis(axes, "y", [number for row in rows for number in quantity(row)])
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_plain)
    return handles


def _draw_bars(
    axes: Axes, rows: Sequence[Row], names: Mapping[str, str], quantity: _Quantity
) -> None:
    """A bar for each contender, in the order of STYLES, with its number; names: of the contenders,
    for the panels that have them."""
    contenders = [name for name in STYLES if name in _values(rows, "contender")]
    found = {row["contender"]: quantity(row) for row in rows}
    points = np.array([found[name] for name in contenders])
    styles = [STYLES[name] for name in contenders]
    axes.barh(
        range(len(contenders)),
        points[:, 0],
        xerr=_errors(points),
        color=[style.color for style in styles],
        hatch=[style.hatch for style in styles],
        edgecolor="white",
        ecolor="black",
    )
    _write_at(axes, points[:, 2], [f"{number:,.4g}" for number in points[:, 0]])
    labels = [textwrap.fill(names.get(name, ""), 24) for name in contenders]
    axes.set_yticks(range(len(contenders)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(_LABELS[quantity])
    axes.xaxis.set_major_formatter(_plain)


def _exceptions(result: Result, titles: Mapping[str, str]) -> str:
    """Sentences about what the picture does not show, or shows and is wrong."""

    def named(wanted: Callable[[Row], bool]) -> str:
        found = []
        for name in _values(filter(wanted, result["rows"]), "contender"):
            own = [row for row in result["rows"] if row["contender"] == name]
            cases = []
            for dtype in _values(filter(wanted, own), "dtype"):
                batches = [row["batch"] for row in own if row["dtype"] == dtype and wanted(row)]
                cases.append(f"{dtype} {', '.join(map(str, batches))}")
            every = all(map(wanted, own))
            found.append(titles[name] + f" ({'; '.join(cases)})" * (not every))
        return "; ".join(found)

    missing = [rival["name"] for rival in result["rivals"] if rival["missing"]]
    sentences = {
        "Cannot run here": "; ".join(titles[name] for name in missing),
        "Skipped": named(lambda row: "skipped" in row and row["contender"] not in missing),
        "DISAGREE with stock": named(lambda row: row.get("agrees") is False),
    }
    return " ".join(f"{what}: {names}." for what, names in sentences.items() if names)


# ----------------------------------------------------------------------------------------- layers


@_style()
def draw_layers(result: Result, level: str) -> Figure:
    """The time (us) of each layer, stock's and patched, with their ratio: a row for each dtype, a
    panel for its smallest and its largest batch.

    level: "block" or "op", of which the result has layers.
    """
    rows = [row for row in result["layers"] if row["level"] == level]
    panels = {}
    for dtype in _values(rows, "dtype"):
        own = [row for row in rows if row["dtype"] == dtype]
        batches = _values(own, "batch")
        shown = sorted({min(batches), max(batches)})
        panels[dtype] = [[row for row in own if row["batch"] == batch] for batch in shown]
    lines = [max(map(len, columns)) for columns in panels.values()]
    figure = _figure(result, sum(0.7 + 0.23 * number for number in lines))
    grid = figure.subplots(
        len(panels), max(map(len, panels.values())), squeeze=False, height_ratios=lines
    )
    for axes, columns in zip(grid, panels.values(), strict=True):
        names: list[str] = []
        for panel, column in itertools.zip_longest(axes, columns):
            if column is None:
                panel.remove()
                continue
            left, names = names, [_clip(row["layer"]) for row in column]
            handles = _draw_layers(panel, column, names if names != left else [""] * len(names))
    batches, caches = sorted(_values(rows, "batch")), sorted(_values(rows, "caches"))
    omitted = f" Batches measured: {', '.join(map(str, batches))}." if len(batches) > 2 else ""
    _finish(
        figure,
        result,
        f"layers at level {level}, patched and stock",
        "Medians, with the range from 10 % to 90 %, and the ratio of stock to patched. Stock is "
        "the same work by stock layers, channels_last, norms folded. Caches: "
        f"{', '.join(caches)}.{omitted}",
        handles,
    )
    return figure


def _draw_layers(
    axes: Axes, rows: Sequence[Row], names: Sequence[str]
) -> dict[str, Artist | Container]:
    """Two bars for each layer, the first layer on top."""
    handles: dict[str, Artist | Container] = {}
    ends = []
    for side, prefix, style, shift in (
        ("patched", "", _OURS, -0.2),
        ("stock", "stock_", _STOCK, 0.2),
    ):
        keys = [f"{prefix}{key}" for key in ("us", "p10_us", "p90_us")]
        points = np.array([[row[key] for key in keys] for row in rows])
        handles[side] = axes.barh(
            np.arange(len(rows)) + shift,
            points[:, 0],
            height=0.38,
            xerr=_errors(points),
            color=style.color,
            hatch=style.hatch,
            edgecolor="white",
            error_kw={"elinewidth": 0.7},
        )
        ends.append(points.max(axis=1))
    marks = [
        f"{row['ratio']:.2f}x"
        + ", DISAGREES" * (not row["agrees"])
        + ", stock is off" * (not row["stock_agrees"])
        for row in rows
    ]
    _write_at(axes, np.maximum(*ends), marks)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time, us")
    axes.xaxis.set_major_formatter(_plain)
    axes.set_title(f"{rows[0]['dtype']}, batch {rows[0]['batch']}")
    return handles


# --------------------------------------------------------------------------------------- roofline


@_style()
def draw_roofline(result: Result) -> Figure:
    """The FLOP/s of each layer against its FLOPs per byte, under the roof that this machine was
    measured to reach: a panel for each dtype, at its largest batch, with a table of the layers.

    Layers of the same kind and shape share a number. Those of level block are shown, if there are
    any. Source: Williams, Waterman and Patterson, "Roofline", Communications of the ACM, 2009.

    result: with ceilings, and with at least one layer that multiplies.
    """
    level = min(_values(result["layers"], "level"), key=list(LEVELS).index)
    rows = [row for row in result["layers"] if row["level"] == level]
    panels = {}
    for dtype in _values(filter(_on_roofline, rows), "dtype"):
        own = [row for row in rows if row["dtype"] == dtype and _on_roofline(row)]
        largest = max(_values(own, "batch"))
        panels[dtype] = _alike([row for row in own if row["batch"] == largest])
    tables = [_numbered(groups) for groups in panels.values()]
    heights = [max(3.0, 0.8 + 0.125 * len(lines)) for lines in tables]
    figure = _figure(result, sum(heights))
    grid = figure.subplots(
        len(panels), 2, squeeze=False, width_ratios=(2.9, 1), height_ratios=heights
    )
    for (axes, beside), groups, lines in zip(grid, panels.values(), tables, strict=True):
        handles = _draw_roofline(axes, groups, result["ceilings"])
        beside.axis("off")
        beside.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=6.5)
    omitted = ", ".join(sorted({row["kernel"] for row in rows if not _on_roofline(row)}))
    _finish(
        figure,
        result,
        f"roofline of the layers at level {level}",
        "The roof is what a large copy and a large matrix product reached in the same run: on it, "
        "a layer takes no longer than its floor. FLOPs are two a multiply-add; bytes are of input, "
        "output and weights, each once, for stock too."
        + f" Left out, as they multiply nothing: {omitted}."
        * bool(omitted),
        handles,
    )
    for axes, groups in zip(grid[:, 0], panels.values(), strict=True):
        _number_points(figure, axes, groups)
    return figure


def _on_roofline(row: Row) -> bool:
    flops: float = row["flops"]
    return flops > 0


def _alike(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows, in groups that do the same work, in order of the first of each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row[key]) for key in ("kernel", "input", "output", "bytes", "flops"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _numbered(groups: Sequence[Sequence[Row]]) -> list[str]:
    """The lines of the table that tells which layers a number stands for."""
    lines = []
    for number, group in enumerate(groups, 1):
        text = ", ".join(_clip(row["layer"]) for row in group)
        lines += textwrap.wrap(f"{number:2}  {text}", 36, subsequent_indent="    ")
    return lines


def _point(row: Row, us: str = "us") -> tuple[float, float]:
    """FLOPs per byte and TFLOP/s. us: the key of the time."""
    return row["flops"] / row["bytes"], 1e-6 * row["flops"] / row[us]


def _draw_roofline(
    axes: Axes, groups: Sequence[Sequence[Row]], ceilings: Mapping[str, Any]
) -> dict[str, Artist | Container]:
    rows = [row for group in groups for row in group]
    ours = np.array([_point(row) for row in rows])
    stock = np.array([_point(row, "stock_us") for row in rows])
    per_s, dtype = ceilings["bytes_per_s"], rows[0]["dtype"]
    peak = ceilings["flops_per_s"][dtype]
    ridge = peak / per_s  # from here on, multiplying is what takes longer
    x = np.array([ours[:, 0].min() / 2, ridge, 3 * max(ridge, ours[:, 0].max())])
    roof = 1e-12 * np.minimum(per_s * x, peak)
    for (intensity, mine), (_, theirs) in zip(ours, stock, strict=True):
        axes.plot([intensity] * 2, [mine, theirs], color="#999999", linewidth=0.6, zorder=1)
    handles: dict[str, Artist | Container] = {}
    handles["roof"], *_ = axes.plot(x, roof, color="black")
    for name, points, style, face in (
        ("patched", ours, _OURS, _OURS.color),
        ("stock", stock, _STOCK, "white"),
    ):
        handles[name], *_ = axes.plot(
            *points.T,
            linestyle="",
            marker=style.marker,
            color=style.color,
            markerfacecolor=face,
        )
    roof_text = f"roof {1e-12 * peak:.3g} TFLOP/s, {1e-9 * per_s:.4g} GB/s"
    axes.set_title(f"{dtype}, batch {rows[0]['batch']}: {roof_text}")
    axes.set_xlabel("intensity, FLOP/byte")
    axes.set_ylabel("TFLOP/s")
    _log_axis(axes, "x", x)
    _log_axis(axes, "y", [*ours[:, 1], *stock[:, 1], *roof])
    return handles


def _number_points(figure: Figure, axes: Axes, groups: Sequence[Sequence[Row]]) -> None:
    """Write each group's number where it hides no line, point or other number, as near as can be;
    the figure, of which `axes` are a part, is laid out already."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    pixels = figure.dpi / 72  # of a typographic point
    step = 4 * pixels

    def along(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.linspace(start, end, 2 + int(math.dist(start, end) / step))

    # What is drawn, as points (N, 2) in pixels. Markers without a line are the ends of others.
    drawn = [
        along(*ends)
        for line in axes.get_lines()
        if line.get_linestyle() != "None"
        for ends in itertools.pairwise(axes.transData.transform(line.get_xydata()))
    ]
    shifts = [
        pixels * radius * np.array([math.cos(angle), math.sin(angle)])
        for radius in range(10, 250, 4)
        for angle in np.linspace(0, 2 * math.pi, 16, endpoint=False)
    ]
    labels: list[Bbox] = []
    for number, group in enumerate(groups, 1):
        text = axes.annotate(
            str(number),
            _point(group[0]),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0},
        )
        point, box = axes.transData.transform(text.xy), text.get_window_extent(renderer)
        busy, shift = np.concatenate(drawn), shifts[0]  # taken where nothing fits
        for tried in shifts:
            wide = box.padded(step).translated(*tried)
            leader = along(point, point + tried)
            if (
                _contains(axes.bbox, wide.corners()).all()
                and not _contains(wide, busy).any()
                and not any(wide.overlaps(other) for other in labels)
                and not any(_contains(other, leader).any() for other in labels)
            ):
                shift = tried
                break
        right, up = shift / pixels
        text.set_position((right, up))
        labels.append(box.translated(*shift))
        drawn.append(along(point, point + shift))


def _contains(box: Bbox, points: np.ndarray) -> np.ndarray:
    """Which of the points, (N, 2), lie in the box: (N,)."""
    inside = (points > box.min) & (points < box.max)
    return inside[:, 0] & inside[:, 1]


# ----------------------------------------------------------------------------------------- shared


def _figure(result: Result, height: float) -> Figure:
    """An empty figure; height: of its panels, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.set_label(digest(result))  # for `save`
    return figure


def _finish(
    figure: Figure,
    result: Result,
    title: str,
    caption: str,
    handles: Mapping[str, Artist | Container],
) -> None:
    """Add the title, the legend below it, and the caption at the foot, and lay everything out."""
    model = result["model"]
    title = f"{_clip(model['name'], 60)}, {'x'.join(map(str, model['input']))}: {title}"
    title = textwrap.fill(title, _TITLE_LETTERS)
    precision = "TF32 off, cudnn.benchmark on" if result["device"] == "cuda" else "wall time"
    text = textwrap.wrap(f"On {conditions.where(result)}; {precision}. {caption}", _CAPTION_LETTERS)
    figure.supxlabel("\n".join(text), x=0.01, ha="left", fontsize=7, color="#333333")
    lines = 1 + title.count("\n")
    if handles:
        columns = max(1, min(len(handles), int(_WIDTH / (0.7 + 0.065 * max(map(len, handles))))))
        lines += math.ceil(len(handles) / columns)
        figure.legend(
            cast("list[Artist]", list(handles.values())),  # containers are as good, like in Axes
            list(handles),
            loc="outside upper center",
            ncols=columns,
            title=title,
            title_fontproperties={"weight": "bold", "size": 9},
        )
    else:
        figure.suptitle(title, weight="bold", fontsize=9)
    figure.set_figheight(figure.get_figheight() + 0.19 * lines + 0.13 * len(text) + 0.15)
    figure.draw_without_rendering()  # lays it out, once: from here on everything stays in its place
    figure.set_layout_engine("none")


def _values(rows: Iterable[Row], key: str) -> list[Any]:
    """The different values, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def _errors(points: np.ndarray) -> np.ndarray:
    """How far 10 % and 90 % are from the median, as matplotlib wants it: (2, N) from (N, 3)."""
    median, low, high = points.T
    return np.maximum([median - low, high - median], 0)


def _write_at(axes: Axes, ends: np.ndarray, marks: Sequence[str]) -> None:
    """Write beside the end of each bar, and make room for it."""
    for y, (end, mark) in enumerate(zip(ends, marks, strict=True)):
        axes.annotate(mark, (end, y), (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.set_xlim(0, max(ends) * (1.1 + 0.025 * max(map(len, marks))))


def _plain(number: float, position: float | None = None) -> str:
    """A tick as people write it: no powers of ten."""
    return f"{number:,.10g}"


def _log_axis(axes: Axes, name: Literal["x", "y"], numbers: Iterable[float]) -> None:
    """A logarithmic axis around the numbers, with as many ticks as can be read."""
    from matplotlib.ticker import LogLocator, NullLocator

    numbers = list(numbers)
    low, high = min(numbers) / 1.3, max(numbers) * 1.3
    decades = math.log10(high / low)
    steps = (1,) if decades > 3 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 5, 7)
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis: Axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain)


def _apart(batches: Sequence[int]) -> list[int]:
    """Those that can be written below a logarithmic axis without touching."""
    gap = (batches[-1] / batches[0]) ** (1 / 8)
    ticks = [batches[0]]
    for batch in batches[1:]:
        if batch >= gap * ticks[-1]:
            ticks.append(batch)
    return ticks


def _clip(name: str, letters: int = 28) -> str:
    """The end of a long name, which tells most."""
    return name if len(name) <= letters else f"\N{HORIZONTAL ELLIPSIS}{name[1 - letters :]}"
