"""The metrics find errors just above their bounds, and the timers count what they should."""

from __future__ import annotations

import gc
import math
import time
import weakref

import pytest
import torch

from torch_mbv2 import testing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_relative_l2():
    expected = torch.tensor([3.0, 4.0])
    assert testing.relative_l2(torch.tensor([3.0, 4.5]), expected) == 0.1


def test_metrics_are_computed_in_float64():
    expected = torch.tensor([1.0, 1.0], dtype=torch.float64) + 2**-40
    assert testing.max_abs(torch.ones(2), expected) == 2**-40


@pytest.mark.parametrize("metric", [testing.relative_l2, testing.max_abs])
def test_metric_of_nothing_is_zero(metric):
    assert metric(torch.empty(0, 3), torch.empty(0, 3)) == 0


@pytest.mark.parametrize("metric", [testing.relative_l2, testing.max_abs])
def test_metric_of_nan_is_nan(metric):
    assert math.isnan(metric(torch.tensor([math.nan, 1.0]), torch.ones(2)))


@pytest.mark.parametrize("metric", [testing.relative_l2, testing.max_abs])
def test_metric_refuses_broadcasting(metric):
    with pytest.raises(ValueError, match=r"shape \(3,\) with expected \(1, 3\)"):
        metric(torch.ones(3), torch.ones(1, 3))


def test_relative_l2_of_an_expected_zero():
    zeros = torch.zeros(2)
    assert testing.relative_l2(zeros, zeros) == 0
    assert testing.relative_l2(torch.ones(2), zeros) == math.inf
    assert math.isnan(testing.relative_l2(torch.full((2,), math.nan), zeros))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_close(dtype):
    expected = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    testing.assert_close(expected.to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_systematic_error_is_not_close(dtype):
    expected = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="relative L2 error"):
        testing.assert_close(
            (expected * (1 + 2 * testing.BOUNDS[dtype].relative)).to(dtype), expected
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_not_close(dtype):
    expected = torch.ones(100, 100, 100, dtype=torch.float64)
    output = expected.to(dtype)
    output[7, 3, 5] += 2 * torch.finfo(dtype).eps + 2**-15
    with pytest.raises(AssertionError, match=r"element \(7, 3, 5\): got 1\.\d+, expected 1,"):
        testing.assert_close(output, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_close(value):
    output = torch.ones(4)
    output[1] = value
    with pytest.raises(AssertionError):
        testing.assert_close(output, torch.ones(4, dtype=torch.float64))


def test_empty_is_close():
    testing.assert_close(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_roundoff(dtype):
    one, u = torch.ones((), dtype=torch.float64), testing.unit_roundoff(dtype)
    assert (one + u).to(dtype) == 1  # half-way goes to even
    assert (one + 1.01 * u).to(dtype) > 1


def test_quantiles():
    timing = testing.Timing(tuple(float(i) for i in range(11)), 1)
    assert (timing.p10, timing.median, timing.p90) == (1, 5, 9)


def test_rounds_and_turns():
    order = []
    timings = testing.time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        "cpu",
        rounds=8,
        min_time=0,
    )
    assert [len(timing.samples) for timing in timings.values()] == [8, 8]
    turns = ["".join(order[-32:][i : i + 4]) for i in range(0, 32, 4)]  # each call warmed up by one
    assert set(turns) == {"aabb", "bbaa"}  # and nobody always goes first


def test_a_sample_repeats_until_it_lasts_min_time():
    timing = testing.time_interleaved(
        {"sleep": lambda: time.sleep(1e-3)}, "cpu", rounds=3, min_time=0.01
    )["sleep"]
    assert 2 <= timing.calls <= 20
    assert 1e-3 <= timing.median < 0.1  # a call, not a sample


def test_on_round_is_called_once_a_round():
    seen = []
    testing.time_interleaved(
        {"a": int}, "cpu", rounds=4, min_time=0, on_round=lambda: seen.append(0)
    )
    assert len(seen) == 4


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        testing.time_interleaved({"a": int}, "cpu", rounds=0)


@pytest.mark.cuda
def test_captured_graph_keeps_what_it_reads():
    def build():
        weight = torch.ones(8, device="cuda")
        return weakref.ref(weight), *testing.capture(lambda: weight * 2)

    weight, replay, result = build()
    gc.collect()
    assert weight() is not None
    replay()
    assert torch.equal(result.cpu(), torch.full((8,), 2.0))
    del replay
    gc.collect()
    assert weight() is None


@pytest.mark.cuda
def test_captured_graph_recomputes_its_result():
    x = torch.zeros(8, device="cuda")
    replay, result = testing.capture(lambda: x + 1)
    x.fill_(2)
    replay()
    assert result.tolist() == [3] * 8


@pytest.mark.cuda
def test_cuda_timer_waits_for_the_gpu():
    x = torch.randn(2048, 2048, device="cuda")
    timing = testing.time_interleaved({"mm": lambda: x @ x}, "cuda", rounds=5, min_time=1e-3)["mm"]
    assert timing.median > 2 * 2048**3 / 1e15  # no GPU does a petaflop in float32


@pytest.mark.parametrize(("elements", "allowed"), [(10**8, 1.5), (900, 1.65), (9, 3.0), (0, 6.0)])
def test_allowed_ratio(elements, allowed):
    assert testing.allowed_ratio(elements) == pytest.approx(allowed, rel=1e-3)
