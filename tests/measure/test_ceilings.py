"""The ceilings: what they are reckoned from, and the floors that they make."""

from __future__ import annotations

import time

import bench_results
import jsonschema
import numpy as np
import pytest
import torch

from torch_mbv2 import testing
from torch_mbv2.measure import ceilings
from torch_mbv2.measure.ceilings import Ceilings
from torch_mbv2.measure.conditions import exact_settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    return ceilings.measure(CPU, [torch.float32, torch.bfloat16])


def best(function, repeats=3):
    """The least seconds that a call takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_bandwidth_is_of_the_order_that_numpy_copies_at(measured):
    source = np.ones(2**26, np.uint8)
    target = np.zeros_like(source)
    rate = 2 * source.nbytes / best(lambda: np.copyto(target, source))
    assert 1 / 500 < measured.bytes_per_s / rate < 500  # no unit is a thousand times another


def test_products_are_of_the_order_that_numpy_multiplies_at(measured):
    matrix = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    rate = 2 * 1024**3 / best(lambda: matrix @ matrix)
    assert 1 / 500 < measured.flops_per_s["float32"] / rate < 500


def test_every_dtype_is_measured(measured):
    assert list(measured.flops_per_s) == ["float32", "bfloat16"]


def test_best_sample_counts(monkeypatch):
    """A copy reads and writes its bytes, and a product of n x n matrices takes 2 n^3 FLOPs."""
    samples = {"copy": (0.5, 0.25, 1.0), "float32": (3.0, 4.0, 2.0)}
    monkeypatch.setattr(
        testing,
        "time_interleaved",
        lambda functions, *_, **__: {name: testing.Timing(samples[name], 1) for name in functions},
    )
    monkeypatch.setattr(ceilings, "_cpu_size", lambda dtype: 256)
    monkeypatch.setattr(ceilings, "_CPU_COPY", 1000)
    found = ceilings.measure(CPU, [torch.float32])
    assert found == Ceilings(2 * 1000 / 0.25, {"float32": 2 * 256**3 / 2.0})


@pytest.mark.parametrize(
    ("seconds_at_128", "size"), [(1e-9, 1024), (0.0008, 256), (0.04, 128), (10.0, 128)]
)
def test_slow_cpus_multiply_small_matrices(monkeypatch, seconds_at_128, size):
    def product(size, dtype, device):
        return (size / 128) ** 3 * seconds_at_128

    def time_interleaved(functions, *_, **__):
        return {name: testing.Timing((seconds,), 1) for name, seconds in functions.items()}

    monkeypatch.setattr(ceilings, "_product", product)
    monkeypatch.setattr(testing, "time_interleaved", time_interleaved)
    assert ceilings._cpu_size(torch.float16) == size


@pytest.mark.parametrize(
    ("moved", "flops", "dtype", "seconds"),
    [
        (3000, 10, "float16", 3.0),  # to move takes longer
        (1000, 800, "float16", 2.0),  # to multiply takes longer
        (1000, 800, "float32", 8.0),
        (500, 0, "float32", 0.5),
    ],
)
def test_floor_is_what_takes_longer(moved, flops, dtype, seconds):
    found = Ceilings(1000.0, {"float16": 400.0, "float32": 100.0})
    assert found.floor(moved, flops, dtype) == seconds


def test_dict_is_what_the_schema_says(measured):
    schema = bench_results.SCHEMA["properties"]["ceilings"] | {
        "$defs": bench_results.SCHEMA["$defs"]
    }
    jsonschema.validate(measured.to_dict(), schema)
    assert measured.to_dict()["flops_per_s"] == measured.flops_per_s


@pytest.mark.cuda
def test_gpu():
    with exact_settings():
        found = ceilings.measure(torch.device("cuda"), [torch.float16, torch.float32])
    assert found.bytes_per_s > 1e11
    assert found.flops_per_s["float16"] > found.flops_per_s["float32"]  # tensor cores
