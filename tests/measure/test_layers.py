"""The bench of the layers: what stands for stock, and what the rows say."""

from __future__ import annotations

import copy
import itertools
import math

import bench_results
import jsonschema
import pytest
import torch
import torch.nn.functional as F
from onnx_helpers import randomise
from torch import nn

import torch_mbv2
from torch_mbv2 import modules
from torch_mbv2.measure import layers
from torch_mbv2.measure.ceilings import Ceilings
from torch_mbv2.mobilenet import Architecture, Block, SamePad2d

CEILINGS = Ceilings(1e10, {"float32": 1e11, "float16": 1e11, "bfloat16": 1e11})
FAST = {"rounds": 1, "min_time": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


def image(*shape, scale=1.0):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def small(dtype=torch.float32):
    return randomise(torch_mbv2.MobileNetV2(width_mult=0.35)).to(dtype)


def bench(model, images, **options):
    return layers.bench_layers(model, images, CEILINGS, **FAST, **options)


# ----------------------------------------------------------------------------------------- stock


def conv(*args, act=None, pad=None, **options):
    parts = [pad, nn.Conv2d(*args, **options), act]
    return nn.Sequential(*(part for part in parts if part is not None))


LAYERS = {
    "dense": conv(4, 6, 3, padding=1, act=nn.ReLU6()),
    "no bias": conv(4, 6, 3, stride=2, bias=False),
    "pointwise": conv(4, 6, 1, act=nn.ReLU()),
    "depthwise": conv(4, 4, 3, stride=2, padding=1, groups=4),
    "grouped, dilated": conv(4, 6, (3, 5), padding=(2, 1), dilation=(2, 1), groups=2),
    "asymmetric": conv(4, 6, 3, stride=2, pad=nn.ZeroPad2d((0, 1, 2, 1)), act=nn.ReLU6()),
    "asymmetric on both sides": conv(4, 6, 3, padding=(1, 2), pad=nn.ZeroPad2d((3, 0, 1, 1))),
    "even window, same": conv(4, 6, 4, padding="same"),
    "SAME": conv(4, 6, 3, stride=2, pad=SamePad2d(3, 2), act=nn.Hardtanh(-1, 2)),
    "average": nn.Sequential(conv(4, 6, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "average, ceil": nn.Sequential(conv(4, 6, 1), nn.AvgPool2d((2, 3), ceil_mode=True)),
    "average, divisor": nn.Sequential(conv(4, 6, 1), nn.AvgPool2d(2, divisor_override=7)),
    "global": nn.Sequential(conv(4, 6, 1), nn.AdaptiveAvgPool2d(1)),
}


def layers_of(model, level):
    """The layers of the patched model, without those whose work a fused block does."""
    return [
        module
        for module in torch_mbv2.patch(model, level=level).modules()
        if isinstance(module, modules.Swapped)
        and not isinstance(module, modules.Folded)
        and module.absorbed_by is None
    ]


def assert_same_work(found, model, *inputs):
    """Stock functions, one after the other, do what the model does: in float64, to the last digits
    of that, so that nothing is rounded on the way."""
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        x, *others = (x.double() for x in inputs)
        for module in found:
            x = layers.stock_of(module, torch.float64)(x, *others)
    assert x.shape == expected.shape
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("shape", [(2, 4, 11, 14), (4, 11, 14)], ids=["batch", "one image"])
@pytest.mark.parametrize("name", LAYERS)
def test_stock_of_a_layer(name, shape):
    model = randomise(LAYERS[name])
    found = layers_of(model, "op")
    assert len(found) == 1 + isinstance(model[-1], nn.AvgPool2d | nn.AdaptiveAvgPool2d)
    assert_same_work(found, model, image(*shape, scale=4))


def test_stock_of_a_dilated_layer_with_same_padding():
    same = randomise(nn.Sequential(nn.Conv2d(4, 6, (3, 5), dilation=(2, 3), padding="same")))
    module = modules.FusedConv2d.from_stock(same[0], same=True)
    assert module.padding is None
    assert_same_work([module], same, image(2, 4, 11, 14))


@pytest.mark.parametrize("act", [[], [nn.ReLU6()]], ids=["plain", "relu6"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (5,)], ids=str)
def test_stock_of_a_linear_layer(shape, act):
    model = randomise(nn.Sequential(nn.Linear(5, 7), *act))
    assert_same_work(layers_of(model, "op"), model, image(*shape, scale=4))


@pytest.mark.parametrize(
    ("bounds", "act"), [((), nn.Identity()), ((0.0,), nn.ReLU()), ((-1.0, 2.0), nn.Hardtanh(-1, 2))]
)
def test_stock_of_an_add(bounds, act):
    x, y = image(2, 3, 5, 7, scale=4).double(), image(2, 3, 5, 7).double() + 1
    before = x.clone(), y.clone()
    module = modules.Add(None, *bounds)
    assert torch.equal(layers.stock_of(module, torch.float64)(x, y), act(x + y))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (4, 5, 7)], ids=["batch", "one image"])
def test_stock_of_a_mean(shape, keepdim):
    module = modules.GlobalAvgPool2d(None, keepdim, (-2, -1))
    x = image(*shape).double()
    found = layers.stock_of(module, torch.float64)(x)
    torch.testing.assert_close(found, x.mean((-2, -1), keepdim=keepdim), rtol=1e-14, atol=0)


def network(*blocks, **options):
    """A network whose convolutions have biases and no norms, so that folding rounds nothing."""
    architecture = Architecture(8, blocks, last=16, num_classes=5, norm=False, **options)
    return randomise(torch_mbv2.MobileNetV2.from_architecture(architecture))


def only(kind, model):
    """The layer of that class of the model, patched in blocks."""
    (piece,) = [module for module in layers_of(model, "block") if type(module) is kind]
    return piece


@pytest.mark.parametrize("shape", [(2, 8, 7, 9), (8, 7, 9)], ids=["batch", "one image"])
@pytest.mark.parametrize(
    "block",
    [
        Block(24, 8, residual=True),
        Block(24, 12),
        Block(24, 8, 2),
        Block(24, 8, 2, (0, 1, 0, 1)),
        Block(24, 8, 2, "same"),
        Block(None, 12, 2),
        Block(None, 8, residual=True),
    ],
    ids=str,
)
def test_stock_of_an_inverted_residual(block, shape):
    model = network(Block(None, 8), block)
    piece = only(modules.FusedInvertedResidual, model)
    assert_same_work([piece], model.features[2], image(*shape, scale=4))


@pytest.mark.parametrize("shape", [(2, 3, 15, 18), (3, 15, 18)], ids=["batch", "one image"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 0, 1), "same"], ids=str)
def test_stock_of_a_stem_block(padding, shape):
    model = network(Block(None, 8), stem_padding=padding)
    piece = only(modules.FusedStemBlock, model)
    assert_same_work([piece], model.features[:2], image(*shape, scale=4))


def test_stock_of_a_stem_block_reads_images_of_another_dtype():
    model = network(Block(None, 8))
    piece = only(modules.FusedStemBlock, model)
    x = image(2, 3, 15, 18)
    with torch.inference_mode():
        found = layers.stock_of(piece, torch.bfloat16)(x)
        assert torch.equal(found, layers.stock_of(piece, torch.bfloat16)(x.bfloat16()))


class Head(nn.Module):
    def __init__(self, keepdim):
        super().__init__()
        self.conv = conv(4, 6, 1, act=nn.ReLU6())
        self.keepdim = keepdim

    def forward(self, x):
        return self.conv(x).mean((-2, -1), keepdim=self.keepdim)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (4, 5, 7)], ids=["batch", "one image"])
@pytest.mark.parametrize("keepdim", [True, False])
def test_stock_of_a_conv_pool(keepdim, shape):
    model = randomise(Head(keepdim))
    found = layers_of(model, "block")
    assert [type(module) for module in found] == [modules.FusedConvPool]
    assert_same_work(found, model, image(*shape, scale=4))


# ------------------------------------------------------------------------------------------ rows


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def result(request):
    """The rows and totals of a small network, and what its progress said."""
    dtype = getattr(torch, request.param)
    said = []
    rows, totals = bench(small(dtype), image(10, 3, 32, 32).to(dtype), on_row=said.append)
    return rows, totals, said


def of(rows, level):
    return [row for row in rows if row["level"] == level]


def test_rows_are_what_the_schema_says(result):
    rows, totals, _ = result
    kinds = ("layer", "layer_total")
    schema = {
        "properties": {k: {"items": {"$ref": f"#/$defs/{k}"}, "minItems": 2} for k in kinds},
        "$defs": bench_results.SCHEMA["$defs"],
    }
    jsonschema.validate({"layer": rows, "layer_total": totals}, schema)


BLOCKS = [f"features.{i}" for i in range(2, 18)]


def test_every_block_has_a_row_in_order(result):
    expected = ["stem_block", *BLOCKS, "conv_pool", "classifier.1"]
    assert [row["layer"] for row in of(result[0], "block")] == expected


def test_every_op_has_a_row_in_order(result):
    names = [row["layer"] for row in of(result[0], "op")]
    assert len(names) == len(set(names)) == 52 + 10 + 2  # convolutions, adds, pooling, linear
    assert names[:3] == ["features.0.0", "features.1.conv.0.0", "features.1.conv.1"]
    third = ["features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2", "features.3"]
    assert names[6:10] == third  # the last is the add
    assert names[-2:] == ["global_avg_pool2d", "classifier.1"]


def test_blocks_follow_each_other(result):
    rows = of(result[0], "block")
    assert rows[0]["input"] == [10, 3, 32, 32]
    assert rows[-1]["output"] == [10, 1000]
    for before, after in itertools.pairwise(rows):
        assert math.prod(after["input"]) == math.prod(before["output"])


def test_errors_are_roundings(result):
    rows = result[0]
    unit = torch.finfo(getattr(torch, rows[0]["dtype"])).eps
    assert all(row["agrees"] and row["stock_agrees"] for row in rows)
    assert 0 < max(row["relative_l2"] for row in rows) < 4 * unit
    assert 0 < max(row["stock_relative_l2"] for row in rows) < 4 * unit


def test_cpu_has_no_heuristics_and_no_graphs(result):
    rows, totals, _ = result
    nothing = {row[key] for row in rows + totals for key in row if key.startswith("heuristic_")}
    assert nothing == {None}
    assert {row["caches"] for row in rows} == {"warm"}


def test_progress_is_told_of_every_row(result):
    rows, _, said = result
    assert len(said) == len(rows) == layers.count_layers(small(), image(1, 3, 32, 32))
    assert said[-1] == f"{rows[0]['dtype']}, batch 10, level block: classifier.1"


def test_rates_follow_from_the_times(result):
    row = result[0][-1]  # the classifier
    size = getattr(torch, row["dtype"]).itemsize
    assert row["bytes"] == size * (10 * 1280 + 10 * 1000 + 1280 * 1000 + 1000)
    assert row["flops"] == 2 * 10 * 1280 * 1000
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    assert row["stock_tflop_per_s"] == pytest.approx(row["flops"] / row["stock_us"] / 1e6)
    assert row["ratio"] == pytest.approx(row["stock_us"] / row["us"])
    assert row["floor_us"] == pytest.approx(max(row["bytes"] / 1e4, row["flops"] / 1e5))
    assert row["of_floor"] == pytest.approx(row["floor_us"] / row["us"])


def test_add_and_pool_multiply_nothing(result):
    rows = {row["layer"]: row for row in of(result[0], "op")}
    add, pool = rows["features.3"], rows["global_avg_pool2d"]
    assert (add["kernel"], add["flops"], pool["flops"]) == ("add", 0, 0)
    assert add["bytes"] == 3 * math.prod(add["output"]) * getattr(torch, add["dtype"]).itemsize


def test_totals(result):
    rows, totals, _ = result
    assert [total["level"] for total in totals] == ["op", "block"]
    rows, total = of(rows, "op"), totals[0]
    logs = [math.log(row["ratio"]) for row in rows]
    assert total["geometric_mean"] == pytest.approx(math.exp(sum(logs) / len(logs)))
    assert total["us"] == pytest.approx(sum(row["us"] for row in rows))
    assert total["stock_us"] == pytest.approx(sum(row["stock_us"] for row in rows))


def test_total_takes_stock_where_there_is_no_convolution():
    rows = [
        bench_results.layer("a", us=2.0),  # stock 6, by heuristics 8
        bench_results.layer("b", us=5.0, heuristic_us=None, heuristic_ratio=None),  # stock 15
    ]
    total = layers._total(rows, on_gpu=True)
    assert total["heuristic_us"] == 8 + 15
    assert total["heuristic_geometric_mean"] == pytest.approx(math.sqrt(4 * 3))
    assert layers._total(rows, on_gpu=False)["heuristic_us"] is None


@pytest.mark.parametrize("level", ["op", "block"])
def test_multiply_adds_are_those_of_the_paper(level):
    """300 million for width 1.0 at 224x224 (Sandler et al. 2018, table 4), multiplied out."""
    model = torch_mbv2.MobileNetV2().eval()
    rows, _ = bench(model, image(1, 3, 224, 224), levels=[level])
    assert sum(row["flops"] for row in rows) == 2 * 300_774_272


# ------------------------------------------------------------------------------- what may be wrong


def wrong(rows, key):
    return [row["layer"] for row in rows if not row[key]]


def test_wrong_kernel_disagrees(monkeypatch):
    forward = modules.FusedConvPool.forward
    monkeypatch.setattr(modules.FusedConvPool, "forward", lambda self, x: 1.01 * forward(self, x))
    rows, _ = bench(small(), image(2, 3, 32, 32), levels=["block"])
    assert wrong(rows, "agrees") == ["conv_pool"]
    assert wrong(rows, "stock_agrees") == []


def test_output_that_is_not_written_disagrees(monkeypatch):
    kept = {}

    def forward(self, x):
        return kept.setdefault(self, F.linear(x, self.weight, self.bias))

    monkeypatch.setattr(modules.FusedLinear, "forward", forward)
    rows, _ = bench(small(), image(2, 3, 32, 32), levels=["block"])
    assert wrong(rows, "agrees") == ["classifier.1"]
    assert math.isnan(rows[-1]["relative_l2"])


def test_wrong_stock_is_told(monkeypatch):
    stock_of = layers.stock_of

    def wrong_stock_of(module, dtype):
        right = stock_of(module, dtype)
        if dtype == torch.float64 or not isinstance(module, modules.FusedLinear):
            return right
        return lambda *inputs: 1.001 * right(*inputs)

    monkeypatch.setattr(layers, "stock_of", wrong_stock_of)
    rows, _ = bench(small(), image(2, 3, 32, 32), levels=["block"])
    assert wrong(rows, "stock_agrees") == ["classifier.1"]
    assert wrong(rows, "agrees") == []


def test_stock_may_round_before_its_bias(monkeypatch):
    """As PyTorch's convolutions by cuDNN, which add the bias in a kernel of its own."""
    conv2d = F.conv2d

    def conv2d_and_bias(x, weight, bias, *options):
        return conv2d(x, weight, None, *options) + bias.reshape(-1, 1, 1)

    model = small(torch.bfloat16)
    monkeypatch.setattr(F, "conv2d", conv2d_and_bias)
    rows, _ = bench(model, image(2, 3, 32, 32).bfloat16(), levels=["op"])
    assert wrong(rows, "stock_agrees") == []


# ------------------------------------------------------------------------------------ other models


class Residual(nn.Module):
    """A convolution and two adds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return (y + x) + y


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Residual()

    def forward(self, x):
        return self.block(self.block(x))


def test_calls_of_one_layer_have_a_row_each():
    names = ["conv", "torch_mbv2_add_0", "torch_mbv2_add_1"]  # two adds: no name without these
    rows, _ = bench(randomise(Twice()), image(2, 8, 6, 6), levels=["op"])
    first = [f"block.{name}" for name in names]
    assert [row["layer"] for row in rows] == [*first, *(f"{name} (2)" for name in first)]
    assert all(row["agrees"] for row in rows)


class Broadcast(nn.Module):
    """A convolution, a pooling, and an add that broadcasts, which is left to stock."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        return y + y.mean((2, 3), keepdim=True)


def test_calls_that_stay_stock_have_no_row():
    rows, _ = bench(randomise(Broadcast()), image(2, 8, 6, 6), levels=["op"])
    assert [row["kernel"] for row in rows] == ["gemm", "global_avg_pool2d"]


def test_nothing_patched_is_no_rows():
    assert bench(nn.Sequential(nn.Softmax(1)).eval(), image(2, 8, 6, 6)) == ([], [])


@pytest.mark.parametrize("level", ["op", "block"])
def test_one_image_without_a_batch(level):
    model = network(Block(None, 8), Block(24, 8, residual=True)).features
    rows, _ = bench(model, image(3, 32, 32), levels=[level])
    assert rows[0]["input"] == [3, 32, 32]
    assert all(row["agrees"] and row["stock_agrees"] for row in rows)


def test_model_stays_as_it_is():
    model, x = small(), image(2, 3, 32, 32)
    with torch.inference_mode():
        before, images = model(x), x.clone()
        bench(model, x)
        assert torch.equal(model(x), before)
    assert torch.equal(x, images)
    assert not any(isinstance(module, modules.Swapped) for module in model.modules())


# ------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_copy_shares_nothing_that_is_read(dtype):
    model = torch_mbv2.patch(small(dtype))
    piece = model.features[2].torch_mbv2_inverted_residual_0
    x = image(2, piece.in_channels, 9, 9).to(dtype)
    layer = layers.Layer("features.2", piece, (x,))
    with torch.inference_mode():
        twin = layer.copy()
        assert torch.equal(twin.module(*twin.inputs), piece(x))
    assert twin.inputs[0].stride() == x.stride()

    def pointers(layer):
        state = (*layer.module.parameters(), *layer.module.buffers(), *layer.inputs)
        return {tensor.data_ptr() for tensor in state}

    assert len(pointers(twin)) == len(pointers(layer)) >= 7
    assert not pointers(twin) & pointers(layer)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0", "a.torch_mbv2_add_0"], ["a.0", "a"]),
        (["torch_mbv2_stem_block_0", "classifier.1"], ["stem_block", "classifier.1"]),
        (["a.torch_mbv2_add_0", "a.torch_mbv2_add_1"], None),
        (["torch_mbv2_add_0", "torch_mbv2_add_1"], None),
        (["torch_mbv2_add_0", "add"], ["torch_mbv2_add_0", "add"]),
    ],
)
def test_short_names(names, expected):
    assert layers.short_names(names) == dict(zip(names, expected or names, strict=True))


@pytest.mark.parametrize(
    ("moved", "l2", "fitting", "expected"),
    [
        (30, 100, 1000, (8, "cold")),  # 7 would do, but fewer than 8 do not hide the graph
        (10, 100, 1000, (20, "cold")),
        (11, 100, 1000, (19, "cold")),
        (1, 100, 1000, (64, "warm")),
        (10, 100, 19, (19, "warm")),
        (500, 100, 3, (3, "cold")),
        (500, 100, 0, (1, "cold")),
        (150, 100, 1, (1, "warm")),
    ],
)
def test_copies(moved, l2, fitting, expected):
    assert layers._copies(moved, l2, fitting) == expected


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.cuda
@pytest.mark.parametrize("level", ["op", "block"])
def test_gpu(level):
    before = torch.backends.cudnn.benchmark
    model = small(torch.float16).cuda()
    images = image(2, 3, 64, 64).half().cuda()
    rows, (total,) = bench(model, images, levels=[level])
    assert wrong(rows, "agrees") == wrong(rows, "stock_agrees") == []
    assert {row["caches"] for row in rows} <= {"cold", "warm"}
    without = [row["kernel"] for row in rows if row["heuristic_us"] is None]
    assert set(without) <= {"add", "global_avg_pool2d", "gemm"}
    assert without[-1] == "gemm"  # the classifier
    assert without.count("gemm") == 1
    assert total["heuristic_us"] > 0
    assert torch.backends.cudnn.benchmark == before
