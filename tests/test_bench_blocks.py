"""The bench of the pieces: what it times, counts and compares, and the JSON that it writes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import torch_mbv2
from torch_mbv2 import modules
from torch_mbv2.mobilenet import Architecture, Block

ROOT = Path(__file__).resolve().parents[1]
PIECES = ["stem_block", *(f"features.{i}" for i in range(2, 18)), "conv_pool", "linear"]
FAST = ["--batches", "1", "--rounds", "1", "--min-time", "0"]
SMALL = ["--device", "cpu", "--width", "0.35", "--resolution", "32", *FAST]
TINY = [*SMALL, "--no-compile"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench_blocks():
    return load("bench_blocks")


@pytest.fixture(scope="module")
def result(bench_blocks, tmp_path_factory):
    """What a tiny run on the CPU writes."""
    file = tmp_path_factory.mktemp("bench_blocks") / "blocks.json"
    arguments = [*TINY, "--dtypes", "float32", "bfloat16", "--first-calls", "1"]
    assert bench_blocks.main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_piece_is_timed_in_order(result):
    cases = [(row["dtype"], row["piece"]) for row in result["pieces"]]
    assert cases == [(dtype, piece) for dtype in ("float32", "bfloat16") for piece in PIECES]


def test_pieces_follow_each_other(result):
    rows = [row for row in result["pieces"] if row["dtype"] == "float32"]
    assert rows[0]["input"] == [1, 3, 32, 32]
    for before, after in itertools.pairwise(rows):
        assert math.prod(after["input"]) == math.prod(before["output"])
    assert rows[-1]["output"] == [1, 1000]


def test_rates_follow_from_the_times(result):
    row = result["pieces"][-1]  # the classifier in bfloat16
    assert row["bytes"] == 2 * (1280 + 1000 + 1280 * 1000 + 1000)
    assert row["macs"] == 1280 * 1000
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    assert row["tflop_per_s"] == pytest.approx(2 * row["macs"] / row["us"] / 1e6)
    assert row["ratio"] == pytest.approx(row["stock_us"] / row["us"])
    assert row["floor_us"] is None  # there is none for a CPU


def test_totals(result):
    rows = [row for row in result["pieces"] if row["dtype"] == "float32"]
    total = result["totals"][0]
    logs = [math.log(row["ratio"]) for row in rows]
    assert total["geometric_mean"] == pytest.approx(math.exp(sum(logs) / len(logs)))
    assert total["us"] == pytest.approx(sum(row["us"] for row in rows))


def test_errors_are_roundings(result):
    assert all(row["agrees"] for row in result["pieces"])
    for row in result["pieces"]:
        unit = {"float32": 2**-24, "bfloat16": 2**-9}[row["dtype"]]
        assert 0 < row["relative_l2"] < 64 * unit


def test_network(result):
    rows = result["network"]
    names = ["patched", "patched, level op", "stock channels_last folded"]
    assert [row["contender"] for row in rows] == names * 2
    assert all(row["agrees"] for row in rows)
    assert rows[2]["ratio"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_computes_what_it_is_timed_for(bench_blocks, capsys):
    arguments = ["--no-pieces", "--first-calls", "0", "--dtypes", "float32", "--json", "-"]
    assert bench_blocks.main([*SMALL, *arguments]) == 0
    row = json.loads(capsys.readouterr().out)["network"][-1]
    assert row["contender"] == "torch.compile"
    assert row["agrees"]


@pytest.mark.cuda
def test_on_a_gpu(bench_blocks, tmp_path):
    """At full size: roundings of one image of 32x32 differ by factors between equal networks."""
    file = tmp_path / "blocks.json"
    arguments = ["--dtypes", "float16", "--first-calls", "0", "--json", str(file)]
    assert bench_blocks.main(["--device", "cuda", *FAST, *arguments]) == 0
    result = json.loads(file.read_text())
    assert [row["piece"] for row in result["pieces"]] == PIECES
    assert all(0 < row["of_floor"] < 1 for row in result["pieces"])
    names = ["patched", "patched, level op", "stock channels_last folded"]
    names += ["torch.compile", "torch.compile, one CUDA graph"]
    assert [row["contender"] for row in result["network"]] == names
    assert all(row["agrees"] for row in result["network"])
    assert all(row["peak_mib"] > 0 for row in result["memory"])


def test_folded_away_network_disagrees(bench_blocks, monkeypatch, capsys):
    """A compiler that takes the images for constants is not the fastest."""

    def compile_to_a_constant(stock, images, captured):
        logits = stock(images)
        return lambda: logits

    monkeypatch.setattr(bench_blocks, "_compile", compile_to_a_constant)
    arguments = ["--no-pieces", "--first-calls", "0", "--dtypes", "float32", "--json", "-"]
    assert bench_blocks.main([*SMALL, *arguments]) == 1
    rows = json.loads(capsys.readouterr().out)["network"]
    assert [row["contender"] for row in rows if not row["agrees"]] == ["torch.compile"]


def test_first_calls(result):
    rows = result["first_calls"]
    assert [row["contender"] for row in rows] == ["patched", "stock channels_last folded"]
    for row in rows:
        steps = ("import_torch_s", "import_s", "load_s", "patch_s", "first_forward_s")
        assert row["total_s"] == pytest.approx(sum(row[step] for step in steps), rel=0.05)


def test_result_says_where_it_is_from(result):
    assert (result["schema"], result["verb"], result["device"]) == (1, "bench_blocks", "cpu")
    assert result["environment"]["torch"] == torch.__version__
    assert result["command"].startswith("python scripts/bench_blocks.py --device cpu")
    assert result["agree"] is True
    assert result["memory"] == []  # none on a CPU


def test_multiply_adds_are_those_of_the_paper(bench_blocks):
    """300 million for width 1.0 at 224x224 (Sandler et al. 2018, table 4), multiplied out here."""
    pieces = bench_blocks.find_pieces(torch_mbv2.patch(torch_mbv2.MobileNetV2().eval()))
    x, dense, depthwise = torch.zeros(1, 3, 224, 224), 0, 0
    with torch.inference_mode():
        for piece in pieces.values():
            x = x.flatten(1) if isinstance(piece, modules.FusedLinear) else x
            y = piece(x)
            counted = bench_blocks.count_macs(piece, x, y)
            dense, depthwise, x = dense + counted[0], depthwise + counted[1], y
    assert (dense, depthwise) == (280_057_856, 20_716_416)


def test_activations_cut_on_both_sides(bench_blocks):
    model = bench_blocks.random_model(0.35, 32)
    x = model.features[:1](bench_blocks._images(32, 4))
    assert (x == 0).float().mean() > 0.05
    assert (x == 6).float().mean() > 0.01


@pytest.mark.parametrize(
    ("stride", "padding", "residual"),
    [
        (1, (1, 1, 1, 1), True),
        (1, (1, 1, 1, 1), False),
        (2, (1, 1, 1, 1), False),
        (2, (0, 1, 0, 1), False),
        (2, "same", False),
    ],
)
def test_stock_of_a_block(bench_blocks, stride, padding, residual):
    torch.manual_seed(0)
    blocks = (Block(None, 8), Block(24, 8, stride, padding, residual))
    architecture = Architecture(stem=8, blocks=blocks, last=16, num_classes=5)
    model = torch_mbv2.MobileNetV2.from_architecture(architecture).eval()
    piece = bench_blocks.find_pieces(torch_mbv2.patch(model))["features.2"]
    x = torch.randn(2, 8, 7, 9).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model.features[2](x)
        torch.testing.assert_close(bench_blocks.stock_of(piece, torch.float32)(x), expected)


def test_wrong_piece_disagrees(bench_blocks, monkeypatch, capsys):
    monkeypatch.setattr(modules.FusedConvPool, "forward", lambda _, x: x.new_ones(1, 1280, 1, 1))
    assert bench_blocks.main([*TINY, "--dtypes", "float32", "--no-network", "--json", "-"]) == 1
    rows = {row["piece"]: row for row in json.loads(capsys.readouterr().out)["pieces"]}
    assert [name for name, row in rows.items() if not row["agrees"]] == ["conv_pool"]


def test_network_that_is_only_partly_fused_is_refused(bench_blocks):
    model = torch_mbv2.MobileNetV2(width_mult=0.35).eval()
    patched = torch_mbv2.patch(model, filter_fn=lambda name, _: not name.startswith("features.3"))
    with pytest.raises(torch_mbv2.Error, match=r"features\.3"):
        bench_blocks.find_pieces(patched)


def test_bad_json_path_is_one_line(bench_blocks, tmp_path, capsys):
    assert bench_blocks.main([*TINY, "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench_blocks: error: --json")


def test_tables_and_markdown(bench_blocks, result, capsys):
    bench_blocks._print(result)
    printed = capsys.readouterr().out
    markdown = load("render_results").render(result)
    for text in (printed, markdown):
        for piece in PIECES:
            assert piece in text
    assert "| stem_block | " in markdown
    assert "width 0.35, 32x32" in markdown
    assert "| float32 | 1 | " in markdown
    assert "| fresh process, float32, one image | " in markdown
