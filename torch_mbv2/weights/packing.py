"""Weights in the order in which the fused block kernels read them: pure functions on tensors.

The kernels (csrc/block/kernel.cuh) take the expanded channels a chunk at a time. A chunk's
weights are one piece of memory, laid out as `PackedSizes` of csrc/plan/block.h says: matrices as
fragments of the tensor-core instruction mma.m16n8k16 in the order of its registers, so that a lane
loads 16 bytes at once, and taps of the depthwise convolution as the entries of diagonal matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
# What instances of the kernels exist: made from kBlockKernels of csrc/plan/block.h.
_TABLE = json.loads(Path(__file__).with_name("block_instances.json").read_text())
_MOST_TILES: int = _TABLE["most_tiles"]  # more output channels are made in several slices


def _layouts(*, image: bool, wide: bool = False) -> set[tuple[int, int]]:
    """The (tiles of 8 output channels, expanded channels at a time) of the instances that read an
    image or do not, and, with `wide`, take more than 32 input channels."""
    return {
        (instance["tiles"], instance["chunk"])
        for instance in _TABLE["instances"]
        if instance["image"] == image and not (wide and instance["resident"])
    }


_LAYOUTS = _layouts(image=False)
_WIDE_LAYOUTS = _layouts(image=False, wide=True)
_STEM_LAYOUTS = _layouts(image=True)
# The window's taps, (row, column), in the order of the instructions.
_TAPS = tuple((i, j) for j in range(3) for i in range(3))


def pack_inverted_residual(
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
) -> Tensor | None:
    """What `ops.inverted_residual` takes as `packed`.

    Biases may be float32: they keep what the weights' dtype would round off.

    Args:
        expand_weight: (E, Cin, 1, 1), or None where there is no expansion; float16 or bfloat16.
        expand_bias: (E,) or None.
        depthwise_weight: (E, 1, 3, 3).
        depthwise_bias: (E,) or None.
        project_weight: (Cout, E, 1, 1).
        project_bias: (Cout,) or None.

    Returns:
        A 1-D tensor of the weights' dtype and device; None where no fused kernel exists: another
        dtype or window, or channels that are no multiples of 8.
    """
    channels = 8 if expand_weight is None else expand_weight.shape[1]
    if channels % 8 != 0 or not _serves(depthwise_weight, project_weight):
        return None
    matrix = None if expand_weight is None else expand_weight.flatten(1)
    few = expand_weight is None or channels <= 32
    return _pack(
        matrix,
        expand_bias,
        depthwise_weight,
        depthwise_bias,
        project_weight,
        project_bias,
        _LAYOUTS if few else _WIDE_LAYOUTS,
    )


def pack_stem_block(
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
) -> Tensor | None:
    """What `ops.stem_block` takes as `packed`.

    Biases may be float32: they keep what the weights' dtype would round off.

    Args:
        stem_weight: (S, Cin, 3, 3), Cin at most 3; float16 or bfloat16.
        stem_bias: (S,) or None.
        depthwise_weight: (S, 1, 3, 3).
        depthwise_bias: (S,) or None.
        project_weight: (Cout, S, 1, 1).
        project_bias: (Cout,) or None.

    Returns:
        A 1-D tensor of the weights' dtype and device; None where no fused kernel exists: another
        dtype or window, more channels, or channels that are no multiples of 8.
    """
    stem, channels, *window = stem_weight.shape
    if channels > 3 or window != [3, 3] or not _serves(depthwise_weight, project_weight):
        return None
    biases = stem_weight.new_zeros(stem, 2)
    if stem_bias is not None:
        biases = _split(stem_bias.float(), stem_weight.dtype)
    parts = []
    for order in _image_orders(stem_weight):
        part = _pack(
            torch.cat([order, biases], 1),
            None,
            depthwise_weight,
            depthwise_bias,
            project_weight,
            project_bias,
            _STEM_LAYOUTS,
            bias_in_matrix=True,
        )
        if part is None:
            return None
        parts.append(part)
    return torch.cat(parts)


def _image_orders(weight: Tensor) -> list[Tensor]:
    """The weights of the stem as k = 30 of a matrix, in `ImageOrder` of csrc/plan/block.h: 3 rows
    of 10 elements of the image, one before the window's 9, or after. The bias, as the rounded one
    and what that lost, are another 2."""
    taps = weight.new_zeros(weight.shape[0], 3, 3, 3)  # (S, row, column, channel)
    taps[..., : weight.shape[1]] = weight.permute(0, 2, 3, 1)
    orders = []
    for first in (1, 0):
        rows = weight.new_zeros(weight.shape[0], 3, 10)
        rows[:, :, first : first + 9] = taps.flatten(2)
        orders.append(rows.flatten(1))
    return orders


def _serves(depthwise_weight: Tensor, project_weight: Tensor) -> bool:
    out_channels, expanded = project_weight.shape[:2]
    return (
        project_weight.dtype in DTYPES
        and tuple(depthwise_weight.shape[2:]) == (3, 3)
        and min(out_channels, expanded) >= 8
        and out_channels % 8 == expanded % 8 == 0
    )


def _pack(
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor | None,
    layouts: Collection[tuple[int, int]],
    *,
    bias_in_matrix: bool = False,
) -> Tensor | None:
    out_channels, expanded = project.shape[:2]
    slices = math.ceil(out_channels / (8 * _MOST_TILES))
    needed = math.ceil(out_channels / 8 / slices)
    # As choose_block_layout of csrc/plan/block.h: the fewest products to spare.
    costs = [
        (math.ceil(expanded / chunk) * chunk * (tiles + 8), chunk, tiles)
        for tiles, chunk in layouts
        if tiles >= needed
    ]
    if not costs:
        return None
    _, chunk, tiles = min(costs)
    chunks = math.ceil(expanded / chunk)
    dtype = project.dtype

    def padded(x: Tensor | None, *sizes: int) -> Tensor:
        """`x`, zero where it ends before `sizes`; None is all zeros."""
        out = project.new_zeros(sizes)
        if x is not None:
            out[tuple(slice(size) for size in x.shape)] = x
        return out

    def padded_bias(x: Tensor | None, size: int) -> Tensor:
        out = project.new_zeros(size, dtype=torch.float32)
        if x is not None:
            out[: len(x)] = x
        return out

    outputs = slices * tiles * 8
    project = padded(project.flatten(1), outputs, chunks * chunk)
    # (slice, output channel, chunk, expanded channel), both channels in the order of columns
    project = _in_columns(project.view(slices, tiles * 8, chunks, chunk), 1)
    # the depthwise columns of every second unit of 8 channels are 2 channels off
    units = project.unflatten(3, (-1, 2, 8))
    project = torch.stack([units[..., 0, :], units[..., 1, :].roll(-2, -1)], -2).flatten(3)
    project_parts = _fragments(project.permute(0, 2, 1, 3))  # (slice, chunk, bytes)

    taps = padded(depthwise[:, 0], chunks * chunk, 3, 3)
    parts = [_depthwise(taps, padded_bias(depthwise_bias, chunks * chunk), chunks)]
    if not bias_in_matrix:
        bias = padded_bias(expand_bias, chunks * chunk).view(chunks, chunk)
        parts.append(_bias_rows(_in_columns(bias, 1), dtype))
    if expand is not None:
        depth = math.ceil(expand.shape[1] / 16) * 16
        matrix = padded(expand, chunks * chunk, depth).view(chunks, chunk, depth)
        parts.append(_words(_fragments(_in_columns(matrix, 1))))
    common = torch.cat(parts, 1)
    blobs = torch.cat([_words(project_parts), common.expand(slices, *common.shape)], 2)
    bias = _in_columns(padded_bias(project_bias, outputs).view(slices, tiles * 8), 1)
    return torch.cat([blobs.flatten(1), _words(bias)], 1).flatten().view(dtype)


def _depthwise(taps: Tensor, bias: Tensor, chunks: int) -> Tensor:
    """The depthwise part of each chunk, (chunks, 16-bit words). taps: (E, 3, 3); bias: (E,)."""
    # Entries of diagonal matrices: [pair of units][channel][tap][half of the register]
    entries = torch.stack([taps[:, i, j] for i, j in _TAPS], 1).view(chunks, -1, 16, 9)
    words = entries.new_zeros(*entries.shape, 2)
    words[:, :, 0::2, :, 0] = entries[:, :, 0::2]
    words[:, :, 1::2, :, 1] = entries[:, :, 1::2]
    pairs = [
        _words(words[:, :, :, part].flatten(2)) for part in (slice(4), slice(4, 8), slice(8, 9))
    ]
    biases = _bias_rows(bias.view(chunks, -1), taps.dtype).view(chunks, -1, 128)
    return torch.cat([*pairs, biases], 2).flatten(1)


def _bias_rows(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Biases of columns, (chunks, columns) of float32, as right operands of mma.m16n8k8 of which
    the first two rows are `_split(bias)`. Returns (chunks, 16-bit words)."""
    # lane = 4 * column + q holds rows 2q and 2q + 1
    rows = bias.new_zeros(*bias.shape, 4, 2, dtype=dtype)
    rows[:, :, 0] = _split(bias, dtype)
    return _words(rows.flatten(1))


def _split(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 2) of `dtype` from float32: the rounded bias, and what that lost. Beyond the finite
    numbers of `dtype` both stay at the largest, as an infinite part would turn the sum into NaN."""
    most = torch.finfo(dtype).max
    rounded = bias.clamp(-most, most).to(dtype)
    return torch.stack([rounded, (bias - rounded.float()).clamp(-most, most).to(dtype)], -1)


def _words(x: Tensor) -> Tensor:
    """The same memory in units of 16 bits."""
    return x.contiguous().view(torch.int16)


def _in_columns(x: Tensor, dim: int) -> Tensor:
    """Channels, dimension `dim` of x, in the order of the columns of their n tiles of 8: such that
    a lane, whose columns are 2q and 2q + 1 of every tile, has 8 consecutive channels in 4 tiles, or
    4 in 2. No index tensors, so that packing can be captured in a CUDA graph."""
    parts, first, channels = [], 0, x.shape[dim]
    while first < channels:
        tiles = next(size for size in (4, 2, 1) if 8 * size <= channels - first)
        group = x.narrow(dim, first, 8 * tiles).unflatten(dim, (4, tiles, 2))
        parts.append(group.transpose(dim, dim + 1).flatten(dim, dim + 2))
        first += 8 * tiles
    return torch.cat(parts, dim)


def _fragments(matrix: Tensor) -> Tensor:
    """Right operands of mma.m16n8k16 in the order of its registers.

    matrix: (..., N, K), N a multiple of 8 and K of 16. Returns (..., N * K): for each 16 of K, for
    each pair of n tiles, for each lane, 4 registers; an odd last tile has 2.
    """
    *batch, n, k = matrix.shape
    # lane = 4 * row + q holds, of n = row, k = 2q, 2q + 1, 2q + 8, 2q + 9
    x = matrix.reshape(-1, n // 8, 8, k // 16, 2, 4, 2)
    pairs = n // 16
    parts = []
    if pairs:
        even = x[:, : 2 * pairs].reshape(-1, pairs, 2, 8, k // 16, 2, 4, 2)
        parts.append(even.permute(0, 4, 1, 3, 6, 2, 5, 7).flatten(2))
    if n // 8 % 2:
        parts.append(x[:, -1].permute(0, 2, 1, 4, 3, 5).flatten(2))
    return torch.cat(parts, 2).reshape(*batch, n * k)
