"""Packed weights: unpacked by the rules of the tensor-core instructions, they are the weights
again; and the choices of the host code in csrc/plan/block.h, compiled and run here."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from torch_mbv2.weights import packing

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


def weights(source, expanded, out, dtype, stem=False, bias=True):
    """(expand or stem, its bias, depthwise, bias, project, bias); source None: no expansion."""
    g = torch.Generator().manual_seed(0)

    def r(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    window = (3, 3) if stem else (1, 1)
    first = None if source is None else r(expanded, source, *window)
    return [
        first,
        r(expanded) if bias and source is not None else None,
        r(expanded, 1, 3, 3),
        r(expanded) if bias else None,
        r(out, expanded, 1, 1),
        r(out) if bias else None,
    ]


def lane_columns(tiles):
    """The channel of each column of n tiles: of 4 (2, 1) tiles a lane has 8 (4, 2) neighbours."""
    channels, first = [], 0
    while first < tiles:
        group = next(size for size in (4, 2, 1) if size <= tiles - first)
        for tile in range(group):
            for n in range(8):
                q, e = n // 2, n % 2  # accumulator columns 2q and 2q + 1
                channels.append(8 * first + q * 2 * group + 2 * tile + e)
        first += group
    return channels


def unfragment(words, tiles, k):
    """(tiles * 8, k) from fragments: lane (n, q) has k = 2q, 2q + 1, 2q + 8, 2q + 9 of column n."""
    matrix = torch.full((tiles * 8, k), math.nan, dtype=words.dtype)
    at = 0
    for step in range(k // 16):
        tile = 0
        while tile < tiles:
            count = 2 if tile + 2 <= tiles else 1
            for lane in range(32):
                n, q = lane // 4, lane % 4
                for t in range(count):
                    for half in range(2):
                        for e in range(2):
                            column = step * 16 + 8 * half + 2 * q + e
                            matrix[(tile + t) * 8 + n, column] = words[at]
                            at += 1
            tile += count
    assert at == len(words)
    return matrix


def unpack(packed, source, expanded, out, tiles, chunk, slices=1, stem=False):
    """The tensors of `weights` from `packed`, read as the kernel reads it."""
    steps = 0 if source is None else 2 if stem else math.ceil(source / 16)
    chunks = math.ceil(expanded / chunk)
    pair_words = 416
    sizes = [chunk // 16 * tiles * 128, chunk // 16 * pair_words, 0 if stem else chunk // 8 * 64]
    sizes.append(steps * chunk // 16 * 256)
    blob = sum(sizes)
    per_slice = chunks * blob + tiles * 16
    assert packed.shape == (slices * per_slice,)
    depth = steps * 16
    expand = torch.full((chunks * chunk, depth), math.nan, dtype=packed.dtype)
    expand_bias = torch.full((chunks * chunk,), math.nan)
    taps = torch.full((chunks * chunk, 3, 3), math.nan, dtype=packed.dtype)
    bias = torch.full((chunks * chunk,), math.nan)
    project = torch.full((slices * tiles * 8, chunks * chunk), math.nan, dtype=packed.dtype)
    project_bias = torch.full((slices * tiles * 8,), math.nan)
    order = [(i, j) for j in range(3) for i in range(3)]
    columns, out_columns = lane_columns(chunk // 8), lane_columns(tiles)
    # Where the depthwise convolution has each channel: those of odd units of 8 are 2 columns off.
    depthwise_columns = [k - k % 8 + (k % 8 - k // 8 % 2 * 2) % 8 for k in range(chunk)]
    for s in range(slices):
        part = packed[s * per_slice : (s + 1) * per_slice]
        for c in range(chunks):
            words = part[c * blob : (c + 1) * blob].split(sizes)
            here = slice(c * chunk, (c + 1) * chunk)
            rows = unfragment(words[0], tiles, chunk)
            for n, channel in enumerate(out_columns):
                project[s * tiles * 8 + channel, here] = rows[n][depthwise_columns]
            for u, pair in enumerate(words[1].view(-1, pair_words)):
                parts = pair[:128].view(16, 4, 2), pair[128:256].view(16, 4, 2)
                entries = torch.cat([*parts, pair[256:288].view(16, 1, 2)], 1)
                biases = pair[288:].view(16, 4, 2)  # [column][q][k]
                assert not biases[:, 1:].any()
                for i in range(16):
                    channel, parity = c * chunk + u * 16 + i, i % 2
                    assert not entries[i, :, 1 - parity].any()
                    bias[channel] = biases[i, 0].float().sum()  # rounded, and what that lost
                    for (y, x), value in zip(order, entries[i, :, parity], strict=True):
                        taps[channel, y, x] = value
            biases = words[2].view(-1, 8, 4, 2)  # [n tile][column][q][k]
            assert not biases[..., 1:, :].any()
            for n, channel in enumerate(columns if not stem else ()):
                expand_bias[c * chunk + channel] = biases[n // 8, n % 8, 0].float().sum()
            if steps:
                rows = unfragment(words[3], chunk // 8, depth)
                for n, channel in enumerate(columns):
                    expand[c * chunk + channel] = rows[n]
        floats = part[chunks * blob :].view(torch.float32)
        for n, channel in enumerate(out_columns):
            project_bias[s * tiles * 8 + channel] = floats[n]
    return expand, expand_bias, taps, bias, project, project_bias


CASES = [
    # source, expanded, out, tiles, chunk, slices
    (16, 96, 24, 3, 32, 1),
    (24, 144, 24, 3, 48, 1),
    (24, 144, 32, 4, 48, 1),
    (8, 48, 8, 2, 48, 1),
    (32, 192, 64, 8, 48, 1),
    (40, 104, 40, 8, 48, 1),
    (160, 240, 96, 12, 48, 1),
    (64, 96, 136, 20, 48, 1),
    (48, 48, 320, 40, 48, 1),
    (16, 48, 448, 40, 48, 2),
    (None, 32, 16, 3, 32, 1),
    (None, 48, 16, 2, 48, 1),
]


@pytest.mark.parametrize("bias", [True, False, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("source", "expanded", "out", "tiles", "chunk", "slices"), CASES)
def test_unpacks_to_the_weights(source, expanded, out, tiles, chunk, slices, dtype, bias):
    tensors = weights(source, expanded, out, dtype, bias=bool(bias))
    if bias is torch.float32:  # they are kept to twice the bits of `dtype`, or exactly
        tensors = [
            x.float() + 2**-12 * torch.rand(len(x)) if x is not None and x.dim() == 1 else x
            for x in tensors
        ]
    packed = packing.pack_inverted_residual(*tensors)
    assert packed.dtype == dtype
    check(unpack(packed, source, expanded, out, tiles, chunk, slices), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "stem", "out", "tiles", "chunk"),
    [(3, 32, 16, 2, 32), (2, 48, 24, 4, 48), (1, 16, 8, 2, 32), (3, 24, 16, 2, 32)],
)
def test_unpacks_to_the_weights_of_a_stem(channels, stem, out, tiles, chunk, dtype):
    tensors = weights(channels, stem, out, dtype, stem=True)
    orders = packing.pack_stem_block(*tensors).chunk(2)
    for packed, first in zip(orders, (1, 0), strict=True):
        found = unpack(packed, channels, stem, out, tiles, chunk, stem=True)
        # 3 rows of 10 elements, of which the window has 9 from `first` on
        rows = found[0][:, :30].view(-1, 3, 10)
        assert not rows[..., 9 - 9 * first].any()
        window = rows[..., first : first + 9].unflatten(2, (3, 3))
        assert not window[..., channels:].any()
        as_conv = window[..., :channels].permute(0, 3, 1, 2)
        bias = found[0][:, 30:].float().sum(1)  # rounded, and what that lost
        check((as_conv, bias, *found[2:]), tensors)


def test_biases_beyond_float16_stay_finite():
    """An infinite one would meet its own rest, of the other sign."""
    tensors = weights(16, 96, 24, torch.float16)
    tensors[1], tensors[3] = torch.full((96,), 1e5), torch.full((96,), -math.inf)
    packed = packing.pack_inverted_residual(*tensors)
    _, expand_bias, _, bias, *_ = unpack(packed, 16, 96, 24, 3, 32)
    assert torch.allclose(expand_bias, torch.tensor(1e5), rtol=1e-6)
    assert bias.equal(torch.full((96,), -2 * 65504.0))


def check(found, tensors):
    """`found`, padded with zeros, holds `tensors`."""
    for got, wanted in zip(found, tensors, strict=True):
        if wanted is None:
            assert not got.any()
            continue
        if wanted.dim() == 4 and got.dim() < 4:  # 1 x 1, or one channel a group
            wanted = wanted.flatten(1) if got.dim() == 2 else wanted[:, 0]
        region = tuple(slice(size) for size in wanted.shape)
        if wanted.dtype == torch.float32:
            torch.testing.assert_close(got[region], wanted, rtol=2**-15, atol=2**-24)
        else:
            assert torch.equal(got[region].to(wanted.dtype), wanted)
        rest = got.clone()
        rest[region] = 0
        assert not rest.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [x if x is None else x.float() for x in t],
        lambda t: [*t[:2], t[2][:, :, :, :2], *t[3:]],
        lambda t: [*t[:4], t[4][:13], t[5][:13]],
        lambda t: [t[0][:, :13], *t[1:]],
        lambda t: [t[0][:12], t[1][:12], t[2][:12], t[3][:12], t[4][:, :12], t[5]],
    ],
    ids=["float32", "window", "out channels", "in channels", "expanded channels"],
)
def test_packs_nothing_where_no_kernel_exists(change):
    tensors = weights(16, 96, 24, torch.float16)
    assert packing.pack_inverted_residual(*tensors) is not None
    assert packing.pack_inverted_residual(*change(tensors)) is None


@pytest.mark.parametrize(
    "tensors",
    [
        weights(4, 32, 16, torch.float16, stem=True),
        weights(3, 32, 40, torch.float16, stem=True),
        weights(3, 32, 16, torch.float32, stem=True),
        [torch.ones(32, 3, 5, 5).half(), *weights(3, 32, 16, torch.float16, stem=True)[1:]],
    ],
    ids=["channels", "out channels", "float32", "window"],
)
def test_packs_no_stem_where_no_kernel_exists(tensors):
    assert packing.pack_stem_block(*tensors) is None


@pytest.mark.parametrize("resident", [True, False])
def test_packed_weights_serve_both_strides(resident):
    """Packing is not told the stride, so what it chooses from must not depend on it."""
    one, two = (
        {
            (instance["tiles"], instance["chunk"])
            for instance in packing._TABLE["instances"]
            if not instance["image"]
            and instance["stride"] == stride
            and (resident or not instance["resident"])
        }
        for stride in (1, 2)
    )
    assert one == two


# ---------------------------------------------------------------------------- csrc/plan/block.h


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    binary = tmp_path_factory.mktemp("tiles") / "block_tiles"
    source = ROOT / "scripts" / "block_tiles.cpp"
    flags = ["-std=c++20", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, source, "-o", binary], check=True)
    return binary


def choose(program, *arguments, **environment):
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout


def fields(line):
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


@pytest.mark.parametrize(("source", "expanded", "out", "tiles", "chunk", "slices"), CASES)
def test_both_sides_choose_the_same_layout(program, source, expanded, out, tiles, chunk, slices):
    code, text = choose(program, 4, 14, 14, source or 0, expanded, out, 1)
    assert code == 0
    layout = fields(text.splitlines()[0])
    packed = packing.pack_inverted_residual(*weights(source, expanded, out, torch.float16))
    assert (int(layout["tiles"]), int(layout["chunk"])) == (tiles, chunk)
    assert int(layout["bytes"]) == 2 * packed.numel()


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
@pytest.mark.parametrize("size", [96, 160, 224, 299, 512])
@pytest.mark.parametrize("shared", [232448, 101376])  # of a block: H100; GA10x, Ada
def test_every_block_of_the_family_has_a_tile(program, width, size, shared):
    from torch_mbv2.mobilenet import DEFAULT_SETTING, _architecture

    architecture = _architecture(10, width, DEFAULT_SETTING, 8, "symmetric", 0.0, 3)
    height, channels = (size + 1) // 2, architecture.stem
    for block in architecture.blocks:
        expanded = block.expanded or channels
        source = 0 if block.expanded is None else channels
        for batch in (1, 256):
            code, text = choose(
                program, batch, height, height, source, expanded, block.out, block.stride,
                SHARED=str(shared),
            )  # fmt: skip
            assert code == 0, text
            chosen = fields(next(line for line in text.splitlines() if line.startswith("chosen")))
            assert int(chosen["shared"]) <= shared
        height, channels = (height - 1) // block.stride + 1, block.out


def test_the_candidates_are_printed_cheapest_first(program):
    _, text = choose(program, 256, 56, 56, 24, 144, 24, 1)
    lines = text.splitlines()
    clocks = [float(fields(line)["clocks"]) for line in lines if "clocks=" in line]
    assert len(clocks) > 10
    assert clocks == [min(clocks), *sorted(clocks[1:])]


def test_clusters_are_for_gpus_that_have_them(program):
    arguments = (1, 7, 7, 160, 960, 160, 1)
    _, with_clusters = choose(program, *arguments)
    _, without = choose(program, *arguments, ARCH="800")
    assert "splits=8" in with_clusters
    assert "splits=2" not in without


@pytest.mark.parametrize(
    "arguments",
    [(1, 14, 14, 24, 144, 13, 1), (1, 14, 14, 13, 144, 16, 1), (1, 14, 14, 16, 96, 16, 3)],
)
def test_there_is_no_tile_for_what_no_instance_serves(program, arguments):
    code, text = choose(program, *arguments)
    assert (code, text.strip()) == (1, "no instance")
