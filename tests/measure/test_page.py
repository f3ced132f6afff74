"""The web page of a bench result: one sound HTML file that has everything and needs nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import bench_results
import pytest
from PIL import Image

from torch_mbv2.errors import Error, UnavailableError
from torch_mbv2.measure import baseline, figures, page

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a page says; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.pre, self.words = [], [], [], "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append({"caption": "", "thead": [], "tbody": [], "tfoot": []})
        elif tag == "tr":
            self.tables[-1][self.open[-2]].append([])
        elif tag in ("td", "th"):
            row = self.tables[-1][self.open[-3]][-1]
            row += [None] * (int(attrs.get("colspan", 1)) - 1) + [""]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        tag = self.open[-1] if self.open else ""
        if tag in ("td", "th"):
            self.tables[-1][self.open[-3]][-1][-1] += text
        elif tag == "caption":
            self.tables[-1]["caption"] += text
        elif tag == "pre":
            self.pre += text
        if tag not in ("pre", "style"):
            self.words += text

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing takes long."""
    monkeypatch.setattr(figures, "draw_all", lambda result: {})


def read(result, folder):
    return Page(page.write(result, folder / "page").read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    result = bench_results.result(("float16", "float32"), (1, 8))
    path = page.write(result, tmp_path_factory.mktemp("whole") / "page")
    return result, path.read_text("utf-8")


# -------------------------------------------------------------------------------------- the whole


def test_needs_nothing_else(whole):
    _, text = whole
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    found = Page(text)
    names = {tag for tag, _ in found.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "form"})
    assert all(key not in attrs for _, attrs in found.tags for key in ("href", "action", "onload"))
    assert all(img["src"].startswith("data:image/png;base64,") for img in found.attributes("img"))
    assert re.search(r"url\(|@import", text) is None
    assert {"charset": "utf-8"} in found.attributes("meta")


def test_pictures(whole):
    result, text = whole
    images = Page(text).attributes("img")
    starts = ["Latency in ms and throughput", "Time of each layer at level block", "TFLOP/s of"]
    assert [img["alt"][: len(start)] for img, start in zip(images, starts, strict=True)] == starts
    for img in images:
        content = base64.b64decode(img["src"].partition(",")[2], validate=True)
        with Image.open(io.BytesIO(content)) as image:
            assert image.info["bench-sha256"] == figures.digest(result)


def test_has_the_json(whole):
    result, text = whole
    found = Page(text)
    assert json.loads(found.pre) == result
    assert {"name": "bench-sha256", "content": figures.digest(result)} in found.attributes("meta")


def test_tables(whole):
    _, text = whole
    captions = [table["caption"] for table in Page(text).tables]
    assert captions[:2] == ["", "What was asked for"]
    assert captions[2].startswith("Medians, with 10 % and 90 % of the samples.")
    assert captions[3:] == [
        "float16, batch 1, level block",
        "float16, batch 8, level block",
        "float32, batch 1, level block",
        "float32, batch 8, level block",
    ]


def test_rows_fill_their_columns(whole):
    _, text = whole
    for table in Page(text).tables[1:]:
        (columns,) = table["thead"]
        assert {len(row) for row in table["tbody"] + table["tfoot"]} == {len(columns)}


def test_details_are_folded(whole):
    _, text = whole
    found = Page(text)
    assert found.attributes("details") == [{}] * 5
    assert "batch 8, level block" in found.words


# ----------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model", "some_net, input 224x192"),
        ("weights", "random"),
        ("patched", "all layers run on torch_mbv2 kernels"),
        ("ran on", "the GPU"),
        ("GPU", "GPU 9000"),
        ("driver", "600.1"),
        ("clocks at the end", "SM 1980 of 1980 MHz, memory 2619 of 2619 MHz, 40 °C, 300 W"),
        ("measured ceilings", "3000 GB/s, 700 TFLOP/s in float16, 700 TFLOP/s in float32"),
        ("CPU", "CPU 1, 2 threads"),
        ("system", "Linux"),
        ("Python", "3.12.1"),
        ("torch", "2.99"),
        ("CUDA", "13.9"),
        ("cuDNN", "9.99"),
        ("packages", "onnx 1.2.3"),
        ("kernels", "can run"),
        ("commit", "0123456789abcdef0123456789abcdef01234567"),
        ("date", "2030-01-02T03:04:05+00:00"),
        ("command", "python -m torch_mbv2 bench torchvision:mobilenet_v2 --json result.json"),
        ("TF32", "off"),
        ("cudnn.benchmark", "on"),
        ("caches", "warm: every call reads the same input and weights"),
        ("images", "normal noise, 32 different ones"),
        ("samples", "20 of each contender, taken in turns, each of at least 0.02 s"),
    ],
)
def test_facts(whole, name, text):
    _, html = whole
    assert [name, text] in Page(html).tables[0]["tbody"]


def test_rivals(whole):
    _, text = whole
    rows = Page(text).tables[1]["tbody"]
    assert ["compile", "torch.compile", "yes"] in rows
    why = "needs the package torch_tensorrt: pip install torch-tensorrt"
    assert ["tensorrt", "TensorRT", why] in rows


def test_network_row(without_pictures, tmp_path):
    row = bench_results.row("patched", batch=4, ms=2.0, calls=7, max_abs=0.5, near_ties=2)
    found = read(bench_results.result(layers=False, rows=[row]), tmp_path)
    table = found.tables[2]
    assert dict(zip(table["thead"][0], table["tbody"][0], strict=True)) == {
        "dtype": "float16",
        "batch": "4",
        "contender": "patched",
        "median, ms": "2.000",
        "10 %": "1.980",
        "90 %": "2.020",
        "calls a sample": "7",
        "images/s": "2,000",
        "first call, s": "0.50",
        "peak, MiB": "24.0",
        "over patched": "4.00x",
        "over patched, CUDA graph": "16.00x",
        "relative L2": "1.0e-03",
        "largest error": "5.0e-01",
        "L2 over eager's": "1.10",
        "top-1 differs": "0",
        "near ties": "2",
        "agrees": "yes",
    }


def test_skipped_row_says_why(without_pictures, tmp_path):
    skipped = bench_results.skipped("compile", "out of memory", batch=256)
    found = read(bench_results.result(layers=False, rows=[skipped]), tmp_path)
    (row,) = found.tables[2]["tbody"]
    assert row == ["float16", "256", "compile", *[None] * 14, "skipped: out of memory"]


def test_layer_row_and_totals(without_pictures, tmp_path):
    layer = bench_results.layer("features.2", us=10.0, bytes=2_500_000, stock_agrees=False)
    total = bench_results.total(us=12.0, stock_us=36.0, geometric_mean=2.5)
    other = bench_results.total(level="op", us=99.0)
    result = bench_results.result(layers=False)
    result |= {"layers": [layer], "layer_totals": [total, other]}
    table = read(result, tmp_path).tables[3]
    (columns,) = table["thead"]
    assert dict(zip(columns, table["tbody"][0], strict=True)) == {
        "layer": "features.2",
        "kernel": "inverted_residual",
        "input": "1x24x56x56",
        "output": "1x24x56x56",
        "patched, us": "10.00",
        "10 %": "9.90",
        "90 %": "10.10",
        "stock, us": "30.00",
        "stock 10 %": "29.70",
        "stock 90 %": "30.30",
        "ratio": "3.00x",
        "untuned, us": "40.00",
        "untuned 10 %": "39.60",
        "untuned 90 %": "40.40",
        "untuned ratio": "4.00x",
        "floor, us": "0.10",
        "of floor": "0.01",
        "stock of floor": "0.00",
        "MB": "2.50",
        "GB/s": "30",
        "stock GB/s": "10",
        "MFLOP": "50.0",
        "TFLOP/s": "5",
        "stock TFLOP/s": "1.67",
        "caches": "cold",
        "relative L2": "3.0e-04",
        "stock L2": "3.0e-04",
        "untuned L2": "3.0e-04",
        "agrees": "yes",
        "stock agrees": "NO",
    }
    (totals,) = table["tfoot"]
    assert {name: cell for name, cell in zip(columns, totals, strict=True) if cell} == {
        "layer": "sum; geometric mean",
        "patched, us": "12.0",
        "stock, us": "36.0",
        "ratio": "2.50x",
        "untuned, us": "100.0",
        "untuned ratio": "4.00x",
    }


def test_baseline(without_pictures, tmp_path):
    """An older run that is in the result has a table of its own."""
    old = bench_results.result(layers=False)
    new = bench_results.result(layers=False)
    new["rows"][-1] = bench_results.row("patched_cudagraph", "float32", 32, ms=99.0)
    new["baseline"] = baseline.compare(new, old, "old.json")
    table = read(new, tmp_path).tables[3]
    assert "old.json" in table["caption"]
    assert len(table["tbody"]) == len(new["rows"])
    assert table["tbody"][-1][-1] == "SLOWER"


def test_without_layers(without_pictures, tmp_path):
    found = read(bench_results.result(layers=False), tmp_path)
    assert len(found.tables) == 3
    headings = [tag for tag, _ in found.tags if tag == "h2"]
    assert len(headings) == 4, "neither pictures nor layers"


def test_on_a_cpu(without_pictures, tmp_path):
    row = bench_results.row("patched", "float32", peak_mib=None, over_patched_cudagraph=None)
    result = bench_results.result(layers=False, device="cpu", clocks=None, rows=[row])
    result["environment"] |= dict.fromkeys(("driver", "cuda", "cudnn", "commit"))
    result["environment"] |= {"gpus": [], "packages": {"onnx": None}}
    result["kernels"] = {"available": False, "why_not_available": "no GPU"}
    found = read(result, tmp_path)
    facts = dict(found.tables[0]["tbody"])
    for name in ("GPU", "driver", "CUDA", "cuDNN", "packages"):
        assert facts[name] == "none"
    assert facts["ran on"] == "the CPU"
    assert facts.keys().isdisjoint(("TF32", "cudnn.benchmark"))
    assert facts["commit"] == facts["clocks at the end"] == "unknown"
    assert facts["measured ceilings"] == "not measured"
    assert facts["kernels"] == "cannot run: no GPU"
    table = found.tables[2]
    cells = dict(zip(table["thead"][0], table["tbody"][0], strict=True))
    assert cells["peak, MiB"] == cells["over patched, CUDA graph"] == "-"
    assert "None" not in found.words


def test_unknown_clocks(without_pictures, tmp_path):
    clocks = dict.fromkeys(bench_results.result()["clocks"]) | {"sm_mhz": 1410.0}
    found = read(bench_results.result(layers=False, clocks=clocks), tmp_path)
    shown = "SM 1410 of - MHz, memory - of - MHz, - °C, - W"
    assert dict(found.tables[0]["tbody"])["clocks at the end"] == shown


# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("agree", [True, False])
def test_agreement(without_pictures, tmp_path, agree):
    row = bench_results.row("patched", agrees=agree)
    found = read(bench_results.result(layers=False, rows=[row], agree=agree), tmp_path)
    assert ("models and layers agree with stock" in found.words) == agree
    assert ("NOT agree with stock" in found.words) == (not agree)
    assert ({"class": "bad"} in found.attributes("td")) == (not agree)


@pytest.mark.parametrize(
    ("over", "worst", "text"),
    [
        (0, 0.02, None),
        (3, 0.123, "3 of 21 times spread, from 10 % to 90 %, over more than 5 % of their median, "
         "the worst over 12 %."),
        (3, None, "3 of 21 times spread, from 10 % to 90 %, over more than 5 % of their median."),
    ],
)  # fmt: skip
def test_noise(without_pictures, tmp_path, over, worst, text):
    noise = {"limit": 0.05, "over": over, "of": 21, "worst": worst}
    found = read(bench_results.result(layers=False, noise=noise), tmp_path)
    assert ("Noisy:" in found.words) == (text is not None)
    assert text is None or f"Noisy: {text}" in found.words


def test_names_are_only_text(without_pictures, tmp_path):
    evil = "<b>&amp;\"'</pre></script><!-- {{ 7 * 7 }}"
    result = bench_results.result(("float16",), (1,), command=evil)
    result["model"]["name"] = evil
    result["layers"][0]["layer"] = evil
    result["rows"][0] = bench_results.skipped("eager", evil)
    found = read(result, tmp_path)
    assert "b" not in {tag for tag, _ in found.tags}
    assert json.loads(found.pre) == result
    assert found.words.count(evil) == 6  # title, heading, model, command, row, layer
    assert found.tables[3]["tbody"][0][0] == evil


# ------------------------------------------------------------------------------------------ files


def test_write_again(without_pictures, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("old")
    (tmp_path / "page" / "mine.txt").write_text("kept")
    path = page.write(bench_results.result(layers=False), tmp_path / "page")
    assert path == tmp_path / "page" / "index.html"
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert sorted(found.name for found in path.parent.iterdir()) == ["index.html", "mine.txt"]


@pytest.mark.parametrize("name", ["new", "folder"])
def test_good_directory(tmp_path, name):
    (tmp_path / "folder").mkdir()
    page.check_directory(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "file: is not a directory"),
        ("nowhere/page", "nowhere/page: there is no directory"),
        ("full", "full/index.html: is a directory"),
    ],
)
def test_bad_directory(tmp_path, name, why):
    (tmp_path / "file").touch()
    (tmp_path / "full" / "index.html").mkdir(parents=True)
    with pytest.raises(Error, match=f"--report .*{why}"):
        page.check_directory(str(tmp_path / name))


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    install = r"needs matplotlib: pip install 'torch-mbv2\[bench\]'"
    with pytest.raises(UnavailableError, match=f"--report {install}"):
        page.check_directory(str(tmp_path / "page"))
    with pytest.raises(UnavailableError, match=f"drawing {install}"):
        page.write(bench_results.result(), tmp_path / "page")
    assert list(tmp_path.iterdir()) == []
