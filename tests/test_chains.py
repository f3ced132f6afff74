"""Forwards whose layers are one call: which chains are found, and when they are taken."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from onnx_helpers import randomise
from torch import Tensor, fx, nn

import torch_mbv2
from torch_mbv2 import chains, modules

SETTING = [[1, 8, 1, 1], [6, 16, 2, 2]]


def small_net() -> nn.Module:
    return randomise(torch_mbv2.MobileNetV2(10, inverted_residual_setting=SETTING))


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 33, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The number of layers of each network that ran."""
    counts: list[int] = []
    run = chains.Network.forward

    def forward(self: chains.Network, input: Tensor) -> Tensor:
        counts.append(len(self.layers_in_order()))
        return run(self, input)

    monkeypatch.setattr(chains.Network, "forward", forward)
    return counts


# --------------------------------------------------------------------------- what is one chain


class Classifier(nn.Module):
    """A chain between what stays stock."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.net(torch.tanh(x)), dim=1)


class Twice(nn.Module):
    """Two chains, the second on values that no chain hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


class Branches(nn.Module):
    """The value in the middle is used outside of the chain: it ends there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.b(self.a(x))
        return self.c(middle), torch.sigmoid(middle)


class Residual(nn.Module):
    """Adds of values before, of the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + x
        return self.b(y) + y


class InPlace(nn.Module):
    """What changes a value in place stays between the layers before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.b(self.a(x))
        y.mul_(0.5)
        return self.d(self.c(y))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.sin(x)) + self.b(torch.cos(x))


# A model, and of how many layers its chains are.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "ours": (small_net, [5]),
    "torchvision": (lambda: torchvision.models.mobilenet_v2(), [19]),
    "timm": (lambda: timm.create_model("mobilenetv2_100"), [19]),
    "timm same": (lambda: timm.create_model("tf_efficientnet_lite0"), [18]),
    "features": (lambda: torchvision.models.mobilenet_v2().features, [18]),
    "graph": (lambda: fx.symbolic_trace(small_net()), [4]),
    "between stock layers": (Classifier, [5]),
    "two": (Twice, [2, 2]),
    "branches": (Branches, [2]),
    "residual": (Residual, [4]),
    "in place": (InPlace, [2, 2]),
    "two inputs": (TwoInputs, []),
    "one layer": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), []),
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_chains_of_a_model(name, taken):
    make, expected = MODELS[name]
    stock = randomise(make()).eval()
    fast = torch_mbv2.patch(stock)
    by_block = torch_mbv2.patch(stock, level="block")
    got, same = fast(images()), by_block(images())
    assert taken == expected
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, same)), strict=True):
        assert torch.equal(a, b)
    assert [count for _, count in torch_mbv2.report(fast).networks] == expected
    assert torch_mbv2.report(fast).rows == torch_mbv2.report(by_block).rows
    if "graph" not in name:
        names = [n for n, _ in by_block.named_modules()]
        assert [n for n, _ in fast.named_modules()] == names, "nothing is added to the tree"
        assert list(fast.state_dict()) == list(by_block.state_dict())
    unpatched = torch_mbv2.unpatch(fast)
    assert not [key for key in vars(unpatched) if key.startswith("torch_mbv2")]
    assert [n for n, _ in unpatched.named_modules()] == [n for n, _ in stock.named_modules()]


# -------------------------------------------------------------------------------- when it is taken


def _hook(fast: nn.Module) -> None:
    fast.features[2].register_forward_hook(lambda *_: None)


def _pre_hook_inside(fast: nn.Module) -> None:
    *_, block = (m for m in fast.modules() if isinstance(m, modules.FusedInvertedResidual))
    block.register_forward_pre_hook(lambda *_: None)


def _replaced(fast: nn.Module) -> None:
    fast.classifier[-1] = nn.Linear(fast.classifier[-1].in_features, 3)


def _removed(fast: nn.Module) -> None:
    fast.classifier[-1] = nn.Identity()


def _appended(fast: nn.Module) -> None:
    fast.classifier.append(nn.Identity())


def _forward_of_its_own(fast: nn.Module) -> None:
    layer = fast.classifier[-1]
    forward = layer.forward
    layer.forward = lambda x: forward(x)


@pytest.mark.parametrize(
    "watch", [_hook, _pre_hook_inside, _replaced, _removed, _appended, _forward_of_its_own]
)
@torch.inference_mode()
def test_layers_run_one_by_one_where_somebody_changed_them(watch, taken):
    fast = torch_mbv2.patch(small_net())
    fast(images())
    assert taken == [5]
    watch(fast)
    by_block = copy.deepcopy(fast)
    fast(images())
    by_block(images())
    assert taken == [5]


@torch.inference_mode()
def test_a_hook_fires_and_goes(taken):
    fast = torch_mbv2.patch(small_net())
    seen: list[torch.Size] = []
    handle = fast.features[2].register_forward_hook(lambda m, i, out: seen.append(out.shape))
    fast(images())
    assert len(seen) == 1
    handle.remove()
    fast(images())
    assert (len(seen), taken) == (1, [5])


@torch.inference_mode()
def test_a_global_hook_sees_the_layers(taken):
    fast = torch_mbv2.patch(small_net())
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, out: seen.append(type(m).__name__)
    )
    fast(images())
    handle.remove()
    assert "FusedInvertedResidual" in seen
    assert taken == []


@torch.inference_mode()
def test_the_profiler_sees_the_layers(taken):
    fast = torch_mbv2.patch(small_net())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        fast(images())
    assert taken == []


def test_a_layer_in_training_mode_is_refused(taken):
    fast = torch_mbv2.patch(small_net())
    next(m for m in fast.modules() if isinstance(m, modules.FusedLinear)).train()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="is for inference only"):
        fast(images())
    assert taken == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.inference_mode()
def test_copies_are_on_their_own(clone, taken):
    fast = torch_mbv2.patch(small_net())
    other = clone(fast)
    _hook(other)
    fast(images())
    assert taken == [5]
    other(images())
    assert taken == [5]
    again = clone(fast)
    assert torch.equal(again(images()), fast(images()))
    assert taken == [5] * 3
    again.classifier[-1].train()
    fast(images())
    assert taken == [5] * 4


@torch.inference_mode()
def test_parts_of_a_sequential_run_their_layers():
    stock = randomise(torchvision.models.mobilenet_v2(width_mult=0.25)).features
    fast = torch_mbv2.patch(stock)
    part = fast[:4]
    torch.testing.assert_close(part(images()), stock[:4](images()), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- what it is made of


@pytest.fixture
def network(monkeypatch) -> chains.Network:
    """A chain that calls the op on a CPU, too, on parameters that count versions."""
    monkeypatch.setattr(chains.Network, "_is_one_call", lambda self, input: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.inference_mode(False):
        fast = torch_mbv2.patch(small_net())
        network = vars(fast)["torch_mbv2_network_0"].__self__
    network.fast = (fast,)  # for as long as it is used
    return network


@torch.no_grad()
def test_one_thread_makes_the_weights(network, monkeypatch):
    """Kernels that one thread launched may still read what another one would replace."""
    made, make = [], chains.Network._make

    def slowly(self: chains.Network, input: Tensor) -> None:
        made.append(threading.get_ident())
        time.sleep(0.05)
        make(self, input)

    monkeypatch.setattr(chains.Network, "_make", slowly)
    x = images()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(network, [x] * 4))
    assert len(made) == 1
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    network.layers_in_order()[-1].weight.mul_(2)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(network, [x] * 4))
    assert len(made) == 2
    assert all(torch.equal(out, network.run_layers(x)) for out in outputs)


@torch.no_grad()
def test_memory_of_another_device_is_not_used_again(network):
    network(images())
    memory = network.memory
    network.__dict__["memory"] = torch.empty_like(memory, device="meta")
    network.forget()
    network(images())
    assert network.memory.device == memory.device
    assert torch.equal(network.memory, memory)


@torch.no_grad()
def test_what_was_refused_is_tried_again_with_other_weights(network):
    """As a float16 image is, when a float32 model has become one of float16."""
    network(images())
    network.refused.add(chains._kind_of(images()))
    network.forget()
    network(images())
    assert not network.refused


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_network_follows_edited_blocks(network, change):
    (fast,) = network.fast
    fast.half()
    x = images().half()
    block = next(m for m in network.layers_in_order() if m.kind == "inverted_residual")
    before, packed = network(x), block.packed.clone()
    if change == "in place":
        block.project_weight.mul_(2)
    else:
        block.project_weight = nn.Parameter(block.project_weight * 2, requires_grad=False)
    after = network(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, network.run_layers(x))
    assert not torch.equal(block.packed, packed)
    # What the op reads holds the new packed weights, and no longer the old ones.
    held = network.memory.cpu().numpy().tobytes()
    new, old = (x.contiguous().view(torch.uint8).numpy().tobytes() for x in (block.packed, packed))
    assert new in held
    assert old not in held


def test_a_layer_is_copied_without_its_chain():
    fast = torch_mbv2.patch(small_net())
    layer = fast.classifier[-1]
    assert len(pickle.dumps(layer)) < 2 * len(pickle.dumps(layer.stock)) + 10_000
    assert copy.deepcopy(layer).networks == []
    other = copy.deepcopy(fast)
    assert [n.links[-1].layer for n in other.classifier[-1].networks] == [other.classifier[-1]]


def test_a_shallow_copy_runs_its_own_layers(taken):
    """As DataParallel makes them: with other children, and the rest shared."""
    fast = torch_mbv2.patch(small_net())
    replica = fast.__new__(type(fast))
    replica.__dict__ = {**fast.__dict__, "_modules": fast._modules.copy()}
    with torch.inference_mode():
        replica(images())
    assert taken == []


def test_filter_fn_leaves_a_forward_alone(taken):
    fast = torch_mbv2.patch(small_net(), filter_fn=lambda name, module: name != "")
    with torch.inference_mode():
        fast(images())
    assert taken == []
