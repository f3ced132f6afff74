"""The README's tables and pictures come from the JSON that `bench` writes, losses included."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import bench_results
import pytest
from PIL import Image

from torch_mbv2.measure import figures

ROOT = Path(__file__).resolve().parents[2]
DASH = "\N{EN DASH}"
ON_CPU = ("eager", "channels_last", "compile", "onnxruntime", "patched")


@pytest.fixture(scope="module")
def render_results(load_script):
    return load_script("render_results")


@pytest.fixture
def render(render_results):
    """What the README says of a result; without pictures, unless these are given."""
    return lambda result, shown=None: render_results.render_part(result, shown or {}, "x.md")


@pytest.fixture
def render_page(render_results):
    """The page of a result; without pictures, unless these are given."""
    return lambda result, shown=None: render_results.render_page(result, shown or {}, "x.json")


def on_cpu(**others):
    """A result on a CPU, where there are no graphs and no heuristic."""
    rows = [
        bench_results.row(name, "float32", peak_mib=None, over_patched_cudagraph=None)
        for name in ON_CPU
    ]
    return bench_results.result(layers=False, device="cpu", clocks=None, rows=rows) | others


def with_rows(*rows, **others):
    """A result on a GPU with these rows and no layers."""
    return bench_results.result(layers=False, rows=list(rows), **others)


def table(text, first):
    """The table in Markdown whose header starts with the column `first`, if it is the only one:
    its header, and its lines."""
    lines = text.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first} |")]
    end = next(i for i in range(start, len(lines) + 1) if i == len(lines) or not lines[i])
    header, rule, *body = ([cell.strip() for cell in cells(line)] for line in lines[start:end])
    assert set("".join(rule)) == {"-", ":"}
    assert all(len(line) == len(header) == len(rule) for line in body)
    return header, body


def cells(line):
    assert line.startswith("|")
    assert line.endswith("|")
    return line[1:-1].split("|")


def network(text):
    """The table of the network, a dictionary a row."""
    header, body = table(text, "dtype | batch")
    return [dict(zip(header, line, strict=True)) for line in body]


def folded(text, summary):
    """What is inside the <details> with this summary."""
    (found,) = (part for part in text.split("<details>") if f"<summary>{summary}<" in part)
    return found.partition("</details>")[0].partition("</summary>")[2]


def section(text, heading):
    """What is below this heading and above the next one."""
    lines = text.splitlines()
    start = lines.index(heading) + 1
    ends = [i for i in range(start, len(lines)) if lines[i].startswith("#")]
    return "\n".join(lines[start : min(ends, default=len(lines))])


# --------------------------------------------------------------------------------------- network


def test_network_on_a_gpu(render):
    """Called rivals against calls, the others against our graph: each base is used in its place."""
    rows = [
        bench_results.row(
            name,
            batch=4,
            ms=2.0,
            p10_ms=1.5,
            p90_ms=2.25,
            images_per_s=2000.4,
            over_patched=3.0,
            over_patched_cudagraph=5.0,
        )
        for name in bench_results.TITLES
    ]
    assert network(render(with_rows(*rows))) == [
        {
            "dtype": "float16",
            "batch": "4",
            "patched, CUDA graph: ms": f"2.000 (1.500{DASH}2.250)",
            "img/s": "2000",
            "eager": "3.00x",
            "channels_last, norms folded": "3.00x",
            "channels_last, norms folded, CUDA graph": "5.00x",
            "torch.compile": "3.00x",
            "torch.compile, CUDA graph": "5.00x",
            "ONNX Runtime": "5.00x",
            "TensorRT": "5.00x",
            "agrees": "yes: error 1.0e-03, 1.10 of stock's",
        }
    ]


def test_network_on_a_cpu(render):
    text = render(on_cpu())
    (row,) = network(text)
    assert row["patched: ms"].startswith("0.425 (")
    assert row["img/s"] == "2353"
    assert [row[bench_results.TITLES[name]] for name in ON_CPU[:-1]] == [
        "8.50x",
        "6.00x",
        "0.87x",
        "1.25x",
    ]
    assert "CUDA graph" not in text.partition("Missing")[0]


def test_rows_are_in_order(render):
    rows = network(render(bench_results.result(dtypes=("float32", "float16"), batches=(8, 1))))
    assert [(row["dtype"], row["batch"]) for row in rows] == [
        ("float32", "8"),
        ("float32", "1"),
        ("float16", "8"),
        ("float16", "1"),
    ]


def test_loss_is_shown(render):
    rival = bench_results.row("compile_cudagraph", over_patched_cudagraph=0.5)
    (row,) = network(render(with_rows(rival, bench_results.row("patched_cudagraph"))))
    assert row["torch.compile, CUDA graph"] == "0.50x"


@pytest.mark.parametrize(
    ("others", "cell"),
    [
        ({"agrees": False}, "**NO**: error 1.0e-03, 1.10 of stock's"),
        ({"agrees": False, "top1_differs": 2}, "1.10 of stock's, top-1 of 2 images"),
        ({"agrees": False, "relative_l2": None, "error_ratio": None}, "**NO**: not finite"),
    ],
)
def test_disagreement_is_shown(render, others, cell):
    (row,) = network(render(with_rows(bench_results.row("patched_cudagraph", **others))))
    assert row["agrees"].endswith(cell)


def test_disagreement_of_a_rival_is_shown(render):
    rival = bench_results.row("compile", agrees=False)
    (row,) = network(render(with_rows(rival, bench_results.row("patched_cudagraph"))))
    assert row["torch.compile"] == "0.87x (**disagrees**)"


def test_skipped_patched_model_is_shown(render):
    """What is measured against it has nothing to be compared with."""
    rival = bench_results.row("compile_cudagraph", over_patched_cudagraph=None)
    skipped = bench_results.skipped("patched_cudagraph", "cannot be captured: why")
    text = render(with_rows(rival, bench_results.row("patched"), skipped))
    (row,) = network(text)
    assert row["patched, CUDA graph: ms"] == "skipped"
    assert row["img/s"] == ""
    assert row["torch.compile, CUDA graph"] == DASH
    assert row["agrees"] == "skipped: cannot be captured: why"
    assert text.count("why") == 1


def test_skipped_rival_has_its_reason_once(render):
    """A rival that ran nowhere has no column, but its reason."""
    rows = []
    for dtype, batch in (("float16", 1), ("bfloat16", 1), ("bfloat16", 8)):
        rows += [
            bench_results.row("patched_cudagraph", dtype, batch),
            bench_results.skipped("compile", "no compiler", dtype, batch),
            bench_results.row("onnxruntime", dtype, batch)
            if dtype == "float16"
            else bench_results.skipped("onnxruntime", "no\nkernel for <a|b>", dtype, batch),
        ]
    text = render(with_rows(*rows))
    assert [row["ONNX Runtime"] for row in network(text)] == ["5.00x", DASH, DASH]
    assert "torch.compile" not in network(text)[0]
    notes = [line for line in text.splitlines() if line.startswith(DASH)]
    assert notes == [
        f"{DASH} torch.compile, float16 at batch 1 and bfloat16 at batch 1, 8: no compiler",
        f"{DASH} ONNX Runtime, bfloat16 at batch 1, 8: no kernel for &lt;a\\|b>",
    ]


def test_missing_rival_is_named_with_the_way_to_get_it(render):
    text = render(bench_results.result(layers=False))
    assert (
        "Missing on this machine: TensorRT (needs the package torch_tensorrt: "
        "pip install torch-tensorrt)." in text.splitlines()
    )
    rivals = bench_results.result()["rivals"]
    complete = bench_results.result(rivals=[rival | {"missing": None} for rival in rivals])
    assert "Missing" not in render(complete)


@pytest.mark.parametrize(
    "part",
    [
        "some_net, random weights, 224x192, on GPU 9000",
        "1980 MHz",
        "driver 600.1",
        "torch 2.99, CUDA 13.9, cuDNN 9.99",
        "commit 012345678, 2030-01-02.",
        "Medians of 20 interleaved rounds",
        "at least 20 ms",
        "TF32 off, cudnn.benchmark on; caches warm: every call reads",
    ],
)
def test_heading_on_a_gpu(render, part):
    assert part in render(bench_results.result()).splitlines()[0]


def test_heading_on_a_cpu(render):
    heading = render(on_cpu()).splitlines()[0]
    assert "on CPU 1, 2 threads; torch 2.99; commit 012345678, 2030-01-02." in heading
    assert "wall time" in heading
    assert "cudnn" not in heading


def test_heading_says_whether_weights_are_random(render):
    model = bench_results.result()["model"] | {"pretrained": True}
    assert "some_net, 224x192, on" in render(bench_results.result(model=model))


@pytest.mark.parametrize(
    ("over", "worst", "sentence"),
    [
        (0, 0.02, ""),
        (3, 0.123, "of 42 spreads, (90 % - 10 %) / median, 3 are over 5%, the worst 12%."),
        (3, None, "of 42 spreads, (90 % - 10 %) / median, 3 are over 5%."),
    ],
)
def test_noise_is_said(render, over, worst, sentence):
    noise = {"limit": 0.05, "over": over, "of": 42, "worst": worst}
    heading = render(bench_results.result(noise=noise)).splitlines()[0]
    assert sentence in heading
    assert ("Noisy" in heading) == bool(over)


def test_contenders(render_page):
    rows = [
        bench_results.row("compile", first_call_s=12.345, peak_mib=99.96, ms=0.3),
        bench_results.skipped("tensorrt", "no"),
        bench_results.skipped("onnxruntime", "no"),
        bench_results.row("patched_cudagraph", batch=8, peak_mib=None, first_call_s=0.1, ms=0.2),
        bench_results.row("patched_cudagraph", first_call_s=0.1, peak_mib=1.0, ms=0.1),
        bench_results.skipped("compile", "no", batch=8),
    ]
    heading = "### Time, first call and memory of each contender"
    assert table(section(render_page(with_rows(*rows)), heading), "dtype | batch") == (
        ["dtype", "batch", "torch.compile", "patched, CUDA graph"],
        [
            ["float16", "1", "0.300 ms, 12.35 s, 100.0 MiB", "0.100 ms, 0.10 s, 1.0 MiB"],
            ["float16", "8", DASH, "0.200 ms, 0.10 s"],
        ],
    )


def test_page_has_what_the_readme_has_and_says_where_it_is_from(render, render_page):
    result = bench_results.result()
    part, page = render(result), render_page(result)
    parts = part.split("\n\n")
    rest = "time, first call and memory of each contender, each layer."
    assert parts.pop() == f"[More of this run](x.md): {rest}"
    for paragraph in parts:
        assert f"\n\n{paragraph}\n\n" in page
    assert f"```bash\n{result['command']}\n```" in page
    assert "[x.json](x.json)" in page


# ---------------------------------------------------------------------------------------- layers


def with_layers(*layers, totals, **others):
    return bench_results.result(layer_totals=list(totals), **others) | {"layers": list(layers)}


BLOCKS = "### Each block against its stock layers"
LAYERS = "### Layer by layer: the patched model at level `op`, where nothing is fused into blocks"


def layers_of(text, case="float16, batch 1", heading=BLOCKS):
    """The table of one level, dtype and batch size."""
    return table(folded(section(text, heading), case), "layer | kernel")


def test_layers_on_a_gpu(render_page):
    numbers = {
        "stock_us": 13.0,
        "heuristic_us": 14.0,
        "ratio": 2.5,
        "heuristic_ratio": 2.69,
        "of_floor": 0.125,
        "gb_per_s": 123.4,
        "tflop_per_s": 5.67,
        "stock_of_floor": 0.05,
    }
    none = {"heuristic_us": None, "heuristic_ratio": None}
    text = render_page(
        with_layers(
            bench_results.layer("a_block", batch=32, us=50.0, **numbers),
            bench_results.layer("a_block", us=5.2, **numbers),
            bench_results.layer("pool", us=0.8, caches="warm", **none, **{"ratio": 0.75}),
            totals=[bench_results.total(), bench_results.total(batch=32)],
        )
    )
    header, body = layers_of(text)
    assert header == [
        *("layer", "kernel", "us", "stock us", "untuned us", "ratio", "untuned ratio"),
        *("GB/s", "TFLOP/s", "of floor", "stock of floor", "caches"),
    ]
    rest = ["13.0", "14.0", "2.50x", "2.69x", "123", "5.7", "0.12", "0.05", "cold"]
    assert body == [
        ["a_block", "`inverted_residual`", "5.2", *rest],
        [
            *("pool", "`inverted_residual`", "0.8", "2.4", "", "0.75x", ""),
            *("375", "62.5", "0.12", "0.04", "warm"),
        ],
    ]
    _, body = layers_of(text, "float16, batch 32")
    assert body == [["a_block", "`inverted_residual`", "50.0", *rest]]


def test_totals(render_page):
    numbers = {"us": 6.04, "stock_us": 26.0, "heuristic_us": 28.0, "geometric_mean": 2.6}
    totals = [
        bench_results.total(**numbers, heuristic_geometric_mean=2.345),
        bench_results.total("float32", 32),
        bench_results.total(level="op"),
    ]
    text = render_page(with_layers(bench_results.layer("a"), totals=totals))
    header, body = table(section(text, BLOCKS).partition("<details>")[0], "dtype | batch")
    assert header == ["dtype", "batch", "us", "stock us", "untuned us", "ratio", "untuned ratio"]
    assert body == [
        ["float16", "1", "6.0", "26.0", "28.0", "2.60x", "2.35x"],
        ["float32", "32", "25.0", "75.0", "100.0", "3.00x", "4.00x"],
    ]


def test_each_level_dtype_and_batch_size_has_a_table(render_page):
    cases = [
        {"level": level, "dtype": dtype, "batch": batch}
        for dtype in ("float16", "float32")
        for batch in (1, 8)
        for level in ("op", "block")
    ]
    layers = [bench_results.layer("-".join(map(str, case.values())), **case) for case in cases]
    totals = [bench_results.total(**case) for case in cases]
    text = render_page(with_layers(*layers, totals=totals))
    for level, heading in (("op", LAYERS), ("block", BLOCKS)):
        for dtype in ("float16", "float32"):
            for batch in (1, 8):
                _, ((name, *_),) = layers_of(text, f"{dtype}, batch {batch}", heading)
                assert name == f"{level}-{dtype}-{batch}"
    assert text.count("<details>") == text.count("</details>") == len(cases)


def test_layers_on_a_cpu(render_page):
    """Without the columns of cuDNN."""
    none = dict.fromkeys(("heuristic_us", "heuristic_ratio"))
    layer = bench_results.layer("a", caches="warm", **none)
    total = bench_results.total(heuristic_us=None, heuristic_geometric_mean=None)
    text = render_page(on_cpu(layers=[layer], layer_totals=[total]))
    header, body = layers_of(text)
    assert header[2:5] == ["us", "stock us", "ratio"]
    assert body[0][2:5] == ["5.0", "15.0", "3.00x"]
    header, body = table(section(text, BLOCKS).partition("<details>")[0], "dtype | batch")
    assert (header[2:], body[0][2:]) == (["us", "stock us", "ratio"], ["25.0", "75.0", "3.00x"])
    assert "cudnn" not in section(text, "## The layers")


def test_result_without_layers_says_nothing_of_them(render, render_page):
    result = on_cpu()
    assert "layer" not in render(result)
    assert "## The layers" not in render_page(result)


@pytest.mark.parametrize(
    ("others", "column", "cell"),
    [
        ({"agrees": False}, 2, "5.0 **DISAGREES**"),
        ({"stock_agrees": False}, 3, "15.0 (**disagrees**)"),
    ],
)
def test_layer_that_is_wrong_is_marked(render_page, others, column, cell):
    layers = [bench_results.layer("a", **others), bench_results.layer("b")]
    _, (first, second) = layers_of(
        render_page(with_layers(*layers, totals=[bench_results.total()]))
    )
    assert first[column] == cell
    assert second[2:4] == ["5.0", "15.0"]


def test_ceilings_are_said(render_page):
    speeds = {"float16": 6.75e14, "float32": 5e13}
    ceilings = {"bytes_per_s": 2.5e12, "flops_per_s": speeds}
    text = render_page(bench_results.result(ceilings=ceilings))
    assert (
        "once at 2500 GB/s or to multiply at 675 TFLOP/s (float16), 50 TFLOP/s (float32), "
        "whichever is longer" in section(text, "## The layers")
    )


def test_names_of_others_do_not_break_the_tables(render_page):
    layers = [bench_results.layer("a|b <c> *d*")]
    model = bench_results.result()["model"] | {"name": "<b>net</b>"}
    text = render_page(with_layers(*layers, totals=[bench_results.total()], model=model))
    assert "| a\\|b &lt;c> \\*d\\* | `inverted_residual` | 5.0 |" in text
    assert "\n&lt;b>net&lt;/b>, random weights, 224x192, on" in text


# -------------------------------------------------------------------------------------- pictures


def test_pictures(render, render_page):
    """The README shows the first one, the page all."""
    shown = {name: f"![{name}](x-{name}.png)" for name in ("batches", "layers", "roofline")}
    result = bench_results.result()
    for text, names in ((render(result, shown), ["batches"]), (render_page(result, shown), shown)):
        pictures = [line for line in text.splitlines() if line.startswith("![")]
        assert pictures == [shown[name] for name in names]


def test_no_picture_no_link(render, render_page):
    assert "![" not in render(bench_results.result())
    assert "![" not in render_page(bench_results.result())


# ------------------------------------------------------------------------------------- the files


class Files:
    """A README and a folder for results; `run` renders them."""

    def __init__(self, folder, render_results):
        self.readme, self.results = folder / "README.md", folder / "some" / "results"
        self.main = render_results.main

    def run(self, *argv):
        return self.main(["--readme", str(self.readme), "--results", str(self.results), *argv])


@pytest.fixture(scope="module")
def new(tmp_path_factory, render_results):
    """Makes files of which nothing is rendered."""

    def new():
        files = Files(tmp_path_factory.mktemp("files"), render_results)
        files.results.mkdir(parents=True)
        text = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
        files.readme.write_text(text, "utf-8")
        return files

    return new


@pytest.fixture
def files(new):
    return new()


def small(**others):
    return bench_results.result(dtypes=("float16",), batches=(1, 8), **others)


def write(path, result):
    path.write_text(json.dumps(result))


def test_readme_between_the_markers_is_rewritten(files):
    readme, results, run = files.readme, files.results, files.run
    write(results / "x86.json", on_cpu())
    write(results / "z9000.json", small())
    assert run("--check") == 1
    assert "old" in readme.read_text("utf-8")
    assert not list(results.glob("*.png"))
    assert run() == 0
    assert run("--check") == 0
    lines = readme.read_text("utf-8").splitlines()
    assert (lines[:3], lines[-3:]) == (
        ["before", "<!-- results -->", ""],
        ["", "<!-- /results -->", "after"],
    )
    assert "old" not in lines
    # The GPU comes first, whatever the names.
    headings = [i for i, line in enumerate(lines) if line.startswith("some_net, ")]
    assert "GPU 9000" in lines[headings[0]]
    assert "CPU 1" in lines[headings[1]]
    # Every page and picture is linked and lies where the link says.
    folder = results.relative_to(readme.parent).as_posix()
    linked = re.findall(r"\]\((.*?)\)", readme.read_text("utf-8"))
    names = ("z9000.png", "z9000.md", "x86.png", "x86.md")
    assert linked == [f"{folder}/{name}" for name in names]
    text = "".join((results / name).read_text("utf-8") for name in ("x86.md", "z9000.md"))
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(shown) == {path.name for path in results.glob("*.png")}
    assert {"x86.png", "z9000.png", "z9000-layers.png", "z9000-roofline.png"} <= set(shown)
    assert figures.digest_of_picture(results / "z9000.png") == figures.digest(small())


@pytest.fixture(scope="module")
def rendered_once(new):
    files = new()
    write(files.results / "h100.json", small())
    assert files.run() == 0
    return files


@pytest.fixture
def rendered(rendered_once, render_results, tmp_path):
    """Files that are up to date, to be changed."""
    folder = tmp_path / "files"
    shutil.copytree(rendered_once.readme.parent, folder)
    return Files(folder, render_results)


def test_check_of_what_was_rendered(rendered, capsys):
    assert rendered.run("--check") == 0
    assert capsys.readouterr() == ("", "")


def test_check_finds_a_readme_that_was_edited(rendered, capsys):
    readme, run = rendered.readme, rendered.run
    text = readme.read_text("utf-8")
    assert "8.50x" in text
    readme.write_text(text.replace("8.50x", "9.50x", 1), "utf-8")
    assert run("--check") == 1
    assert capsys.readouterr().err == f"{readme} is out of date: run scripts/render_results.py\n"


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("# Another")])
def test_check_finds_a_page_that_is_missing_or_was_edited(rendered, change, capsys):
    change(rendered.results / "h100.md")
    assert rendered.run("--check") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{rendered.results / 'h100.md'} is out of date")


def test_check_ignores_what_is_outside_the_markers(rendered):
    readme, run = rendered.readme, rendered.run
    readme.write_text(readme.read_text("utf-8").replace("after", "other words"), "utf-8")
    assert run("--check") == 0


def test_check_finds_pictures_that_are_of_another_result(rendered, capsys):
    """Here of one whose tables are the same; the page says the command."""
    results, run = rendered.results, rendered.run
    write(results / "h100.json", small(command="another"))
    assert run("--check") == 1
    out_of_date = capsys.readouterr().err
    assert out_of_date.splitlines() == [
        f"{results / name} is out of date: run scripts/render_results.py"
        for name in ("h100.png", "h100-layers.png", "h100-roofline.png", "h100.md")
    ]
    assert run() == 0
    assert run("--check") == 0


@pytest.mark.parametrize("change", [Path.unlink, lambda path: Image.new("1", (1, 1)).save(path)])
def test_check_finds_a_picture_that_is_missing_or_is_another(rendered, change, capsys):
    results, run = rendered.results, rendered.run
    change(results / "h100-layers.png")
    assert run("--check") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{results / 'h100-layers.png'} is out of date")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no *.json in it"),
        ("[", "is not JSON"),
        ('{"verb": "bench", "schema": 1}', "in schema 1 instead of 2: run bench again"),
        ('{"verb": "bench_blocks", "schema": 1}', "is by 'bench_blocks'"),
        (json.dumps(bench_results.result() | {"rows": 3}), "rows is not as bench.schema.json"),
    ],
    ids=["none", "no JSON", "older", "other verb", "invalid"],
)
@pytest.mark.parametrize("argv", [[], ["--check"]])
def test_unusable_results_are_refused_in_one_line(files, content, why, argv, capsys):
    readme, results, run = files.readme, files.results, files.run
    before = readme.read_text("utf-8")
    if content is not None:
        (results / "h100.json").write_text(content)
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"render_results: error: {results}")
    assert why in line
    assert readme.read_text("utf-8") == before


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- results -->",
        "<!-- /results --> <!-- results -->",
        "<!-- results --> <!-- results --> <!-- /results -->",
    ],
)
def test_readme_without_its_markers_is_refused(files, text, capsys):
    readme, results, run = files.readme, files.results, files.run
    write(results / "h100.json", small())
    readme.write_text(text)
    assert run() == 2
    assert f"{readme}: must have <!-- results --> and then" in capsys.readouterr().err
    assert not list(results.glob("*.png"))


def test_readme_is_up_to_date(render_results):
    assert render_results.main(["--check"]) == 0
