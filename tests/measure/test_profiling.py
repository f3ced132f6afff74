"""measure.profiling: how a timeline is divided, what traces are read as, how the calls of a stock
and a patched model are put side by side, and what hooks leave behind."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_mbv2
from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.measure import profiling
from torch_mbv2.measure.profiling import ROOT, Call, Run, align, partition, read, typical

pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------------- timeline


@pytest.mark.parametrize(
    ("spans", "parts"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(3, 5), (5, 9)], [(3, 5), (5, 9)], id="back to back"),
        pytest.param([(3, 5), (8, 9)], [(3, 5), (8, 9)], id="gap"),
        pytest.param([(3, 6), (4, 9)], [(3, 6), (6, 9)], id="overlap"),
        pytest.param([(3, 9), (4, 6), (8, 11)], [(3, 9), (9, 9), (9, 11)], id="nested"),
        pytest.param([(3, 5), (3, 9)], [(3, 5), (5, 9)], id="one start"),
        pytest.param([(3, 5), (3, 5)], [(3, 5), (5, 5)], id="the same"),
        pytest.param(
            [(0, 9), (1, 2), (3, 4), (12, 13)], [(0, 9), (9, 9), (9, 9), (12, 13)], id="in"
        ),
    ],
)
def test_partition(spans, parts):
    assert partition(spans) == parts


@pytest.mark.parametrize("seed", range(5))
def test_partition_gives_each_moment_to_the_first_that_runs(seed):
    generator = random.Random(seed)
    starts = sorted(generator.randrange(200) for _ in range(40))
    spans = [(start, start + generator.randrange(12)) for start in starts]
    parts = partition(spans)
    for moment in range(220):
        running = [i for i, (start, end) in enumerate(spans) if start <= moment < end]
        assert [i for i, (a, b) in enumerate(parts) if a <= moment < b] == running[:1]


# ---------------------------------------------------------------------------------------- traces


class Trace:
    """What Kineto writes; times in us."""

    def __init__(self):
        self.entries = [
            {"ph": "M", "name": "process_name", "ts": 0.0, "pid": 7, "tid": 0, "args": {}},
            {"ph": "i", "name": "Iteration Start", "pid": "Traces", "tid": "Trace", "ts": 0.0},
            {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "x"}
            | {"ts": 0.0, "dur": 1e6, "args": {"Op count": 0}},
        ]
        self.ids = 0

    def add(self, category, name, start, end, thread=7, **arguments):
        entry = {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, "ts": start}
        self.entries.append(entry | {"dur": end - start, "args": arguments})

    def range(self, name, start, end):
        self.ids += 1
        self.add("user_annotation", name, start, end, **{"External id": self.ids})

    def operator(self, name, start, end, thread=7):
        self.ids += 1
        self.add("cpu_op", name, start, end, thread, **{"External id": self.ids})
        return self.ids

    def kernel(self, name, start, end, operator=None, launch=None, category="kernel"):
        """Launched by an operator, by a call of the runtime at a time, or by nothing seen."""
        self.ids += 1
        linked = {} if operator is None else {"External id": operator}
        if launch is not None:
            self.add("cuda_runtime", "cudaLaunchKernelExC", launch, launch, correlation=self.ids)
        self.add(category, name, start, end, thread=99, correlation=self.ids, **linked)

    def read(self, cuda=True):
        modules = {ROOT, "block", "block.conv", "fc"}
        runs = read({"traceEvents": self.entries}, modules, {"block.conv", "fc"}, cuda)
        return [
            None
            if run is None
            else ([(str(c), c.time, c.launched) for c in run.calls], run.gaps, run.length)
            for run in runs
        ]


def forward(trace, at):
    """One run on the CPU, from `at` on: a layer and an add in a block, a function, a layer. The ids
    of the innermost operators."""
    trace.range(ROOT, at, at + 100)
    trace.range("block", at + 5, at + 50)
    trace.range("block.conv", at + 10, at + 30)
    trace.operator("aten::conv2d", at + 12, at + 28)
    conv = trace.operator("aten::cudnn_convolution", at + 14, at + 27)
    add = trace.operator("aten::add", at + 35, at + 40)
    trace.operator("aten::flatten", at + 55, at + 60)
    trace.operator("aten::view", at + 56, at + 58)
    trace.range("fc", at + 70, at + 90)
    linear = trace.operator("torch_mbv2::linear", at + 75, at + 80)
    trace.operator("aten::to", at + 82, at + 85)
    return conv, add, linear


def test_run_on_a_cpu():
    trace = Trace()
    forward(trace, 1000)
    trace.operator("aten::elsewhere", 1033, 1034, thread=8)
    trace.range("of somebody else", 1071, 1089)
    ((calls, gaps, length),) = trace.read(cuda=False)
    assert calls == [
        ("block.conv", 20_000, ["aten::conv2d"]),
        ("block: aten::add", 5_000, ["aten::add"]),
        (f"{ROOT}: aten::flatten", 5_000, ["aten::flatten"]),
        ("fc", 20_000, ["torch_mbv2::linear", "aten::to"]),
    ]
    assert (gaps, length) == (50_000, 100_000)


def test_runs_on_a_gpu():
    """The second kernel starts before the first has ended; the GPU lags behind the CPU; a run lasts
    until the next one starts, so that the last does not end."""
    trace = Trace()
    for run in range(3):
        conv, add, linear = forward(trace, 1000 + 100 * run)
        at = 2000 + 100 * run
        trace.kernel("conv kernel", at, at + 20, conv)
        trace.kernel("add kernel", at + 15, at + 30, add)
        trace.kernel("Memset (Device)", at + 40, at + 41, linear, category="gpu_memset")
        trace.kernel("gemm", at + 45, at + 95, linear)
        trace.add("gpu_user_annotation", "fc", at + 40, at + 95, thread=99)
    calls = [
        ("block.conv", 20_000, ["conv kernel"]),
        ("block: aten::add", 10_000, ["add kernel"]),
        (f"{ROOT}: aten::flatten", 0, []),
        ("fc", 51_000, ["Memset (Device)", "gemm"]),
    ]
    assert trace.read() == [(calls, 19_000, 100_000), (calls, 19_000, 100_000), None]


def test_run_that_starts_before_the_one_before_it_has_ended():
    trace = Trace()
    for run in range(2):
        conv, _, linear = forward(trace, 1000 + 100 * run)
        trace.kernel("conv kernel", 2000 + 40 * run, 2030 + 40 * run, conv)
        trace.kernel("gemm", 2020 + 40 * run, 2050 + 40 * run, linear)
    (calls, gaps, length), last = trace.read()
    assert [time for _, time, _ in calls] == [30_000, 0, 0, 20_000]
    assert (gaps, length, last) == (0, 50_000, None)


def test_kernels_without_an_operator():
    """They are found by their launch or, where that is unknown or outside of everything, theirs is
    the time of the model itself. Nothing is lost."""
    trace = Trace()
    for run in range(2):
        at = 1000 + 100 * run
        conv, _, _ = forward(trace, at)
        trace.kernel("conv kernel", at, at + 10, conv)
        trace.kernel("launched", at + 10, at + 30, launch=at + 81)
        trace.kernel("between", at + 30, at + 60, launch=at + 65)
        trace.kernel("unknown", at + 60, at + 99)
    (calls, gaps, length), _ = trace.read()
    assert calls == [
        ("block.conv", 10_000, ["conv kernel"]),
        ("block: aten::add", 0, []),
        (f"{ROOT}: aten::flatten", 0, []),
        ("fc", 20_000, ["launched"]),
        (f"{ROOT}: between", 30_000, ["between"]),
        (f"{ROOT}: unknown", 39_000, ["unknown"]),
    ]
    assert (gaps, length) == (1_000, 100_000)


def test_runs_whose_kernels_were_not_seen():
    trace = Trace()
    for run in range(4):
        conv, _, _ = forward(trace, 1000 + 100 * run)
        if run >= 2:
            trace.kernel("conv kernel", 2000 + 10 * run, 2005 + 10 * run, conv)
    assert [run is None for run in trace.read()] == [True, True, False, True]


# ----------------------------------------------------------------------------------- typical runs


def run_of(time, gaps=1000, launched=("kernel",)):
    return Run([Call("a", None, 0, 0, list(launched), time), Call("b", None, 0, 0, [], 500)], gaps)


def test_typical_leaves_the_shortest_and_the_longest_out():
    runs = [run_of(time) for time in (9_000_000, 3000, 1000, 2000, 4000, 0, 10, 3000)]
    found = typical(runs)
    assert [call.time for call in found.calls] == [2.25, 0.5]
    assert (found.gaps, found.count) == (1, 4)
    assert found.length == pytest.approx(3.75)


def test_typical_leaves_out_what_was_seen_partly():
    runs = [run_of(1, launched=()), run_of(2000), run_of(4000), run_of(5, launched=("kernel",) * 2)]
    found = typical(runs)
    assert [call.time for call in found.calls] == [3, 0.5]
    assert (found.calls[0].launched, found.count) == (["kernel"], 2)


def test_typical_of_one():
    assert typical([run_of(7000)]).length == pytest.approx(8.5)


# ------------------------------------------------------------------------------------- alignment


def calls_of(text):
    """Calls of modules, or of functions as "module:function"."""
    pairs = (word.partition(":")[::2] for word in text.split())
    return [Call(module or ROOT, function or None, 0, 0) for module, function in pairs]


OWNERS = {"x.conv": "x.conv", "x.norm": "x.conv", "y": "y", "new": "new", "newer": "newer"}


@pytest.mark.parametrize(
    ("stock", "patched", "rows"),
    [
        pytest.param(
            "x.conv x.norm y",
            "x.conv y",
            {"x.conv": ("x.conv x.norm", "x.conv"), "y": ("y", "y")},
            id="members",
        ),
        pytest.param(
            "x.conv x.norm.act y",
            "x.conv y",
            {"x.conv": ("x.conv x.norm.act", "x.conv"), "y": ("y", "y")},
            id="inside of a member",
        ),
        pytest.param(
            "x.conv x:add y :flatten",
            "x.conv y :flatten",
            {
                "x.conv": ("x.conv x:add", "x.conv"),
                "y": ("y", "y"),
                ROOT: (":flatten", ":flatten"),
            },
            id="function that is done by the layer before",
        ),
        pytest.param(
            "x:pad x.conv x.norm x:pad y",
            "x.conv y",
            {"x.conv": ("x:pad x.conv x.norm", "x.conv"), "y": ("x:pad y", "y")},
            id="padding",
        ),
        pytest.param(
            "x.conv x:add relu y",
            "x.conv new y",
            {"x.conv": ("x.conv", "x.conv"), "new": ("x:add relu", "new"), "y": ("y", "y")},
            id="function and layer that a new layer does",
        ),
        pytest.param(
            "x:add x:mul y",
            "new newer y",
            {"new": ("x:add", "new"), "newer": ("x:mul", "newer"), "y": ("y", "y")},
            id="two new layers",
        ),
        pytest.param(
            "x.conv relu y relu",
            "x.conv y relu",
            {"x.conv": ("x.conv relu", "x.conv"), "y": ("y", "y"), "relu": ("relu", "relu")},
            id="layer that is called twice",
        ),
        pytest.param(
            "x:mul y",
            ":mul y",
            {"x": ("x:mul", ":mul"), "y": ("y", "y")},
            id="function in a forward that was copied into another",
        ),
        pytest.param(
            "a b:add", "a b:add", {"a": ("a", "a"), "b": ("b:add", "b:add")}, id="all stock"
        ),
        pytest.param("a b:add", "a", {"a": ("a", "a"), "b": ("b:add", "")}, id="nobody near"),
        pytest.param("a", "a b:add", {"a": ("a", "a"), "b": ("", "b:add")}, id="only patched"),
    ],
)
def test_align(stock, patched, rows):
    found = align(calls_of(stock), calls_of(patched), OWNERS, {"new", "newer"})
    assert {
        name: tuple(" ".join(map(str, side)) for side in sides) for name, sides in found.items()
    } == {
        name: tuple(" ".join(map(str, calls_of(side))) for side in sides)
        for name, sides in rows.items()
    }
    assert list(found) == list(rows)


# ------------------------------------------------------------------------------------ real models

SETTING = [[1, 8, 1, 1], [6, 8, 2, 2]]


def mobilenet(**options):
    return torch_mbv2.MobileNetV2(5, inverted_residual_setting=SETTING, **options).eval()


class Net(nn.Module):
    """A layer called twice, functions that a patched layer does, and some that stay stock."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.twice = nn.Conv2d(8, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.first(F.pad(x, (1, 1, 1, 1))))
        x = x + self.norm(self.twice(F.pad(x, (1, 1, 1, 1))))
        x = self.relu(x).sigmoid()
        x = self.twice(x).mean((2, 3))
        return self.fc(self.drop(x))


def recorded(model, level="block", path=None):
    patched = torch_mbv2.patch(model, level=level)
    images = torch.randn(2, 3, 16, 16)
    runs = [profiling.record(module, images, 3, path) for module in (model, patched)]
    rows = profiling.rows(model, patched, *(run.calls for run in runs))
    return patched, runs, {row.name: row.to_dict() for row in rows}


@pytest.mark.parametrize("level", ["op", "block"])
@pytest.mark.parametrize("make", [mobilenet, Net], ids=["MobileNetV2", "Net"])
def test_rows_hold_everything(make, level):
    _, runs, rows = recorded(make().eval(), level)
    for run, side in zip(runs, ("stock", "patched"), strict=True):
        assert math.fsum(row[f"{side}_us"] for row in rows.values()) == pytest.approx(run.layers)
        launched = sum(row[f"{side}_kernels"] for row in rows.values())
        assert launched == sum(len(call.launched) for call in run.calls)
        assert min(run.layers, run.gaps) > 0
        assert 1 <= run.count <= 3


@pytest.mark.parametrize("level", ["op", "block"])
def test_rows_are_those_of_the_report(level):
    patched, _, rows = recorded(mobilenet(), level)
    expected = {row.name: (row.kind, row.kernel) for row in torch_mbv2.report(patched).patched}
    assert {
        name: (row["kind"], row["kernel"]) for name, row in rows.items() if row["kernel"]
    } == expected
    assert {name: row["kind"] for name, row in rows.items() if not row["kernel"]} == {
        ROOT: "flatten",
        "classifier.0": "Dropout",
    }


def test_residual_add_is_the_work_of_the_block():
    _, _, rows = recorded(mobilenet())
    with_add, without = (rows[f"features.{i}.torch_mbv2_inverted_residual_0"] for i in (3, 2))
    layers = ["conv.0.0", "conv.0.1", "conv.0.2", "conv.1.0", "conv.1.1", "conv.1.2", "conv.2"]
    layers += ["conv.3"]
    assert with_add["stock_calls"] == [f"features.3.{name}" for name in layers] + [
        "features.3: aten::add"
    ]
    assert without["stock_calls"] == [f"features.2.{name}" for name in layers]
    *convolution, pool = rows["torch_mbv2_conv_pool_0"]["stock_calls"]
    assert convolution == ["features.4.0", "features.4.1", "features.4.2"]
    assert pool == f"{ROOT}: aten::adaptive_avg_pool2d"


def test_functions_and_layers_that_are_called_twice():
    _, _, rows = recorded(Net().eval(), "op")
    assert {name: row["stock_calls"] for name, row in rows.items()} == {
        "first": [f"{ROOT}: aten::pad", "first", f"{ROOT}: aten::relu"],
        ROOT: [f"{ROOT}: aten::pad", f"{ROOT}: aten::sigmoid"],
        "twice": ["twice", "twice"],
        "norm": ["norm"],
        "torch_mbv2_add_0": [f"{ROOT}: aten::add", "relu"],
        "torch_mbv2_global_avg_pool2d_0": [f"{ROOT}: aten::mean"],
        "drop": ["drop"],
        "fc": ["fc"],
    }
    assert rows[ROOT]["kind"] == "pad, sigmoid"
    assert rows["norm"]["kind"] == "BatchNorm2d"
    assert (rows["drop"]["kind"], rows["drop"]["kernel"]) == ("Dropout", None)


def test_trace_has_the_modules_as_ranges(tmp_path):
    path = tmp_path / "trace.json"
    patched, _, _ = recorded(mobilenet(), path=path)
    entries = json.loads(path.read_text())["traceEvents"]
    names = {entry["name"] for entry in entries if entry.get("cat") == "user_annotation"}
    called = {row.name for row in torch_mbv2.report(patched).patched}
    assert called | {ROOT, "features.2"} <= names
    assert not any("conv.0.0" in name for name in names)  # that is what the blocks do


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_ranges_leave_nothing_behind():
    model = mobilenet()
    expected = model(torch.ones(1, 3, 16, 16))
    with profiling.ranges(model):
        assert hooks(model) == 2 * len(list(model.modules()))
        assert torch.equal(model(torch.ones(1, 3, 16, 16)), expected)
    assert hooks(model) == 0


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_ranges_are_closed_where_a_layer_raises(raised):
    class Fails(nn.Module):
        def forward(self, x):
            raise raised

    model = nn.Sequential(nn.Identity(), nn.Sequential(Fails()))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler:
        with pytest.raises(raised), profiling.ranges(model):
            model(torch.ones(1))
        torch.ones(1).neg()
    assert hooks(model) == 0
    (after,) = [event for event in profiler.events() if event.name == "aten::neg"]
    assert after.cpu_parent is None


def test_gpu_whose_kernels_the_profiler_does_not_see(monkeypatch):
    monkeypatch.setattr(profiling, "read", lambda *_: [None] * 9)
    with pytest.raises(UnavailableError, match="has seen no kernels of the GPU"):
        profiling.record(nn.Linear(3, 3), torch.ones(1, 3), 1)


# -------------------------------------------------------------------------------------- one layer


class Counts(nn.Module):
    """Keeps what it is given, and overwrites it."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, x, scale=1):
        self.given.append(x.clone())
        return x.mul_(scale)


def test_run_alone_calls_a_layer_on_what_it_gets():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Counts()

        def forward(self, x):
            return self.layer(x + 1, scale=2)

    model = Model()
    (given,) = profiling.run_alone(model, "layer", torch.ones(2, 3))
    assert given.shape == (2, 3)
    once, *alone = model.layer.given
    assert torch.equal(once, torch.full((2, 3), 2.0))
    assert torch.equal(alone[0], once)
    assert len(alone) == 4  # three to warm up
    assert hooks(model) == 0


def test_run_alone_of_a_layer_that_is_not_called():
    model = nn.Sequential(nn.Identity())
    model.forward = lambda x: x
    with pytest.raises(ModelError, match="0: the model does not call it"):
        profiling.run_alone(model, "0", torch.ones(1))
