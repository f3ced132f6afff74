"""patch, unpatch and report, on the CPU and (marked `cuda`) on a GPU."""

from __future__ import annotations

import copy
import importlib
import operator
import pickle
from collections import Counter

import onnx
import onnx2torch
import onnx_helpers
import pytest
import reports
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

import torch_mbv2
from torch_mbv2 import modules
from torch_mbv2.modules import FusedConv2d, Swapped
from torch_mbv2.weights import packing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and weights that a wrong fold would show; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return model.eval()


def small_net(**options) -> nn.Module:
    setting = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 2, 2]]
    return randomise(
        torch_mbv2.MobileNetV2(10, inverted_residual_setting=setting, width_mult=0.5, **options)
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def images(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(device)


MODELS = {
    "torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=17),
    "own": lambda: torch_mbv2.MobileNetV2(17, width_mult=0.35),
    "own same": lambda: torch_mbv2.MobileNetV2(17, width_mult=0.35, padding="same"),
    "timm": lambda: timm.create_model("mobilenetv2_035", num_classes=17),
    "graph": lambda: fx.symbolic_trace(torchvision.models.mobilenet_v2(width_mult=0.35).eval()),
    "timm same": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=17),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(),
    "resnet": lambda: torchvision.models.resnet18(num_classes=17),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(),
    "sequential": lambda: _in_one_sequential(torchvision.models.mobilenet_v2(width_mult=0.35)),
    "onnx2torch": lambda: onnx2torch.convert(
        _graph_of(torchvision.models.mobilenet_v2(width_mult=0.35))
    ),
    "loaded": lambda: torch_mbv2.load_onnx(_graph_of(torchvision.models.mnasnet0_5())),
}


def _in_one_sequential(net: nn.Module) -> nn.Sequential:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*net.features, *pool, *net.classifier)


def _graph_of(net: nn.Module) -> onnx.ModelProto:
    """An export, whose batch norms are folded."""
    return onnx_helpers.export(randomise(net), torch.zeros(2, 3, 65, 72), opset_version=13)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {}


@pytest.fixture
def stock(request, models) -> nn.Module:
    name = request.param
    if name not in models:
        models[name] = randomise(MODELS[name]())
    return models[name]


@pytest.mark.parametrize("stock", MODELS, indirect=True)
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_same_answers_and_back(stock, device):
    stock = copy.deepcopy(stock).to(device)
    x = images(2, 3, 65, 72, device=device)
    expected = stock(x)
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    fast = torch_mbv2.patch(stock)
    assert isinstance(
        fast, type(stock) if type(stock).__name__ != "GraphModule" else fx.GraphModule
    )
    assert relative(fast(x), expected) < 2e-5
    assert torch.equal(stock(x), expected), "patch touched the model it was given"
    back = torch_mbv2.unpatch(fast)
    assert torch.equal(back(x), expected)
    assert list(back.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize(
    "stock", ["torchvision", "own", "own same", "timm", "graph"], indirect=True
)
def test_every_layer_of_a_mobilenet_v2_gets_a_kernel(stock):
    report = torch_mbv2.report(torch_mbv2.patch(stock, level="op"))
    counts = {
        kernel: sum(row.kernel == kernel for row in report.rows)
        for kernel in ("gemm", "conv_depthwise", "conv_implicit_gemm", "add", "global_avg_pool2d")
    }
    assert counts == {
        "gemm": 35,
        "conv_depthwise": 17,
        "conv_implicit_gemm": 1,
        "add": 10,
        "global_avg_pool2d": 1,
    }
    assert [row for row in report.stock if row.supported] == []
    torch_mbv2.patch(stock, level="op", strict=True)


def kernel_counts(model: nn.Module) -> dict[str, int]:
    """How many layers each fused block or kernel takes in a patched model."""
    return dict(reports.counts(model))


MOBILENET_V2_BLOCKS = {"stem_block": 1, "inverted_residual": 16, "conv_pool": 1, "gemm": 1}


@pytest.mark.parametrize(
    "stock",
    ["torchvision", "own", "own same", "timm", "graph", "sequential", "onnx2torch"],
    indirect=True,
)
def test_every_block_of_a_mobilenet_v2_is_fused(stock):
    fast = torch_mbv2.patch(stock, strict=True)
    report = torch_mbv2.report(fast)
    assert kernel_counts(fast) == MOBILENET_V2_BLOCKS
    assert [row for row in report.stock if row.supported] == []
    reasons = {row.reason for row in report.rows if row.kernel is not None}
    assert reasons == {None, "float32 has no fused kernel"}
    half = torch_mbv2.report(copy.deepcopy(fast).half())
    assert all(row.reason is None for row in half.rows if row.kernel is not None)
    assert {row.kernel for row in half.patched} == {*MOBILENET_V2_BLOCKS}
    residuals = [row for row in report.rows if row.kernel and row.detail.endswith(", residual")]
    assert len(residuals) == 10


@pytest.mark.parametrize(
    ("stock", "expected"),
    [
        ("timm same", {"stem_block": 1, "inverted_residual": 15, "conv_pool": 1, "gemm": 1}),
        ("mnasnet", {"stem_block": 1, "inverted_residual": 16, "conv_pool": 1, "gemm": 1}),
        ("loaded", {"stem_block": 1, "inverted_residual": 16, "conv_pool": 1, "gemm": 1}),
        (
            "squeezenet",
            {"gemm": 16, "conv_implicit_gemm": 7, "conv_winograd": 2, "conv_pool": 1},
        ),
    ],
    indirect=["stock"],
)
def test_blocks_of_other_networks(stock, expected):
    assert kernel_counts(torch_mbv2.patch(stock)) == expected


@pytest.mark.parametrize("stock", MODELS, indirect=True)
@torch.inference_mode()
def test_blocks_share_the_parameters_of_their_layers(stock):
    by_layer, by_block = (torch_mbv2.patch(stock, level=level) for level in ("op", "block"))
    for fast in (by_block, copy.deepcopy(by_block), pickle.loads(pickle.dumps(by_block))):
        sizes = [sum(p.numel() for p in m.parameters()) for m in (by_layer, fast)]
        assert sizes[0] == sizes[1]
        assert not any("packed" in name for name in fast.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("options", "dtype", "kernel", "launched"),
    [
        ({"kernel_size": 1}, torch.float16, "gemm", "MatrixLoader"),
        ({"kernel_size": 1, "stride": 2}, torch.float32, "conv_implicit_gemm", "WindowLoader"),
        ({"kernel_size": 3, "groups": 64}, torch.float32, "conv_depthwise", "depthwise"),
        ({"kernel_size": 3}, torch.float32, "conv_winograd", "transform_input"),
        ({"kernel_size": 3}, torch.float16, "conv_implicit_gemm", "WindowLoader"),
        ({"kernel_size": 3, "dilation": 2}, torch.float32, "conv_implicit_gemm", "WindowLoader"),
    ],
)
@torch.inference_mode()
def test_report_names_the_kernel_that_runs(options, dtype, kernel, launched):
    model = nn.Sequential(nn.Conv2d(64, 64, **options)).to("cuda", dtype).eval()
    fast = torch_mbv2.patch(model)
    assert torch_mbv2.report(fast).rows[0].kernel == kernel
    x = torch.randn(1, 64, 8, 8, device="cuda", dtype=dtype)
    fast(x)
    with torch.profiler.profile() as profile:
        fast(x)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert "torch_mbv2::conv2d" in names
    assert any("torch_mbv2" in name and launched in name for name in names), names


#: A part of the names of a kernel's functions, as the profiler shows them.
FUNCTIONS = {
    "gemm": "MatrixLoader",
    "conv_implicit_gemm": "WindowLoader",
    "conv_depthwise": "depthwise_",
    "add": "add_kernel",
    "conv_pool": "conv_pool_kernels",
    "inverted_residual": "inverted_residual_kernel",
    "stem_block": "inverted_residual_kernel",
}


@pytest.mark.cuda
@pytest.mark.parametrize("level", ["op", "block", "network"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_report_names_what_the_profiler_sees(dtype, level):
    net = randomise(torch_mbv2.MobileNetV2(16)).to("cuda", dtype)
    fast = torch_mbv2.patch(net, level=level)
    x = images(2, 3, 96, 96, device="cuda").to(dtype)
    fast(x)
    with torch.profiler.profile() as profile:
        fast(x)
        torch.cuda.synchronize()
    seen = Counter(
        function
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "torch_mbv2" in event.name
        for function in set(FUNCTIONS.values())
        if function in event.name
    )
    kernels = [k for row in torch_mbv2.report(fast).patched for k in row.kernel.split(" + ")]
    assert seen == Counter(FUNCTIONS[kernel] for kernel in kernels if kernel in FUNCTIONS)
    assert sum(seen.values()) >= (50 if dtype == torch.float32 else 19)


@pytest.mark.parametrize("stock", ["torchvision", "own same", "timm", "graph"], indirect=True)
@torch.inference_mode()
def test_copies_and_pickles(stock):
    fast = torch_mbv2.patch(stock)
    x = images(1, 3, 64, 64)
    expected = fast(x)
    for clone in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(clone(x), expected)
        assert str(torch_mbv2.report(clone)) == str(torch_mbv2.report(fast))
        assert torch.equal(torch_mbv2.unpatch(clone)(x), stock(x))


@torch.inference_mode()
def test_patching_twice_is_patching_once():
    net = small_net()
    x = images(1, 3, 32, 32)
    once = torch_mbv2.patch(net)
    twice = torch_mbv2.patch(once)
    assert torch.equal(twice(x), once(x))
    assert str(torch_mbv2.report(twice)) == str(torch_mbv2.report(once))
    assert torch.equal(torch_mbv2.unpatch(twice)(x), net(x))


@pytest.mark.parametrize("level", ["op", "block", "network"])
@torch.inference_mode()
def test_in_place(level):
    net = small_net()
    x = images(1, 3, 32, 32)
    expected = net(x)
    assert torch_mbv2.patch(net, level=level, inplace=True) is net
    assert any(isinstance(m, Swapped) for m in net.modules())
    assert relative(net(x), expected) < 1e-5
    assert torch.equal(torch_mbv2.unpatch(net)(x), expected)


def test_attributes_and_parts_still_work():
    net = small_net()
    fast = torch_mbv2.patch(net)
    x = images(1, 3, 32, 32)
    with torch.inference_mode():
        assert relative(fast.features(x), net.features(x)) < 1e-5
        assert relative(fast.features[:3](x), net.features[:3](x)) < 1e-5
        first = net.features[0](x)
        assert relative(fast.features[0](x), first) < 1e-5
        assert relative(fast.features[1](first), net.features[1](first)) < 1e-5
        assert relative(fast.features[1].conv(first), net.features[1].conv(first)) < 1e-5
    assert not any(p.requires_grad for p in fast.parameters())
    assert not any("stock" in name for name in fast.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_after_patching(dtype):
    net = small_net()
    x = images(2, 3, 32, 32).to(dtype)
    fast = torch_mbv2.patch(net).to(dtype)
    exact = copy.deepcopy(net).double()(x.double())
    half = copy.deepcopy(net).to(dtype)
    assert relative(fast(x), exact) <= 1.5 * relative(half(x), exact)
    assert torch.equal(torch_mbv2.unpatch(fast)(x), half(x))


@torch.inference_mode()
def test_training_mode_is_refused():
    net = small_net()
    with pytest.raises(torch_mbv2.Error, match=r"training mode; call model\.eval\(\)"):
        torch_mbv2.patch(net.train())
    fast = torch_mbv2.patch(net.eval())
    with pytest.raises(RuntimeError, match="is for inference only"):
        fast.train()(images(1, 3, 32, 32))
    net.features[3].train()
    with pytest.raises(torch_mbv2.Error, match=r"'features\.3' is in training mode"):
        torch_mbv2.patch(net)


def packed(fast: nn.Module) -> list[torch.Tensor | None]:
    """What the blocks of a patched model keep packed, checked against their weights: as bits,
    because halves of floats can look like NaN."""
    found = []
    for block in fast.modules():
        if isinstance(block, modules.FusedInvertedResidual | modules.FusedStemBlock):
            expected = getattr(packing, f"pack_{block.kind}")(*block._tensors())
            assert expected is None or block.packed.dtype == block.project_weight.dtype
            for name, exact in block.exact_biases.items():  # of which the parameters are roundings
                bias = block._parameters[name]
                assert (exact is None) == (bias is None)
                if exact is not None:
                    assert exact.dtype == torch.float32
                    torch.testing.assert_close(bias.float(), exact, rtol=2**-7, atol=1e-6)
            assert (block.packed is None) == (expected is None)
            found.append(None if expected is None else block.packed.view(torch.int16))
            assert expected is None or torch.equal(found[-1], expected.view(torch.int16))
    assert found
    return found


@pytest.mark.parametrize("stock", ["torchvision", "graph"], indirect=True)
@torch.inference_mode()
def test_packed_weights_follow_the_weights(stock):
    fast = torch_mbv2.patch(stock)
    assert packed(fast) == [None] * len(packed(fast)), "no fused kernel takes float32"
    fast.half()
    assert all(p is not None for p in packed(fast))
    state = {name: value * 2 for name, value in fast.state_dict().items()}
    before = packed(fast)
    fast.load_state_dict(state)
    assert not any(torch.equal(a, b) for a, b in zip(packed(fast), before, strict=True))
    for clone in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert all(map(torch.equal, packed(clone), packed(fast)))
        assert all(p is not None for p in packed(clone.bfloat16()))
        state = {name: value * 2 for name, value in clone.state_dict().items()}
        clone.load_state_dict(state)
        packed(clone)


def test_unknown_level_is_refused():
    with pytest.raises(
        torch_mbv2.Error, match=r"level must be one of \('op', 'block', 'network'\), got 'all'"
    ):
        torch_mbv2.patch(small_net(), level="all")


def test_input_that_requires_grad_is_refused():
    fast = torch_mbv2.patch(small_net())
    with pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        fast(images(1, 3, 32, 32).requires_grad_())


@torch.inference_mode()
def test_filter_leaves_layers_stock_and_strict_says_so():
    net = small_net()

    def keep_first(name: str, module: nn.Module) -> bool:
        return not name.startswith("features.0.")

    fast = torch_mbv2.patch(net, filter_fn=keep_first)
    assert type(fast.features[0][0]) is nn.Conv2d
    assert type(fast.features[0][1]) is nn.BatchNorm2d
    rows = {row.name: row for row in torch_mbv2.report(fast).rows}
    assert rows["features.0.0"].reason == "filter_fn left it out"
    assert relative(fast(images(1, 3, 32, 32)), net(images(1, 3, 32, 32))) < 1e-5
    with pytest.raises(torch_mbv2.Error, match=r"strict=True.*features\.0\.0: filter_fn"):
        torch_mbv2.patch(net, filter_fn=keep_first, strict=True)


def test_strict_leaves_the_model_alone_when_it_fails():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    net.eval()
    with pytest.raises(torch_mbv2.Error, match="padding_mode 'reflect'"):
        torch_mbv2.patch(net, strict=True, inplace=True)
    assert [type(m) for m in net] == [nn.Conv2d, nn.Conv2d]


# ------------------------------------------------------------- what matches, and what must not


class Calls(nn.Module):
    """Wraps a function of (self, x) as a model with the given layers."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(*args, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)


class ScaledConv2d(nn.Conv2d):
    """A convolution that does something else, as subclasses may."""

    def forward(self, input):
        return 2 * super().forward(input)


def _shared_activation(m, x):
    return m.act(m.b(m.act(m.a(x))))


def _norm_used_twice(m, x):
    return m.norm(m.a(x)) + m.norm(x)


def _two_users(m, x):
    y = m.a(x)
    return F.relu(y) + y


def _in_place_add(m, x):
    y = m.a(x)
    y += x
    return y


def _in_place_add_used_before(m, x):
    y = m.a(x)
    z = y * 2
    y += x
    return y + z


def _untraceable_block(m, x):
    return x if x.sum() > 1e9 else _block(m, x)


def _branch(m, x):
    if x.sum() > 1e9:
        return x
    return m.norm(m.a(x))


def expand(channels: int = 8) -> nn.Conv2d:
    return conv(4, channels, 1)


def depthwise(channels: int = 8, stride: int = 1, padding: int = 1, **kwargs) -> nn.Conv2d:
    return conv(channels, channels, 3, stride, padding, groups=channels, **kwargs)


def project(channels: int = 8, **kwargs) -> nn.Conv2d:
    return conv(channels, 4, 1, **kwargs)


def _block(m, x, first=F.relu6, second=F.relu6):
    return m.c(second(m.b(first(m.a(x)))))


def _expansion_used_twice(m, x):
    y = F.relu6(m.a(x))
    return m.c(F.relu6(m.b(y))) + y[:, :4]


def _depthwise_used_twice(m, x):
    y = F.relu6(m.b(F.relu6(m.a(x))))
    return m.c(y) + y[:, :4]


def _output_used_twice(m, x):
    y = _block(m, x)
    return y * y.sigmoid()


def _conv_used_twice(m, x):
    y = m.a(x)
    return (y + x).mean((2, 3))


BLOCK = {"a": expand(), "b": depthwise(), "c": project()}
STEM = {"a": conv(4, 8, 3, 2), "b": depthwise(), "c": project()}
#: rows of a block of three layers without batch norm, whose activations are functions
FUSED = ["folded", "folded", "folded", "inverted_residual"]

CASES = {
    "block": (_block, BLOCK),
    "block with residual": (lambda m, x: x + _block(m, x), BLOCK),
    "block with residual, other order": (lambda m, x: torch.add(_block(m, x), x), BLOCK),
    "block, clipped and padded by functions": (
        lambda m, x: m.c(F.hardtanh(m.b(F.pad(m.a(x).clamp(-0.1, 0.2), (0, 1, 0, 1))), -0.1, 0.2)),
        BLOCK | {"b": depthwise(stride=2, padding=0)},
    ),
    "block without activation": (lambda m, x: m.c(m.b(m.a(x))), BLOCK),
    "block of two activations": (lambda m, x: _block(m, x, F.relu), BLOCK),
    "block of one more bound": (lambda m, x: _block(m, x, lambda y: y.clamp(0.05, 6)), BLOCK),
    "block with an activation after it": (lambda m, x: F.relu(_block(m, x)), BLOCK),
    "block whose expansion is used twice": (_expansion_used_twice, BLOCK),
    "block whose depthwise layer is used twice": (_depthwise_used_twice, BLOCK),
    "block whose output is used twice": (_output_used_twice, BLOCK),
    "block with a multiplier": (
        _block,
        BLOCK | {"b": conv(8, 16, 3, groups=8), "c": project(16)},
    ),
    "block of groups": (_block, BLOCK | {"b": conv(8, 8, 3, groups=4)}),
    "block with dilation": (_block, BLOCK | {"b": depthwise(dilation=2)}),
    "block with a strided projection": (_block, BLOCK | {"c": project(stride=2)}),
    "block plus something else": (lambda m, x: _block(m, x) + (x - 1), BLOCK),
    "block plus its input, relu": (lambda m, x: F.relu(_block(m, x) + x), BLOCK),
    "block that shrinks plus its input": (
        lambda m, x: _block(m, x[:, :, :3, :3]) + x[:, :, :3, :3],
        BLOCK | {"b": depthwise(padding=0)},
    ),
    "block of a shared layer": (
        lambda m, x: m.c(F.relu6(m.b(F.relu6(m.b(F.relu6(m.a(x))))))),
        BLOCK,
    ),
    "block without expansion": (
        lambda m, x: m.c(F.relu(m.b(x))),
        {"b": depthwise(4), "c": conv(4, 8, 1)},
    ),
    "untraceable block": (_untraceable_block, BLOCK),
    "stem and block": (_block, STEM),
    "stem of another activation": (lambda m, x: _block(m, x, F.relu), STEM),
    "stem and strided block": (_block, STEM | {"b": depthwise(stride=2)}),
    "stem of groups": (_block, STEM | {"a": conv(4, 8, 3, groups=2)}),
    "conv, pool": (lambda m, x: m.a(x).mean((2, 3)), {"a": expand()}),
    "conv, relu, adaptive pool": (
        lambda m, x: m.p(m.act(m.a(x))),
        {"a": expand(), "act": nn.ReLU(), "p": nn.AdaptiveAvgPool2d(1)},
    ),
    "conv, mean, kept": (lambda m, x: m.a(x).relu().mean([-2, -1], True), {"a": expand()}),
    "conv, mean twice": (lambda m, x: m.a(x).mean(3).mean(2), {"a": expand()}),
    "conv used twice, pool": (_conv_used_twice, {"a": expand(4)}),
    "conv, relu function": (lambda m, x: F.relu(m.a(x)), {"a": conv(4, 4, 3)}),
    "conv, relu6 function": (lambda m, x: F.relu6(m.a(x)), {"a": conv(4, 4, 3)}),
    "conv, clamp": (lambda m, x: m.a(x).clamp(-0.1, 0.2), {"a": conv(4, 4, 3)}),
    "conv, clamp by keyword": (lambda m, x: torch.clamp(m.a(x), max=0.1), {"a": conv(4, 4, 3)}),
    "conv, hardtanh": (lambda m, x: F.hardtanh(m.a(x), -0.1, 0.3), {"a": conv(4, 4, 3)}),
    "conv, Hardtanh": (
        lambda m, x: m.act(m.a(x)),
        {"a": conv(4, 4, 3), "act": nn.Hardtanh(-0.2, 0.1)},
    ),
    "conv, sigmoid": (lambda m, x: torch.sigmoid(m.a(x)), {"a": conv(4, 4, 3)}),
    "two convs without norm between": (
        lambda m, x: m.norm(m.b(m.a(x))),
        {"a": conv(4, 5, 3), "b": conv(5, 4, 1), "norm": nn.BatchNorm2d(4)},
    ),
    "shared activation": (
        _shared_activation,
        {"a": conv(4, 4, 3), "b": conv(4, 4, 1), "act": nn.ReLU()},
    ),
    "shared convolution": (lambda m, x: m.a(F.relu(m.a(x))), {"a": conv(4, 4, 3, padding=1)}),
    "shared norm": (
        _norm_used_twice,
        {"a": conv(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)},
    ),
    "output used twice": (_two_users, {"a": conv(4, 4, 3, padding=1)}),
    "in-place add": (_in_place_add, {"a": conv(4, 4, 3, padding=1)}),
    "in-place add, used before": (_in_place_add_used_before, {"a": conv(4, 4, 3, padding=1)}),
    "untraceable": (_branch, {"a": conv(4, 4, 3), "norm": nn.BatchNorm2d(4)}),
    "norm before conv": (
        lambda m, x: m.a(m.norm(x)),
        {"a": conv(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)},
    ),
    "norm without statistics": (
        lambda m, x: m.norm(m.a(x)),
        {"a": conv(4, 4, 3), "norm": nn.BatchNorm2d(4, track_running_stats=False)},
    ),
    "ZeroPad2d": (
        lambda m, x: m.a(m.pad(x)),
        {"pad": nn.ZeroPad2d((0, 1, 2, 3)), "a": conv(4, 4, 3, stride=2)},
    ),
    "ConstantPad2d of 1": (
        lambda m, x: m.a(m.pad(x)),
        {"pad": nn.ConstantPad2d(1, 1.0), "a": conv(4, 4, 3)},
    ),
    "ReflectionPad2d": (
        lambda m, x: m.a(m.pad(x)),
        {"pad": nn.ReflectionPad2d(1), "a": conv(4, 4, 3)},
    ),
    "negative pad": (
        lambda m, x: m.a(m.pad(x)),
        {"pad": nn.ZeroPad2d(-1), "a": conv(4, 4, 3, padding=2)},
    ),
    "F.pad": (lambda m, x: m.a(F.pad(x, (1, 0, 2, 0))), {"a": conv(4, 4, 3, padding=1)}),
    "F.pad of a value": (lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), value=2.0)), {"a": conv(4, 4, 3)}),
    "F.pad reflect": (
        lambda m, x: m.a(F.pad(x, (1, 1, 1, 1), mode="reflect")),
        {"a": conv(4, 4, 3)},
    ),
    "padding same": (lambda m, x: m.a(x), {"a": conv(4, 6, (4, 3), padding="same", dilation=2)}),
    "padding valid": (lambda m, x: m.a(x), {"a": conv(4, 6, (4, 3), padding="valid")}),
    "padding circular": (
        lambda m, x: m.a(x),
        {"a": conv(4, 6, 3, padding=1, padding_mode="circular")},
    ),
    "broadcasting add": (
        lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True),
        {"a": conv(4, 4, 3)},
    ),
    "add of shapes": (lambda m, x: m.a(x) * (x.shape[0] + x.shape[1]), {"a": conv(4, 4, 3)}),
    "add with alpha": (
        lambda m, x: torch.add(m.a(x), x, alpha=2),
        {"a": conv(4, 4, 3, padding=1)},
    ),
    "add, relu": (lambda m, x: F.relu(m.a(x) + x), {"a": conv(4, 4, 3, padding=1)}),
    "mean": (lambda m, x: m.a(x).mean([2, 3]), {"a": conv(4, 4, 3)}),
    "mean, kept, negative": (lambda m, x: m.a(x).mean((-1, -2), True), {"a": conv(4, 4, 3)}),
    "mean twice": (lambda m, x: m.a(x).mean(3).mean(2), {"a": conv(4, 4, 3)}),
    "mean twice from the right": (lambda m, x: m.a(x).mean(-1).mean(-1), {"a": conv(4, 4, 3)}),
    "mean of channels": (lambda m, x: m.a(x).mean(1), {"a": conv(4, 4, 3)}),
    # Moved away from 0, where a mean of everything would cancel to little but rounding.
    "mean of all": (lambda m, x: m.a(x + 5).mean(), {"a": conv(4, 4, 3)}),
    "mean of a vector": (
        lambda m, x: m.a(x + 5).flatten(1).mean((0, 1)),
        {"a": conv(4, 4, 3)},
    ),
    "avg_pool2d": (
        lambda m, x: F.avg_pool2d(m.a(x), 3, 2, 1, True, False),
        {"a": conv(4, 4, 3)},
    ),
    "AvgPool2d": (
        lambda m, x: m.p(x),
        {"p": nn.AvgPool2d((3, 2), (1, 2), (1, 0), True, False, 5)},
    ),
    "AdaptiveAvgPool2d(1)": (lambda m, x: m.p(x), {"p": nn.AdaptiveAvgPool2d(1)}),
    "AdaptiveAvgPool2d(3)": (lambda m, x: m.p(x), {"p": nn.AdaptiveAvgPool2d(3)}),
    "adaptive_avg_pool2d": (
        lambda m, x: F.adaptive_avg_pool2d(m.a(x), (1, 1)),
        {"a": conv(4, 4, 3)},
    ),
    "Linear, relu": (
        lambda m, x: F.relu(m.d(m.l(x.flatten(2)))),
        {"l": nn.Linear(99, 7), "d": nn.Dropout(0.5)},
    ),
    "transposed convolution": (lambda m, x: m.a(x), {"a": nn.ConvTranspose2d(4, 4, 3)}),
    "parameters read directly": (
        lambda m, x: F.conv2d(m.a(x), m.a.weight),
        {"a": conv(4, 4, 3, padding=1)},
    ),
    "lazy operator": (lambda m, x: operator.add(m.a(x), x), {"a": conv(4, 4, 3, padding=1)}),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_whatever_is_matched_the_answer_stays(case):
    torch.manual_seed(0)
    function, layers = CASES[case]
    net = randomise(Calls(function, **layers))
    x = images(2, 4, 9, 11)
    expected = net(x.clone())
    fast = torch_mbv2.patch(net)
    assert relative(fast(x.clone()), expected) < 2e-6
    assert torch.equal(torch_mbv2.unpatch(fast)(x.clone()), expected)


def kernels(net: nn.Module) -> list[str]:
    rows = torch_mbv2.report(torch_mbv2.patch(net)).rows
    return [takes for row in rows if (takes := reports.takes(row)) is not None]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("conv, relu function", ["conv_implicit_gemm"]),
        ("shared activation", ["conv_implicit_gemm", "gemm"]),
        ("ZeroPad2d", ["folded", "conv_implicit_gemm"]),
        ("ConstantPad2d of 1", ["conv_implicit_gemm"]),
        ("padding circular", []),
        ("transposed convolution", []),
        ("add, relu", ["conv_implicit_gemm", "add"]),
        ("block", FUSED),
        ("block with residual", FUSED),
        ("block with residual, other order", FUSED),
        ("block, clipped and padded by functions", FUSED),
        ("block without activation", FUSED),
        ("block of two activations", ["gemm", "conv_depthwise", "gemm"]),
        ("block of one more bound", ["gemm", "conv_depthwise", "gemm"]),
        ("block with an activation after it", ["gemm", "conv_depthwise", "gemm"]),
        (
            "block whose expansion is used twice",
            ["gemm", "folded", "folded", "add", "inverted_residual"],
        ),
        ("block whose depthwise layer is used twice", ["gemm", "conv_depthwise", "gemm", "add"]),
        ("block whose output is used twice", FUSED),
        ("block with a multiplier", ["gemm", "conv_implicit_gemm", "gemm"]),
        ("block of groups", ["gemm", "conv_implicit_gemm", "gemm"]),
        ("block with dilation", ["gemm", "conv_depthwise", "gemm"]),
        ("block with a strided projection", ["gemm", "conv_depthwise", "conv_implicit_gemm"]),
        ("block plus something else", [*FUSED[:-1], "add", "inverted_residual"]),
        ("block plus its input, relu", [*FUSED[:-1], "add", "inverted_residual"]),
        ("block that shrinks plus its input", [*FUSED[:-1], "add", "inverted_residual"]),
        ("block of a shared layer", ["gemm", "conv_depthwise", "gemm"]),
        ("block without expansion", ["folded", "folded", "inverted_residual"]),
        ("stem and block", ["folded"] * 3 + ["stem_block"]),
        (
            "stem of another activation",
            ["conv_implicit_gemm", *["folded"] * 2, "inverted_residual"],
        ),
        ("stem and strided block", ["conv_implicit_gemm", *["folded"] * 2, "inverted_residual"]),
        ("stem of groups", ["conv_implicit_gemm", *["folded"] * 2, "inverted_residual"]),
        ("conv, pool", ["folded", "conv_pool"]),
        ("conv, relu, adaptive pool", ["folded", "folded", "folded", "conv_pool"]),
        ("conv, mean, kept", ["folded", "conv_pool"]),
        ("conv, mean twice", ["folded", "conv_pool"]),
        ("conv used twice, pool", ["gemm", "add", "global_avg_pool2d"]),
        ("mean twice", ["conv_implicit_gemm", "global_avg_pool2d"]),
        ("AdaptiveAvgPool2d(3)", []),
        ("parameters read directly", []),
        ("untraceable", ["conv_implicit_gemm"]),
        ("norm before conv", ["conv_implicit_gemm"]),
    ],
)
def test_kernels_of_a_pattern(case, expected):
    function, layers = CASES[case]
    assert kernels(randomise(Calls(function, **layers))) == expected


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            conv(4, 4, 3, padding=1, padding_mode="circular"),
            "padding_mode 'circular' has no kernel",
        ),
        (conv(4, 4, 3).double(), "dtype float64 has no kernel"),
        (nn.AdaptiveAvgPool2d(3), "adaptive pooling to 3 has no kernel"),
        (nn.BatchNorm2d(4), "no convolution that is used only here comes right before it"),
        (nn.ReLU6(), "no layer with a kernel"),
        (nn.MaxPool2d(2), "no kernel for MaxPool2d"),
        (nn.Softmax(1), "no kernel for Softmax"),
        (ScaledConv2d(4, 4, 3), "a subclass of Conv2d may do something else"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_reason_why_a_layer_stays_stock(layer, reason):
    (row,) = torch_mbv2.report(nn.Sequential(layer).eval()).rows
    assert row.kernel is None
    assert reason in row.reason


@pytest.mark.parametrize(
    ("case", "kind", "reason"),
    [
        ("block of two activations", "depthwise", "before it has another activation"),
        ("block with an activation after it", "depthwise", "after it has an activation"),
        ("block whose depthwise layer is used twice", "depthwise", "right after it"),
        ("block with a strided projection", "depthwise", "right after it"),
        ("block with dilation", "depthwise", "no dilation (2, 2)"),
        ("block of a shared layer", "depthwise", "called in several places"),
        ("stem of another activation", "conv2d", "the block after it has another activation"),
        ("stem and strided block", "conv2d", "the block after it has a stride"),
        ("stem of groups", "conv2d", "one group"),
        ("conv used twice, pool", "global_avg_pool2d", "right before it"),
        ("untraceable block", "depthwise", "torch.fx cannot trace"),
    ],
)
def test_reason_why_a_layer_is_in_no_block(case, kind, reason):
    function, layers = CASES[case]
    fast = torch_mbv2.patch(randomise(Calls(function, **layers)))
    rows = torch_mbv2.report(fast).patched
    (row,) = (row for row in rows if row.reason not in (None, "float32 has no fused kernel"))
    assert row.kind == kind
    assert reason in row.reason
    assert reason in str(torch_mbv2.report(fast))


@torch.inference_mode()
def test_layers_with_hooks_stay_and_their_hooks_run():
    net = small_net()
    seen = []
    net.features[0][1].register_forward_hook(lambda *args: seen.append("norm"))
    fast = torch_mbv2.patch(net)
    fast(images(1, 3, 32, 32))
    assert seen == ["norm"]
    rows = {row.name: row for row in torch_mbv2.report(fast).rows}
    assert "hooks" in rows["features.0.1"].reason


@pytest.mark.parametrize(
    ("hooked", "fused"),
    [
        ("features.0", {"inverted_residual": 5, "conv_pool": 1}),
        ("features.0.2", {"inverted_residual": 5, "conv_pool": 1}),
        ("features.1", {"inverted_residual": 5, "conv_pool": 1}),
        ("features.1.conv.1", {"inverted_residual": 4, "conv_pool": 1}),
        ("features.2", {"stem_block": 1, "inverted_residual": 4, "conv_pool": 1}),
        ("features.2.conv.0.2", {"stem_block": 1, "inverted_residual": 4, "conv_pool": 1}),
        ("features.2.conv.1", {"stem_block": 1, "inverted_residual": 3, "conv_pool": 1}),
        ("features.3.conv.3", {"stem_block": 1, "inverted_residual": 4, "conv_pool": 1}),
        ("features.6.2", {"stem_block": 1, "inverted_residual": 4}),
        ("", {"stem_block": 1, "inverted_residual": 4, "conv_pool": 1}),
    ],
)
@torch.inference_mode()
def test_hooks_see_what_they_saw(hooked, fused):
    net = small_net()
    seen = []
    net.get_submodule(hooked).register_forward_hook(lambda m, inputs, out: seen.append(out.clone()))
    x = images(1, 3, 32, 32)
    net(x)
    fast = torch_mbv2.patch(net)
    fast(x)
    assert relative(seen[1], seen[0]) < 1e-5
    names = ("stem_block", "inverted_residual", "conv_pool")
    assert {k: n for k, n in kernel_counts(fast).items() if k in names} == fused


@pytest.mark.parametrize(
    ("part", "left"),
    [
        ("", None),
        ("0.0", "48 -> 8, 3x3"),  # a block from the depthwise layer on
        ("0.1", "48 -> 8, 3x3"),
        ("0.2", "48 -> 8, 3x3"),
        ("1.0", None),
        ("1.1", None),
        ("1.2", None),
        ("2", None),
        ("3", "8 -> 48 -> 8, 3x3"),  # a block without the residual
    ],
)
@torch.inference_mode()
def test_filter_leaves_parts_of_blocks_out(part, left):
    net = small_net()
    layer = f"features.3.conv.{part}" if part else "features.3"
    fast = torch_mbv2.patch(net, filter_fn=lambda name, module: name != layer)
    rows = {row.name: row for row in torch_mbv2.report(fast).rows}
    block = rows.get("features.3.torch_mbv2_inverted_residual_0")
    assert (block and block.detail) == left
    assert "features.2.torch_mbv2_inverted_residual_0" in rows
    assert not part or type(fast.get_submodule(layer)) is type(net.get_submodule(layer))
    x = images(1, 3, 32, 32)
    assert relative(fast(x), net(x)) < 1e-5
    assert torch.equal(torch_mbv2.unpatch(fast)(x), net(x))


@torch.inference_mode()
def test_filter_that_leaves_the_model_out_leaves_its_forward():
    fast = torch_mbv2.patch(small_net(), filter_fn=lambda name, module: name != "")
    found = kernel_counts(fast)
    assert found["inverted_residual"] == 5
    assert not {"stem_block", "conv_pool"} & set(found)


def test_report_of_an_unpatched_model_tells_what_patch_would_do():
    net = small_net().train()
    would = torch_mbv2.report(net)
    assert str(would) == str(torch_mbv2.report(torch_mbv2.patch(net.eval())))
    assert not any(isinstance(m, Swapped) for m in net.modules())
    plain = would.to_dict()
    assert plain["summary"] == would.summary()
    assert plain["rows"][-1]["kernel"] == "conv_pool"


@torch.inference_mode()
def test_a_bare_layer():
    layer = conv(3, 4, 3).eval()
    fast = torch_mbv2.patch(layer)
    assert type(fast) is FusedConv2d
    assert relative(fast(images(1, 3, 8, 8)), layer(images(1, 3, 8, 8))) < 1e-6
    assert type(torch_mbv2.unpatch(fast)) is nn.Conv2d
    with pytest.raises(torch_mbv2.Error, match="cannot become another module in place"):
        torch_mbv2.patch(layer, inplace=True)


@pytest.mark.parametrize("stock", ["torchvision", "own same", "timm"], indirect=True)
@torch.inference_mode()
def test_fold_norms_is_stock_and_the_same(stock):
    from torch_mbv2.patch import fold_norms

    folded = fold_norms(stock)
    x = images(1, 3, 64, 64)
    assert not any(isinstance(m, nn.BatchNorm2d | Swapped) for m in folded.modules())
    assert relative(folded(x), stock(x)) < 2e-5


# ------------------------------------------------------------------------ the PyTorch ecosystem


def test_compiles_whole():
    fast = torch_mbv2.patch(small_net())
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        expected = fast(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_exports_with_a_dynamic_batch(padding):
    fast = torch_mbv2.patch(small_net(padding=padding))
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            fast, (images(2, 3, 33, 32),), dynamic_shapes={"x": {0: batch}}
        )
        x = images(5, 3, 33, 32)
        assert torch.equal(program.module()(x), fast(x))


def test_extra_repr_is_complete():
    layer = FusedConv2d.from_stock(conv(8, 8, 3, stride=2, groups=8), act_min=0.0, act_max=6.0)
    assert repr(layer) == (
        "FusedConv2d(8, 8, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0, 0, 0), "
        "dilation=(1, 1), groups=8, bias=True, activation=relu6)"
    )


def test_extra_repr_of_blocks_is_complete():
    expand = FusedConv2d.from_stock(conv(8, 16, 1, bias=False), act_min=0.0)
    depthwise = FusedConv2d.from_stock(
        conv(16, 16, (3, 5), 2, groups=16), same=True, act_min=0.0, act_max=6.0
    )
    point = FusedConv2d.from_stock(conv(16, 8, 1))
    block = modules.FusedInvertedResidual.from_stock(expand, depthwise, point, residual=True)
    assert repr(block) == (
        "FusedInvertedResidual(8, 16, 8, expand=True, kernel_size=(3, 5), stride=(2, 2), "
        "padding=same, residual=True, expand_bias=False, depthwise_bias=True, project_bias=True, "
        "activation=relu6)"
    )
    depthwise = FusedConv2d.from_stock(conv(16, 16, 3, groups=16), same=True, act_min=0.0)
    block = modules.FusedInvertedResidual.from_stock(None, depthwise, point)
    stem = FusedConv2d.from_stock(conv(3, 16, 5, 2, 1), act_min=0.0)
    assert repr(modules.FusedStemBlock.from_stock(stem, block)) == (
        "FusedStemBlock(3, 16, 8, stem_kernel_size=(5, 5), stem_stride=(2, 2), "
        "stem_padding=(1, 1, 1, 1), kernel_size=(3, 3), padding=(1, 1, 1, 1), stem_bias=True, "
        "depthwise_bias=True, project_bias=True, activation=relu)"
    )
    pool = modules.GlobalAvgPool2d(None, keepdim=True)
    assert repr(modules.FusedConvPool.from_stock(expand, pool)) == (
        "FusedConvPool(8, 16, keepdim=True, bias=False, activation=relu)"
    )


@pytest.mark.parametrize("size", [7, 8, 9, 224, 225])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (3, 1, 1), (5, 2, 1), (3, 1, 2)]
)
def test_same_padding_gives_ceil_of_size_over_stride(size, kernel, stride, dilation):
    x = torch.empty(1, 1, size, size + 1)
    pads = modules.same_padding(x, (kernel,) * 2, (stride,) * 2, (dilation,) * 2)
    out = F.conv2d(F.pad(x, pads), torch.empty(1, 1, kernel, kernel), None, stride, 0, dilation)
    assert out.shape[2:] == (-(-size // stride), -(-(size + 1) // stride))
    assert 0 <= pads[1] - pads[0] <= 1
    assert 0 <= pads[3] - pads[2] <= 1


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_one_image_without_a_batch(device):
    stock = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2)
    )
    stock = stock.to(device).eval()
    x = images(1, 3, 9, 8, device=device)[0]
    got = torch_mbv2.patch(stock)(x)
    assert got.shape == (8, 4, 4)
    assert relative(got, stock(x)) < 2e-6


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_blocks_take_one_image_without_a_batch(device, padding):
    net = small_net(padding=padding).to(device)
    stock = nn.Sequential(*net.features, nn.AdaptiveAvgPool2d(1)).eval()
    fast = torch_mbv2.patch(stock)
    assert kernel_counts(fast) == {"stem_block": 1, "inverted_residual": 4, "conv_pool": 1}
    x = images(1, 3, 33, 32, device=device)[0]
    got = fast(x)
    assert got.shape == (1280, 1, 1)
    assert relative(got, stock(x[None])[0]) < 1e-5  # stock batch norms take batches only


@pytest.mark.parametrize("verb", ["patch", "unpatch", "report"])
def test_what_is_no_module_is_refused(verb):
    with pytest.raises(torch_mbv2.Error, match=rf"^torch_mbv2\.{verb}: model must be a .*, got 3$"):
        getattr(torch_mbv2, verb)(3)


def test_model_without_anything_to_report(monkeypatch):
    """Reporting on it patches it once, and not again and again."""
    module = importlib.import_module("torch_mbv2.patch")  # the name is the function's, too
    calls, one = [], module._patch
    monkeypatch.setattr(module, "_patch", lambda *args: (calls.append(args), one(*args)))
    assert torch_mbv2.report(nn.Sequential(nn.Identity()).eval()).rows == []
    assert len(calls) == 1
