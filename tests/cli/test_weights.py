"""The verb `weights`: the files that it writes, bit for bit, and what `check` says about files that
are not those."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import torch_mbv2
from torch_mbv2 import cli
from torch_mbv2.cli import models
from torch_mbv2.mobilenet import Architecture, Block
from torch_mbv2.sources import ModelInfo

SIZE = 32
FORMATS = ["text", "npz", "safetensors"]
ARCHITECTURE = Architecture(
    8, (Block(None, 8, residual=True), Block(16, 12, stride=2), Block(24, 12, residual=True)), 20, 7
)


class Shuffled(nn.Module):
    """Layers registered in another order than they run in; one runs twice, one never."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3, bias=False)
        self.second = nn.Conv2d(6, 4, (1, 3), groups=2)
        self.unused = nn.Conv2d(4, 4, 1)
        self.act = nn.PReLU()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.twice = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.twice(self.twice(self.second(x)))
        return self.head(x.mean((2, 3)))


def make(kind, dtype=torch.float32):
    if kind == "shuffled":
        torch.manual_seed(0)
        model = Shuffled()
    else:
        model = torch_mbv2.MobileNetV2.from_architecture(ARCHITECTURE)
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point():
            low = 0.5 if name.endswith("var") else -1
            value.data.uniform_(low, 1, generator=generator)
    return model.eval().to(dtype)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the verb on a model of `make` or a given one, in a folder of its own: (exit status,
    stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(action, model="mobilenet", *options, directory="w"):
        module = make(model) if isinstance(model, str) else model
        found = (module, ModelInfo("m", "of a test", True, (None, 3, SIZE, SIZE)))
        monkeypatch.setattr(models, "load_model", lambda spec: found)
        status = cli.main(["weights", action, "m", directory, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def check(run):
    """Runs `check` and returns the exit status and the rows of the JSON by their names."""

    def check(model="mobilenet", *options):
        status, out, err = run("check", model, *options, "--json", "-")
        assert "error" not in err
        result = json.loads(out)
        assert result["equal"] is (status == 0)
        return status, {row["name"]: row for row in result["tensors"]}

    return check


def parse(path):
    """A file of the text layout by the simplest of all readers."""
    return np.array([float(line) for line in path.read_text().splitlines()], np.float32)


# ---------------------------------------------------------------------------------------- export


def test_layout_of_a_whole_mobilenet(run, tmp_path):
    """52 convolutions and one linear layer, two files each, and the index."""
    assert run("export", torch_mbv2.MobileNetV2(10, width_mult=0.1).eval())[0] == 0
    written = {p.relative_to(tmp_path / "w").as_posix() for p in (tmp_path / "w").rglob("*.?")}
    layers = [*(f"conv/{i}" for i in range(52)), "gemm/0"]
    assert written == {f"{layer}.{suffix}" for layer in layers for suffix in "wb"}
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_values_are_the_network(run, tmp_path):
    """A network without batch norms that reads the text files computes what the model computes."""
    assert run("export")[0] == 0
    plain = torch_mbv2.MobileNetV2.from_architecture(
        Architecture(**vars(ARCHITECTURE) | {"norm": 0})
    )
    layers = [m for m in plain.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    names = [*(f"conv/{i}" for i in range(len(layers) - 1)), "gemm/0"]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    files = [tmp_path / "w" / f"{name}.{suffix}" for name in names for suffix in "wb"]
    torch.nn.utils.vector_to_parameters(
        torch.from_numpy(np.concatenate([parse(file) for file in files])), parameters
    )
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(plain.eval()(images), make("mobilenet")(images))


def test_order_is_that_of_execution(run, tmp_path):
    status, _, err = run("export", "shuffled")
    index = json.loads((tmp_path / "w" / "weights.json").read_text())
    assert (index["format"], index["version"]) == ("torch_mbv2 weights", 1)
    assert [tuple(entry.values()) for entry in index["tensors"]] == [
        ("conv/0.w", [6, 3, 3, 3], "float32", "first", "weight"),
        ("conv/0.b", [6], "float32", "first", "bias"),
        ("conv/1.w", [4, 3, 1, 3], "float32", "second", "weight"),
        ("conv/1.b", [4], "float32", "second", "bias"),
        ("conv/2.w", [4, 4, 1, 1], "float32", "twice", "weight"),
        ("conv/2.b", [4], "float32", "twice", "bias"),
        ("gemm/0.w", [3, 4], "float32", "head", "weight"),
        ("gemm/0.b", [3], "float32", "head", "bias"),
    ]
    assert (status, err.count("3 tensors are of no convolution")) == (0, 1)


def test_bits_and_zeros(run, tmp_path):
    """Values are in C order and bit-exact; a bias that the layer lacks is zeros."""
    run("export", "shuffled")
    model = make("shuffled")
    second = parse(tmp_path / "w" / "conv" / "1.w").reshape(4, 3, 1, 3)
    assert second.tobytes() == model.second.weight.detach().numpy().tobytes()
    assert parse(tmp_path / "w" / "gemm" / "0.b").tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip(run, check, form, dtype):
    if form == "safetensors":
        pytest.importorskip("safetensors")
    model = make("mobilenet", dtype)
    assert run("export", model, "--format", form)[0] == 0
    status, rows = check(model)
    assert (status, {row["status"] for row in rows.values()}) == (0, {"equal"})
    assert {row["dtype"] for row in rows.values()} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip_of_every_float16(run, check, form):
    """Subnormals, both zeros, infinities and NaN included."""
    if form == "safetensors":
        pytest.importorskip("safetensors")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 22, bias=False)).half()
    model[1].weight.data.flatten()[: len(every)] = every
    model[1].weight.data.flatten()[len(every) :] = 0
    run("export", model, "--format", form)
    status, rows = check(model)
    assert (status, rows["gemm/0.w"]["differ"]) == (0, 0)


def test_tables(run):
    out = run("export")[1]
    assert "conv/0.w 8x3x3x3 float32 features.0.0 conv/0.b 8 float32 " in " ".join(out.split())
    assert "22 tensors as text in w" in out
    assert "22 tensors are equal, 0 are not" in run("check")[1]


def test_onnx_file(tmp_path, monkeypatch, capsys):
    onnx_helpers = pytest.importorskip("onnx_helpers")
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    exported = onnx_helpers.export(make("mobilenet"), torch.randn(1, 3, SIZE, SIZE))
    (tmp_path / "m.onnx").write_bytes(exported.SerializeToString())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["weights", "export", "m.onnx", "w"]) == 0
    assert cli.main(["weights", "check", "m.onnx", "w"]) == 0
    assert "conv/9.b" in capsys.readouterr().out


# --------------------------------------------------------------------------------- never half done


@pytest.mark.parametrize("earlier", ["nothing", "an empty folder", "an export"])
def test_failure_leaves_all_as_it_was(run, check, tmp_path, monkeypatch, earlier):
    if earlier == "an empty folder":
        (tmp_path / "w").mkdir()
    if earlier == "an export":
        run("export", "shuffled")
    before = sorted(tmp_path.rglob("*"))
    savetxt = np.savetxt

    def fail(path, *args, **options):
        if path.name == "3.w":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        savetxt(path, *args, **options)

    monkeypatch.setattr(np, "savetxt", fail)
    status, out, err = run("export", "mobilenet", "--force")
    assert (status, out) == (2, "")
    assert err == "torch-mbv2: error: w: cannot be written: No space left on device\n"
    assert sorted(tmp_path.rglob("*")) == before
    if earlier == "an export":
        assert check("shuffled")[0] == 0


@pytest.mark.parametrize("form", ["text", "npz"])
def test_force_replaces_an_export(run, check, tmp_path, form):
    run("export", "mobilenet", "--format", form)
    assert run("export", "shuffled", "--force")[0] == 0
    status, rows = check("shuffled")
    assert (status, len(rows)) == (0, 8)
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [
        "conv",
        "gemm",
        "weights.json",
    ]


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda w: (w.mkdir(), (w / "a").touch()), [], "w: is not empty; give another folder, or"),
        (lambda w: (w.mkdir(), (w / "a").touch()), ["--force"], "w: holds 'a', which no export"),
        (lambda w: (w / "conv" / "x").mkdir(parents=True), ["--force"], "w: holds 'conv/x', which"),
        (
            lambda w: (w.mkdir(), (w / "conv").symlink_to("/")),
            ["--force"],
            "w: holds 'conv', which",
        ),
        (lambda w: w.touch(), ["--force"], "w: is not a directory"),
    ],
)
def test_export_overwrites_nothing(run, tmp_path, prepare, options, message):
    prepare(tmp_path / "w")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run("export", "mobilenet", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("export m no/w", "no/w: there is no directory"),
        ("export m .", ".: an export makes its folder anew"),
        ("check m w", "w: no such folder"),
        ("check m . --format npz", "weights.npz: no such file"),
        ("check m . --force", "--force: check writes nothing"),
        ("export m w --format csv", "--format: invalid choice: 'csv'"),
        ("burn m w", "invalid choice: 'burn'"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, argv, message):
    found = (make("mobilenet"), ModelInfo("m", "of a test", True, (None, 3, SIZE, SIZE)))
    monkeypatch.setattr(models, "load_model", lambda spec: found)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["weights", *argv.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_model_without_weights(run):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    status, _, err = run("export", model)
    assert (status, err) == (
        2,
        "torch-mbv2: error: m: the model runs no convolution or linear layer to export\n",
    )


@pytest.mark.parametrize("action", ["export", "check"])
def test_safetensors_is_optional(run, tmp_path, monkeypatch, action):
    if action == "check":
        (tmp_path / "w").mkdir()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    status, _, err = run(action, "mobilenet", "--format", "safetensors")
    assert (status, err.count("\n")) == (2, 1)
    assert "needs the package safetensors: pip install safetensors" in err


# ----------------------------------------------------------------------------------------- check


def test_random_weights_are_noted(run, monkeypatch, capsys):
    run("export")
    info = ModelInfo("m", "random, seed 0", False, (None, 3, SIZE, SIZE))
    monkeypatch.setattr(models, "load_model", lambda spec: (make("mobilenet"), info))
    assert cli.main(["weights", "check", "m", "w"]) == 0
    assert capsys.readouterr().err == "torch-mbv2: note: the weights are random, seed 0\n"


def test_text_without_the_index(run, check, tmp_path):
    """As programs other than this one write it."""
    run("export")
    (tmp_path / "w" / "weights.json").unlink()
    assert check()[0] == 0


def replace_line(number, text):
    def change(path):
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n")

    return change


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        (replace_line(3, "abc"), "unreadable", "conv/1.b:3: not one number: 'abc'"),
        (replace_line(3, "1 2"), "unreadable", "conv/1.b:3: not one number: '1 2'"),
        (replace_line(3, "1_0"), "unreadable", "conv/1.b:3: not one number: '1_0'"),
        (replace_line(4, "\n\n1,"), "unreadable", "conv/1.b:6: not one number: '1,'"),
        (replace_line(8, "1\n2"), "wrong shape", "conv/1.b has 9 values, (8,) are 8"),
        (replace_line(8, ""), "wrong shape", "conv/1.b has 7 values, (8,) are 8"),
        (lambda path: path.write_text(""), "wrong shape", "conv/1.b has 0 values, (8,) are 8"),
        (lambda path: path.write_bytes(b"\x00\xff\n"), "unreadable", "conv/1.b:1: not one number"),
        (lambda path: os.truncate(path, 2**40), "unreadable", "conv/1.b has more than 576 bytes"),
        (pipe, "unreadable", "conv/1.b is not a file"),
        (lambda path: path.unlink(), "missing", ""),
    ],
)
def test_unusable_text(run, check, tmp_path, change, status, detail):
    run("export")
    change(tmp_path / "w" / "conv" / "1.b")
    code, rows = check()
    row = rows.pop("conv/1.b")
    assert (code, row["status"], row["differ"], row["max_abs"]) == (1, status, None, None)
    assert row["detail"].startswith(detail)
    assert {row["status"] for row in rows.values()} == {"equal"}


@pytest.mark.parametrize(
    ("line", "largest"),
    [("100", 99.5), ("nan", None), ("-inf", None), ("1e999", None), ("0.50000006", 2**-24)],
)
def test_one_value_differs(run, check, tmp_path, line, largest):
    model = make("mobilenet")
    model.classifier[1].bias.data[2] = 0.5
    run("export", model)
    replace_line(3, line)(tmp_path / "w" / "gemm" / "0.b")
    status, rows = check(model)
    row = rows["gemm/0.b"]
    assert (status, row["status"], row["differ"]) == (1, "differs", 1)
    assert row["max_abs"] == largest


def test_negative_zero_is_not_zero(run, check, tmp_path):
    run("export", "shuffled")
    (tmp_path / "w" / "gemm" / "0.b").write_text("0\n-0\n0\n")
    row = check("shuffled")[1]["gemm/0.b"]
    assert (row["status"], row["differ"], row["max_abs"]) == ("differs", 1, 0)


def test_extra_files(run, check, tmp_path):
    run("export")
    (tmp_path / "w" / "conv" / "99.w").write_text("1\n")
    (tmp_path / "w" / "gemm" / "\x1b[2J").mkdir()
    status, rows = check()
    assert status == 1
    assert [name for name, row in rows.items() if row["status"] == "extra"] == [
        "conv/99.w",
        "gemm/\x1b[2J",
    ]
    assert "\x1b" not in run("check")[1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"format": "torch_mbv2 weights", "version": 2, "tensors": []}',
        b'{"format": "torch_mbv2 weights", "version": 1, "tensors": [{"name": [], "shape": []}]}',
        b'{"format": "torch_mbv2 weights", "version": 1, "tensors": [{"name": "a", "shape": 1}]}',
    ],
)
def test_unusable_index(run, check, tmp_path, content):
    run("export")
    (tmp_path / "w" / "weights.json").write_bytes(content)
    status, rows = check()
    row = rows.pop("weights.json")
    assert (status, row["status"]) == (1, "unreadable")
    assert {row["status"] for row in rows.values()} == {"equal"}


def test_other_shape_in_the_index(run, check, tmp_path):
    run("export")
    path = tmp_path / "w" / "weights.json"
    index = json.loads(path.read_text())
    index["tensors"][0]["shape"].reverse()
    path.write_text(json.dumps(index))
    status, rows = check()
    row = rows["conv/0.w"]
    assert (status, row["status"]) == (1, "wrong shape")
    assert row["detail"] == "weights.json has (3, 3, 3, 8), the model (8, 3, 3, 3)"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (np.zeros((8, 3, 3, 3)), "differs"),
        (np.zeros((8, 27), np.float32), "wrong shape"),
        (np.zeros(10**5), "wrong shape"),
        (np.array([Bomb()], object), "unreadable"),
        (np.zeros((8, 3, 3, 3), np.complex64), "unreadable"),
        (np.array(["a"]), "unreadable"),
        (None, "missing"),
    ],
)
def test_unusable_npz(run, check, tmp_path, value, status):
    run("export", "mobilenet", "--format", "npz")
    path = tmp_path / "w" / "weights.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["conv/0.w"] = value
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    code, rows = check()
    assert (code, rows.pop("conv/0.w")["status"]) == (1, status)
    assert {row["status"] for row in rows.values()} == {"equal"}
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an array",
        pickle.dumps(Bomb()),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 2000,
        b"\x93NUMPY\x01\x00\x46\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,)}".ljust(69)
        + b"\n",
    ],
)
def test_hostile_array(run, check, tmp_path, content):
    run("export", "mobilenet", "--format", "npz")
    with zipfile.ZipFile(tmp_path / "w" / "weights.npz", "w") as archive:
        archive.writestr("conv/0.w.npy", content)
    code, rows = check()
    assert (code, rows["conv/0.w"]["status"]) == (1, "unreadable")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("form", ["npz", "safetensors"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"x" * 99, lambda d: d[:-9]])
def test_damaged_archive(run, tmp_path, form, damage):
    if form == "safetensors":
        pytest.importorskip("safetensors")
    run("export", "mobilenet", "--format", form)
    path = tmp_path / "w" / f"weights.{form}"
    path.write_bytes(damage(path.read_bytes()))
    status, out, err = run("check")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"weights.{form}: not a" in err


def test_unusable_safetensors(run, check, tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    run("export", "mobilenet", "--format", "safetensors")
    path = tmp_path / "w" / "weights.safetensors"
    values = torch_files.load_file(path)
    values["conv/0.w"] = values["conv/0.w"].flatten()
    values["conv/1.w"] = values["conv/1.w"] + 1
    values["conv/1.b"] = values["conv/1.b"].to(torch.complex64)
    values["conv/99.w"] = values.pop("conv/2.w")
    values["conv/2.b"] = values["conv/2.b"].view(torch.int32).view(torch.float4_e2m1fn_x2)
    torch_files.save_file(values, path)
    status, rows = check()
    wrong = {name: row["status"] for name, row in rows.items() if row["status"] != "equal"}
    assert status == 1
    assert wrong == {
        "conv/0.w": "wrong shape",
        "conv/1.w": "differs",
        "conv/1.b": "unreadable",
        "conv/2.w": "missing",
        "conv/2.b": "unreadable",
        "conv/99.w": "extra",
    }


def test_two_formats_in_one_folder(run, check, tmp_path):
    run("export")
    run("export", "mobilenet", "--format", "npz", directory="n")
    (tmp_path / "n" / "weights.npz").rename(tmp_path / "w" / "weights.npz")
    status, _, err = run("check")
    assert (status, err.count("\n")) == (2, 1)
    assert "w: holds weights as text and npz; choose one by --format" in err
    assert check("mobilenet", "--format", "npz")[0] == 0
