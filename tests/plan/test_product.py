"""csrc/plan/product.h, compiled and run here: which tile a matrix product runs on."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest


class Problem(NamedTuple):
    m: int
    n: int
    k: int
    batch: int = 1
    half: bool = True
    matrix: bool = True
    vectors: bool = True
    multiprocessors: int = 132


KINDS = list(itertools.product((True, False), repeat=3))
SIZES = [
    (1, 1000, 1280, 1),
    (49 * 256, 1280, 320, 1),
    (112 * 112 * 256, 96, 16, 1),
    # odd
    (1, 1, 1, 1),
    (7, 13, 5, 3),
    (129, 97, 33, 65_537),
    # large
    (2**40, 2**31 - 1, 8, 1),
    (2**31, 8, 2**31 - 8, 1),
    (1, 1, 1, 2**40),
]
PROBLEMS = [Problem(*sizes, *kind) for sizes in SIZES for kind in KINDS]
PROBLEMS += [
    Problem(196, 64, 384, multiprocessors=1),
    Problem(196, 64, 384, half=False, multiprocessors=46),
]


@pytest.fixture
def plans(build, problem):
    """The tiles that are compiled, and (tile, clocks) of the choice and of all candidates."""
    lines = [line.split()[1:] for line in build("product_plans", *map(int, problem)).splitlines()]
    compiled, *pairs = lines
    *candidates, chosen = [(int(tile), float(clocks)) for tile, clocks in pairs]
    return list(map(int, compiled)), chosen, candidates


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_choice_is_the_cheapest_candidate(plans):
    _, chosen, candidates = plans
    assert all(0 < clocks < math.inf for _, clocks in candidates)
    assert chosen == min(candidates, key=lambda candidate: candidate[1])


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_candidate_is_compiled(plans):
    compiled, _, candidates = plans
    assert [tile for tile, _ in candidates] == compiled


@pytest.mark.parametrize(
    ("problem", "tile"),
    [
        (Problem(1, 1000, 1280), 8),  # 16 x 16 with split k: one thread block's latency is the time
        (Problem(112 * 112 * 256, 96, 16), 3),  # all of n at once: the rows are read once
        (Problem(1, 1000, 1280, half=False), 5),
        (Problem(112 * 112 * 256, 16, 32, half=False), 2),
        (Problem(7, 13, 5, 3, half=False, vectors=False), 1),
    ],
    ids=str,
)
def test_choices(plans, tile):
    assert plans[1][0] == tile
