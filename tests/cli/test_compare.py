"""`compare`: right models pass, planted faults are found and named, tolerances are kept."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from onnx_helpers import export, randomise
from PIL import Image
from torch import fx, nn

import torch_mbv2
from torch_mbv2 import cli, modules, sources
from torch_mbv2.cli import compare, models
from torch_mbv2.errors import ModelError
from torch_mbv2.modules import Folded, Swapped

SIZE, CLASSES = 32, 7


def own(**options) -> nn.Module:
    settings = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 1, 2]]
    net = torch_mbv2.MobileNetV2(CLASSES, 0.5, inverted_residual_setting=settings, **options)
    return randomise(net)


def torchvision_net() -> nn.Module:
    settings = [[1, 8, 1, 1], [6, 16, 2, 2]]
    return randomise(
        torchvision.models.MobileNetV2(CLASSES, 0.5, inverted_residual_setting=settings)
    )


def resnet() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return randomise(torchvision.models.ResNet(block, [1, 1, 1, 1], CLASSES))


def in_one_sequential() -> nn.Sequential:
    net = own()
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*net.features, *pool, *net.classifier).eval()


def as_graph() -> nn.Module:
    return fx.symbolic_trace(torchvision_net()).eval()


def converted() -> nn.Module:
    """By onnx2torch, as no MobileNetV2 has a function before its stem."""
    net = nn.Sequential(nn.Tanh(), torchvision_net()).eval()
    return torch_mbv2.load_onnx(export(net, torch.zeros(2, 3, SIZE, SIZE)))


class Functions(nn.Module):
    """Padding, activations, residual and mean in function calls, which no hook sees."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, 2), nn.AvgPool2d(2)
        self.a, self.b, self.c = self.block(), self.block(), nn.Conv2d(8, 9, 1)

    @staticmethod
    def block():
        return nn.ModuleList([nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)])

    def forward(self, x):
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        for depthwise, project in (self.a, self.b):
            x = x + project(F.relu6(depthwise(F.pad(x, (1, 1, 1, 1)))))
        return F.relu(self.c(F.avg_pool2d(self.pool(x), 2))).mean((2, 3))


def activation_in_norm() -> nn.Module:
    """Of a kind that no kernel has: it remains behind the convolution with the norm in it."""
    norms = [timm.layers.BatchNormAct2d(8, act_layer=act) for act in (nn.SiLU, nn.ReLU)]
    convs = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
    return randomise(nn.Sequential(convs[0], norms[0], convs[1], norms[1]))


MODELS = {
    "functions": lambda: randomise(Functions()),
    "activation in norm": activation_in_norm,
    "own": own,
    "own same": lambda: own(padding="same"),
    "torchvision": torchvision_net,
    "timm": lambda: randomise(timm.create_model("mobilenetv2_035", num_classes=CLASSES)),
    "resnet": resnet,
    "graph": as_graph,
    "sequential": in_one_sequential,
    "converted": converted,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made() -> dict[str, nn.Module]:
    return {}


@pytest.fixture
def net(request, made) -> nn.Module:
    name = request.param
    if name not in made:
        torch.manual_seed(0)
        made[name] = MODELS[name]()
    return made[name]


@pytest.fixture
def run(monkeypatch, capsys):
    """Compares a model of random weights: (exit status, the JSON, stdout, stderr)."""

    def run(net, *argv, shape=(None, 3, SIZE, SIZE)):
        info = sources.ModelInfo("net", "made here", True, shape)
        monkeypatch.setattr(models, "load_model", lambda spec: (net, info))
        common = ("timm:net", "--device", "cpu", "--batch", "3")
        status = cli.main(["compare", *common, *map(str, argv), "--json"])
        printed = capsys.readouterr()
        return status, json.loads(printed.out) if printed.out else None, printed.err

    return run


@pytest.fixture
def plant(monkeypatch):
    """Makes a patched layer wrong: of a class, where a condition on the module holds."""

    def plant(cls, where, damage):
        forward = cls.forward

        def wrong(self, *args):
            out = forward(self, *args)
            return damage(out) if where(self) else out

        monkeypatch.setattr(cls, "forward", wrong)

    return plant


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def layers_of(patched: nn.Module) -> set[str]:
    """The names of those that do the work when the whole model runs."""
    return {
        name
        for name, module in patched.named_modules()
        if isinstance(module, Swapped)
        and not isinstance(module, Folded)
        and module.absorbed_by is None
    }


# ------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("level", ["op", "block"])
@pytest.mark.parametrize("net", MODELS, indirect=True)
def test_right_model_agrees_layer_by_layer(net, level):
    """Every patched layer is compared with something, both ways, and nothing is over tolerance."""
    patched = torch_mbv2.patch(net, level=level)
    found = compare.compare_layers(net, patched, images(), compare.Tolerance(torch.float32))
    assert (found["first_isolated"], found["first_accumulated"]) == (None, None)
    compared = {row["layer"] for row in found["rows"] if row["kernel"] and row["isolated"]}
    assert compared == layers_of(patched)
    assert all(row["skipped"] is None for row in found["rows"])
    assert all(row["accumulated"]["relative_l2"] < 1e-4 for row in found["rows"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("net", ["own"], indirect=True)
def test_right_model_agrees_in_half_precision(run, net, dtype):
    status, found, err = run(net, "--dtype", dtype, "--layers")
    assert (status, err, found["agree"], found["dtype"]) == (0, "", True, dtype)
    assert found["layers"]["first_accumulated"] is None


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("level", ["op", "block"])
@pytest.mark.parametrize("net", ["own", "resnet"], indirect=True)
def test_right_model_agrees_on_a_gpu(run, net, level, dtype):
    argv = ("--device", "cuda", "--dtype", dtype, "--level", level, "--layers", "--bisect")
    status, found, _ = run(net, *argv)
    assert (status, found["device"]) == (0, "cuda")
    assert found["layers"]["first_accumulated"] is None


@pytest.mark.parametrize("net", ["own"], indirect=True)
def test_figures(run, net):
    """Those of the JSON are what torch says about the two models' logits."""
    status, found, _ = run(net, "--against", "stock")
    assert status == 0
    (row,) = found["rivals"]
    x = images(3)
    with torch.inference_mode():
        a, b = torch_mbv2.patch(net)(x).double(), net(x).double()
    assert (row["against"], row["output"], row["shape"]) == ("stock", "", [3, CLASSES])
    assert row["top1"] == int((a.argmax(1) == b.argmax(1)).sum())
    assert row["max_abs"] == pytest.approx(float((a - b).abs().max()))
    assert row["mean_abs"] == pytest.approx(float((a - b).abs().mean()))
    assert row["relative_l2"] == pytest.approx(float((a - b).norm() / b.norm()))
    assert row["cosine"] == pytest.approx(float(F.cosine_similarity(a, b, 0).mean()), 1)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    assert (row["nan"], row["inf"], row["over"], row["elements"]) == ([0, 0], [0, 0], 0, a.numel())
    assert row["atol"] == pytest.approx(
        384 * 2**-24 * float(b.square().mean().sqrt()) * layers ** (2 / 3)
    )
    assert (found["layers"], found["bisect"]) == (None, None)


@pytest.mark.parametrize("net", ["own"], indirect=True)
def test_tables(net, monkeypatch, capsys):
    info = sources.ModelInfo("net", "random, seed 0", False, (None, 3, SIZE, SIZE))
    monkeypatch.setattr(models, "load_model", lambda spec: (net, info))
    argv = ["compare", "timm:net", "--device", "cpu", "--batch", "2", "--layers", "--bisect"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.isascii()
    assert "noise of shape (2, 3, 32, 32)" in out
    assert "first layer over tolerance, isolated: none\n" in out
    assert out.count("torch_mbv2_stem_block_0") == 2
    assert out.endswith("bisect: the answers agree: there is nothing to be found\n")
    assert err == "torch-mbv2: note: the weights are random, seed 0: top-1 means nothing\n"


class Several(nn.Module):
    """A model that returns a dictionary of maps and scores, at two scales."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        return {"maps": y, "heads": (self.b(y).mean((2, 3)), y.mean(1))}


def test_several_outputs(run):
    status, found, _ = run(Several().eval(), "--layers")
    assert status == 0
    assert [(row["output"], row["shape"], row["top1"]) for row in found["rivals"]] == [
        ("['maps']", [3, 4, 30, 30], None),
        ("['heads'][0]", [3, 5], 3),
        ("['heads'][1]", [3, 30, 30], None),
    ]


class Halves(nn.Module):
    """A residual add whose operand a function call makes, out of sight of hooks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(y + y.flip(3)).mean((2, 3))


def test_layer_without_a_point_to_compare_says_so(run):
    status, found, _ = run(Halves().eval(), "--layers", "--level", "op")
    rows = {row["layer"]: row for row in found["layers"]["rows"]}
    assert status == 0
    assert "comes from a function call" in rows["torch_mbv2_add_0"]["skipped"]
    assert rows["torch_mbv2_add_0"]["isolated"] is None
    assert rows["b"]["isolated"]["agrees"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.a(F.relu_(self.a(x))).mean((2, 3))


def test_layer_that_is_called_twice(run):
    """In-place functions spoil what hooks have seen, unless that is copied at once."""
    status, found, _ = run(Twice().eval(), "--layers")
    rows = [row for row in found["layers"]["rows"] if row["layer"] == "a"]
    assert status == 0
    assert [row["call"] for row in rows] == [0, 1]
    assert all(row["isolated"]["agrees"] and row["accumulated"]["agrees"] for row in rows)


# --------------------------------------------------------------------------------------- faults


def one_channel(out):
    out = out.clone()
    out[:, 0] *= 1.01
    return out


def always(module):
    return True


def is_residual(module):
    return module.residual


def is_marked(module):
    return getattr(module.stock, "marked", False)


FAULTS = {
    # model, level, which layer is wrong (the only one such, or the marked one), its name
    "conv": ("own", "op", modules.FusedConv2d, is_marked, "features.3.conv.1.0"),
    "add": ("own", "op", modules.Add, always, "features.3.torch_mbv2_add_0"),
    "mean": ("own", "op", modules.GlobalAvgPool2d, always, "torch_mbv2_global_avg_pool2d_0"),
    "stem": ("own", "block", modules.FusedStemBlock, always, "torch_mbv2_stem_block_0"),
    "block": (
        "own same",
        "block",
        modules.FusedInvertedResidual,
        is_residual,
        "features.3.torch_mbv2_inverted_residual_0",
    ),
    "head": ("torchvision", "block", modules.FusedConvPool, always, "torch_mbv2_conv_pool_0"),
    "linear": ("torchvision", "block", modules.FusedLinear, is_marked, "classifier.1"),
    "timm": ("timm", "op", modules.FusedConv2d, is_marked, "blocks.2.0.conv_pw"),
    "resnet": ("resnet", "op", modules.FusedConv2d, is_marked, "layer3.0.downsample.0"),
    "resnet, relu": ("resnet", "block", modules.FusedConv2d, is_marked, "layer2.0.conv1"),
    "graph": (
        "graph",
        "block",
        modules.FusedInvertedResidual,
        is_residual,
        "features.3.conv.0.0",
    ),
    "layer of a graph": ("graph", "op", modules.FusedConv2d, is_marked, "features.3.conv.2"),
    "add of a graph": ("graph", "op", modules.Add, always, "torch_mbv2_add_0"),
    "sequential": ("sequential", "block", modules.FusedStemBlock, always, "0.0"),
}


@pytest.fixture
def fault(request, plant, monkeypatch, made):
    """Plants one of FAULTS: the model, the level and the name of the wrong layer."""
    net, level, cls, where, name = FAULTS[request.param]
    if net not in made:
        torch.manual_seed(0)
        made[net] = MODELS[net]()
    if where is is_marked:
        monkeypatch.setattr(made[net].get_submodule(name), "marked", True, raising=False)
    plant(cls, where, one_channel)
    return made[net], level, name


@pytest.mark.parametrize("fault", FAULTS, indirect=True)
def test_fault_is_blamed_where_it_is_made(run, fault):
    net, level, name = fault
    status, found, _ = run(net, "--layers", "--level", level)
    assert (status, found["agree"]) == (1, False)
    assert found["layers"]["first_isolated"] == name
    assert found["layers"]["first_accumulated"] == name
    wrong = {row["layer"] for row in found["layers"]["rows"] if not row["isolated"]["agrees"]}
    # Besides it only the modules that it is inside.
    assert all(layer == name or name.startswith(f"{layer}.") for layer in wrong)


@pytest.mark.parametrize(
    "fault",
    ["conv", "add", "mean", "stem", "block", "resnet, relu", "graph", "layer of a graph"],
    indirect=True,
)
def test_bisect_names_the_fault(run, fault):
    net, level, name = fault
    status, found, _ = run(net, "--bisect", "--level", level)
    assert status == 1
    assert found["bisect"]["culprits"] == [name]
    assert found["bisect"]["found"] == f"{name} breaks agreement on its own"
    assert not found["bisect"]["differences"][0]["agrees"]


@pytest.mark.parametrize("net", ["own", "timm", "functions"], indirect=True)
def test_activation_that_was_folded_wrongly(net):
    """Stock's value is what stock does, not what the patched layer says of itself."""
    patched = torch_mbv2.patch(net, level="op")
    name, conv = next(
        (name, module)
        for name, module in patched.named_modules()
        if isinstance(module, modules.FusedConv2d) and module.act_max is None
    )
    conv.act_max = 1e-3
    found = compare.compare_layers(net, patched, images(), compare.Tolerance(torch.float32))
    assert found["first_isolated"] == name


@pytest.mark.parametrize(("value", "key"), [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("net", ["own"], indirect=True)
def test_not_finite_is_counted_and_named(run, plant, net, value, key):
    def damage(out):
        return out.index_put(
            (torch.tensor(1), torch.tensor(2), *2 * [torch.tensor(0)]), torch.tensor(value)
        )

    plant(modules.FusedInvertedResidual, lambda m: m.out_channels == 16, damage)
    status, found, _ = run(net, "--layers")
    name = "features.4.torch_mbv2_inverted_residual_0"
    row = next(row for row in found["layers"]["rows"] if row["layer"] == name)
    assert status == 1
    assert row["isolated"][key] == [1, 0]
    assert (row["isolated"]["over"], row["isolated"]["agrees"]) == (1, False)
    assert row["isolated"]["max_abs"] < 1e-4, "the other elements have their figures"
    assert found["layers"]["first_isolated"] == name
    assert found["rivals"][0]["over"] > 0


def test_fault_that_does_not_reach_the_output(run, plant):
    """Exit status 1 all the same."""
    net = own()
    net.classifier[1].weight.data.zero_()
    plant(modules.FusedStemBlock, lambda m: True, one_channel)
    status, found, _ = run(net, "--layers", "--bisect")
    assert status == 1
    assert found["rivals"][0]["agrees"]
    assert found["layers"]["first_isolated"] == "torch_mbv2_stem_block_0"
    assert found["bisect"]["culprits"] == []


# --------------------------------------------------------------------------------------- bisect


def bisected(net, level, fails):
    """With a judge that only looks which layers are patched."""
    return compare.bisect(net, level, lambda model: [{"agrees": not fails(layers_of(model))}])


@pytest.mark.parametrize("net", ["own"], indirect=True)
@pytest.mark.parametrize(
    ("level", "culprits"),
    [
        ("op", ["features.0.0"]),
        ("op", ["classifier.1", "features.2.conv.1.0"]),
        ("op", ["features.3.torch_mbv2_add_0"]),
        ("op", ["torch_mbv2_global_avg_pool2d_0"]),
        ("block", ["torch_mbv2_conv_pool_0"]),
        ("block", ["features.2.torch_mbv2_inverted_residual_0", "torch_mbv2_stem_block_0"]),
    ],
)
def test_bisect_finds_what_fails_together(net, level, culprits):
    found = bisected(net, level, lambda patched: patched.issuperset(culprits))
    assert found["culprits"] == culprits
    assert ("no single layer is to blame" in found["found"]) == (len(culprits) > 1)
    assert not found["differences"][0]["agrees"]
    assert found["patchings"] < 30


@pytest.mark.parametrize("net", ["own"], indirect=True)
@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (lambda patched: True, "stock PyTorch is over tolerance itself"),
        (lambda patched: len(patched) > 15, "it takes more than 8 layers together"),
    ],
)
def test_bisect_where_no_layer_is_to_blame(net, fails, sentence):
    found = bisected(net, "op", fails)
    assert found["culprits"] == []
    assert sentence in found["found"]


# ------------------------------------------------------------------------------------ tolerances


@pytest.mark.parametrize(
    ("rtol", "atol", "error", "agrees"),
    [
        (0.0, 0.5, 0.5, True),
        (0.0, 0.5, 0.5 + 2**-40, False),
        (0.25, 0.0, 1.0, True),  # of 4
        (0.25, 0.0, 1 + 2**-40, False),
        (0.25, 0.5, 1.5, True),
        (0.25, 0.5, 1.5 + 2**-40, False),
        (0.0, 0.0, 0.0, True),
    ],
)
def test_edge_of_the_tolerance(rtol, atol, error, agrees):
    expected = torch.tensor([4.0, -4.0], dtype=torch.float64)
    found = compare.differences(expected + error * torch.eye(2)[1].double(), expected, rtol, atol)
    assert found["agrees"] == agrees
    assert found["over"] == (not agrees)


@pytest.mark.parametrize(
    ("a", "b", "over"),
    [
        (math.nan, math.nan, 0),
        (math.inf, math.inf, 0),
        (math.inf, -math.inf, 1),
        (math.nan, math.inf, 1),
        (1.0, math.nan, 1),
        (math.inf, 1.0, 1),
    ],
)
def test_what_is_not_finite_agrees_only_with_its_like(a, b, over):
    found = compare.differences(torch.tensor([a, 2.0]), torch.tensor([b, 2.0]), 1.0, 1.0)
    assert (found["over"], found["elements"]) == (over, 2)
    assert found["nan"] == [int(math.isnan(a)), int(math.isnan(b))]
    assert found["max_abs"] == 0


@pytest.mark.parametrize(
    ("argv", "bounds"),
    [
        (("--rtol", "0.5", "--atol", "0.25"), (0.5, 0.25)),
        (("--rtol", "0.5"), (0.5, 0.0)),
        (("--atol", "0.25"), (0.0, 0.25)),
    ],
)
@pytest.mark.parametrize("net", ["own"], indirect=True)
def test_given_tolerances_are_used_everywhere(run, net, argv, bounds):
    _, found, _ = run(net, "--layers", *argv)
    rows = [*found["rivals"], *(row["isolated"] for row in found["layers"]["rows"])]
    assert {(row["rtol"], row["atol"]) for row in rows} == {bounds}


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("net", ["own"], indirect=True)
def test_status_follows_the_tolerance(run, plant, net, factor):
    """With all outputs off by 0.25, exact in float32 next to rounding."""
    plant(modules.FusedLinear, lambda m: True, lambda out: out + 0.25)
    assert run(net, "--atol", 0.25 * factor)[0] == (factor < 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_default_tolerance_follows_the_scale_of_the_output(dtype):
    tolerance, ones = compare.Tolerance(dtype), torch.ones(5)
    rtol, atol = tolerance.bounds(ones, 1)
    assert rtol == torch.finfo(dtype).eps
    assert tolerance.bounds(8 * ones, 1) == (rtol, 8 * atol)
    assert tolerance.bounds(ones, 27) == (rtol, pytest.approx(9 * atol))
    assert tolerance.bounds(ones, 27, growth=1) == (rtol, 27 * atol)
    assert tolerance.bounds(torch.tensor([1.0, math.inf]), 1) == (rtol, atol)
    assert tolerance.bounds(torch.zeros(0), 1) == (rtol, 0)


# ---------------------------------------------------------------------------------------- inputs


def test_nothing_but_nan_does_not_agree():
    """Though both sides are alike."""
    nan = torch.full((2, 3), math.nan)
    assert not compare.differences(nan, nan, 1e-3, 1e-3)["agrees"]
    assert compare._same_top1(nan, nan) == 0


@pytest.mark.parametrize(
    ("asked", "file", "expected"),
    [
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, None, torch.float32),
    ],
)
def test_onnx_runtime_is_judged_by_the_coarser_dtype(asked, file, expected):
    """It runs the file in the file's own."""
    assert compare._coarser(compare.Tolerance(asked), file) == compare.Tolerance(expected)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_outputs_in_pieces_of_the_only_batch_size():
    """The last piece is filled up, and what that adds is cut off again."""
    seen = []

    def function(x):
        seen.append(len(x))
        return x.mean((2, 3)), [x]

    x = images(5)
    found = compare.outputs(Returns(function), x, 2)
    assert seen == [2, 2, 2]
    assert list(found) == ["[0]", "[1][0]"]
    assert torch.equal(found["[1][0]"], x)
    torch.testing.assert_close(found["[0]"], x.mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.argmax(1), "output must be a tensor of floats, is int64"),
        (lambda x: (x, "text"), r"output\[1\] must be a tensor of floats, is str"),
        (lambda x: x.mean(), r"output of shape \(\) is not one for each image"),
        (lambda x: x @ x[:, :, :3], "cannot be run on float32 images of shape"),
    ],
)
def test_outputs_that_cannot_be_compared(function, message):
    with pytest.raises(ModelError, match=message):
        compare.outputs(Returns(function), images(4), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")

    def save(name, net, shape, **options):
        proto = export(net.eval(), torch.randn(*shape), **options)
        (folder / name).write_bytes(proto.SerializeToString())

    save("net.onnx", own(), (1, 3, SIZE, SIZE))
    save("fixed.onnx", own(), (2, 3, SIZE, SIZE), dynamic_axes={})
    save("vector.onnx", nn.Linear(5, 3), (1, 5))
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3, 2))
    save("maps.onnx", head, (2, 3, SIZE, SIZE), dynamic_axes={})
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "text.jpg").write_text("not an image\n" * 99)
    return folder


@pytest.fixture
def run_file(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*argv):
        status = cli.main(["compare", *argv, "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("argv", "shape"),
    [
        ("net.onnx --batch 3", [3, CLASSES]),
        ("fixed.onnx --batch 3", [3, CLASSES]),
        ("maps.onnx --batch 3 --layers", [3, 2, 14, 14]),
        ("net.onnx --dtype bfloat16 --level op", [8, CLASSES]),
        ("net.onnx --images 0.png 1.png 2.png --tf --crop", [3, CLASSES]),
    ],
)
def test_file_against_onnx_runtime(run_file, argv, shape):
    status, out, err = run_file(*argv.split(), "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [row["against"] for row in found["rivals"]] == ["stock", "onnxruntime"]
    assert [row["shape"] for row in found["rivals"]] == [shape, shape]
    assert found["rivals"][1]["max_abs"] > 0
    assert found["images"] == (["0.png", "1.png", "2.png"] if "--images" in argv else None)


def test_onnx_runtime_notices_weights_that_differ(run_file, monkeypatch):
    """Of the file and of the loaded model: stock cannot tell, and no patched layer is to blame."""
    load = models.load_model

    def changed(spec):
        net, info = load(spec)
        net.classifier[1].bias.data += 0.01
        return net, info

    monkeypatch.setattr(models, "load_model", changed)
    status, out, _ = run_file("net.onnx", "--bisect", "--json")
    found = json.loads(out)
    assert status == 1
    assert [row["agrees"] for row in found["rivals"]] == [True, False]
    assert found["bisect"]["against"] == "onnxruntime"
    assert "stock PyTorch is over tolerance itself" in found["bisect"]["found"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("missing.onnx", "missing.onnx: No such file"),
        ("vector.onnx", "vector.onnx: the model's input must be images of shape"),
        ("net.onnx --against tensorrt", "--against: must be of stock, onnxruntime, got 'tensorrt'"),
        ("net.onnx --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("net.onnx --level net", "--level: invalid choice: 'net'"),
        ("net.onnx --batch 0", "--batch: must be a whole number from 1 up, got '0'"),
        ("net.onnx --rtol -1", "--rtol: must be a number from 0 up, got '-1'"),
        ("net.onnx --atol x", "--atol: must be a number from 0 up, got 'x'"),
        ("net.onnx --atol inf", "--atol: must be a number from 0 up, got 'inf'"),
        ("net.onnx --batch 2 --images 0.png", "--batch counts images of noise: give it, or --imag"),
        ("net.onnx --tf", "--tf, --mean, --std and --crop are for --images"),
        ("net.onnx --images", "--images: expected at least one argument"),
        ("net.onnx --images text.jpg", "text.jpg: cannot be read as an image"),
        ("net.onnx --images 0.png --std 0 1 1", "--std: a standard deviation cannot be 0"),
        ("net.onnx --size 99999", "--size: must be at most 4096 pixels"),
        ("net.onnx --size 48", "ONNX Runtime takes images of shape (?, 3, 32, 32) only, got (8, 3"),
        ("torchvision:resnet18 --against onnxruntime", "torchvision:resnet18 is no ONNX file; exp"),
    ],
)
def test_bad_input(run_file, argv, message):
    """Exit status 2 and one line on stderr that says what is wrong; nothing on stdout."""
    status, out, err = run_file(*argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("torch-mbv2: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_onnx_runtime_that_is_not_installed(run_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "onnxruntime" else find(name, *a),
    )
    status, out, err = run_file("net.onnx", "--against", "stock,onnxruntime")
    assert (status, out) == (2, "")
    assert "--against onnxruntime: it is not installed: pip install 'torch-mbv2[onnx]'" in err
    status, out, _ = run_file("net.onnx", "--json")
    assert status == 0
    assert [row["against"] for row in json.loads(out)["rivals"]] == ["stock"]


def test_file_that_onnx_runtime_cannot_run(run_file, folder):
    (Path(folder) / "damaged.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"damaged\.onnx: ONNX Runtime cannot run it: "):
        models.OnnxRuntime("damaged.onnx")


def test_outputs_that_do_not_correspond(run_file, monkeypatch):
    load = models.load_model

    def other(spec):
        return nn.Sequential(load(spec)[0], nn.Flatten(0)).eval(), load(spec)[1]

    monkeypatch.setattr(models, "load_model", other)
    status, out, err = run_file("net.onnx", "--batch", "2")
    assert (status, out) == (2, "")
    assert "the outputs do not correspond: (14,) of the patched model, (2, 7) of onnxruntime" in err


def test_help(run_file):
    status, out, err = run_file("--help")
    assert (status, err) == (0, "")
    assert "python -m torch_mbv2 compare model.onnx" in out
