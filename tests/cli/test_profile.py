"""The verb `profile`: what it prints and writes, its traces, and single layers for other tools."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_mbv2
from torch_mbv2 import cli
from torch_mbv2.cli import models, profile
from torch_mbv2.measure import profiling
from torch_mbv2.sources import ModelInfo

SETTING = [[1, 8, 1, 1], [6, 8, 2, 2]]  # with one strided block and one with an add
QUICK = ("--device", "cpu", "--iterations", "3")
BLOCK = "features.3.torch_mbv2_inverted_residual_0"


def mobilenet():
    return torch_mbv2.MobileNetV2(5, inverted_residual_setting=SETTING)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the verb on a module in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, module=None, batch=None, size=32):
        info = ModelInfo("tiny", "made in the test", True)
        model = models.ImageModel((module or mobilenet()).eval(), info, (size, size), batch)
        monkeypatch.setattr(models, "load", lambda spec, size: model)
        status = cli.main(["profile", "tiny", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def names(rows):
    """Of the layers, as the table has them."""
    found = (row["layer"].partition(".torch_mbv2_")[0] for row in rows)
    return [name.removeprefix("torch_mbv2_").removesuffix("_0") for name in found]


def validate(result):
    jsonschema = pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")
    path = Path(profiling.__file__).with_name("profile.schema.json")
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text("utf-8")))
    validator.check_schema(validator.schema)
    validator.validate(result)


def assert_adds_up(result):
    """All rows and the gaps are the time from end to end."""
    for side, total in result["totals"].items():
        rows = result["rows"]
        assert sum(row[f"{side}_us"] for row in rows) == pytest.approx(total["layers_us"])
        assert total["layers_us"] + total["gaps_us"] == pytest.approx(total["end_to_end_us"])
        assert sum(row[f"{side}_kernels"] for row in rows) == total["kernels"] > 0
        assert total["unprofiled_p10_us"] <= total["unprofiled_us"] <= total["unprofiled_p90_us"]


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


# ---------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("flags", [(), ("--dtype", "bfloat16", "--batch", "2", "--level", "op")])
def test_json(run, flags):
    status, out, err = run(*QUICK, *flags, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    validate(result)
    assert_adds_up(result)
    assert result["command"] == shlex.join(
        ["python", "-m", "torch_mbv2", "profile", "tiny", *QUICK, *flags, "--json"]
    )
    assert (result["dtype"], result["batch"]) == (("bfloat16", 2) if flags else ("float32", 1))
    layers = {row["layer"] for row in result["rows"]}
    assert (BLOCK in layers) == (result["level"] == "block")
    assert {total["idle"] for total in result["totals"].values()} == {None}
    assert all(total["gaps_us"] > 0 for total in result["totals"].values())


def test_table(run, tmp_path):
    status, out, err = run(*QUICK, "--json", "result.json")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "result.json").read_text())
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert cells(lines[header]) == [
        *("layer", "kind", "stock us", "patched us", "ratio", "stock ops", "patched ops")
    ]
    shown = lines[header + 2 : header + 2 + len(result["rows"])]
    assert [cells(line)[0] for line in shown] == names(result["rows"])
    block = next(row for row in result["rows"] if row["layer"] == BLOCK)
    assert cells(next(line for line in shown if line.startswith("features.3"))) == [
        "features.3",
        "inverted_residual, gemm + conv_depthwise + gemm + add",
        f"{block['stock_us']:.1f}",
        f"{block['patched_us']:.1f}",
        f"{block['ratio']:.2f}x",
        "9",
        str(block["patched_kernels"]),
    ]
    totals = {cells(line)[0]: cells(line)[1:3] for line in lines[header:] if line.strip()}
    for name, key in {
        "layers": "layers_us",
        "between layers (Python, profiler)": "gaps_us",
        "end to end": "end_to_end_us",
        "end to end without the profiler, median": "unprofiled_us",
    }.items():
        assert totals[name] == [f"{total[key]:.1f}" for total in result["totals"].values()]
    assert "stock: eager, in its own memory format, batch norms apart" in out
    assert out.isascii()


def test_top(run, tmp_path):
    status, out, _ = run(*QUICK, "--top", "2", "--json", "result.json")
    assert status == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    lines = out.splitlines()
    first, second, others = lines[next(i for i, x in enumerate(lines) if x[:3] == "---") + 1 :][:3]
    slowest = sorted(rows, key=lambda row: row["stock_us"])[-2:]
    shown = [row for row in rows if row in slowest]
    assert [cells(line)[0] for line in (first, second)] == names(shown)
    rest = [row for row in rows if row not in slowest]
    sums = {key: sum(row[key] for row in rest) for key in ("stock_us", "patched_us")}
    assert cells(others)[:3] == [
        f"{len(rest)} more layers",
        *(f"{value:.1f}" for value in sums.values()),
    ]
    assert cells(others)[-2:] == [
        str(sum(row[f"{side}_kernels"] for row in rest)) for side in ("stock", "patched")
    ]


def test_top_of_fewer(run):
    status, out, _ = run(*QUICK, "--top", "99")
    assert status == 0
    assert " more layer" not in out


@pytest.mark.parametrize(
    ("idle", "sentence"),
    [
        (0.83, "the GPU waits for the host 83 % of the time: use a CUDA graph, see README"),
        (0.02, "the GPU is busy 98 % of the time"),
    ],
)
def test_whether_the_gpu_waits(run, monkeypatch, tmp_path, capsys, idle, sentence):
    run(*QUICK, "--json", "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    result["device"] = "cuda"
    result["environment"] |= {"gpus": [{"name": "GPU 9000"}]}
    for total in result["totals"].values():
        total["idle"] = idle
    validate(result)
    profile._print(result, None, None)
    out = capsys.readouterr().out
    assert f"stock: without the profiler {sentence}" in out
    assert f"patched: without the profiler {sentence}" in out
    assert "host gaps (GPU idle)" in out
    assert "stock kernels" in out


def test_graph_with_a_layer_that_is_called_twice(run, tmp_path):
    """What an ONNX file becomes: a GraphModule, whose blocks stand in the place of layers."""
    onnx_helpers = pytest.importorskip("onnx_helpers")
    pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.twice = nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            x = self.first(x).sigmoid()
            return self.fc(self.twice(x + self.twice(x)).mean((2, 3)))

    exported = onnx_helpers.export(Net().eval(), torch.randn(2, 3, 32, 32))
    path = tmp_path / "net.onnx"
    path.write_bytes(exported.SerializeToString())
    status, out, _ = run(*QUICK, "--json", module=torch_mbv2.load_onnx(path))
    assert status == 0
    result = json.loads(out)
    assert_adds_up(result)
    kinds = [row["kind"] for row in result["rows"]]
    assert kinds == [
        "conv2d",
        "Sigmoid",
        "conv2d",
        "add",
        "conv2d",
        "global_avg_pool2d",
        *kinds[6:],
    ]
    assert kinds[-1] == "linear"


# ----------------------------------------------------------------------------------------- traces


def test_traces(run, tmp_path):
    status, out, _ = run(*QUICK, "--trace", "a/traces")
    assert status == 0
    assert "traces: a/traces/stock.json and a/traces/patched.json open in ui.perfetto.dev" in out
    names = {}
    for side in ("stock", "patched"):
        entries = json.loads((tmp_path / "a" / "traces" / f"{side}.json").read_text())
        names[side] = {
            entry["name"]
            for entry in entries["traceEvents"]
            if entry.get("cat") == "user_annotation"
        }
    assert {profiling.ROOT, "features.3", "features.3.conv.1.0"} <= names["stock"]
    assert {profiling.ROOT, "features.3", BLOCK} <= names["patched"]
    assert "features.3.conv.1.0" not in names["patched"]


def test_traces_replace_older_ones(run, tmp_path):
    (tmp_path / "stock.json").write_text("old")
    assert run(*QUICK, "--trace", ".")[0] == 0
    assert json.loads((tmp_path / "stock.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.touch(), "--trace x: cannot be written: File exists"),
        (lambda path: (path / "stock.json").mkdir(parents=True), "x: stock.json in it is a dir"),
    ],
)
def test_traces_in_the_way(run, monkeypatch, tmp_path, make, message):
    """Found before anything runs."""
    make(tmp_path / "x")
    monkeypatch.setattr(models.ImageModel, "to", None)
    status, out, err = run(*QUICK, "--trace", "x")
    assert (status, out) == (2, "")
    assert message in err


# ------------------------------------------------------------------------------------- one layer


def test_ncu(run):
    status, out, err = run("--ncu", BLOCK, "--dtype", "float16", "--batch", "32")
    assert (status, err) == (0, "")
    assert out == (
        f"ncu --set full --profile-from-start off --force-overwrite --export {BLOCK} python -m "
        f"torch_mbv2 profile tiny --device cuda --dtype float16 --batch 32 --alone {BLOCK}\n"
    )


def test_ncu_with_everything(run, monkeypatch):
    """Also where the GPU is somewhere else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    odd = nn.Sequential()
    odd.add_module("a conv/1", nn.Conv2d(3, 3, 1))
    flags = ("--device", "cuda", "--level", "op", "--resolution", "64")
    status, out, _ = run("--ncu", "a conv/1", *flags, module=odd, batch=3)
    assert status == 0
    words = shlex.split(out)
    assert words[words.index("--export") + 1] == "a_conv_1"
    parsed = cli._parser().parse_args(words[words.index("profile") :])
    assert (parsed.alone, parsed.batch, parsed.dtype) == ("a conv/1", 3, "float32")
    assert (parsed.level, parsed.resolution, parsed.device) == ("op", 64, "cuda")


@pytest.mark.parametrize("layer", ["features.3", BLOCK])
def test_alone(run, layer):
    status, out, err = run("--device", "cpu", "--batch", "2", "--alone", layer)
    assert (status, err) == (0, "")
    assert out == f"{layer}: ran alone on float32 (2, 8, 8, 8), on cpu\n"


# ----------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ncu features.9", "--ncu: the patched model has no layer features.9; it has features."),
        ("--alone xyz", "--alone: the patched model has no layer xyz; it has features.2.torch_"),
        ("--ncu features.3.conv.2", f"features.3.conv.2 is a part of {BLOCK} in the patched model"),
        ("--ncu x --alone y", "argument --alone: not allowed with argument --ncu"),
        ("--ncu x --trace y", "not allowed with argument"),
        ("--ncu features.3 --json", "--json: --ncu and --alone have no results to write"),
        ("--alone features.3 --json x", "--json: --ncu and --alone have no results to write"),
        ("--iterations 0", "--iterations: must be a whole number from 1 up, got '0'"),
        ("--top x", "--top: must be a whole number from 1 up, got 'x'"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--level all", "--level: invalid choice: 'all'"),
        ("--batch 3", "--batch: the model takes batches of 2 only"),
    ],
)
def test_bad_input(run, flags, message):
    status, out, err = run(*flags.split(), batch=2)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_no_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run("--device", "cuda")
    assert (status, out) == (2, "")
    assert err == "torch-mbv2: error: --device cuda: no CUDA GPU is visible to torch\n"


def test_json_in_the_place_of_a_trace(run):
    status, out, err = run("--device", "cpu", "--trace", "t", "--json", "t/stock.json")
    assert (status, out) == (2, "")
    assert "--json t/stock.json: " in err


@pytest.mark.parametrize("flags", [(), ("--alone", "0")])
def test_model_that_cannot_run(run, flags):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5))
    status, out, err = run(*QUICK, *flags, module=model)
    assert (status, out) == (2, "")
    assert "the model cannot be run on float32 images of shape (1, 3, 32, 32)" in err


def test_help(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "python -m torch_mbv2 profile torchvision:mobilenet_v2" in out


# -------------------------------------------------------------------------------------------- GPU


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("level", ["op", "block"])
def test_on_a_gpu(run, tmp_path, level, batch):
    flags = ("--device", "cuda", "--dtype", "float16", "--level", level, "--batch", str(batch))
    status, out, err = run(*flags, "--json", "result.json", "--trace", ".")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "result.json").read_text())
    validate(result)
    assert_adds_up(result)
    assert out.count("without the profiler the GPU") == 2
    rows = {row["layer"]: row for row in result["rows"]}
    patched = {name: row for name, row in rows.items() if row["kernel"] is not None}
    model = torch_mbv2.patch(mobilenet().eval(), level=level)
    assert set(patched) == {row.name for row in torch_mbv2.report(model).patched}
    assert set(rows) == set(patched)  # what is stock in both launches nothing
    assert all(row["stock_us"] > 0 and row["patched_us"] > 0 for row in rows.values())
    for row in rows.values() if level == "block" else ():
        if row["kernel"] != "gemm":
            assert row["patched_kernels"] == 1, row
            assert row["stock_kernels"] > 1, row
    for total in result["totals"].values():
        assert total["gaps_us"] >= 0
        assert total["runs"] >= 5
        assert 0 <= total["idle"] < 1
    entries = json.loads((tmp_path / "patched.json").read_text())["traceEvents"]
    assert any(entry.get("name", "").startswith("torch_mbv2::") for entry in entries)


@pytest.mark.cuda
def test_busy_gpu(run):
    """The layers of a batch that keeps a GPU busy take as long as all without the profiler."""
    flags = ("--device", "cuda", "--dtype", "float16", "--batch", "512")
    status, out, _ = run(*flags, "--json", module=torch_mbv2.MobileNetV2(), size=224)
    assert status == 0
    for total in json.loads(out)["totals"].values():
        assert total["layers_us"] == pytest.approx(total["unprofiled_us"], rel=0.05)


@pytest.mark.cuda
def test_alone_on_a_gpu(run):
    status, out, _ = run("--device", "cuda", "--dtype", "float16", "--alone", BLOCK)
    assert status == 0
    assert out == f"{BLOCK}: ran alone on float16 (1, 8, 8, 8), on cuda\n"
