"""csrc/plan/winograd.h, compiled and run here: tiles, and the memory of a chunk of them."""

from __future__ import annotations

import math

import pytest

CHUNK_BYTES = 256 << 20


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1),
        (2, 7, 9, 64, 96),
        (256, 56, 56, 64, 64),
        (3, 5, 4, 2**20, 2**20),  # a tile takes more than a chunk should
        (100000, 224, 224, 64, 64),
    ],
)
def test_cuts_into_chunks(build, sizes):
    batch, out_h, out_w, in_channels, out_channels = sizes
    numbers = [int(word) for word in build("winograd", *sizes).split()]
    tiles_h, tiles_w, tiles, chunk, weights, inputs, products = numbers
    assert (tiles_h, tiles_w) == (math.ceil(out_h / 2), math.ceil(out_w / 2))
    assert tiles == batch * tiles_h * tiles_w
    assert 1 <= chunk <= tiles
    # 16 values of 4 bytes a tile and channel, or a pair of channels.
    for memory, values in (
        (weights, in_channels * out_channels),
        (inputs, chunk * in_channels),
        (products, chunk * out_channels),
    ):
        assert memory % 256 == 0
        assert 0 <= memory - 64 * values < 256
    if chunk < tiles:  # as many as fit, or 128
        bytes_of_a_tile = 64 * (in_channels + out_channels)
        assert chunk == max(CHUNK_BYTES // bytes_of_a_tile, 128)
