"""The plan of an inverted residual (csrc/plan/block.h), compiled and run without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
# What makes tests/plan/block.cpp's problem the stem and the first block of a network.
STEM = {"image": 1, "source": 3, "expanded": 32, "out": 16}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a C++ file of this project and gives the program."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("plan")

    def compile(source):
        binary = folder / Path(source).stem
        flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
        subprocess.run([COMPILER, *flags, ROOT / source, "-o", binary], check=True)
        return binary

    return compile


@pytest.fixture(scope="module")
def plan(compiled):
    """Plans the problem of block.cpp with some settings changed: (exit status, first line)."""
    binary = compiled("tests/plan/block.cpp")

    def run(**settings):
        arguments = [f"{name}={value}" for name, value in settings.items()]
        done = subprocess.run([binary, *arguments], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, done.stdout.strip()

    return run


def test_packing_reads_the_instances_that_are_compiled(compiled):
    """Else: block_tiles --instances > torch_mbv2/weights/block_instances.json."""
    binary = compiled("scripts/block_tiles.cpp")
    done = subprocess.run([binary, "--instances"], capture_output=True, text=True, check=True)
    committed = ROOT / "torch_mbv2" / "weights" / "block_instances.json"
    assert committed.read_text() == done.stdout


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": 2},
        {"source": 0},
        {"stride_h": 2, "stride_w": 2},
        {"pad_top": 0, "pad_left": 64},
        {"out": 328},
        STEM,
        {**STEM, "source": 1, "stem_top": 64, "span": 2**31 - 2},
    ],
    ids=str,
)
def test_is_fused(plan, settings):
    code, text = plan(**settings)
    assert code == 0
    assert text.startswith("fused ")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": 0}, "float32 has no fused kernel"),
        ({"kind": 1}, "hard-swish has no fused kernel"),
        ({"kind": 2}, "SiLU has no fused kernel"),
        ({"kind": 3}, "sigmoid has no fused kernel"),
        ({"lo": -1}, "the activation's lower bound must be 0, got -1"),
        ({"lo": "-inf"}, "the activation's lower bound must be 0, got -inf"),
        ({"lo": "nan"}, "the activation's lower bound must be 0, got nan"),
        ({"window_h": 5, "window_w": 5}, "5x5 windows have no fused kernel"),
        ({"window_w": 1}, "3x1 windows have no fused kernel"),
        ({"stride_w": 2}, "strides must be equal, got (1, 2)"),
        ({"stride_h": 3, "stride_w": 3}, "stride 3 has no fused kernel"),
        ({"pad_top": 65}, "padding beyond 64 has no fused kernel, got (65, 1)"),
        ({"pad_left": 65}, "padding beyond 64 has no fused kernel, got (1, 65)"),
        ({"source": 12}, "input channels must be multiples of 8, got 12"),
        ({"expanded": 100}, "expanded channels must be multiples of 8, got 100"),
        ({"out": 12}, "output channels must be multiples of 8, got 12"),
        ({"out": 0}, "output channels must be multiples of 8, got 0"),
        ({**STEM, "source": 4}, "a stem's image must have 1 to 3 channels, got 4"),
        ({**STEM, "stem_window": 5}, "5x5 windows of a stem have no fused kernel"),
        ({**STEM, "stem_stride": 1}, "a stem's stride must be 2, got (2, 1)"),
        ({**STEM, "stride_h": 2, "stride_w": 2}, "a stem's block must have stride 1, got 2"),
        ({**STEM, "stem_top": 65}, "padding beyond 64 has no fused kernel, got (65, 0)"),
        ({**STEM, "span": 2**31 - 1}, "offsets within an image must be below 2^31"),
        ({**STEM, "out": 40}, "40 output channels have no fused kernel"),
        ({"shared": 16384}, "no tile fits the shared memory of this GPU"),
    ],
    ids=str,
)
def test_says_why_it_is_not_fused(plan, settings, reason):
    assert plan(**settings) == (1, reason)


def test_a_candidate_can_be_forced(plan):
    _, text = plan(kernel=13, warps_x=1, warps_y=1, images=1, splits=1)
    cut = dict(part.split("=") for part in text.split()[2:])
    assert cut == {"kernel": "13", "warps_x": "1", "warps_y": "1", "images": "1", "splits": "1"}


@pytest.mark.parametrize(
    "cut",
    [
        {"kernel": 0, "warps_x": 1, "warps_y": 1, "images": 1, "splits": 1},
        {"kernel": 13, "warps_x": 9, "warps_y": 1, "images": 1, "splits": 1},
        {"kernel": 13, "warps_x": 1, "warps_y": 1, "images": 1, "splits": 3},
        {"kernel": 99, "warps_x": 1, "warps_y": 1, "images": 1, "splits": 1},
    ],
    ids=["layout", "warps", "splits", "kernel"],
)
def test_only_a_candidate_can_be_forced(plan, cut):
    assert plan(**cut) == (1, "the forced tile is no candidate")


def test_costs_are_an_argument(plan):
    def clocks(**settings):
        return float(plan(**settings)[1].split()[1].removeprefix("clocks="))

    assert clocks(start=1e6) > 1e6 > clocks()
