"""The README's tables and pictures come from the JSON that `bench` writes, losses included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bench_results
import pytest
from PIL import Image

from torch_mbv2.measure import figures

ROOT = Path(__file__).resolve().parents[1]
DASH = "\N{EN DASH}"
ON_CPU = ("eager", "channels_last", "compile", "onnxruntime", "patched")


@pytest.fixture(scope="module")
def render_results(load_script):
    return load_script("render_results")


@pytest.fixture
def render(render_results):
    """The Markdown of a result; without pictures, unless their links are given."""
    return lambda result, links=None: render_results.render(result, links or {})


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
    header, body = table(text.partition("<details>")[0], "dtype | batch")
    return [dict(zip(header, line, strict=True)) for line in body]


def folded(text, summary):
    """What is inside the <details> with this summary."""
    (found,) = (part for part in text.split("<details>") if f"<summary>{summary}<" in part)
    return found.partition("</details>")[0].partition("</summary>")[2]


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
        "some_net, 224x192, on GPU 9000",
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


def test_contenders(render):
    rows = [
        bench_results.row("compile", first_call_s=12.345, peak_mib=99.96, ms=0.3),
        bench_results.skipped("tensorrt", "no"),
        bench_results.skipped("onnxruntime", "no"),
        bench_results.row("patched_cudagraph", batch=8, peak_mib=None, first_call_s=0.1, ms=0.2),
        bench_results.row("patched_cudagraph", first_call_s=0.1, peak_mib=1.0, ms=0.1),
        bench_results.skipped("compile", "no", batch=8),
    ]
    part = folded(render(with_rows(*rows)), "Time, first call and memory of each contender")
    assert table(part, "dtype | batch") == (
        ["dtype", "batch", "torch.compile", "patched, CUDA graph"],
        [
            ["float16", "1", "0.300 ms, 12.35 s, 100.0 MiB", "0.100 ms, 0.10 s, 1.0 MiB"],
            ["float16", "8", DASH, "0.200 ms, 0.10 s"],
        ],
    )


# ---------------------------------------------------------------------------------------- layers


def with_layers(*layers, totals, **others):
    return bench_results.result(layer_totals=list(totals), **others) | {"layers": list(layers)}


BLOCKS = "Each block against its stock layers, float16"


def test_layers_on_a_gpu(render):
    numbers = {
        "stock_us": 13.0,
        "heuristic_us": 14.0,
        "ratio": 2.5,
        "of_floor": 0.125,
        "gb_per_s": 123.4,
        "tflop_per_s": 5.67,
    }
    totals = {"us": 6.0, "stock_us": 26.0, "heuristic_us": 28.0, "geometric_mean": 2.6}
    part = folded(
        render(
            with_layers(
                bench_results.layer("a_block", batch=32, us=50.0, **numbers),
                bench_results.layer("a_block", us=5.2, **numbers),
                bench_results.layer("pool", us=0.8, heuristic_us=None, **{"ratio": 0.75}),
                bench_results.layer("a_block", level="op", us=77.0),
                bench_results.layer("a_block", dtype="float32", us=78.0),
                totals=[
                    bench_results.total(**totals),
                    bench_results.total(batch=32, heuristic_geometric_mean=None, **totals),
                    bench_results.total(level="op"),
                    bench_results.total(dtype="float32"),
                ],
            )
        ),
        BLOCKS,
    )
    header, body = table(part, "layer | batch 1: us")
    group = ["stock us", "untuned us", "ratio", "of floor"]
    assert header == ["layer", "batch 1: us", *group, "batch 32: us", *group, "GB/s", "TFLOP/s"]
    first = ["13.0", "14.0", "2.50x", "0.12"]
    assert body == [
        ["a_block", "5.2", *first, "50.0", *first, "123.4", "5.7"],
        ["pool", "0.8", "2.4", "", "0.75x", "0.12", *[""] * 7],
        [
            "sum; geometric mean",
            *["6.0", "26.0", "28.0 (4.00x)", "2.60x", ""],
            *["6.0", "26.0", "28.0", "2.60x", ""],
            *["", ""],
        ],
    ]


def test_each_level_and_dtype_has_a_table(render):
    text = render(
        with_layers(
            *(
                bench_results.layer("a", dtype, level=level)
                for level in ("op", "block")
                for dtype in ("float16", "float32")
            ),
            totals=[
                bench_results.total(dtype, level=level)
                for level in ("op", "block")
                for dtype in ("float16", "float32")
            ],
        )
    )
    op = "Layer by layer: the patched model at level <code>op</code>, where nothing is fused into"
    summaries = [line for line in text.splitlines() if line.startswith("<details>")]
    assert summaries == [
        "<details><summary>Time, first call and memory of each contender</summary>",
        f"<details><summary>{BLOCKS}</summary>",
        "<details><summary>Each block against its stock layers, float32</summary>",
        f"<details><summary>{op} blocks, float16</summary>",
        f"<details><summary>{op} blocks, float32</summary>",
    ]
    assert text.count("</details>") == len(summaries)


def test_layers_on_a_cpu(render):
    none = dict.fromkeys(("heuristic_us", "heuristic_ratio"))
    layer = bench_results.layer("a", caches="warm", **none)
    total = bench_results.total(heuristic_us=None, heuristic_geometric_mean=None)
    part = folded(render(on_cpu(layers=[layer], layer_totals=[total])), BLOCKS)
    header, body = table(part, "layer | batch 1: us")
    assert header[1:5] == ["batch 1: us", "stock us", "ratio", "of floor"]
    assert body[0][:5] == ["a", "5.0", "15.0", "3.00x", "0.02"]
    assert body[1][:4] == ["sum; geometric mean", "25.0", "75.0", "3.00x"]
    assert "Caches are warm." in part
    assert "heuristic" not in part


@pytest.mark.parametrize(
    ("others", "column", "cell"),
    [
        ({"agrees": False}, 1, "5.0 **DISAGREES**"),
        ({"stock_agrees": False}, 2, "15.0 (**disagrees**)"),
        ({"caches": "warm"}, 1, "5.0 (warm)"),
    ],
)
def test_what_is_particular_about_a_layer_is_marked(render, others, column, cell):
    layers = [bench_results.layer("a", **others), bench_results.layer("b")]
    part = folded(render(with_layers(*layers, totals=[bench_results.total()])), BLOCKS)
    _, (first, second, _) = table(part, "layer | batch 1: us")
    assert first[column] == cell
    assert second[1:3] == ["5.0", "15.0"]
    mixed = "Caches are cold except where marked warm."
    assert (mixed if "caches" in others else "Caches are cold.") in part


def test_ceilings_are_said(render):
    layers, totals = [bench_results.layer("a", batch=8)], [bench_results.total(batch=8)]
    ceilings = {"bytes_per_s": 2.5e12, "flops_per_s": {"float16": 6.75e14}}
    part = folded(render(with_layers(*layers, totals=totals, ceilings=ceilings)), BLOCKS)
    assert "once at 2500 GB/s or to multiply at 675 TFLOP/s, whichever is longer" in part
    assert "GB/s and TFLOP/s are ours at batch 8." in part


def test_names_of_others_do_not_break_the_tables(render):
    layers = [bench_results.layer("a|b <c> *d*")]
    model = bench_results.result()["model"] | {"name": "<b>net</b>"}
    text = render(with_layers(*layers, totals=[bench_results.total()], model=model))
    assert "| a\\|b &lt;c> \\*d\\* | 5.0 |" in text
    assert text.startswith("&lt;b>net&lt;/b>, 224x192, on")


# -------------------------------------------------------------------------------------- pictures


def test_pictures(render):
    """The first is in sight, the others are folded away, and each says what it shows."""
    links = {name: f"d/x-{name}.png" for name in ("batches", "layers", "roofline")}
    text = render(bench_results.result(), links)
    shown, _, rest = text.partition("<details>")
    assert "\n\n![time and throughput against the batch size](d/x-batches.png)\n" in shown
    part = folded(f"<details>{rest}", "Pictures of the layers")
    roof = "FLOP/s of each layer against its FLOPs per byte, under the roof of the machine"
    assert [line for line in part.splitlines() if line] == [
        "![time of each block, stock and patched](d/x-layers.png)",
        f"![{roof}](d/x-roofline.png)",
    ]


def test_no_picture_no_link(render):
    assert "![" not in render(bench_results.result())


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
    headings = [i for i, line in enumerate(lines) if line.startswith("some_net, 224x192")]
    assert "GPU 9000" in lines[headings[0]]
    assert "CPU 1" in lines[headings[1]]
    # Every picture is linked, is one of its result, and lies where the link says.
    linked = {line.partition("](")[2][:-1] for line in lines if line.startswith("![")}
    assert linked == {path.relative_to(readme.parent).as_posix() for path in results.glob("*.png")}
    assert {Path(link).name for link in linked} >= {"x86.png", "z9000.png", "z9000-layers.png"}
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
    assert text.count("8.50x") == 2
    readme.write_text(text.replace("8.50x", "9.50x", 1), "utf-8")
    assert run("--check") == 1
    assert capsys.readouterr().err == f"{readme} is out of date: run scripts/render_results.py\n"


def test_check_ignores_what_is_outside_the_markers(rendered):
    readme, run = rendered.readme, rendered.run
    readme.write_text(readme.read_text("utf-8").replace("after", "other words"), "utf-8")
    assert run("--check") == 0


def test_check_finds_pictures_that_are_of_another_result(rendered, capsys):
    """Here of one whose tables are the same."""
    results, run = rendered.results, rendered.run
    write(results / "h100.json", small(command="another"))
    assert run("--check") == 1
    out_of_date = capsys.readouterr().err
    assert out_of_date.splitlines() == [
        f"{results / name} is out of date: run scripts/render_results.py"
        for name in ("h100.png", "h100-layers.png", "h100-roofline.png")
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
