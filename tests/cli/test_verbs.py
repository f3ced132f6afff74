"""The command line: what each verb prints and writes, its exit status, and one clear line for every
input that cannot be used."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import bench_results
import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import torch_mbv2
from torch_mbv2 import cli, sources
from torch_mbv2.cli import bench, classify, compare, images, info, models, output
from torch_mbv2.errors import Error
from torch_mbv2.measure import contenders, environment
from torch_mbv2.measure.conditions import exact_settings

CLASSES, SIZE = 7, 32


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of small models and images, usable and not."""
    onnx_helpers = pytest.importorskip("onnx_helpers")
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    folder = tmp_path_factory.mktemp("files")

    def save(name, model, *shape, **options):
        exported = onnx_helpers.export(model.eval(), torch.randn(*shape), **options)
        (folder / name).write_bytes(exported.SerializeToString())

    settings = [[1, 8, 1, 1], [6, 8, 2, 2]]
    small = torch_mbv2.MobileNetV2(CLASSES, inverted_residual_setting=settings)
    save("small.onnx", onnx_helpers.randomise(small), 1, 3, SIZE, SIZE)

    def head(channels):
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
        )

    save("batch2.onnx", head(3), 2, 3, SIZE, SIZE, dynamic_axes={})
    save("grey.onnx", head(1), 1, 1, SIZE, SIZE)
    save("vector.onnx", nn.Linear(5, 3), 1, 5)
    save("maps.onnx", nn.Conv2d(3, 4, 3), 1, 3, SIZE, SIZE)
    small_bytes = (folder / "small.onnx").read_bytes()
    (folder / "truncated.onnx").write_bytes(small_bytes[: len(small_bytes) // 2])
    (folder / "text.onnx").write_text("not a model\n" * 99)
    (folder / "empty.onnx").touch()

    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    png = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "text.jpg").write_text("not an image\n" * 99)
    (folder / "labels.txt").write_text("".join(f"name {i}\n" for i in range(CLASSES)))
    (folder / "few.txt").write_text("one\ntwo\n")
    (folder / "none.txt").touch()
    return folder


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Runs the command line inside the folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(files)

    def run(*argv):
        status = cli.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def process(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch_mbv2", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ------------------------------------------------------------------------------------- processes


def test_process_that_succeeds(files):
    done = process("classify", files / "small.onnx", files / "0.png", "--json", "-")
    out, err = done.communicate(timeout=120)
    assert (done.returncode, err) == (0, "")
    assert len(json.loads(out)["images"][0]["top"]) == 5


def test_process_that_fails(files):
    done = process("classify", files / "truncated.onnx", files / "0.png")
    out, err = done.communicate(timeout=120)
    assert (done.returncode, out) == (2, "")
    assert err.startswith("torch-mbv2: error: ")
    assert err.count("\n") == 1


def test_process_whose_reader_leaves():
    done = process("info")
    done.stdout.close()
    assert done.stderr.read() == ""
    assert done.wait(timeout=120) == 0


# ----------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("classify missing.onnx 0.png", "missing.onnx: No such file"),
        ("classify missing 0.png", "missing: no such file; a model is an ONNX file, torchvision:"),
        ("classify truncated.onnx 0.png", "truncated.onnx: not an ONNX model, or a damaged one"),
        ("classify text.onnx 0.png", "text.onnx: not an ONNX model"),
        ("classify empty.onnx 0.png", "empty.onnx: not an ONNX model, or an empty one"),
        ("classify . 0.png", ".: Is a directory"),
        ("classify vector.onnx 0.png", "vector.onnx: the model's input must be images of shape"),
        ("classify grey.onnx 0.png", "(N, 3, H, W), it is (?, 1, 32, 32)"),
        ("classify maps.onnx 0.png", "must be scores of shape (1, classes), it is float32 of"),
        ("classify small.onnx missing.png", "missing.png: no such image"),
        ("classify small.onnx truncated.png", "truncated.png: cannot be read as an image: "),
        ("classify small.onnx 0.png text.jpg", "text.jpg: cannot be read as an image: not in a"),
        ("classify small.onnx .", ".: cannot be read as an image: Is a directory"),
        ("classify small.onnx 0.png --labels missing.txt", "missing.txt: No such file"),
        ("classify small.onnx 0.png --labels few.txt", "few.txt: 2 labels, but the model has 7"),
        ("classify small.onnx 0.png --labels none.txt", "none.txt: there are no labels"),
        ("classify small.onnx 0.png --labels 0.png", "0.png: labels must be text in UTF-8"),
        ("classify small.onnx 0.png --top 0", "--top: must be a whole number from 1 up, got '0'"),
        ("classify small.onnx 0.png --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("classify small.onnx 0.png --size 99999", "--size: must be at most 4096 pixels"),
        ("classify small.onnx 0.png --tf --mean 0 0 0", "--tf is mean 0.5 and std 0.5: give it"),
        ("classify small.onnx 0.png --std 0 1 1", "--std: a standard deviation cannot be 0"),
        ("classify small.onnx 0.png --mean nan 1 1", "--mean and --std must be finite"),
        ("classify small.onnx 0.png --wrong", "unrecognized arguments: --wrong"),
        ("classify small.onnx", "the following arguments are required: IMAGE"),
        ("classify small.onnx 0.png --json no/x", "--json no/x: there is no directory no"),
        ("classify small.onnx 0.png --json .", "--json .: is a directory"),
        ("bench missing.onnx", "missing.onnx: No such file"),
        ("bench vector.onnx", "vector.onnx: the model's input must be images of shape"),
        ("bench maps.onnx --rounds 1", "the model's output must be scores of shape"),
        ("bench small.onnx --batches 1,0", "--batches: must be a whole number from 1 up, got '0'"),
        ("bench small.onnx --batches 1,x", "--batches: must be a whole number from 1 up, got 'x'"),
        ("bench small.onnx --batches 99999999999", "--batches: must be at most 2147483647"),
        ("bench small.onnx --dtypes float8", "--dtypes: must be of float32, float16, bfloat16"),
        ("bench small.onnx --min-time -1", "--min-time: must be seconds from 0 up"),
        ("bench batch2.onnx --batches 1", "--batches: the model takes batches of 2 only"),
        ("info extra", "unrecognized arguments: extra"),
        ("", "the following arguments are required: VERB"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
    ],
)
def test_bad_input(run, argv, message):
    """Exit status 2 and one line on stderr that says what is wrong; nothing on stdout."""
    status, out, err = run(*argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("torch-mbv2: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["classify small.onnx 0.png", "bench small.onnx"])
def test_no_gpu(run, monkeypatch, verb):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(*verb.split(), "--device", "cuda")
    assert (status, out) == (2, "")
    assert err == "torch-mbv2: error: --device cuda: no CUDA GPU is visible to torch\n"


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "torch-mbv2: error: not enough memory: give smaller images or batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "not enough memory: give"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (Error("two\nlines"), 2, "torch-mbv2: error: two lines"),
    ],
)
def test_what_stops_a_verb(run, monkeypatch, raised, status, message):
    def stop(args):
        raise raised

    monkeypatch.setattr(info, "run", stop)
    got, out, err = run("info")
    assert (got, out) == (status, "")
    assert message in err
    assert err.count("\n") == bool(message)


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help(run, verb):
    status, out, err = run(*verb.split(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: torch-mbv2")
    assert verb == "" or f"python -m torch_mbv2 {verb}" in out


def test_version(run):
    assert run("--version")[0] == 0


# ------------------------------------------------------------------------------------------- info


def test_info(run):
    status, out, err = run("info")
    assert (status, err) == (0, "")
    assert torch.__version__ in out
    why = torch_mbv2.why_not_available()
    assert ("can run" if why is None else f"cannot run: {why}") in out


def test_info_json(run):
    found = json.loads(run("info", "--json")[1])
    assert found["environment"]["torch"] == torch.__version__
    assert found["kernels"]["available"] == torch_mbv2.is_available()


def test_commit_of_a_copy_without_history(monkeypatch):
    monkeypatch.setattr(environment, "_stdout", lambda *command: None)
    monkeypatch.setenv("TORCH_MBV2_COMMIT", "abc")
    assert environment.commit.__wrapped__() == "abc"


# --------------------------------------------------------------------------------------- classify


def expected(files, index, mean=images.IMAGENET_MEAN, std=images.IMAGENET_STD):
    """Probabilities that the stock model finds in an image of its own size."""
    pixels = np.asarray(Image.open(files / f"{index}.png"), dtype=np.float32) / 255
    image = ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)
    with torch.inference_mode():
        return torch_mbv2.load_onnx(files / "small.onnx")(torch.from_numpy(image)[None]).softmax(1)


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("tf", [True, False])
def test_classify(run, files, stock, tf):
    flags = ["--stock"] * stock + ["--tf"] * tf
    argv = ("classify", "small.onnx", "0.png", "1.png", "--device", "cpu", "--top", "9", *flags)
    status, out, err = run(*argv, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["patched"] != stock
    assert [image["path"] for image in found["images"]] == ["0.png", "1.png"]
    for index, image in enumerate(found["images"]):
        half = (0.5, 0.5, 0.5)
        probabilities = expected(files, index, *[half, half][: 2 * tf])[0]
        assert [entry["class"] for entry in image["top"]] == probabilities.argsort(
            descending=True
        ).tolist()
        best = [entry["probability"] for entry in image["top"]]
        assert best == pytest.approx(probabilities.sort(descending=True).values.tolist(), rel=1e-4)


def test_classify_prints_a_plain_table(run, files):
    argv = ("classify", "small.onnx", "0.png", "--labels", "labels.txt", "--top", "2")
    status, out, err = run(*argv, "--device", "cpu", "--json", "found.json")
    assert (status, err) == (0, "")
    header, rule, first, second = out.splitlines()
    assert header.split() == ["image", "probability", "class", "label"]
    assert set(rule) == {"-", " "}
    probabilities = expected(files, 0)[0]
    best = int(probabilities.argmax())
    assert first.split() == ["0.png", f"{probabilities[best]:.4f}", str(best), "name", str(best)]
    assert second.startswith("0.png")
    assert out.isascii()
    written = json.loads((files / "found.json").read_text())
    assert written["images"][0]["top"][0]["label"] == f"name {best}"


@pytest.mark.parametrize(("width", "drawn"), [(80, True), (40, False)])
def test_terminal_gets_a_drawn_table_that_fits(capsys, monkeypatch, width, drawn):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    columns = [f"column {index}" for index in range(5)]
    output.print_table(columns, [[f"[cell] {index}" for index in range(5)]], numbers=columns[:2])
    out = capsys.readouterr().out
    assert ("─" in out) == drawn
    assert all(f"[cell] {index}" in out for index in range(5))


def test_classify_in_batches_of_the_only_size(run):
    """Three images through a model of two at a time: the second batch is filled up."""
    argv = ("classify", "batch2.onnx", "--device", "cpu", "--json", "-")
    together = json.loads(run(*argv, "0.png", "1.png", "2.png")[1])["images"]
    alone = json.loads(run(*argv, "2.png")[1])["images"]
    assert [image["path"] for image in together] == ["0.png", "1.png", "2.png"]
    assert together[2] == alone[0]


def test_classify_says_that_random_weights_mean_nothing(run, monkeypatch, tmp_path):
    pytest.importorskip("torchvision", reason="the extra `onnx` is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "_unreachable", lambda url: "no server in tests")
    status, out, err = run("classify", "torchvision:mobilenet_v2", "0.png", "--device", "cpu")
    assert status == 0
    assert len(out.splitlines()) == 7
    assert "note: the weights are random, seed 0" in err
    assert "no server in tests" in err


def test_scores_that_are_not_finite(run, monkeypatch):
    monkeypatch.setattr(models, "scores", lambda *_: torch.full((1, CLASSES), math.nan))
    status, _, err = run("classify", "small.onnx", "0.png", "--device", "cpu")
    assert status == 2
    assert "0.png: the model's scores are not finite in float32; try another --dtype" in err


def test_probabilities_stay_as_they_are():
    scores = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    assert torch.equal(classify.probabilities(scores), scores)
    assert torch.equal(classify.probabilities(2 * scores), (2 * scores).softmax(1))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_other_modes(tmp_path, mode):
    """All say the same: a grey image."""
    grey = Image.new("L", (6, 4), 255)
    if mode == "I;16":
        grey = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        grey = grey.convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    grey.save(path)
    image = images.read(path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.asarray(image).min() == 255


def test_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.read(tmp_path / "turned.jpg").size == (4, 6)


def test_crop_cuts_the_centre_out():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200  # the middle square
    image = Image.fromarray(pixels)
    cropped = images.Preprocessing((32, 32), crop=True).resize(image)
    stretched = images.Preprocessing((32, 32)).resize(image)
    assert np.asarray(cropped).min() == 200
    assert np.asarray(stretched).min() == 0


# ------------------------------------------------------------------------------------------ bench


QUICK = ("--device", "cpu", "--rounds", "3", "--min-time", "0")
PLAIN = ("--rivals", "eager,channels_last")


def read(path):
    """A result, checked against the schema."""
    found = json.loads(path.read_text())
    jsonschema.validate(found, bench_results.SCHEMA)
    return found


def test_bench(run, files):
    argv = ("bench", "small.onnx", "--batches", "1,3", "--dtypes", "float32,bfloat16", *QUICK)
    argv = (*argv, *PLAIN)
    status, out, _ = run(*argv, "--json", "bench.json")
    assert status == 0
    assert "DISAGREES" not in out
    assert out.isascii()
    result = read(files / "bench.json")
    assert result["command"] == f"python -m torch_mbv2 {' '.join(argv)} --json bench.json"
    assert result["agree"] is True
    assert result["model"]["input"] == [SIZE, SIZE]
    assert result["environment"]["torch"] == torch.__version__
    assert (result["clocks"], result["ceilings"], result["layers"]) == (None, None, [])
    assert [(row["dtype"], row["batch"], row["contender"]) for row in result["rows"]] == [
        (dtype, batch, contender)
        for dtype in ("float32", "bfloat16")
        for batch in (1, 3)
        for contender in ("eager", "channels_last", "patched")
    ]
    for start in range(0, len(result["rows"]), 3):
        eager, folded, patched = result["rows"][start : start + 3]
        assert (eager["agrees"], folded["agrees"], patched["agrees"]) == (None, True, True)
        assert eager["over_patched"] == pytest.approx(eager["median_ms"] / patched["median_ms"])


def test_bench_of_every_rival_says_what_is_missing(run, files, monkeypatch):
    """Nothing that is asked for goes without a word; what is here is timed."""
    monkeypatch.setattr(contenders, "_installed", lambda name: False)
    monkeypatch.setattr(contenders, "_compile_missing", lambda device: None)
    monkeypatch.setitem(
        contenders.CONTENDERS,
        "compile",
        contenders.Contender("torch.compile", contenders._eager, contenders._here),
    )
    status, out, _ = run("bench", "small.onnx", "--batches", "1", *QUICK, "--json", "all.json")
    assert status == 0
    assert "not timed: ONNX Runtime: needs the package onnxruntime and onnx: pip install" in out
    assert "not timed: TensorRT: needs a CUDA GPU" in out
    result = read(files / "all.json")
    assert [rival["name"] for rival in result["rivals"]] == list(contenders.RIVALS)
    names = [row["contender"] for row in result["rows"]]
    assert names == ["eager", "channels_last", "compile", "patched"]


class Stubborn(nn.Module):
    """Cannot be run in channels_last, or on three images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        assert len(x) != 3, "not three"
        return self.conv(x).view(len(x), -1)


@pytest.mark.parametrize("flags", [(), ("--layers",)])
def test_bench_of_a_model_that_cannot_be_patched(run, monkeypatch, flags):
    info = sources.ModelInfo("tiny", "made in the test", True)
    model = models.ImageModel(Stubborn().eval(), info, (8, 8), None)
    monkeypatch.setattr(models, "load", lambda *_: model)
    status, out, err = run("bench", "tiny", "--batches", "2", *QUICK, *PLAIN, *flags)
    assert (status, out) == (2, "")
    assert "error: the model cannot be run on float32 images of shape (" in err
    assert err.count("\n") == 1


def test_call_of_a_model_that_raises_anything():
    with pytest.raises(Error, match=r"on float32 images of shape \(3, 3, 8, 8\): not three"):
        models.call(Stubborn(), torch.zeros(3, 3, 8, 8))


def test_bench_on_a_cpu_says_nothing_of_a_gpu(run):
    status, out, _ = run("bench", "small.onnx", "--batches", "1", *QUICK, *PLAIN)
    assert status == 0
    assert "wall time" in out
    assert not re.search("TF32|cudnn|CUDA events", out)


def test_bench_json_alone(run):
    status, out, _ = run("bench", "batch2.onnx", *QUICK, *PLAIN, "--json")
    assert status == 0
    assert {row["batch"] for row in json.loads(out)["rows"]} == {2}


def test_exact_settings_are_restored():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with exact_settings():
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == (False, True)
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_bench_shows_disagreement(run, files, monkeypatch):
    """A patched model that is off by 0.1 % fails, visibly."""

    def wrong(model):
        patched = torch_mbv2.patch(model)
        patched.classifier[1].weight.data *= 1.001
        return patched

    monkeypatch.setattr(contenders, "patch", wrong)
    argv = ("bench", "small.onnx", "--batches", "2", *QUICK, *PLAIN)
    status, out, _ = run(*argv, "--json", "wrong.json")
    assert status == 1
    assert re.search(r"^DISAGREES: float32, batch 2, patched: relative L2 error \d", out, re.M)
    assert re.search(r"patched .* NO$", out, re.M)
    result = read(files / "wrong.json")
    assert result["agree"] is False
    assert [row["agrees"] for row in result["rows"]] == [None, True, False]


def test_bench_layers(run, files):
    argv = ("bench", "small.onnx", "--batches", "2", *QUICK, *PLAIN, "--layers")
    status, out, _ = run(*argv, "--json", "layers.json")
    assert status == 0
    result = read(files / "layers.json")
    assert {row["level"] for row in result["layers"]} == {"op", "block"}
    assert result["ceilings"]["bytes_per_s"] > 0
    assert len(result["layer_totals"]) == 2
    for level in ("op", "block"):
        assert f"layers at level {level}, float32, batch 2" in out


@pytest.mark.parametrize(
    ("where", "part"), [(bench, "_work"), (contenders, "patch"), (bench.layers, "bench_layers")]
)
def test_bench_of_too_large_a_batch_keeps_what_it_measured(run, files, monkeypatch, where, part):
    """Whatever lacks memory: images, the patched model or its layers."""
    function, calls = getattr(where, part), []

    def limited(*args, **options):
        calls.append(part)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return function(*args, **options)

    monkeypatch.setattr(where, part, limited)
    argv = ("bench", "small.onnx", "--batches", "1,3", *QUICK, *PLAIN, "--layers")
    status, out, err = run(*argv, "--json", "a.json", "--plot", "a.png", "--report", "page")
    assert status == 0, err
    result = read(files / "a.json")
    skipped = [(row["batch"], row["contender"]) for row in result["rows"] if "skipped" in row]
    names = {"_work": ["eager", "channels_last", "patched"], "patch": ["patched"]}.get(part, [])
    assert skipped == [(3, name) for name in names]
    for name in names:
        assert f"skipped: float32, batch 3, {name}: not enough memory" in out
    assert {row["batch"] for row in result["layers"]} == ({1, 3} if part == "patch" else {1})
    assert ("layers of float32, batch 3 are not timed" in err) == (part == "bench_layers")
    assert Image.open(files / "a.png").width > 500


def test_interrupted_bench_keeps_what_it_measured(run, files, monkeypatch):
    measure = bench.bench_network

    def interrupted(work, *args, **others):
        if len(work.images) == 2:
            raise KeyboardInterrupt
        return measure(work, *args, **others)

    monkeypatch.setattr(bench, "bench_network", interrupted)
    argv = ("bench", "small.onnx", *QUICK, *PLAIN, "--json", "new.json")
    status, out, err = run(*argv, "--batches", "1,2,3")
    assert status == 130
    assert "interrupted: 1 of 3 cases were measured" in err
    assert "patched" in out
    assert {row["batch"] for row in read(files / "new.json")["rows"]} == {1}
    (files / "new.json").unlink()
    assert run(*argv, "--batches", "2,1") == (130, "", "")
    assert not (files / "new.json").exists()


def test_bench_of_only_too_large_batches(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(bench, "_work", fail)
    status, out, err = run("bench", "small.onnx", "--batches", "7,9", *QUICK, *PLAIN)
    assert (status, out) == (2, "")
    assert "the patched model has not enough memory for any of these batch sizes: 7, 9" in err


def test_bench_pictures_and_page(run, files):
    argv = ("bench", "small.onnx", "--batches", "1,2", *QUICK, *PLAIN, "--layers")
    status, _, err = run(*argv, "--plot", "bench.png", "--report", "page")
    assert status == 0
    assert "wrote bench.png" in err
    assert Image.open(files / "bench.png").width > 500
    assert (files / "page" / "index.html").read_text().startswith("<!DOCTYPE html>")


def test_bench_against_a_baseline(run, files):
    """A run is slower than one that was a hundred times as fast, and not than one as slow."""
    argv = ("bench", "small.onnx", "--batches", "1", *QUICK, *PLAIN)
    assert run(*argv, "--json", "old.json")[0] == 0

    def against(factor):
        """The exit status, and how many rows fail, if the old times of `patched` had been so."""
        old = read(files / "old.json")
        for row in old["rows"]:
            if row["contender"] == "patched":
                for key in ("median_ms", "p10_ms", "p90_ms"):
                    row[key] *= factor
        (files / "scaled.json").write_text(json.dumps(old))
        status, _, _ = run(*argv, "--baseline", "scaled.json", "--json", "new.json")
        return status, read(files / "new.json")["baseline"]["slower"]

    assert against(0.01) == (1, 1)
    assert against(100) == (0, 0)


def test_bench_of_another_model_is_refused_before_any_work(run, files, monkeypatch):
    argv = ("bench", "small.onnx", "--batches", "1", *QUICK, *PLAIN)
    assert run(*argv, "--json", "mine.json")[0] == 0
    other = read(files / "mine.json")
    other["model"]["name"] = "theirs"
    (files / "theirs.json").write_text(json.dumps(other))
    monkeypatch.setattr(bench, "bench_network", lambda *_, **__: pytest.fail("work was done"))
    status, out, err = run(*argv, "--baseline", "theirs.json")
    assert (status, out) == (2, "")
    assert "model is small.onnx now and theirs in theirs.json" in err


def test_bench_without_a_row_in_common_keeps_what_it_measured(run, files):
    argv = ("bench", "small.onnx", *QUICK, *PLAIN)
    assert run(*argv, "--batches", "1", "--json", "one.json")[0] == 0
    more = ("--batches", "2", "--baseline", "one.json", "--json", "two.json")
    status, out, err = run(*argv, *more)
    assert status == 2
    assert "have nothing in common" in err
    assert "patched" in out
    assert "baseline" not in read(files / "two.json")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rivals eager,theirs", "--rivals: must be of eager, channels_last, cudagraph, compile"),
        ("--plot nowhere/a.png", "nowhere"),
        ("--plot a.txt", "a.txt"),
        ("--json both.png --plot both.png", "--json both.png: --plot writes to this file, too"),
        ("--json a-roofline.png --plot a.png", "a-roofline.png: --plot writes to this file, too"),
        ("--json index.html --report .", "--json index.html: --report writes to this file, too"),
        ("--report text.jpg", "text.jpg"),
        ("--baseline missing.json", "missing.json: No such file"),
        ("--baseline labels.txt", "labels.txt: must be JSON"),
    ],
)
def test_bench_refuses_before_any_work(run, monkeypatch, argv, message):
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("work was done"))
    status, out, err = run("bench", "small.onnx", *argv.split())
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.cuda
def test_bench_on_a_gpu(run, files):
    argv = ("bench", "small.onnx", "--batches", "1,5", "--dtypes", "float32,float16")
    rivals = ("--rivals", "eager,channels_last,cudagraph")
    status, out, _ = run(
        *argv, *rivals, "--layers", "--rounds", "3", "--min-time", "0", "--json", "gpu.json"
    )
    assert status == 0, out
    result = json.loads((files / "gpu.json").read_text())
    names = ["eager", "channels_last", "cudagraph", "patched", "patched_cudagraph"]
    assert [row["contender"] for row in result["rows"]] == names * 4
    assert all(row["agrees"] in (None, True) and "skipped" not in row for row in result["rows"])
    assert all(row["peak_mib"] > 0 for row in result["rows"])
    assert result["clocks"]["sm_mhz"] > 0


# ----------------------------------------------------------------------------------------- output


def test_json_has_no_nan(capsys):
    output.emit("-", {"rows": [{"ratio": math.nan, "n": 1}], "x": (math.inf,)}, lambda: None)
    assert json.loads(capsys.readouterr().out) == {"rows": [{"ratio": None, "n": 1}], "x": [None]}


def test_progress_goes_to_stderr(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.progress("working", 2) as advance:
        advance("first")
        advance("second")
    assert "second" in terminal.getvalue()


# ------------------------------------------------------------------------------------------- demo


@pytest.fixture
def demo(files, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    path = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(files)
    monkeypatch.setattr(module, "EXPORTS", files / "exports")
    return module


def rivals(out):
    """The lines of the table of `compare`."""
    lines = [line for line in out.splitlines() if line.startswith(("stock  ", "onnxruntime  "))]
    assert len(lines) == 2
    return lines


def test_demo(demo, capsys):
    assert demo.main(["small.onnx", "0.png", "1.png", "--labels", "labels.txt"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in rivals(captured.out)] == ["stock", "onnxruntime"]
    assert captured.out.count("0.png") == captured.out.count("1.png") == 3


def test_demo_of_a_model_that_is_not_a_file(demo, files, capsys, monkeypatch):
    """It goes to ONNX and back."""
    small = torch_mbv2.load_onnx(files / "small.onnx")
    found = sources.ModelInfo("small", "some", True, (None, 3, SIZE, SIZE))
    load = sources.load_model
    monkeypatch.setattr(
        models,
        "load_model",
        lambda spec: (small, found) if spec.startswith("timm:") else load(spec),
    )
    assert demo.main(["timm:small"]) == 0
    assert (files / "exports" / "small.onnx").is_file()
    assert all(line.endswith("yes") for line in rivals(capsys.readouterr().out))


def test_demo_fails_where_models_disagree(demo, capsys, monkeypatch):
    def wrong(model, **options):
        patched = patch(model, **options)
        patched.classifier[1].bias.data += 1e-3
        return patched

    patch = torch_mbv2.patch
    monkeypatch.setattr(compare, "patch", wrong)
    assert demo.main(["small.onnx"]) == 1
    assert all(line.endswith("NO") for line in rivals(capsys.readouterr().out))


@pytest.mark.parametrize("argv", [["text.onnx"], ["missing.onnx"], ["small.onnx", "text.jpg"]])
def test_demo_of_bad_input(demo, capsys, argv):
    assert demo.main(argv) == 2
    assert f": error: {argv[-1]}: " in capsys.readouterr().err
