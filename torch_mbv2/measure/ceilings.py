"""What a machine reaches at best: the rates that the floors of the layers are reckoned with.

They are measured in the run that they are compared in, not taken from a datasheet. That of a GPU
names the rates of a boost clock which it does not hold under load, leaves out what refreshing and
error correction cost, and knows nothing of power limits or of others on the same machine; that of a
CPU names none at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torch_mbv2 import testing

_GPU_SIZE, _CPU_SIZE = 8192, 1024
_GPU_COPY, _CPU_COPY = 2**30, 2**28
_CPU_PRODUCT_S = 0.005


@dataclass(frozen=True)
class Ceilings:
    """The best rates of a machine.

    Attributes:
        bytes_per_s: of its memory, read and written ones together.
        flops_per_s: of matrix products, two FLOPs a multiply-add, by the name of the dtype.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The "ceilings" of bench.schema.json."""
        return asdict(self)

    def floor(self, bytes: int, flops: int, dtype: str) -> float:
        """The seconds that moving `bytes` or computing `flops` takes at least, whichever is longer.

        dtype: by name, one of those measured.
        """
        return max(bytes / self.bytes_per_s, flops / self.flops_per_s[dtype])


def measure(device: torch.device, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """Measure `device`: a copy far larger than any cache, and square matrix products of random
    numbers by stock PyTorch, 8192 wide on a GPU. The best of several samples counts.

    Whether float32 may use TF32 is for the caller to set. Takes a second or two.
    """
    source = torch.empty(_copied_bytes(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.zero_()  # on a CPU, memory that nobody wrote to is all one page
    functions: dict[str, Callable[[], Tensor]] = {"copy": lambda: target.copy_(source)}
    flops: dict[str, int] = {}
    with torch.inference_mode():
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            size = _GPU_SIZE if device.type == "cuda" else _cpu_size(dtype)
            functions[name], flops[name] = _product(size, dtype, device), 2 * size**3
        timings = testing.time_interleaved(functions, device, rounds=10, min_time=0.01)
    seconds = {name: min(timing.samples) for name, timing in timings.items()}
    return Ceilings(
        bytes_per_s=2 * source.nbytes / seconds["copy"],
        flops_per_s={name: count / seconds[name] for name, count in flops.items()},
    )


def _copied_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_COPY
    return min(_GPU_COPY, torch.cuda.mem_get_info(device)[0] // 4)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A product of two (size, size) matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return functools.partial(torch.mm, left, right, out=torch.empty_like(left))


def _cpu_size(dtype: torch.dtype) -> int:
    """The largest power of two up to 1024 that multiplies in reasonable time: in half precision,
    CPUs differ by a factor of a thousand."""
    size, device = 128, torch.device("cpu")
    while size < _CPU_SIZE:
        product = _product(size, dtype, device)
        timing = testing.time_interleaved({"": product}, device, rounds=2, min_time=0)
        if min(timing[""].samples) > _CPU_PRODUCT_S:
            break
        size *= 2
    return size
