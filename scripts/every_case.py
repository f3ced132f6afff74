#!/usr/bin/env python3
"""Run every case of tests/ops once, and nothing else that launches kernels, under a sanitizer.

The tests themselves compute what they expect on the GPU as well, and a sanitizer takes minutes for
a convolution in float64. Here tensors are made on the CPU, so that what it watches is this
project's kernels. Several processes at a time take a part each:

    for i in $(seq 0 13); do
      compute-sanitizer --tool racecheck python scripts/every_case.py --part $i/14 & done; wait
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/ops")]

import torch_mbv2  # noqa: E402
from torch_mbv2 import ops  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPS = sorted(ops.SCHEMAS)


def part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"a part is I/N with I < N, as in 0/4, not {text}")
    return int(index), int(count)


def every_case() -> Iterator[tuple[Any, torch.dtype]]:
    """The cases that tests/ops list: one for each kernel, sizes and options of every kind, and one
    for each tile that only large problems run on; not those beyond 2^31 elements."""
    files = [
        importlib.import_module(path.stem) for path in sorted(ROOT.glob("tests/ops/test_*.py"))
    ]
    for kind in ("KERNELS", "CASES", "LARGE"):
        for file in files:
            for case in getattr(file, kind, []):
                if hasattr(case, "tensors"):
                    yield from ((case, dtype) for dtype in DTYPES)


def run_case(case: Any, dtype: torch.dtype, device: str) -> bool:
    """Whether the outputs are finite; whether they are right is for the tests to say."""
    first, *others = case.tensors("cpu", dtype)
    others = [None if x is None else x.to(device) for x in others]
    images = [first]
    if first.dim() == 4:
        images = [first.contiguous(memory_format=torch.channels_last)]
    if case.op == "stem_block":  # which reads images as they come, by other code
        images += [first.contiguous(), first.float()]
    op = getattr(ops, case.op)
    outs = [op(image.to(device), *others, **case.options) for image in images]
    return all(bool(out.cpu().isfinite().all()) for out in outs)


def run_network(dtype: torch.dtype, device: str) -> bool:
    """Whether a network gives the same at first sight, when a GPU captures it, and replayed."""
    fast = torch_mbv2.patch(torchvision.models.mobilenet_v2().eval()).to(device, dtype)
    images = torch.randn(2, 3, 64, 64).to(dtype).to(device)
    first, *others = [fast(images).cpu() for _ in range(3)]
    return all(torch.equal(first, other) for other in others)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="every N-th case")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, help="of these alone")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options = parser.parse_args(argv)
    reason = torch_mbv2.why_not_available() if options.device == "cuda" else None
    if reason is not None:
        parser.error(f"the kernels cannot run here: {reason}; --device cpu runs the references")

    index, count = options.part
    cases = [(case, dtype) for case, dtype in every_case() if case.op in options.ops][index::count]
    bad = [f"{case} {dtype}" for case, dtype in cases if not run_case(case, dtype, options.device)]
    if index == 0 and "network" in options.ops:
        bad += [f"network {dtype}" for dtype in DTYPES if not run_network(dtype, options.device)]
    for line in bad:
        print(f"not finite, or not the same twice: {line}")
    print(f"{len(cases)} cases, {len(bad)} of them bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
