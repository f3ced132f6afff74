"""csrc/plan/architecture.h, compiled and run here: whose constants an architecture takes."""

from __future__ import annotations

import pytest


def test_the_table_is_in_order_and_what_was_not_measured_is_inherited(build):
    rows = [tuple(map(int, line.split())) for line in build("architecture").splitlines()]
    archs = [arch for arch, _ in rows]
    assert archs == [800, 860, 890, 900, 1000, 1200]
    assert (900, 900) in rows
    assert {measured for _, measured in rows} <= set(archs)


@pytest.mark.parametrize(
    ("arch", "takes"),
    [
        *((arch, arch) for arch in (800, 860, 890, 900, 1000, 1200)),
        (0, 900),  # it cannot be told
        (750, 800),
        (870, 860),
        (1030, 1000),
        (1100, 1000),
        (1210, 1200),
        (2000, 1200),
    ],
)
def test_takes_the_nearest_older_ones(build, arch, takes):
    words = build("architecture", arch).split()
    assert int(words[0]) == takes


def test_says_where_the_constants_come_from(build):
    known, unknown, hidden = build("architecture", 900, 1030, 0).splitlines()
    assert known.startswith("900 900 tiles are chosen by times measured on ")
    assert known.endswith(" (sm_90)")
    assert unknown.endswith("; sm_103 has not been measured")
    assert hidden == known
