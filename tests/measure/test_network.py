"""Timing whole networks: each contender computes what the stock model does, and what does not is
found out."""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
import sys
import types

import pytest
import torch
from torch import nn

import torch_mbv2
from torch_mbv2 import ops
from torch_mbv2.measure import contenders
from torch_mbv2.measure.conditions import noise
from torch_mbv2.measure.contenders import CONTENDERS, PATCHED, RIVALS, Contender, Ready, Work
from torch_mbv2.measure.network import Yardstick, agreement, bench_network

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TIMES = {"rounds": 2, "min_time": 0}


@pytest.fixture(scope="module")
def stock():
    onnx_helpers = pytest.importorskip("onnx_helpers")
    settings = [[1, 8, 1, 1], [6, 16, 2, 2]]
    model = torch_mbv2.MobileNetV2(7, inverted_residual_setting=settings)
    return onnx_helpers.randomise(model).eval()


def prepared(stock, dtype=torch.float32, batch=2, device=CPU):
    """(what is to be done, what it is measured by)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 32, 32, generator=generator).to(device, dtype)
    model = copy.deepcopy(stock).to(device, dtype)
    fresh = images.flip(-1)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(fresh.double()).cpu()
        yardstick = Yardstick(fresh, model(fresh).cpu(), exact)
    return Work(model, images[:batch]), yardstick


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_rows(stock, batch):
    work, yardstick = prepared(stock, batch=batch)
    before = work.images.clone()
    steps = []
    names = ["eager", "channels_last", "patched"]
    rows = bench_network(work, yardstick, names, **TIMES, on_step=steps.append)
    assert [row["contender"] for row in rows] == names
    assert len(steps) == len(names) + TIMES["rounds"]
    assert [row["agrees"] for row in rows] == [None, True, True]
    for row in rows:
        assert row["batch"] == batch
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["median_ms"])
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["over_patched"] == pytest.approx(row["median_ms"] / rows[-1]["median_ms"])
        assert math.isnan(row["over_patched_cudagraph"])
        assert row["first_call_s"] > 0
        assert row["peak_mib"] is None
    assert torch.equal(work.images, before)


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
RUNTIME = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed"
)


@pytest.mark.parametrize(
    "name", [pytest.param("compile", marks=COMPILER), pytest.param("onnxruntime", marks=RUNTIME)]
)
def test_rival_computes_what_it_is_timed_for(stock, name):
    """Up to roundings, which in so small a network may by chance be twice those of stock."""
    row, _ = bench_network(*prepared(stock), [name, "patched"], **TIMES)
    assert row["relative_l2"] < 64 * 2**-24
    assert row["top1_differs"] == 0


def constant(work):
    """A compiler that takes the images for constants."""
    with torch.inference_mode():
        logits = work.stock(work.images)
    return Ready(lambda: logits, work.images.clone())


def test_rival_that_folds_the_images_away_disagrees(stock, monkeypatch):
    rival = Contender("a fast one", constant, lambda device: None)
    monkeypatch.setitem(CONTENDERS, "compile", rival)
    rows = bench_network(*prepared(stock), ["eager", "compile", "patched"], **TIMES)
    assert [row["agrees"] for row in rows] == [None, False, True]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("first line\nsecond line"), "first line"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_rival_that_fails_says_why(stock, monkeypatch, error, why):
    def fail(work):
        raise error

    monkeypatch.setitem(CONTENDERS, "compile", Contender("broken", fail, lambda device: None))
    rows = bench_network(*prepared(stock), ["eager", "compile", "patched"], **TIMES)
    assert rows[1] == {"dtype": "float32", "batch": 2, "contender": "compile", "skipped": why}
    assert rows[2]["agrees"] is True


class Casting(nn.Module):
    """Takes pixels, computes in the dtype of its weights, and returns float32."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x.to(self.conv.weight.dtype)).mean((2, 3)).float()


def test_rows_are_of_the_dtype_of_the_weights():
    stock = Casting().eval()
    rows = bench_network(*prepared(stock, torch.float16), ["eager", "patched"], **TIMES)
    assert [row["dtype"] for row in rows] == ["float16", "float16"]


def test_onnxruntime_takes_pixels(stock):
    pytest.importorskip("onnxruntime")
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    module = Casting().eval()
    ready = CONTENDERS["onnxruntime"].prepare(Work(module, images))
    torch.testing.assert_close(ready.call(), module(images))


def test_patched_model_that_fails_is_an_error(stock, monkeypatch):
    def fail(work):
        raise RuntimeError("broken")

    monkeypatch.setitem(CONTENDERS, "patched", Contender("patched", fail, lambda device: None))
    with pytest.raises(RuntimeError, match="broken"):
        bench_network(*prepared(stock), ["eager", "patched"], **TIMES)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_a_gpu(stock, dtype):
    """Everything that is installed, also where the batch does not divide the images."""
    work, yardstick = prepared(stock, dtype, 2, CUDA)
    names = [name for name in CONTENDERS if CONTENDERS[name].missing(CUDA) is None]
    rows = bench_network(work, yardstick, names, **TIMES)
    assert [row["contender"] for row in rows] == names
    # Roundings: in so small a network they may by chance be twice those of stock.
    largest = 64 * torch.finfo(dtype).eps
    assert all(row["relative_l2"] < largest and not row["top1_differs"] for row in rows), rows
    assert all(row["peak_mib"] > 0 for row in rows)
    assert rows[-1]["over_patched_cudagraph"] == 1


@pytest.mark.cuda
@torch.inference_mode()
def test_memory_that_other_networks_keep_is_not_counted(stock):
    """As many of their CUDA graphs are kept as there may be, with scratch memory of megabytes."""
    fast = torch_mbv2.patch(copy.deepcopy(stock).to(CUDA, torch.float16))
    for size in range(200, 248):
        images = torch.randn(2, 3, size, size, device=CUDA, dtype=torch.float16)
        for _ in range(2):
            fast(images)
    assert ops.replays()[1] > 2**20
    names = ["eager", "patched", "patched_cudagraph"]
    rows = bench_network(*prepared(stock, torch.float16, 2, CUDA), names, **TIMES)
    assert all(row["peak_mib"] > 0 for row in rows), rows


@pytest.mark.cuda
def test_captured_graphs_do_not_share_memory_with_what_comes_later(stock):
    """cuBLAS workspaces that a later contender frees must not be written to by a replay."""
    work, _ = prepared(stock, torch.float16, 2, CUDA)
    ready = CONTENDERS["cudagraph"].prepare(work)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    guards = [torch.zeros(2**20, device="cuda") for _ in range(64)]
    for _ in range(3):
        ready.call()
    assert all(not guard.any() for guard in guards)


# ---------------------------------------------------------------------------------- what there is


def test_contenders():
    assert RIVALS == (
        "eager",
        "channels_last",
        "cudagraph",
        "compile",
        "compile_cudagraph",
        "onnxruntime",
        "tensorrt",
    )
    assert (*RIVALS, *PATCHED) == tuple(CONTENDERS)


@pytest.mark.parametrize(
    ("name", "device", "why"),
    [
        ("eager", CPU, None),
        ("patched", CPU, None),
        ("cudagraph", CPU, "needs a CUDA GPU"),
        ("cudagraph", CUDA, None),
        ("compile", CUDA, "needs the package triton: pip install triton"),
        ("compile_cudagraph", CPU, "needs a CUDA GPU"),
        ("compile_cudagraph", CUDA, "needs the package triton: pip install triton"),
        (
            "onnxruntime",
            CPU,
            "needs the package onnxruntime and onnx: pip install onnxruntime onnx",
        ),
        (
            "onnxruntime",
            CUDA,
            "needs the package onnxruntime-gpu and onnx: pip install onnxruntime-gpu onnx",
        ),
        ("tensorrt", CPU, "needs a CUDA GPU"),
        ("tensorrt", CUDA, "needs the package torch_tensorrt: pip install torch-tensorrt"),
        ("patched_cudagraph", CPU, "needs a CUDA GPU"),
    ],
)
def test_what_is_missing(monkeypatch, name, device, why):
    monkeypatch.setattr(contenders, "_installed", lambda package: False)
    assert CONTENDERS[name].missing(device) == why


def test_compiler_is_missing(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert CONTENDERS["compile"].missing(CPU).startswith("needs a C++ compiler")


def test_provider_is_missing(monkeypatch):
    """The package for the CPU is no rival on a GPU."""
    fake = types.ModuleType("onnxruntime")
    fake.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(contenders, "_installed", lambda package: True)
    assert "has no CUDA provider" in CONTENDERS["onnxruntime"].missing(CUDA)
    assert CONTENDERS["onnxruntime"].missing(CPU) is None


def test_tensorrt_is_given_the_model(stock, monkeypatch):
    """Torch-TensorRT is too large for most machines; what it is asked for can be seen without."""
    asked = {}

    def compile(module, **options):
        asked.update(options)
        return module

    fake = types.ModuleType("torch_tensorrt")
    fake.compile = compile
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(contenders, "_captured", lambda ready: ready)
    work, yardstick = prepared(stock)
    (row, _) = bench_network(work, yardstick, ["tensorrt", "patched"], **TIMES)
    assert row["agrees"] is True
    assert asked.pop("inputs")[0].shape == work.images.shape
    assert asked == {"ir": "dynamo", "min_block_size": 1, "disable_tf32": True}


# ------------------------------------------------------------------------------------- agreement


EXACT = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 0.0]], dtype=torch.float64)


def judged(logits, stock, exact=EXACT):
    return agreement(logits, Yardstick(torch.empty(0), stock, exact))


def test_agreement_of_equals():
    found = judged(EXACT.float(), EXACT.float())
    assert found["agrees"]
    assert found["error_ratio"] == 1


@pytest.mark.parametrize("factor", [1.4, 1.6])
def test_agreement_allows_an_error_of_half_as_much_again(factor):
    error = torch.tensor([[1e-3, 0, 0], [0, -1e-3, 0]]).repeat(5000, 1)
    exact = EXACT.repeat(5000, 1)
    found = judged(exact.float() + factor * error, exact.float() + error, exact)
    assert found["agrees"] == (factor < 1.5)
    assert found["error_ratio"] == pytest.approx(factor, rel=1e-3)


def test_agreement_of_every_place_in_a_batch():
    """Images that are there again are compared again."""
    logits = EXACT.float().repeat(4, 1)
    assert judged(logits, EXACT.float())["agrees"]
    logits[-1, 1] += 3
    found = judged(logits, EXACT.float())
    assert (found["agrees"], found["top1_differs"]) == (False, 1)


def test_agreement_needs_the_dtype_of_stock():
    """Else what computes in half would be judged by the roundings of half."""
    assert not judged(EXACT.half(), EXACT.float())["agrees"]


def test_agreement_forgives_near_ties_only():
    exact = torch.tensor([[1.0, 1.0 + 1e-6], [0.0, 1.0]], dtype=torch.float64)
    stock = exact.float() + torch.tensor([[0.0, 1e-4], [0.0, 1e-4]])
    tie = judged(exact.float() + torch.tensor([[1e-4, 0.0], [0, 1e-4]]), stock, exact)
    assert (tie["agrees"], tie["near_ties"], tie["top1_differs"]) == (True, 1, 0)
    wrong = judged(exact.float().flip(1), stock, exact)
    assert (wrong["agrees"], wrong["top1_differs"]) == (False, 1)


@pytest.mark.parametrize("broken", ["patched", "stock"])
def test_agreement_needs_finite_logits(broken):
    bad = EXACT.float().clone()
    bad[0, 0] = math.nan
    pair = (bad, EXACT.float()) if broken == "patched" else (EXACT.float(), bad)
    assert judged(*pair)["agrees"] is False


# ----------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("spreads", "over", "worst"), [([], 0, None), ([0.01, 0.05], 0, 0.05), ([0.01, 0.06], 1, 0.06)]
)
def test_noise(spreads, over, worst):
    assert noise(spreads) == {"limit": 0.05, "over": over, "of": len(spreads), "worst": worst}
