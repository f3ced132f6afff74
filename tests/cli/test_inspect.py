"""The verb `inspect`: operators, parameters, multiply-adds and bytes against published numbers,
torch's FLOP counter and sums by hand, and what the verb prints and writes."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import torch_mbv2
from torch_mbv2 import cli
from torch_mbv2.cli import models
from torch_mbv2.cli.inspect import operators
from torch_mbv2.mobilenet import Architecture, Block
from torch_mbv2.sources import ModelInfo

SETTING = [[1, 8, 1, 1], [6, 8, 2, 2]]  # with one strided block and one with an add


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Runs the verb on a module: (exit status, stdout, stderr)."""

    def run(module, *flags, size=32, batch=None):
        info = ModelInfo("tiny", "made in the test", True)
        model = models.ImageModel(module.eval(), info, (size, size), batch)
        monkeypatch.setattr(models, "load", lambda spec, size: model)
        status = cli.main(["inspect", "tiny", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def found(inspect):
    """Runs the verb on a module: what it writes as JSON, with the rows by name and operator."""

    def run(module, *flags, **options):
        status, out, _ = inspect(module, *flags, "--json", "-", **options)
        assert status == 0
        return json.loads(out)

    return run


def traffic(result):
    return {row["way"]: row["bytes"] for row in result["traffic"]}


def fates(result, operator):
    """What becomes of the rows of one operator, in order."""
    return [
        row["kernel"] or (row["stock"] and "stock") or row["folded_into"]
        for row in result["layers"]
        if row["operator"] == operator
    ]


def mobilenet(**options):
    return torch_mbv2.MobileNetV2(5, inverted_residual_setting=SETTING, **options)


# ---------------------------------------------------------------------------------- ground truth


def test_published_numbers_of_mobilenet_v2(found):
    """Sandler et al. 2018, table 4, and torchvision's documentation: 3.50 M parameters and 300.8 M
    multiply-adds."""
    result = found(torch_mbv2.MobileNetV2(), size=224)
    assert result["parameters"] == 3_504_872
    assert result["macs"] == 300_774_272
    assert result["operators"] == {
        "Conv2d": 52,
        "BatchNorm2d": 52,
        "ReLU6": 35,
        "add": 10,
        "global average pool": 1,
        "Flatten": 1,
        "Linear": 1,
    }
    assert result["convolutions"] == {"dense": 1, "depthwise": 17, "pointwise": 34}
    assert sum(row["macs"] for row in result["layers"]) == result["macs"]
    assert sum(row["parameters"] for row in result["layers"]) == result["parameters"]
    assert fates(result, "Conv2d") == (
        ["torch_mbv2_stem_block_0"] * 3
        + [f"features.{i}.torch_mbv2_inverted_residual_0" for i in range(2, 18) for _ in range(3)]
        + ["torch_mbv2_conv_pool_0"]
    )
    assert fates(result, "add") == [
        f"features.{i}.torch_mbv2_inverted_residual_0" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
    ]
    assert fates(result, "global average pool") == ["torch_mbv2_conv_pool_0"]
    assert fates(result, "Linear") == ["gemm"]


def test_folded_norms_are_no_operators(found):
    blocks = (Block(None, 16), Block(96, 16, 2, "same"), Block(96, 16, residual=True))
    architecture = Architecture(32, blocks, 64, 5, stem_padding="same", norm=False)
    result = found(torch_mbv2.MobileNetV2.from_architecture(architecture))
    assert result["operators"] == {
        "Conv2d": 10,
        "ReLU6": 7,
        "pad": 2,
        "add": 1,
        "global average pool": 1,
        "Flatten": 1,
        "Linear": 1,
    }
    text = result["model"]["architecture"]
    assert text.startswith("stem of 32 channels, 3 inverted residuals (1 with an add), 64 channels")
    assert text.endswith("5 classes; relu6; batch norms folded; SAME padding")


def zoo(name):
    source, name = name.split(":")
    if source == "torchvision":
        library = pytest.importorskip("torchvision", reason="the extra `onnx` is not installed")
        return library.models.get_model(name).eval()
    library = pytest.importorskip("timm", reason="the extra `test` is not installed")
    return library.create_model(name).eval()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("torchvision:mobilenet_v2", {"Conv2d": 52, "ReLU6": 35, "add": 10}),
        ("torchvision:resnet18", {"Conv2d": 20, "ReLU": 17, "add": 8, "MaxPool2d": 1}),
        ("torchvision:mobilenet_v3_small", {"Conv2d": 52, "Hardswish": 19, "mul": 9, "add": 6}),
        ("torchvision:efficientnet_b0", {"Conv2d": 81, "SiLU": 49, "Sigmoid": 16, "add": 9}),
        ("torchvision:shufflenet_v2_x0_5", {"Conv2d": 56, "ReLU": 37, "cat": 16, "chunk": 13}),
        ("timm:mobilenetv2_100", {"Conv2d": 52, "BatchNorm2d": 52, "ReLU6": 35, "add": 10}),
        ("timm:tf_mobilenetv3_small_100", {"Conv2d": 53, "BatchNorm2d": 34, "pad": 5, "add": 6}),
    ],
)
def test_multiply_adds_are_those_of_the_flop_counter(name, counts):
    model = zoo(name)
    rows = operators(model, (2, 3, 64, 72), torch.float32)
    model.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(2, 3, 64, 72, device="meta"))
    assert 2 * sum(row.macs for row in rows) == counter.get_total_flops()
    by_module = counter.get_flop_counts()
    root = type(model).__name__
    for row in (row for row in rows if row.operator == "Conv2d"):
        assert [2 * row.macs] == list(by_module[f"{root}.{row.name}"].values())
    assert {key: Counter(row.operator for row in rows)[key] for key in counts} == counts


def test_bytes_of_a_chain_by_hand(found):
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8, 5),
    )
    result = found(chain, "--batch", "2", "--dtype", "float16", size=10)
    image, maps, weight, linear = 2 * 3 * 10 * 10, 2 * 8 * 5 * 5, 8 * 3 * 9, 8 * 5 + 5
    assert [(row["name"], row["operator"], row["bytes"]) for row in result["layers"]] == [
        ("0", "Conv2d", 2 * (image + weight + maps)),
        ("1", "BatchNorm2d", 2 * (maps + 4 * 8 + maps)),
        ("2", "ReLU6", 2 * (maps + maps)),
        ("3", "global average pool", 2 * (maps + 2 * 8)),
        ("4", "Flatten", 0),
        ("6", "Linear", 2 * (2 * 8 + linear + 2 * 5)),
    ]
    fused = 2 * (image + weight + 8 + maps + maps + 2 * 8 + 2 * 8 + linear + 2 * 5)
    stock = sum(row["bytes"] for row in result["layers"])
    assert traffic(result) == {"stock": stock, "op": fused, "block": fused}
    assert result["macs"] == 2 * (25 * weight + 8 * 5)
    by_way = {row["way"]: row for row in result["traffic"]}
    assert by_way["op"]["bytes_per_image"] == fused / 2
    assert by_way["op"]["flops_per_byte"] == 2 * result["macs"] / fused


# Weights and bias of each convolution of `mobilenet()`, norms folded, and its pixels in and out for
# images of 32 x 32: (weights, channels in, pixels in, channels out, pixels out).
_LAYERS = {
    "stem": (32 * 3 * 9, 3, 32**2, 32, 16**2),
    "features.1 depthwise": (32 * 9, 32, 16**2, 32, 16**2),
    "features.1 project": (32 * 8, 32, 16**2, 8, 16**2),
    "features.2 expand": (8 * 48, 8, 16**2, 48, 16**2),
    "features.2 depthwise": (48 * 9, 48, 16**2, 48, 8**2),
    "features.2 project": (48 * 8, 48, 8**2, 8, 8**2),
    "features.3 expand": (8 * 48, 8, 8**2, 48, 8**2),
    "features.3 depthwise": (48 * 9, 48, 8**2, 48, 8**2),
    "features.3 project": (48 * 8, 48, 8**2, 8, 8**2),
    "head": (8 * 1280, 8, 8**2, 1280, 8**2),
}
_WEIGHTS = sum(layer[0] + layer[3] for layer in _LAYERS.values()) + 1280 * 5 + 5


@pytest.fixture
def folded():
    """Elements that `mobilenet()` moves for one image when patched, by level."""
    maps = sum(c * pixels + d * out for _, c, pixels, d, out in _LAYERS.values())
    add, pool, linear = 3 * 8 * 8**2, 1280 * 8**2 + 1280, 1280 + 5
    # Input and output of the stem block, of two inverted residuals, and of the pooled head.
    blocks = 3 * 32**2 + 8 * 16**2, 8 * 16**2 + 8 * 8**2, 2 * 8 * 8**2, 8 * 8**2 + 1280
    return {
        "op": _WEIGHTS + maps + add + pool + linear,
        "block": _WEIGHTS + sum(blocks) + linear,
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bytes_of_fused_blocks_by_hand(found, folded, dtype):
    result = found(mobilenet(), "--dtype", dtype)
    moved = traffic(result)
    assert moved["op"] == 2 * folded["op"]
    assert moved["block"] == 2 * folded["block"]
    assert result["blocks_without_kernel"] == 0


def test_blocks_without_a_kernel_count_layer_by_layer(inspect, folded):
    """In float32 only the pooled head is one kernel: it saves its maps' way out and back."""
    status, out, err = inspect(mobilenet(), "--json", "-")
    result = json.loads(out)
    assert (status, result["blocks_without_kernel"]) == (0, 3)
    moved = traffic(result)
    assert moved["op"] == 4 * folded["op"]
    assert moved["block"] == moved["op"] - 4 * 2 * 1280 * 8**2
    assert "note: 3 fused blocks have no kernel" in err


def test_batch_shares_the_weights(found, folded):
    one, many = (
        {row["way"]: row["bytes_per_image"] for row in found(mobilenet(), *flags)["traffic"]}
        for flags in (["--dtype", "float16"], ["--dtype", "float16", "--batch", "8"])
    )
    assert one["block"] - many["block"] == 2 * _WEIGHTS * 7 / 8
    assert one["op"] - many["op"] == 2 * _WEIGHTS * 7 / 8


def test_nothing_is_computed(found):
    """Not even the images of this batch would fit into any memory."""
    macs = found(mobilenet())["macs"]
    most = 2**31 - 1
    assert found(mobilenet(), "--batch", str(most))["macs"] == macs * most


def test_rows_tell_the_window(found):
    rows = {row["name"]: row for row in found(mobilenet())["layers"]}
    depthwise = rows["features.2.conv.1.0"]
    assert depthwise["input"] == [1, 48, 16, 16]
    assert depthwise["output"] == [1, 48, 8, 8]
    assert (depthwise["kernel_size"], depthwise["stride"]) == ([3, 3], [2, 2])
    assert (depthwise["groups"], depthwise["parameters"]) == (48, 48 * 9)
    assert depthwise["macs"] == 48 * 9 * 8 * 8
    assert rows["classifier.1"]["kernel_size"] is None


# ------------------------------------------------------------------------------------- all models


class Functional(nn.Module):
    """Layers as functions, of its own parameters, in one forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.norm(self.conv(x)))
        y = F.conv2d(x, self.weight, None, 1, 1, 1, 8)
        x = F.hardswish(x + y)
        x += y
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_functions_count_as_layers(found):
    result = found(Functional())
    assert result["operators"] == {
        "Conv2d": 2,
        "add": 2,
        "BatchNorm2d": 1,
        "ReLU6": 1,
        "Hardswish": 1,
        "global average pool": 1,
        "Flatten": 1,
        "Linear": 1,
    }
    assert result["convolutions"] == {"dense": 1, "depthwise": 1}
    conv = [row for row in result["layers"] if row["operator"] == "Conv2d"][1]
    assert (conv["name"], conv["groups"], conv["parameters"]) == ("", 8, 72)
    assert fates(result, "ReLU6") == [""]  # folded, but the report has no name for it
    assert fates(result, "Conv2d") == ["conv_implicit_gemm", "stock"]
    assert fates(result, "add") == ["add", "stock"]  # the second adds what stock layers made
    assert fates(result, "Hardswish") == ["stock"]
    assert fates(result, "global average pool") == ["global_avg_pool2d"]


class Reshapes(nn.Module):
    def forward(self, x):
        x = x.reshape(-1, 3, 32 * 32)
        return x.transpose(1, 2).reshape(-1, 3 * 32 * 32)


def test_only_the_reshape_that_copies_counts(found):
    result = found(nn.Sequential(Reshapes(), nn.Linear(3 * 32 * 32, 5)))
    assert fates(result, "reshape") == [None, "stock"]
    moved = [row["bytes"] for row in result["layers"] if row["operator"] == "reshape"]
    assert moved == [0, 4 * 2 * 3 * 32 * 32]


class Untraceable(nn.Module):
    """Runs, but torch.fx cannot follow it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        if x.shape[2] > 4:
            x = self.conv(x).relu()
        return self.linear(x.mean((2, 3)))


def test_untraceable_model(found):
    result = found(Untraceable())
    assert result["operators"] == {
        "Conv2d": 1,
        "ReLU": 1,
        "global average pool": 1,
        "Linear": 1,
    }
    assert fates(result, "Conv2d") == ["conv_implicit_gemm"]
    assert fates(result, "Linear") == ["gemm"]
    (relu,) = [row for row in result["layers"] if row["operator"] == "ReLU"]
    assert relu["stock"].startswith("torch.fx cannot trace its forward: ")


def test_traced_graph_with_all_calls_in_one_forward(found):
    setting = [[1, 8, 1, 1], [6, 8, 3, 2]]
    model = torch_mbv2.MobileNetV2(5, inverted_residual_setting=setting).eval()
    result = found(fx.symbolic_trace(model))
    assert result["model"]["class"] == "torch.fx.graph_module.GraphModule"
    assert fates(result, "add") == ["features.3.conv.0.0", "features.4.conv.0.0"]
    assert fates(result, "global average pool") == ["features.5.0"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x)))).mean((2, 3))


def test_activation_that_is_called_twice(found):
    result = found(Shared())
    assert [row["name"] for row in result["layers"]] == ["a", "relu", "b", "relu", ""]
    assert fates(result, "ReLU") == ["", ""]


def test_norm_with_its_activation(found):
    """timm's batch norm holds its activation, which is folded as well or stays behind."""
    timm = pytest.importorskip("timm", reason="the extra `test` is not installed")
    norm = timm.layers.BatchNormAct2d
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(8, act_layer=nn.ReLU6),
        nn.Conv2d(8, 8, 3),
        norm(8, act_layer=nn.SiLU),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    result = found(model)
    assert fates(result, "BatchNorm2d") == ["0", "2"]
    assert fates(result, "ReLU6") == ["0"]
    assert fates(result, "SiLU") == ["stock"]


class Resize(nn.Module):
    """Calculates a shape in tensors, as ONNX does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.linear(x.view(x.shape[0], -1))


def test_onnx_file(inspect, tmp_path, capsys):
    onnx_helpers = pytest.importorskip("onnx_helpers")
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    file = tmp_path / "resize.onnx"
    exported = onnx_helpers.export(Resize().eval(), torch.randn(2, 3, 16, 16))
    file.write_bytes(exported.SerializeToString())
    assert cli.main(["inspect", str(file), "--batch", "3", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["input"][0] == 3
    for name in ("Conv2d", "ReLU", "global average pool", "Linear"):
        assert result["operators"][name] == 1
    height, width = result["layers"][0]["output"][2:]
    assert result["macs"] == 3 * (height * width * 8 * 27 + 8 * 5)


# ------------------------------------------------------------------------------------------ output


def test_prints_header_rows_and_totals(inspect, tmp_path):
    file = tmp_path / "found.json"
    flags = ("--dtype", "float16", "--batch", "4", "--json", str(file))
    status, out, err = inspect(mobilenet(), *flags)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    header = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert header["class"] == "torch_mbv2.mobilenet.MobileNetV2"
    assert header["input"] == "4 x 3 x 32 x 32, float16"
    assert header["operators"].startswith("10 Conv2d, 10 BatchNorm2d, 7 ReLU6, 1 add, ")
    assert header["convolutions"] == "1 dense, 3 depthwise, 6 pointwise"
    rows = lines[lines.index("") + 3 :]
    result = json.loads(file.read_text())
    for row, line in zip(result["layers"], rows, strict=False):
        assert line.startswith(row["name"] or "(the model)")
        assert f"{row['bytes']:,}" in line or row["bytes"] == 0
    assert rows[0].split() == [
        *("features.0.0", "Conv2d", "4x3x32x32", "4x32x16x16", "3x3", "2x2", "1", "864"),
        *(f"{4 * 256 * 864:,}", f"{2 * (12288 + 864 + 32768):,}"),
        *("folded", "into", "torch_mbv2_stem_block_0"),
    ]
    block = lines[-1].rsplit(maxsplit=3)
    moved = traffic(result)["block"]
    assert block[0] == 'patched, level "block"'
    assert block[1:3] == [f"{moved / 1e6:.3f}", f"{moved / 4e6:.3f}"]
    assert float(block[3]) == pytest.approx(2 * result["macs"] / moved, abs=0.05)


def test_json_has_what_the_docstring_says(found):
    result = found(mobilenet())
    assert set(result) == {
        *("schema", "verb", "command", "model", "dtype", "input", "operators", "convolutions"),
        *("parameters", "macs", "traffic", "blocks_without_kernel", "report", "layers"),
    }
    assert set(result["model"]) == {"name", "weights", "pretrained", "class", "architecture"}
    assert {frozenset(row) for row in result["layers"]} == {
        frozenset(
            (
                *("name", "operator", "input", "output", "kernel_size", "stride", "groups"),
                *("parameters", "macs", "bytes", "kernel", "folded_into", "stock"),
            )
        )
    }
    assert result["report"] == {
        key: value
        for key, value in torch_mbv2.report(mobilenet().eval()).to_dict().items()
        if key in ("summary", "note")
    }


def test_model_that_moves_nothing(inspect):
    status, out, err = inspect(nn.Flatten())
    assert (status, err) == (0, "")
    assert "convolutions   none" in out


def test_the_only_batch_of_a_model(inspect, found):
    assert found(mobilenet(), batch=2)["input"] == [2, 3, 32, 32]
    status, out, err = inspect(mobilenet(), "--batch", "3", batch=2)
    assert (status, out) == (2, "")
    assert "--batch: the model takes batches of 2 only" in err


class Dynamic(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Broken(nn.Module):
    def forward(self, x):
        raise KeyError("two\nlines")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Dynamic(), "what it does depends on the values of the images, which are not computed"),
        (Broken(), "cannot be run on float32 images of shape (1, 3, 32, 32): 'two"),
        (
            nn.Linear(5, 3),
            "cannot be run on float32 images of shape (1, 3, 32, 32): a and b must have",
        ),
    ],
)
def test_model_that_cannot_be_run(inspect, module, message):
    status, out, err = inspect(module)
    assert (status, out) == (2, "")
    assert err.startswith("torch-mbv2: error: tiny: the model cannot be ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resolution 0", "--resolution: must be a whole number from 1 up, got '0'"),
        ("--batch x", "--batch: must be a whole number from 1 up, got 'x'"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(inspect, flags, message):
    status, out, err = inspect(mobilenet(), *flags.split())
    assert (status, out) == (2, "")
    assert message in err


def test_missing_file(capsys):
    assert cli.main(["inspect", "missing.onnx"]) == 2
    assert "missing.onnx: No such file" in capsys.readouterr().err


def test_hooks_are_gone_afterwards(inspect):
    from torch.nn.modules import module

    inspect(mobilenet())
    inspect(Broken())
    assert not module._global_forward_pre_hooks
    assert not module._global_forward_hooks


def test_resolution_reaches_the_model(monkeypatch, capsys):
    asked = []

    def load(spec, size):
        asked.append((spec, size))
        return models.ImageModel(Shared().eval(), ModelInfo("s", "", True), (size, size), None)

    monkeypatch.setattr(models, "load", load)
    assert cli.main(["inspect", "some:model", "--resolution", "48", "--json", "-"]) == 0
    assert asked == [("some:model", 48)]
    assert json.loads(capsys.readouterr().out)["input"] == [1, 3, 48, 48]
