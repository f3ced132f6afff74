"""The pictures of a bench result: what they show is what the result says, and it can be read."""

from __future__ import annotations

import copy
import itertools
import sys

import bench_results
import numpy as np
import pytest
from PIL import Image

from torch_mbv2.errors import Error, UnavailableError
from torch_mbv2.measure import conditions, figures

matplotlib = pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

CONTENDERS = list(bench_results.MS)
DTYPES = ("float16", "bfloat16", "float32")


def tall(dtypes=DTYPES, batches=(1, 8, 32, 128, 256), layers=20, level="block"):
    """A result with all contenders and as many layers, hardly one like another."""
    result = bench_results.result(dtypes, batches)
    cases = list(itertools.product(dtypes, batches))
    result["rows"] += [bench_results.row("tensorrt", *case, ms=0.9 * case[1]) for case in cases]
    rng = np.random.default_rng(0)
    result["layers"] = [
        bench_results.layer(
            f"features.{index}.conv.0",
            *case,
            level,
            us=case[1] ** 0.5 * rng.uniform(2, 9),
            input=[1, 8 + index // 2, 7, 7],
            flops=int(1e9 * 1.3 ** (index // 2)),
        )
        for case in cases
        for index in range(layers)
    ]
    return result


def on_cpu():
    result = bench_results.result(("float32",), (1, 8), layers=False, device="cpu", clocks=None)
    result["environment"] |= {"gpus": [], "driver": None, "cuda": None, "commit": None}
    names = ("eager", "channels_last", "patched")
    result["rows"] = [row for row in result["rows"] if row["contender"] in names]
    return result


def with_layers(*layers, **others):
    return bench_results.result(**others) | {"layers": list(layers)}


def canvas(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return FigureCanvasAgg(figure)


def caption(figure):
    return " ".join(figure.get_supxlabel().split())


def panels(figure):
    """The panels with axes, by their titles: one for each title, or those that share it."""
    found = {}
    for axes in figure.axes:
        if axes.axison:
            found.setdefault(axes.get_title(), []).append(axes)
    return found


def lines(axes):
    """The lines of a panel by contender, told by their markers."""
    names = {style.marker: name for name, style in figures.STYLES.items()}
    return {names[line.get_marker()]: line for line in axes.get_lines()}


def medians(result, contender, dtype, key="median_ms"):
    rows = [row for row in result["rows"] if "skipped" not in row]
    return [r[key] for r in rows if (r["contender"], r["dtype"]) == (contender, dtype)]


# ----------------------------------------------------------------------------------------- styles


def test_every_contender_has_a_style():
    assert list(figures.STYLES) == bench_results.SCHEMA["$defs"]["contender"]["enum"]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(figures.STYLES, 2)))
def test_styles_differ_without_colours(one, other):
    one, other = figures.STYLES[one], figures.STYLES[other]
    assert one.marker != other.marker
    assert one.line != other.line
    assert one.hatch != other.hatch
    assert one.color != other.color


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("panel", "label", "key"),
    [(0, "latency, ms", "median_ms"), (1, "throughput, images/s", "images_per_s")],
)
def test_batches(dtype, panel, label, key):
    result = bench_results.result()
    axes = panels(figures.draw_batches(result))[dtype][panel]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size, images", label)
    assert axes.get_xscale() == "log"
    assert axes.get_yscale() == ("log" if panel == 0 else "linear")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8", "32"]
    found = lines(axes)
    assert {name: list(line.get_ydata()) for name, line in found.items()} == {
        name: medians(result, name, dtype, key) for name in CONTENDERS
    }
    assert all(list(line.get_xdata()) == [1, 8, 32] for line in found.values())


@pytest.mark.parametrize(
    ("panel", "ends"), [(0, [(3, 8), (6, 16)]), (1, [(125, 1e3 / 3), (125, 1e3 / 3)])]
)
def test_batches_show_the_spread(panel, ends):
    rows = [
        bench_results.row("patched", batch=n, ms=4.0 * n, p10_ms=3.0 * n, p90_ms=8.0 * n)
        for n in (1, 2)
    ]
    result = bench_results.result(layers=False, rows=rows)
    axes = panels(figures.draw_batches(result))["float16"][panel]
    (bars,) = axes.collections
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], ends)


def test_legend_has_what_was_drawn():
    (legend,) = figures.draw_batches(bench_results.result()).legends
    titles = [bench_results.TITLES[name] for name in figures.STYLES if name in CONTENDERS]
    assert [text.get_text() for text in legend.get_texts()] == titles
    assert legend.get_title().get_text().startswith("some_net, 224x192: latency")


def test_skipped_batch_is_a_gap():
    result = bench_results.result(("float16",), (1, 8, 32), layers=False)
    why = bench_results.skipped("compile", "out of memory", batch=8)
    result["rows"] = [
        why if (row["contender"], row["batch"]) == ("compile", 8) else row for row in result["rows"]
    ]
    figure = figures.draw_batches(result)
    line = lines(panels(figure)["float16"][0])["compile"]
    assert list(np.isnan(line.get_ydata())) == [False, True, False]
    assert "Skipped: torch.compile (float16 8)." in caption(figure)


def test_skipped_contender_is_only_named():
    result = bench_results.result(("float16",), (1, 8), layers=False)
    result["rows"] = [
        bench_results.skipped("onnxruntime", "why", batch=row["batch"])
        if row["contender"] == "onnxruntime"
        else row
        for row in result["rows"]
    ]
    figure = figures.draw_batches(result)
    assert "onnxruntime" not in lines(panels(figure)["float16"][0])
    assert "ONNX Runtime" not in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "Cannot run here: TensorRT. Skipped: ONNX Runtime." in caption(figure)


def test_disagreement_is_named():
    result = bench_results.result(("float16",), (1, 8), layers=False)
    result["rows"][-1]["agrees"] = False
    assert "DISAGREE with stock: patched, CUDA graph (float16 8)." in caption(
        figures.draw_batches(result)
    )


@pytest.mark.parametrize(("panel", "key"), [(0, "median_ms"), (1, "images_per_s")])
def test_one_batch_size_is_bars(panel, key):
    result = bench_results.result(("float16",), (8,))
    figure = figures.draw_batches(result)
    axes = panels(figure)["float16, batch 8"][panel]
    expected = [medians(result, name, "float16", key)[0] for name in CONTENDERS]
    assert [bar.get_width() for bar in axes.patches] == expected
    names = [tick.get_text().replace("\n", " ") for tick in axes.get_yticklabels()]
    shown = [bench_results.TITLES[name] for name in CONTENDERS]
    assert names == (shown if panel == 0 else [""] * len(CONTENDERS))
    assert [text.get_text() for text in axes.texts] == [f"{number:,.4g}" for number in expected]
    assert not figure.legends


# ----------------------------------------------------------------------------------------- layers


def test_layers():
    result = bench_results.result(("float16", "float32"), (1, 8, 32))
    figure = figures.draw_layers(result, "block")
    found = panels(figure)
    titles = [f"{dtype}, batch {batch}" for dtype in ("float16", "float32") for batch in (1, 32)]
    assert list(found) == titles
    (left,), (right,) = found["float16, batch 1"], found["float16, batch 32"]
    for axes in (left, right):
        assert axes.get_xlabel() == "time, us"
        assert [bar.get_width() for bar in axes.patches] == [4, 5, 6, 7, 8, 12, 15, 18, 21, 24]
        assert [text.get_text() for text in axes.texts] == ["3.00x"] * 5
        bottom, top = axes.get_ylim()
        assert bottom > top, "the first layer is on top"
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names == list(bench_results.LAYERS)
    assert [tick.get_text() for tick in right.get_yticklabels()] == [""] * 5
    assert "Caches: cold. Batches measured: 1, 8, 32." in caption(figure)


def test_layers_of_a_level_only():
    result = bench_results.result(("float16",), (1,))
    result["layers"] += [bench_results.layer("features.1.conv.0", level="op", us=9.0)]
    (axes,) = figures.draw_layers(result, "op").axes
    assert [bar.get_width() for bar in axes.patches] == [9, 27]


def test_layers_of_other_names_are_named_again():
    result = bench_results.result(("float16",), (1, 8))
    result["layers"] = [bench_results.layer("a"), bench_results.layer("b", batch=8)]
    left, right = figures.draw_layers(result, "block").axes
    assert [axes.get_yticklabels()[0].get_text() for axes in (left, right)] == ["a", "b"]


def test_no_panel_is_empty():
    result = bench_results.result(("float16", "float32"), (1, 8))
    result["layers"] = [
        row for row in result["layers"] if (row["dtype"], row["batch"]) != ("float32", 8)
    ]
    figure = figures.draw_layers(result, "block")
    assert [len(axes.patches) for axes in figure.axes] == [10, 10, 10]


@pytest.mark.parametrize(
    ("others", "mark"),
    [
        ({}, "3.00x"),
        ({"agrees": False}, "3.00x, DISAGREES"),
        ({"stock_agrees": False}, "3.00x, stock is off"),
    ],
)
def test_wrong_layers_are_marked(others, mark):
    result = bench_results.result(("float16",), (1,))
    result["layers"] = [bench_results.layer("a", **others)]
    (axes,) = figures.draw_layers(result, "block").axes
    assert [text.get_text() for text in axes.texts] == [mark]


def test_figure_grows_with_the_layers():
    short, long = (
        figures.draw_layers(tall(("float16",), (1,), layers=n), "block") for n in (5, 25)
    )
    assert long.get_figheight() - short.get_figheight() > 0.2 * 20


# --------------------------------------------------------------------------------------- roofline


@pytest.fixture
def roofline():
    """A result whose points are known: 100 and 1000 FLOPs a byte, on a roof of 1 TB/s, 200 T."""
    result = bench_results.result(("float16",), (1, 4))
    result["ceilings"] = {"bytes_per_s": 1e12, "flops_per_s": {"float16": 2e14}}
    common = {"batch": 4, "bytes": 1_000_000}
    result["layers"] = [
        bench_results.layer("smaller batch", batch=1),
        bench_results.layer("a", us=2.0, flops=100_000_000, **common),
        bench_results.layer("b", us=10.0, flops=1_000_000_000, **common),
        bench_results.layer("c", us=4.0, flops=100_000_000, **common),
        bench_results.layer("d", us=4.0, flops=0, kernel="add", **common),
    ]
    return result


def test_roofline_points(roofline):
    (axes,) = panels(figures.draw_roofline(roofline))[
        "float16, batch 4: roof 200 TFLOP/s, 1000 GB/s"
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("intensity, FLOP/byte", "TFLOP/s")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    *_, roof, ours, stock = axes.get_lines()
    np.testing.assert_allclose(ours.get_xydata(), [(100, 50), (100, 25), (1000, 100)])
    np.testing.assert_allclose(stock.get_xydata(), [(100, 50 / 3), (100, 25 / 3), (1000, 100 / 3)])
    (first, first_y), (ridge, ridge_y), (last, last_y) = roof.get_xydata()
    assert (ridge, ridge_y) == pytest.approx((200, 200))
    assert first < 100
    assert first_y == pytest.approx(first), "1 TB/s"
    assert last > 1000
    assert last_y == pytest.approx(200)


def test_roofline_names(roofline):
    figure = figures.draw_roofline(roofline)
    axes, beside = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2"]
    assert beside.texts[0].get_text().split("\n") == [" 1  a, c", " 2  b"]
    assert "Left out, as they multiply nothing: add." in caption(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "roof",
        "patched",
        "stock",
    ]


@pytest.mark.parametrize(
    ("levels", "shown"), [(("block", "op"), "block"), (("op", "block"), "block"), (("op",), "op")]
)
def test_roofline_prefers_blocks(roofline, levels, shown):
    roofline["layers"] = [bench_results.layer(level, level=level) for level in levels]
    figure = figures.draw_roofline(roofline)
    assert figure.axes[1].texts[0].get_text() == f" 1  {shown}"


def test_numbers_hide_neither_points_nor_each_other():
    rng = np.random.default_rng(0)
    layers = [
        bench_results.layer(
            str(index), us=rng.uniform(4, 8), flops=int(1e8 * 2 ** rng.uniform(0, 5))
        )
        for index in range(50)
    ]
    figure = figures.draw_roofline(with_layers(*layers))
    renderer, axes = canvas(figure).get_renderer(), figure.axes[0]
    *_, ours, stock = axes.get_lines()
    points = axes.transData.transform(np.concatenate([ours.get_xydata(), stock.get_xydata()]))
    assert len(axes.texts) == 50
    boxes = [matplotlib.text.Text.get_window_extent(text, renderer) for text in axes.texts]
    assert not [i for i, box in enumerate(boxes) if any(box.contains(*point) for point in points)]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    crossed = [
        (text.get_text(), number)
        for text, own in zip(axes.texts, boxes, strict=True)
        for number, box in enumerate(boxes, 1)
        if box is not own
        for point in np.linspace(axes.transData.transform(text.xy), (own.min + own.max) / 2, 99)
        if box.contains(*point)
    ]
    assert crossed == [], "lines from points to their numbers"


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (bench_results.result(), ["batches", "layers", "roofline"]),
        (bench_results.result(layers=False), ["batches"]),
        (bench_results.result(rows=[]), ["layers", "roofline"]),
        (bench_results.result(ceilings=None), ["batches", "layers"]),
        (bench_results.result(layers=False, rows=[bench_results.skipped("eager", "why")]), []),
        (with_layers(bench_results.layer("a", level="op"), rows=[]), ["layers-op", "roofline"]),
        (with_layers(bench_results.layer("a", flops=0), rows=[]), ["layers"]),
    ],
    ids=["all", "no layers", "no rows", "no ceilings", "all skipped", "level op", "pools only"],
)
def test_pictures_are_of_what_there_is(result, names):
    assert list(figures.draw_all(result)) == names


def texts(figure, monkeypatch):
    """Every text that is drawn, with its box in pixels."""
    from matplotlib.text import Text

    found, draw = [], Text.draw

    def record(text, renderer, *args):
        if text.get_text().strip() and text.get_visible():
            found.append((text.get_text(), Text.get_window_extent(text, renderer)))
        draw(text, renderer, *args)

    monkeypatch.setattr(Text, "draw", record)
    canvas(figure).draw()
    monkeypatch.undo()
    return found


def renamed(result):
    """With the longest names and the most exceptions."""
    result["model"]["name"] = "an_onnx_file_of_a_very_long_name_indeed_" * 3
    result["environment"]["gpus"][0]["name"] = "GPU " * 30
    for row in result["layers"]:
        row["layer"] = "/an/onnx/graph/node/" * 3 + row["layer"]
        row["kernel"] = f"kernel_{row['layer']}"
        row["agrees"] = row["stock_agrees"] = False
    result["rows"] = [
        bench_results.skipped(row["contender"], "why", row["dtype"], row["batch"])
        if row["contender"] in ("compile", "onnxruntime") and row["batch"] > 1
        else row | {"agrees": False}
        for row in result["rows"]
    ]
    return result


@pytest.mark.parametrize(
    "result",
    [
        tall(),
        tall(("float16",), (1,), layers=80, level="op"),
        renamed(tall(("float16", "float32"), (1, 8))),
        bench_results.result(batches=(30, 31, 32, 33, 34, 64, 65)),
        bench_results.result(batches=tuple(2**power for power in range(15))),
        on_cpu(),
    ],
    ids=["tall", "one batch", "long names", "close batches", "many batches", "CPU"],
)
def test_no_text_is_cut_off_or_hides_another(result, monkeypatch):
    for name, figure in figures.draw_all(result).items():
        found = texts(figure, monkeypatch)
        names = [text for text, _ in found]
        boxes = np.array([box.extents for _, box in found])
        width, height = figure.bbox.size
        inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] <= (width, height)).all(1)
        assert [text for text, fits in zip(names, inside, strict=True) if not fits] == [], name
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        meet = ((low < boxes[None, :, 2:]) & (boxes[None, :, :2] < high)).all(-1)
        pairs = np.argwhere(np.triu(meet, 1))
        assert [(names[i], names[j]) for i, j in pairs] == [], name


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            bench_results.result(),
            "GPU 9000 at 1980 MHz, driver 600.1; torch 2.99, CUDA 13.9, cuDNN 9.99; "
            "commit 012345678, 2030-01-02",
        ),
        (
            bench_results.result(clocks=None),
            "GPU 9000, driver 600.1; torch 2.99, CUDA 13.9, cuDNN 9.99; "
            "commit 012345678, 2030-01-02",
        ),
        (
            bench_results.result(clocks=dict.fromkeys(bench_results.result()["clocks"])),
            "GPU 9000, driver 600.1; torch 2.99, CUDA 13.9, cuDNN 9.99; "
            "commit 012345678, 2030-01-02",
        ),
        (on_cpu(), "CPU 1, 2 threads; torch 2.99; commit unknown, 2030-01-02"),
    ],
    ids=["GPU", "no clocks", "unknown clocks", "CPU"],
)
def test_where(result, text):
    assert conditions.where(result) == text
    assert f"On {text}; " in caption(figures.draw_batches(result))


def test_where_says_that_files_differ_from_the_commit():
    result = bench_results.result()
    result["environment"]["commit"] += "+"
    assert "commit 012345678+," in conditions.where(result)


def test_dollars_are_no_mathematics():
    result = bench_results.result(("float16",), (1, 8), layers=False)
    result["model"]["name"] = r"$\nothing$"
    figure = figures.draw_batches(result)
    assert figure.legends[0].get_title().get_text().startswith(r"$\nothing$, 224x192")
    assert figures.png(figure)


def test_settings_of_the_user_neither_count_nor_change():
    result = bench_results.result(("float16",), (1, 8), layers=False)
    expected = figures.png(figures.draw_batches(result))
    with matplotlib.rc_context({"figure.dpi": 20, "axes.facecolor": "red", "xtick.labelsize": 30}):
        before = copy.deepcopy(dict(matplotlib.rcParams))
        assert figures.png(figures.draw_batches(result)) == expected
        assert dict(matplotlib.rcParams) == before


# ------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def drawn():
    result = bench_results.result(("float16",), (1,))
    return result, figures.draw_all(result)


def test_digest_is_of_the_content():
    result = bench_results.result()
    backwards = dict(reversed(result.items()))
    assert figures.digest(result) == figures.digest(backwards)
    backwards["date"] = "2030-01-02T03:04:06+00:00"
    assert figures.digest(result) != figures.digest(backwards)


def test_pictures_carry_the_digest(drawn, tmp_path):
    result, pictures = drawn
    paths = figures.save(pictures, tmp_path / "gpu.2.PNG")
    assert [path.name for path in paths] == [
        "gpu.2.PNG",
        "gpu.2-layers.PNG",
        "gpu.2-roofline.PNG",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert {figures.digest_of_picture(path) for path in paths} == {figures.digest(result)}
    with Image.open(paths[0]) as image:
        assert image.format == "PNG"
        assert image.width == 1200


def test_other_pictures_have_no_digest(tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    assert figures.digest_of_picture(tmp_path / "a.png") is None


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_other_formats(drawn, tmp_path, suffix, start):
    result, pictures = drawn
    first, *_ = figures.save(pictures, tmp_path / f"a{suffix}")
    again, *_ = figures.save({"batches": figures.draw_batches(result)}, tmp_path / f"b{suffix}")
    content = first.read_bytes()
    assert content.startswith(start)
    assert figures.digest(result).encode() in content
    assert again.read_bytes() == content, "the same result, the same file"


@pytest.mark.parametrize("name", ["a.png", "a.SVG", "b.c.pdf"])
def test_good_path(tmp_path, name):
    figures.check_path(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a.jpg", "must end in one of .png, .svg, .pdf"),
        ("a", "must end in one of .png, .svg, .pdf"),
        ("folder.png", "is a directory"),
        ("nowhere/a.png", "there is no directory"),
        ("b.png", "is a directory"),
        (f"{300 * 'c'}.png", "cannot be written: File name too long"),
    ],
)
def test_bad_path(tmp_path, name, why):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "b-roofline.png").mkdir()
    with pytest.raises(Error, match=rf"--plot .*{name[:-4]}(-roofline)?{name[-4:]}: {why}"):
        figures.check_path(str(tmp_path / name))


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    install = r"needs matplotlib: pip install 'torch-mbv2\[bench\]'"
    with pytest.raises(UnavailableError, match=f"--plot {install}"):
        figures.check_path(str(tmp_path / "a.png"))
    with pytest.raises(UnavailableError, match=f"drawing {install}"):
        figures.draw_all(bench_results.result())
