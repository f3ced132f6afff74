"""Error metrics with their bounds, and timers: what tests, scripts and the command line share."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ERROR_RATIO = 1.5
"""How much larger than stock PyTorch's an error may be, both against float64 in relative L2.

Two ways to sum the same products in the same precision differ in their error by chance, and folding
a batch norm rounds the weights once more; a wrong tap, a lost bias or a sum kept in half precision
costs far more than that.
"""


@dataclass(frozen=True)
class Bound:
    """How far the output of one op may be from float64 on the same, already rounded, inputs.

    Attributes:
        relative: of the relative L2 error.
        rtol: of an element's error, as a multiple of the expected element.
        atol: of an element's error, added to that, as a multiple of the RMS of all elements.
        why: where the numbers come from.
    """

    relative: float
    rtol: float
    atol: float
    why: str


_SUM = (
    "sums of up to 1280 products in float32 wander off by some 15 roundings of 2^-24: 2^-20 of the "
    "RMS, 2^-16 for the worst of a million elements and for Winograd's extra additions"
)
BOUNDS: dict[torch.dtype, Bound] = {
    torch.float32: Bound(2**-19, 2**-24, 2**-16, f"one rounding of 2^-24, and {_SUM}"),
    torch.float16: Bound(2**-11, 2**-11, 2**-15, f"one rounding of 2^-11, and {_SUM}"),
    torch.bfloat16: Bound(2**-8, 2**-8, 2**-15, f"one rounding of 2^-8, and {_SUM}"),
}
"""The bound of a single op, by the dtype of its output; the accumulation is in float32."""

_CHAIN = (
    "three roundings, one a layer, where those inside come out averaged by the sums after them: "
    "each some 0.6 roundoffs of the RMS, 16 roundoffs for the worst of a million elements"
)
BLOCK_BOUNDS: dict[torch.dtype, Bound] = {
    torch.float32: Bound(2**-18, 2**-24, 2**-15, f"three times {_SUM}"),
    torch.float16: Bound(2**-9, 2**-11, 2**-7, f"roundings of 2^-11: {_CHAIN}"),
    torch.bfloat16: Bound(2**-6, 2**-8, 2**-4, f"roundings of 2^-8: {_CHAIN}"),
}
"""The bound of a fused block (`inverted_residual`, `stem_block`, `conv_pool`), whose layers may
round what they hand on to its dtype, as stock layers do."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a normal number to `dtype`: half its epsilon."""
    return torch.finfo(dtype).eps / 2


def relative_l2(output: Tensor, expected: Tensor) -> float:
    """`||output - expected|| / ||expected||`, in float64: a number, NaN if anything is NaN.

    Both of the same shape, any dtype and device. Where `expected` is all zeros it is 0 for zeros
    and infinite for anything else; no elements have no error. Raises ValueError for two shapes.
    """
    output, expected = _pair(output, expected)
    error, size = float((output - expected).norm()), float(expected.norm())
    if size == 0 and not error > 0:
        return error
    return error / size if size else float("inf")


def error_ratio(output: Tensor, stock: Tensor, expected: Tensor) -> float:
    """The relative L2 error of `output` as a multiple of that of `stock`, neither taken for less
    than a rounding to the dtype of `output`; NaN if either is not finite.

    All of one shape; `expected` in float64. Raises ValueError for other shapes.
    """
    unit = unit_roundoff(output.dtype)
    errors = [relative_l2(x, expected) for x in (output, stock)]
    if not all(map(math.isfinite, errors)):
        return math.nan
    return max(errors[0], unit) / max(errors[1], unit)


def allowed_ratio(elements: int) -> float:
    """How much an `error_ratio` of outputs with so many elements may be: `ERROR_RATIO` and, of few
    elements, what chance adds to that."""
    # The relative L2 of n roundings varies by 1 / sqrt(2 n), the ratio of two such by 1 / sqrt(n).
    return ERROR_RATIO * (1 + 3 / math.sqrt(max(elements, 1)))


def max_abs(output: Tensor, expected: Tensor) -> float:
    """`max |output - expected|`, in float64; 0 for no elements, NaN if anything is NaN.

    Both of the same shape, any dtype and device. Raises ValueError for two shapes.
    """
    output, expected = _pair(output, expected)
    return float((output - expected).abs().max()) if output.numel() else 0.0


def _pair(output: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    if output.shape != expected.shape:
        raise ValueError(
            f"cannot compare shape {tuple(output.shape)} with expected {tuple(expected.shape)}"
        )
    return output.detach().double().cpu(), expected.detach().double().cpu()


def assert_close(output: Tensor, expected: Tensor, bound: Bound | None = None) -> None:
    """Raise AssertionError unless `output` is within `bound` of `expected`, in both metrics.

    output: of an op. expected: the same shape, computed in float64 from the same inputs.
    bound: by default `BOUNDS[output.dtype]`.
    """
    bound = BOUNDS[output.dtype] if bound is None else bound
    relative = relative_l2(output, expected)
    if not relative <= bound.relative:
        raise AssertionError(
            f"relative L2 error {relative:.3g}, allowed {bound.relative:.3g} ({bound.why})"
        )
    if not output.numel():
        return
    got, wanted = _pair(output, expected)
    error = (got - wanted).abs()
    allowed = bound.rtol * wanted.abs() + bound.atol * wanted.square().mean().sqrt()
    excess = (error - allowed).flatten()
    worst = int(excess.argmax())
    if not excess[worst] <= 0:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"element {index}: got {float(got[index]):.9g}, expected {float(wanted[index]):.9g}, "
            f"allowed error {float(allowed[index]):.3g} ({bound.why})"
        )


# ---------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes, one sample a round; every sample is the mean over `calls` calls."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p10(self) -> float:
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)

    def quantile(self, q: float) -> float:
        """The q-quantile of the samples, 0 <= q <= 1, interpolated linearly."""
        return float(torch.tensor(self.samples, dtype=torch.float64).quantile(q))


@dataclass(frozen=True)
class _Replay:
    graph: torch.cuda.CUDAGraph
    function: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def capture(function: Callable[[], T], warm_up: int = 3) -> tuple[Callable[[], None], T]:
    """A CUDA graph of what `function` launches: the call that replays it, and its result's tensors,
    which every replay overwrites. The call keeps `function`, and with it what the graph reads.

    function: takes and returns tensors that stay where they are. It is called `warm_up` times
    before, on the stream that is captured, so that libraries choose and load their kernels.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # cuBLAS keeps its workspace from call to call. The graph gets one of its own, from its pool:
    # what it would else share may be freed, by torch.compile say, while it still writes there.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph, stream=stream):
        result = function()
    torch._C._cuda_clearCublasWorkspaces()
    return _Replay(graph, function), result


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    *,
    rounds: int = 20,
    min_time: float = 0.02,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """How long each function takes when all take turns, in random order, so that what the machine
    does meanwhile (clocks, temperature, other work) meets all of them alike.

    Wall time on a CPU, CUDA events on a GPU (for graph replays as for anything that it is asked to
    do). Caches are as the calls leave them.

    functions: by name; each is called without arguments.
    device: where they run; "cuda" is the current GPU.
    rounds: samples of each function.
    min_time: seconds that one sample lasts at least; the function is repeated for that long.
    on_round: called after every round, say to show progress.
    """
    if rounds < 1:
        raise ValueError(f"time_interleaved: rounds must be at least 1, got {rounds}")
    sample = _sample_cuda if torch.device(device).type == "cuda" else _sample_cpu
    calls = {name: _repeats(function, sample, min_time) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(names)  # nobody always follows the same one
        for name in names:
            samples[name].append(sample(functions[name], calls[name]))
        if on_round is not None:
            on_round()
    return {name: Timing(tuple(values), calls[name]) for name, values in samples.items()}


def _repeats(
    function: Callable[[], Any], sample: Callable[[Callable[[], Any], int], float], min_time: float
) -> int:
    """How many calls last `min_time`; finding out warms up."""
    sample(function, 1)
    calls = 1
    while (last := sample(function, calls)) * calls < min_time:
        # A first guess from a single call may be far off, so grow by at most a factor of ten.
        calls = max(calls + 1, min(10 * calls, int(min_time / max(last, 1e-9)) + 1))
    return calls


def _sample_cpu(function: Callable[[], Any], calls: int) -> float:
    function()  # threads that were busy with something else are back, caches have what it reads
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _sample_cuda(function: Callable[[], Any], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000 / calls
