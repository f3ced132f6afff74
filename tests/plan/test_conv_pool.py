"""csrc/plan/conv_pool.h, compiled and run here: which kernel and tile conv_pool runs on."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest


class Problem(NamedTuple):
    batch: int
    pixels: int
    k: int = 320
    n: int = 1280
    element_bytes: int = 2
    vectors: bool = True
    multiprocessors: int = 132


PROBLEMS = [
    *(Problem(batch, 49, element_bytes=size) for batch in (1, 8, 32, 256) for size in (2, 4)),
    *(Problem(256, pixels) for pixels in (1, 9, 25, 70, 4096, 4097)),
    *(Problem(64, 49, k=k) for k in (8, 160, 168, 448, 640, 648)),
    Problem(256, 49, multiprocessors=1),
    Problem(256, 49, multiprocessors=46),
    # odd
    Problem(3, 45, 13, 7, vectors=False),
    Problem(3, 45, 13, 7, 4, vectors=False),
    Problem(1, 1, 1, 1, vectors=False),
    Problem(5, 1, 24, 1001),
    # large
    Problem(40_000, 49),
    Problem(40_000, 49, element_bytes=4),
    Problem(2**33, 1, 8, 8),
    Problem(2**33, 4096, 640, 100_000),
    Problem(1, 2**31 - 1, 8, 8),
    Problem(1, 2**31 - 1, 8, 8, 4),
    Problem(2, 49, 2**31 - 8, 2**31 - 1),
]  # fmt: skip


@pytest.fixture
def plans(build, problem):
    """The chosen plan, and all candidates."""
    lines = build("conv_pool_plans", *map(int, problem)).splitlines()
    fields = [dict(part.split("=") for part in line.split()[1:]) for line in lines]
    return fields[-1], fields[:-1]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_choice_is_the_cheapest_candidate(plans, problem):
    chosen, candidates = plans
    clocks = [float(plan["clocks"]) for plan in candidates]
    assert all(0 < x < math.inf for x in clocks)
    assert chosen == candidates[clocks.index(min(clocks))]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_candidate_can_run(plans, problem):
    for plan in plans[1]:
        kernel, images, warps = plan["kernel"], int(plan["images"]), int(plan["warps"])
        assert (kernel == "float") == (problem.element_bytes == 4)
        assert int(plan["vectors"]) == problem.vectors
        assert 1 <= warps <= 8
        assert kernel == "resident" or images == 1
        if kernel == "resident":
            assert 32 * int(plan["steps"]) >= problem.k
            assert warps in (4, 8)
            assert 1 <= images <= problem.batch
            assert images * problem.pixels <= 2**30
            assert problem.pixels <= 4096


@pytest.mark.parametrize(
    ("problem", "kernel", "channels"),
    [
        (Problem(1, 49), "direct", 16),
        (Problem(8, 49), "direct", 32),
        (Problem(256, 49), "resident", 256),
        (Problem(256, 49, vectors=False), "direct", 32),
        (Problem(256, 4097), "direct", 32),
        (Problem(256, 49, k=648), "direct", 32),
        (Problem(13, 49, element_bytes=4), "float", 32),
        (Problem(14, 49, element_bytes=4), "float", 128),  # 140 thread blocks
        (Problem(256, 49, element_bytes=4, vectors=False), "float", 32),
    ],
    ids=str,
)
def test_choices(plans, problem, kernel, channels):
    assert (plans[0]["kernel"], int(plans[0]["channels"])) == (kernel, channels)


@pytest.mark.parametrize("first", range(1, 301, 50))
def test_the_sums_of_an_image_do_not_depend_on_its_place(build, first):
    lines = build("pixel_order", first, first + 49).splitlines()
    assert len(lines) == 50


@pytest.mark.parametrize("size", range(1, 17))
def test_square_images_waste_no_products(build, size):
    pixels = size * size
    assert build("pixel_order", pixels, pixels) == f"{pixels}: {pixels} octets for 8 images\n"
