"""The README's tables come from the JSON that `bench` writes, losses and disagreements included."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def render_results():
    spec = importlib.util.spec_from_file_location("r", ROOT / "scripts" / "render_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(contender, mode, median, **others):
    return {
        "dtype": "float16",
        "batch": 4,
        "mode": mode,
        "contender": contender,
        "median_ms": median,
        "p25_ms": median - 0.25,
        "p75_ms": median + 0.25,
        "images_per_s": 4e3 / median,
        "ratio": 2 / median,
        "relative_l2": 1e-3,
        "error_ratio": 1.1,
        "agrees": True if contender == "patched" else None,
    } | others


def result(patched, device="cuda"):
    mode = "graph" if device == "cuda" else "eager"
    stock = [row("stock", "eager", 8.0), row("stock channels_last folded", mode, 2.0)]
    return {
        "verb": "bench",
        "device": device,
        "date": "2030-01-02T03:04:05+00:00",
        "environment": {
            "gpus": [{"name": "GPU 9000"}],
            "driver": "600.1",
            "cpu": "CPU 1",
            "threads": 2,
            "torch": "2.99",
            "cuda": "13.9",
            "cudnn": "9.99",
            "commit": "0123456789abcdef+",
        },
        "settings": {"rounds": 20},
        "model": {"name": "some_net", "input": [224, 192]},
        "rows": [*stock, patched],
    }


def last_line(render_results, patched, device="cuda"):
    return render_results.render(result(patched, device)).splitlines()[-1]


def test_row(render_results):
    assert last_line(render_results, row("patched", "graph", 1.0)) == (
        "| float16 | 4 | 2.000 (1.750-2.250) | 1.000 (0.750-1.250) | 4000 | **2.00x** | 8.00x "
        "| yes: error 1.0e-03, 1.10 of stock's |"
    )


def test_loss_is_shown(render_results):
    assert "| **0.50x** | 2.00x |" in last_line(render_results, row("patched", "graph", 4.0))


@pytest.mark.parametrize(
    ("others", "cell"),
    [
        ({"agrees": False}, "| **NO**: error 1.0e-03, 1.10 of stock's |"),
        ({"agrees": False, "relative_l2": None, "error_ratio": None}, "| **NO**: not finite |"),
    ],
)
def test_disagreement_is_shown(render_results, others, cell):
    assert last_line(render_results, row("patched", "graph", 1.0, **others)).endswith(cell)


def test_skipped_is_shown(render_results):
    skipped = {key: row("patched", "graph", 1.0)[key] for key in ("dtype", "batch", "mode")}
    skipped |= {"contender": "patched", "skipped": "cannot be captured: why"}
    line = last_line(render_results, skipped)
    assert (
        line == "| float16 | 4 | 2.000 (1.750-2.250) | skipped |  |  |  | cannot be captured: why |"
    )


def test_heading(render_results):
    heading = render_results.render(result(row("patched", "graph", 1.0))).splitlines()[0]
    for part in (
        "some_net, 224x192, on GPU 9000, driver 600.1; torch 2.99",
        "CUDA 13.9, cuDNN 9.99",
    ):
        assert part in heading
    assert "commit 012345678+, 2030-01-02" in heading


def test_cpu_is_eager(render_results):
    table = render_results.render(result(row("patched", "eager", 1.0), "cpu"))
    assert "CPU 1, 2 threads" in table
    assert "graph" not in table
    assert "**2.00x**" in table


def test_readme_between_the_markers_is_rewritten(render_results, tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    argv = ["--readme", str(readme), "--results", str(results)]
    assert render_results.main(argv) == 2  # nothing to render
    (results / "a.json").write_text(json.dumps(result(row("patched", "graph", 1.0))))
    readme.write_text("before\n")
    assert render_results.main(argv) == 2  # no markers
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert render_results.main([*argv, "--check"]) == 1
    assert "old" in readme.read_text()
    assert render_results.main(argv) == 0
    assert render_results.main([*argv, "--check"]) == 0
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert any(line.startswith("| float16 |") for line in lines)


@pytest.mark.skipif(
    not list((ROOT / "scripts" / "results").glob("*.json")), reason="no results are recorded"
)
def test_readme_is_up_to_date(render_results):
    assert render_results.main(["--check"]) == 0
