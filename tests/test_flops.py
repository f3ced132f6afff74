"""FLOP formulas: torch's counter finds in every op, and in a patched model, what it finds in the
stock equivalents."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import torch_mbv2
from torch_mbv2 import flops, ops

flops.register()  # conftest.py imports torch_mbv2 before the counter


def count(function, *arguments):
    """The FLOPs of a call, and the names of the operators that they are counted under."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    counts = counter.get_flop_counts().get("Global", {})
    return counter.get_total_flops(), {str(op) for op in counts}


# -------------------------------------------------------------------------------------------- ops


def w(*shape):
    return torch.empty(shape, device="meta")


# All sizes of a case differ, so that none can stand for another.
OPS = {
    "conv2d": (
        lambda x: ops.conv2d(x, w(12, 2, 3, 5), w(12), (2, 3), (1, 0, 2, 3), (2, 1), 3, "relu"),
        lambda x: F.conv2d(
            F.pad(x, (1, 0, 2, 3)), w(12, 2, 3, 5), w(12), (2, 3), 0, (2, 1), 3
        ).relu(),
        (2, 6, 17, 19),
    ),
    "conv2d depthwise": (
        lambda x: ops.conv2d(x, w(6, 1, 3, 3), stride=2, padding=1, groups=6),
        lambda x: F.conv2d(x, w(6, 1, 3, 3), None, 2, 1, 1, 6),
        (2, 6, 17, 19),
    ),
    "conv2d_winograd": (
        lambda x: ops.conv2d_winograd(x, w(7, 6, 3, 3), padding=(1, 0, 2, 1)),
        lambda x: F.conv2d(F.pad(x, (1, 0, 2, 1)), w(7, 6, 3, 3)),
        (2, 6, 9, 11),
    ),
    "linear": (
        lambda x: ops.linear(x, w(7, 5), w(7)),
        lambda x: F.linear(x, w(7, 5), w(7)),
        (3, 5),
    ),
    "linear of a vector": (
        lambda x: ops.linear(x, w(7, 5)),
        lambda x: F.linear(x, w(7, 5)),
        (5,),
    ),
    "linear of a sequence": (
        lambda x: ops.linear(x, w(7, 5), w(7)),
        lambda x: F.linear(x, w(7, 5), w(7)),
        (2, 3, 5),
    ),
    "inverted_residual": (
        lambda x: ops.inverted_residual(
            x,
            w(12, 4, 1, 1),
            w(12),
            w(12, 1, 3, 5),
            None,
            w(6, 12, 1, 1),
            w(6),
            (2, 3),
            (1, 0, 2, 3),
        ),
        lambda x: F.conv2d(
            F.conv2d(
                F.pad(F.conv2d(x, w(12, 4, 1, 1), w(12)), (1, 0, 2, 3)),
                w(12, 1, 3, 5),
                None,
                (2, 3),
                groups=12,
            ),
            w(6, 12, 1, 1),
            w(6),
        ),
        (2, 4, 17, 19),
    ),
    "inverted_residual without expansion": (
        lambda x: ops.inverted_residual(
            x, None, None, w(4, 1, 3, 3), None, w(4, 4, 1, 1), None, residual=True
        ),
        lambda x: x + F.conv2d(F.conv2d(x, w(4, 1, 3, 3), padding=1, groups=4), w(4, 4, 1, 1)),
        (2, 4, 7, 9),
    ),
    "stem_block": (
        lambda x: ops.stem_block(
            x,
            w(8, 3, 3, 5),
            None,
            w(8, 1, 5, 3),
            None,
            w(6, 8, 1, 1),
            None,
            (2, 3),
            (1, 0, 2, 3),
            (0, 2, 1, 3),
        ),
        lambda x: F.conv2d(
            F.conv2d(
                F.pad(F.conv2d(F.pad(x, (1, 0, 2, 3)), w(8, 3, 3, 5), None, (2, 3)), (0, 2, 1, 3)),
                w(8, 1, 5, 3),
                groups=8,
            ),
            w(6, 8, 1, 1),
        ),
        (2, 3, 17, 19),
    ),
    "conv_pool": (
        lambda x: ops.conv_pool(x, w(7, 4, 1, 1), w(7)),
        lambda x: F.conv2d(x, w(7, 4, 1, 1), w(7)).mean((2, 3)),
        (2, 4, 5, 3),
    ),
    "avg_pool2d": (
        lambda x: ops.avg_pool2d(x, 3, 2),
        lambda x: F.avg_pool2d(x, 3, 2),
        (2, 4, 7, 9),
    ),
    "global_avg_pool2d": (
        ops.global_avg_pool2d,
        lambda x: x.mean((2, 3)),
        (2, 4, 7, 9),
    ),
    "add": (lambda x: ops.add(x, x), lambda x: x + x, (2, 4, 7, 9)),
    "im2col": (lambda x: ops.im2col(x, 3), lambda x: F.unfold(x, 3), (2, 4, 7, 9)),
}


@pytest.mark.parametrize("case", OPS)
def test_every_op_counts_as_its_stock_equivalent(case):
    op, stock, shape = OPS[case]
    name = case.split()[0]
    total, counted = count(op, w(*shape))
    assert total == count(stock, w(*shape))[0]
    assert counted == ({f"torch_mbv2.{name}"} if name in flops.FORMULAS else set())
    assert (total > 0) == (name in flops.FORMULAS)


def test_all_ops_are_tested():
    defined = {
        schema.name.removeprefix("torch_mbv2::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("torch_mbv2::")
    }
    # A network counts the ops of its steps; the others compute nothing.
    others = {"network", "explain", "replays", "forget_replays"}
    assert {case.split()[0] for case in OPS} == defined - others


def test_empty_batch_counts_nothing():
    assert count(OPS["stem_block"][0], w(0, 3, 17, 19))[0] == 0


def test_arguments_by_name():
    op = torch.ops.torch_mbv2.linear
    total, _ = count(
        lambda x: op(act_max=None, act_min=None, bias=None, weight=w(7, 5), input=x), w(3, 5)
    )
    assert total == 2 * 3 * 7 * 5


def test_real_tensors_through_the_dispatcher():
    """On the CPU an op runs as stock operators, which must not count a second time."""
    x, weight = torch.randn(2, 3, 5, 7), torch.randn(4, 3, 1, 1)
    total, counted = count(torch.ops.torch_mbv2.conv_pool, x, weight, None, None, None)
    assert (total, counted) == (2 * 2 * 5 * 7 * 4 * 3, {"torch_mbv2.conv_pool"})


# ----------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("level", ["op", "block"])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(("width", "height", "batch"), [(1.0, 224, 1), (0.35, 97, 3), (1.4, 33, 2)])
def test_patched_mobilenet_counts_as_stock(level, padding, width, height, batch):
    model = torch_mbv2.MobileNetV2(10, width_mult=width, padding=padding).eval()
    patched = torch_mbv2.patch(model, level=level).to("meta")
    x = w(batch, 3, height, height + 2)
    total, counted = count(patched, x)
    assert total == count(model.to("meta"), x)[0]
    assert all(name.startswith("torch_mbv2.") for name in counted)
    assert ("torch_mbv2.inverted_residual" in counted) == (level == "block")


@pytest.mark.parametrize("level", ["op", "block"])
def test_patched_resnet_counts_as_stock(level):
    torchvision = pytest.importorskip("torchvision", reason="the extra `onnx` is not installed")
    model = torchvision.models.resnet18(num_classes=10).eval()
    patched = torch_mbv2.patch(model, level=level).to("meta")
    assert count(patched, w(2, 3, 65, 97))[0] == count(model.to("meta"), w(2, 3, 65, 97))[0]


@pytest.mark.parametrize("level", ["op", "block"])
def test_real_and_fake_tensors_count_alike(level):
    setting = [[1, 8, 1, 1], [6, 8, 2, 2]]
    model = torch_mbv2.MobileNetV2(5, inverted_residual_setting=setting).eval()
    patched = torch_mbv2.patch(model, level=level)
    expected = count(model, torch.randn(2, 3, 33, 35))[0]
    assert count(patched, torch.randn(2, 3, 33, 35))[0] == expected
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert count(patched, torch.empty(2, 3, 33, 35))[0] == expected


def test_counts_by_module():
    """Tools that ask for the FLOPs of a part of the model find the block that does its work."""
    model = torch_mbv2.patch(torch_mbv2.MobileNetV2().eval()).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(w(1, 3, 224, 224))
    macs = 56 * 56 * (24 * 144 + 9 * 144 + 144 * 24)
    (block,) = counter.get_flop_counts()["MobileNetV2.features.3"].values()
    assert block == 2 * macs


# --------------------------------------------------------------------------------------- imports


def run_alone(code):
    """What a new interpreter prints; nothing else may be written."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout


_COUNT_AN_OP = """
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    torch_mbv2.ops.linear(torch.empty(3, 5, device="meta"), torch.empty(7, 5, device="meta"))
print(counter.get_total_flops())
"""


@pytest.mark.parametrize(
    "start",
    [
        "import torch, torch.utils.flop_counter, torch_mbv2",
        "import torch, torch_mbv2; torch_mbv2.flops.register(load=True)",
    ],
)
def test_ops_are_counted_in_any_order_of_imports(start):
    assert run_alone(start + _COUNT_AN_OP) == f"{2 * 3 * 5 * 7}\n"


_PLUGIN, _COUNTER = "import torch_mbv2", "from torch.utils.flop_counter import FlopCounterMode"
_PATCH = "patched = torch_mbv2.patch(torch.nn.Linear(5, 7).eval()).to('meta')"
_COUNT_A_MODEL = """
with FlopCounterMode(display=False) as counter, torch.no_grad():
    patched(torch.empty(3, 5, device="meta"))
print(counter.get_total_flops())
"""


@pytest.mark.parametrize(
    "order",
    [
        (_COUNTER, _PLUGIN, _PATCH),
        (_PLUGIN, _COUNTER, _PATCH),
        (_PLUGIN, _PATCH, _COUNTER),
    ],
)
def test_patched_models_are_counted_in_any_order_of_imports(order):
    start = "\n".join(("import torch", *order))
    assert run_alone(start + _COUNT_A_MODEL) == f"{2 * 3 * 5 * 7}\n"


def test_formulas_are_registered_once_by_many_threads(monkeypatch):
    registry = {}
    monkeypatch.setattr(flop_counter, "flop_registry", registry)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: flops.register(), range(32)))
    assert set(registry) == {getattr(torch.ops.torch_mbv2, name) for name in flops.FORMULAS}


def test_import_leaves_the_counter_and_triton_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import torch_mbv2;"
        "print([n for n in set(sys.modules) - before if n.startswith(('torch.utils', 'triton'))])"
    )
    assert run_alone(code) == "[]\n"


def test_a_model_without_our_ops_is_counted_as_ever():
    model = nn.Conv2d(3, 4, 3).to("meta")
    assert count(model, w(1, 3, 5, 5)) == (2 * 3 * 4 * 9 * 9, {"aten.convolution"})
