"""csrc/plan/depthwise.h, compiled and run here: which kernel, and how long its runs are."""

from __future__ import annotations

import pytest

FLOAT32, FLOAT16 = 0, 1


def plan(build, **settings: int) -> str:
    return build("depthwise", *(f"{name}={value}" for name, value in settings.items())).strip()


def run_rows(build, **settings: int) -> int:
    word, rows = plan(build, **settings).split()
    assert word == "strips"
    return int(rows)


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        ({}, "strips"),
        ({"stride": 2}, "strips"),
        ({"kernel": 5}, "strips"),
        ({"kernel": 5, "stride": 2, "dtype": FLOAT32}, "strips"),
        ({"channels": 4, "dtype": FLOAT32}, "strips"),
        ({"kernel": 7}, "vectors"),
        ({"kernel_w": 5}, "vectors"),
        ({"stride": 3}, "vectors"),
        ({"stride_w": 2}, "vectors"),
        ({"dilation_h": 2}, "vectors"),
        ({"channels": 4, "dtype": FLOAT16}, "channels"),
        ({"aligned": 0}, "channels"),
    ],
    ids=str,
)
def test_runs_on(build, settings, kernel):
    assert plan(build, **settings).split()[0] == kernel


@pytest.mark.parametrize("size", [1, 2, 7, 56, 112, 2000])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_runs_stay_in_the_map(build, size, batch):
    assert 1 <= run_rows(build, size=size, batch=batch) <= min(size, 28)


def test_small_batches_are_spread_over_every_multiprocessor(build):
    """Long runs read less twice, but there must be enough of them."""
    assert run_rows(build, batch=1) < run_rows(build, batch=256)
    assert run_rows(build, batch=8, multiprocessors=8) > run_rows(build, batch=8)
