"""Times each fused piece of a MobileNetV2 against the stock layers that it replaces, then the whole
network, its memory and its first call. On a GPU both sides are CUDA graphs; whatever is compared
takes turns in one process. `--json FILE` writes

    {"schema": 1, "verb": "bench_blocks", "command", "date": ISO 8601 in UTC,
     "device": "cpu" | "cuda", "environment", "kernels": as `info` writes them,
     "settings": {"tf32", "cudnn_benchmark", "caches", "images", "rounds", "min_time_s",
                  "read_bytes_per_s": that of the floor,
                  "macs_per_s": {dtype: that of the floor}},
     "model": {"name", "width", "resolution", "weights"},
     "agree": whether every row agrees,
     "pieces": [one for each dtype, batch and piece],
     "totals": [one for each dtype and batch],
     "network": [one for each dtype, batch and contender],
     "memory": [one for each dtype, batch and contender; none on a CPU],
     "first_calls": [one for each contender]}

A row of pieces, where "stock" is the same convolutions with batch norms folded, channels_last:

    {"dtype", "batch", "piece": "stem_block" | "features.2" ... | "conv_pool" | "linear",
     "input": shape, "output": shape,
     "us", "p10_us", "p90_us", "stock_us", "stock_p10_us", "stock_p90_us",
     "ratio": stock_us / us,
     "bytes": of input, output and weights, each once, "gb_per_s": at `us`,
     "macs": multiply-adds, "tflop_per_s": two for each, at `us`,
     "floor_us": the time to move the bytes or to multiply, whichever is longer; null on a CPU,
     "of_floor": floor_us / us,
     "relative_l2", "stock_relative_l2": error against float64 of the first 8 images,
     "agrees": whether it is at most `testing.ERROR_RATIO` times stock's, neither taken for less
               than a rounding}

of totals:

    {"dtype", "batch", "geometric_mean": of the ratios, "us": sum, "stock_us": sum}

of network:

    {"dtype", "batch", "contender": "patched" | "patched, level op" |
     "stock channels_last folded" | "torch.compile": frozen, mode="reduce-overhead" |
     "torch.compile, one CUDA graph": frozen, captured as the others are,
     "ms", "p10_ms", "p90_ms", "images_per_s", "ratio": median of stock channels_last folded / ms,
     "prepare_s": patching, folding or compiling, the first calls and the capture,
     "relative_l2", "agrees": of the logits, as above, for images that came after the preparations}

or {"dtype", "batch", "contender", "skipped": why}; of memory, for an eager call:

    {"dtype", "batch", "contender", "weights_mib": allocated before the call, which includes the
     stock weights that a patched model keeps, "peak_mib": allocated on top during the call}

and of first_calls, each in a fresh process, medians over `runs` of them:

    {"contender", "dtype", "batch", "runs", "import_torch_s", "import_s",
     "load_s": building the model and moving it, "patch_s": patching, folding or torch.compile(),
     "first_forward_s", "total_s": all of these, "second_forward_s"}

or {"contender", "dtype", "batch", "skipped": why}.

The exit status is 1 if a row does not agree.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mbv2
from torch_mbv2 import modules, testing
from torch_mbv2.cli import bench, models, output
from torch_mbv2.patch import fold_norms

ROOT = Path(__file__).resolve().parents[1]
FOLDED, PATCHED, PATCHED_OPS = bench.FOLDED, bench.PATCHED, "patched, level op"
COMPILED, COMPILED_GRAPH = "torch.compile", "torch.compile, one CUDA graph"

CHECKED = 8
"""Images that are compared with float64."""
READ_RATE = 3.08e12
"""Bytes a second that an H100 SXM was measured to read from its memory."""
_TENSOR_RATE = 132 * 4 * (16 * 8 * 16) / 6 * 1.98e9
MAC_RATES = {
    # 132 multiprocessors with 4 schedulers each, m16n8k16 by mma.sync every 6 clocks, at 1.98 GHz
    "float16": _TENSOR_RATE,
    "bfloat16": _TENSOR_RATE,
    "float32": 132 * 128 * 1.98e9,  # FFMA
}
"""Multiply-adds a second of an H100 SXM, of dense and pointwise convolutions by dtype. Depthwise
ones run beside tensor cores, and count where there are none (float32)."""

Piece = (
    modules.FusedStemBlock
    | modules.FusedInvertedResidual
    | modules.FusedConvPool
    | modules.FusedLinear
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit status. argv: by default that of the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.command = shlex.join(["python", "scripts/bench_blocks.py", *argv])
    try:
        output.check_json_path(args.json)
        result = run(args)
        output.emit(args.json, result, lambda: _print(result))
    except torch.OutOfMemoryError:
        print("bench_blocks: error: not enough GPU memory: give smaller --batches", file=sys.stderr)
        return 2
    except (torch_mbv2.Error, OSError) as error:
        print(f"bench_blocks: error: {error}", file=sys.stderr)
        return 2
    return 0 if result["agree"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_blocks",
        description=__doc__.partition("`--json")[0],
        epilog="example:\n  python scripts/bench_blocks.py --batches 1 256 --json blocks.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--width", type=float, default=1.0, metavar="X", help="multiplies the channels")
    add("--resolution", type=models.image_size, default=224, metavar="N", help="height and width")
    add("--batches", type=models.positive, nargs="+", default=[1, 32, 256], metavar="N")
    add("--dtypes", choices=models.DTYPES, nargs="+", default=["float16"], metavar="T")
    add("--rounds", type=models.positive, default=20, metavar="N", help="samples of each")
    add("--min-time", type=float, default=0.02, metavar="S", help="seconds of a sample at least")
    add("--no-pieces", action="store_true", help="the network only")
    add("--no-network", action="store_true", help="the pieces only")
    add("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    add("--first-calls", type=int, default=3, metavar="N", help="fresh processes of each; 0: none")
    add("--json", metavar="FILE", help="write everything to FILE, or print only that for -")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What `--json` writes."""
    device = models.device(args.device)
    result = bench.header("bench_blocks", args.command, device, args.rounds, args.min_time)
    result["settings"] |= {"read_bytes_per_s": READ_RATE, "macs_per_s": MAC_RATES}
    result |= {
        "model": {
            "name": "torch_mbv2.MobileNetV2",
            "width": args.width,
            "resolution": args.resolution,
            "weights": "random, batch norms fitted to noise",
        },
        "agree": True,
        **{part: [] for part in ("pieces", "totals", "network", "memory", "first_calls")},
    }
    if args.first_calls > 0 and not args.no_network:
        result["first_calls"] = first_calls(args, device)
    model = random_model(args.width, args.resolution)
    with bench.exact_settings():
        for dtype, batch in itertools.product(args.dtypes, args.batches):
            stock = copy.deepcopy(model).to(device, models.DTYPES[dtype])
            images = _images(args.resolution, batch).to(device, models.DTYPES[dtype])
            images = images.contiguous(memory_format=torch.channels_last)
            if not args.no_pieces:
                rows = bench_pieces(stock, images, args.rounds, args.min_time)
                result["pieces"] += rows
                result["totals"].append(_total(rows))
            if not args.no_network:
                if device.type == "cuda":
                    result["memory"] += measure_memory(stock, images)
                result["network"] += bench_network(
                    stock, images, args.rounds, args.min_time, not args.no_compile
                )
    rows = result["pieces"] + result["network"]
    result["agree"] = all(row.get("agrees") is not False for row in rows)
    return result


def random_model(width: float, resolution: int) -> nn.Module:
    """A MobileNetV2 with random weights, on the CPU, whose batch norms are fitted to noise, so that
    each activation cuts on both sides."""
    torch.manual_seed(0)
    model = torch_mbv2.MobileNetV2(width_mult=width).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 3)
            nn.init.normal_(module.bias, 1, 1)
            module.momentum = 1.0  # the statistics of the next batch, alone
    with torch.no_grad():
        model(_images(resolution, 4))
    return model.eval()


def _images(resolution: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(min(batch, bench.IMAGES), 3, resolution, resolution, generator=generator)
    return images[torch.arange(batch) % len(images)]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------- pieces


def find_pieces(patched: nn.Module) -> dict[str, Piece]:
    """The fused pieces of a patched MobileNetV2 by name, in the order of the calls.

    Raises Error if patching left something between them.
    """
    found: dict[str, dict[str, Piece]] = {"stem_block": {}, "inverted_residual": {}}
    found |= {"conv_pool": {}, "gemm": {}}
    left = []
    for row in torch_mbv2.report(patched).rows:
        if row.kernel in found:
            found[row.kernel][row.name] = patched.get_submodule(row.name)
        elif row.kernel != "folded":
            left.append(row.name)
    stems, blocks, pools, linears = found.values()
    if left or not len(stems) == len(pools) == len(linears) == 1:
        raise torch_mbv2.Error(
            "bench_blocks: this network is not made of a stem, inverted residuals, a pooled head "
            f"and a classifier once it is patched; what is left: {', '.join(left) or 'nothing'}"
        )
    return {
        "stem_block": next(iter(stems.values())),
        **{name.partition(".torch_mbv2_")[0]: block for name, block in blocks.items()},
        "conv_pool": next(iter(pools.values())),
        "linear": next(iter(linears.values())),
    }


def stock_of(piece: Piece, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What `piece` does, by stock layers on its weights in `dtype`, channels_last."""
    weights = {}
    for name, parameter in piece.named_parameters():
        layout = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
        weights[name] = parameter.detach().to(dtype, memory_format=layout)

    def act(x: Tensor) -> Tensor:
        open_ended = piece.act_min is None and piece.act_max is None
        return x if open_ended else x.clamp_(piece.act_min, piece.act_max)

    def conv(
        name: str,
        x: Tensor,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | None = (0, 0, 0, 0),
    ) -> Tensor:
        weight, bias = weights[f"{name}weight"], weights.get(f"{name}bias")
        if padding is None:
            padding = modules.same_padding(x, weight.shape[2:], stride, (1, 1))
        left, right, top, bottom = padding
        if (left, top) != (right, bottom):
            x, left, top = F.pad(x, tuple(padding)), 0, 0
        return F.conv2d(x, weight, bias, stride, (top, left), 1, x.shape[1] // weight.shape[1])

    def stem_block(x: Tensor) -> Tensor:
        x = act(conv("stem_", x, piece.stem_stride, piece.stem_padding))
        return conv("project_", act(conv("depthwise_", x, (1, 1), piece.padding)))

    def inverted_residual(x: Tensor) -> Tensor:
        y = act(conv("expand_", x)) if "expand_weight" in weights else x
        y = conv("project_", act(conv("depthwise_", y, piece.stride, piece.padding)))
        return x + y if piece.residual else y

    def conv_pool(x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(act(conv("", x)), 1)
        return pooled if piece.keepdim else pooled.flatten(1)

    def linear(x: Tensor) -> Tensor:
        return act(F.linear(x, weights["weight"], weights.get("bias")))

    functions: dict[type, Callable[[Tensor], Tensor]] = {
        modules.FusedStemBlock: stem_block,
        modules.FusedInvertedResidual: inverted_residual,
        modules.FusedConvPool: conv_pool,
        modules.FusedLinear: linear,
    }
    return functions[type(piece)]


def count_macs(piece: Piece, x: Tensor, y: Tensor) -> tuple[int, int]:
    """The multiply-adds of a piece from x to y: dense and pointwise ones, depthwise ones."""
    pixels_in, pixels_out = (len(t) * math.prod(t.shape[2:]) for t in (x, y))
    dense = depthwise = 0
    for name, weight in piece.named_parameters():
        if name.endswith("bias"):
            continue
        if name == "depthwise_weight":
            depthwise += pixels_out * weight.numel()
        elif name == "expand_weight" or isinstance(piece, modules.FusedConvPool):
            dense += pixels_in * weight.numel()
        else:
            dense += pixels_out * weight.numel()
    return dense, depthwise


def bench_pieces(
    stock: nn.Module, images: Tensor, rounds: int, min_time: float
) -> list[dict[str, Any]]:
    """The rows of one dtype and one batch size; each piece gets the output of the one before."""
    pieces = find_pieces(torch_mbv2.patch(stock))
    rows, x = [], images
    with output.progress("pieces", len(pieces)) as advance:
        for name, piece in pieces.items():
            x = x.flatten(1) if isinstance(piece, modules.FusedLinear) else x
            row, x = _bench_piece(name, piece, x, rounds, min_time)
            rows.append(row)
            advance(f"{row['dtype']}, batch {row['batch']}, {name}")
            _free()
    return rows


def _bench_piece(
    name: str, piece: Piece, x: Tensor, rounds: int, min_time: float
) -> tuple[dict[str, Any], Tensor]:
    dtype = str(x.dtype).removeprefix("torch.")
    functions = {"fused": piece.forward, "stock": stock_of(piece, x.dtype)}
    with torch.inference_mode():
        calls = {side: _callable(lambda f=f: f(x), x.is_cuda) for side, f in functions.items()}
        timings = testing.time_interleaved(calls, x.device, rounds=rounds, min_time=min_time)
        outputs = {side: call() for side, call in calls.items()}
        expected = stock_of(piece, torch.float64)(x[:CHECKED].double())
        errors = [testing.relative_l2(outputs[s][:CHECKED], expected) for s in ("fused", "stock")]
        y = outputs["fused"].clone()
    fused, plain = timings["fused"], timings["stock"]
    dense, depthwise = count_macs(piece, x, y)
    weights = sum(parameter.numel() for parameter in piece.parameters())
    moved = (x.numel() + y.numel() + weights) * x.element_size()
    macs = dense + depthwise
    floor = None
    if x.is_cuda:
        multiplied = macs if x.dtype == torch.float32 else dense
        floor = 1e6 * max(moved / READ_RATE, multiplied / MAC_RATES[dtype])
    row = {
        "dtype": dtype,
        "batch": len(x),
        "piece": name,
        "input": list(x.shape),
        "output": list(y.shape),
        **_quantiles(fused, "us", 1e6),
        **{f"stock_{key}": value for key, value in _quantiles(plain, "us", 1e6).items()},
        "ratio": plain.median / fused.median,
        "bytes": moved,
        "gb_per_s": moved / fused.median / 1e9,
        "macs": macs,
        "tflop_per_s": 2 * macs / fused.median / 1e12,
        "floor_us": floor,
        "of_floor": None if floor is None else floor / (1e6 * fused.median),
        "relative_l2": errors[0],
        "stock_relative_l2": errors[1],
        "agrees": _agrees(errors[0], errors[1], x.dtype),
    }
    return row, y


def _callable(function: Callable[[], Tensor], captured: bool) -> Callable[[], Tensor]:
    """What is timed: `function`, or a CUDA graph of it, whose result the next call overwrites."""
    if not captured:
        return function
    replay, result = testing.capture(function)

    def call() -> Tensor:
        replay()
        return result

    return call


def _quantiles(timing: testing.Timing, unit: str, scale: float) -> dict[str, float]:
    return {
        unit: scale * timing.median,
        f"p10_{unit}": scale * timing.p10,
        f"p90_{unit}": scale * timing.p90,
    }


def _agrees(error: float, stock: float, dtype: torch.dtype) -> bool:
    unit = testing.unit_roundoff(dtype)
    return max(error, unit) <= testing.ERROR_RATIO * max(stock, unit)


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "dtype": rows[0]["dtype"],
        "batch": rows[0]["batch"],
        "geometric_mean": statistics.geometric_mean(row["ratio"] for row in rows),
        "us": sum(row["us"] for row in rows),
        "stock_us": sum(row["stock_us"] for row in rows),
    }


# --------------------------------------------------------------------------------------- network


def bench_network(
    stock: nn.Module, images: Tensor, rounds: int, min_time: float, compiled: bool
) -> list[dict[str, Any]]:
    """The rows of one dtype and one batch size. Mirrors `images`."""
    common = {"dtype": str(images.dtype).removeprefix("torch."), "batch": len(images)}
    prepare: dict[str, Callable[[], Callable[[], Tensor]]] = {
        PATCHED: lambda: _prepare(torch_mbv2.patch(stock), images),
        PATCHED_OPS: lambda: _prepare(torch_mbv2.patch(stock, level="op"), images),
        FOLDED: lambda: _prepare(_folded(stock), images),
    }
    if compiled:
        prepare[COMPILED] = lambda: _compile(stock, images, captured=False)
        if images.is_cuda:
            prepare[COMPILED_GRAPH] = lambda: _compile(stock, images, captured=True)
    rows, calls, seconds = [], {}, {}
    for name, function in prepare.items():
        start = time.perf_counter()
        try:
            calls[name] = function()
        except Exception as error:  # a compiler may raise anything
            if name not in (COMPILED, COMPILED_GRAPH):
                raise
            first = next(iter(str(error).splitlines()), type(error).__name__)
            rows.append({**common, "contender": name, "skipped": first})
        seconds[name] = time.perf_counter() - start
    # Nothing is compiled any more: here it would be without the settings of `_compile`.
    with torch.compiler.set_stance("fail_on_recompile"):
        timings = testing.time_interleaved(calls, images.device, rounds=rounds, min_time=min_time)
        # A compiler that takes the images for constants computes nothing: what is compared are the
        # logits of images that nobody saw before.
        images.copy_(images.flip(3))
        logits = {name: call()[:CHECKED].clone() for name, call in calls.items()}
    with torch.inference_mode():
        expected = copy.deepcopy(stock).double()(images[:CHECKED].double())
    errors = {name: testing.relative_l2(found, expected) for name, found in logits.items()}
    measured = [
        {
            **common,
            "contender": name,
            **_quantiles(timing, "ms", 1e3),
            "images_per_s": len(images) / timing.median,
            "ratio": timings[FOLDED].median / timing.median,
            "prepare_s": seconds[name],
            "relative_l2": errors[name],
            "agrees": _agrees(errors[name], errors[FOLDED], images.dtype),
        }
        for name, timing in timings.items()
    ]
    calls.clear()
    torch._dynamo.reset()
    _free()
    return measured + rows


def _folded(stock: nn.Module) -> nn.Module:
    return fold_norms(stock).to(memory_format=torch.channels_last)


def _prepare(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    return _callable(torch.inference_mode()(lambda: module(images)), images.is_cuda)


def _compile(stock: nn.Module, images: Tensor, captured: bool) -> Callable[[], Tensor]:
    """torch.compile at its best without minutes of tuning, with frozen weights. On a GPU either in
    its own CUDA graphs, which copy the images and check guards at each call, or `captured` in one
    like those of the other contenders."""
    import torch._inductor.config as inductor

    module = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    own_graphs = images.is_cuda and not captured
    compiled = torch.compile(module, mode="reduce-overhead" if own_graphs else None)

    @torch.no_grad()  # an inference tensor cannot be frozen
    def call() -> Tensor:
        if own_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(images)

    with inductor.patch(freezing=True):
        for _ in range(3):  # compile, record, replay
            call()
    return _callable(call, captured)


def measure_memory(stock: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """The rows of one dtype and one batch size."""
    rows = []
    builders: dict[str, Callable[[], nn.Module]] = {
        PATCHED: lambda: torch_mbv2.patch(stock),
        FOLDED: lambda: _folded(stock),
    }
    for name, build in builders.items():
        _free()
        without = torch.cuda.memory_allocated()
        module = build()
        _free()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            module(images)  # libraries choose their kernels, and try some that need more
            torch.cuda.reset_peak_memory_stats()
            module(images)
        rows.append(
            {
                "dtype": str(images.dtype).removeprefix("torch."),
                "batch": len(images),
                "contender": name,
                "weights_mib": (before - without) / 2**20,
                "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
            }
        )
        del module
    return rows


# ------------------------------------------------------------------------------------ first call

_FIRST_CALL = """
import json, sys, time
seconds = {}
begin = last = time.perf_counter()
def lap(name):
    global last
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    now = time.perf_counter()
    seconds[name], last = now - last, now
import torch
lap("import_torch_s")
import torch_mbv2
from torch_mbv2.patch import fold_norms
lap("import_s")
contender, device, dtype, width, resolution = sys.argv[1:]
dtype = getattr(torch, dtype)
model = torch_mbv2.MobileNetV2(width_mult=float(width)).eval().to(device, dtype)
x = torch.zeros(1, 3, int(resolution), int(resolution), device=device, dtype=dtype)
x = x.contiguous(memory_format=torch.channels_last)
lap("load_s")
if contender == "patched":
    model = torch_mbv2.patch(model)
else:
    model = fold_norms(model).to(memory_format=torch.channels_last)
if contender == "torch.compile":
    import torch._inductor.config
    torch._inductor.config.freezing = True
    model = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None)
lap("patch_s")
with torch.no_grad():
    model(x).cpu()
    lap("first_forward_s")
    seconds["total_s"] = time.perf_counter() - begin
    model(x).cpu()
    lap("second_forward_s")
print(json.dumps(seconds))
"""


def first_calls(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows, one image in the first dtype."""
    rows = []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # as on a machine that never compiled it
    }
    wanted = [device.type, args.dtypes[0], str(args.width), str(args.resolution)]
    for contender in (PATCHED, FOLDED, *([] if args.no_compile else [COMPILED])):
        common = {"contender": contender, "dtype": args.dtypes[0], "batch": 1}
        command = [sys.executable, "-c", _FIRST_CALL, contender, *wanted]
        runs = []
        for _ in range(1 if contender == COMPILED else args.first_calls):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode != 0:
                why = done.stderr.strip().rpartition("\n")[2] or "it failed without a word"
                rows.append({**common, "skipped": why})
                break
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        else:
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({**common, "runs": len(runs), **medians})
    return rows


# ---------------------------------------------------------------------------------------- output


def _print(result: dict[str, Any]) -> None:
    found, model = result["environment"], result["model"]
    machine = found["cpu"]
    if result["device"] == "cuda":
        machine = f"{found['gpus'][0]['name']}, driver {found['driver']}, CUDA {found['cuda']}"
    print(f"{model['name']}, width {model['width']}, {model['resolution']}x{model['resolution']}")
    print(f"{machine}, torch {found['torch']}, commit {found['commit'] or 'unknown'}")
    for title, columns, rows in _tables(result):
        if rows:
            print(f"\n{title}")
            words = ("dtype", "piece", "contender", "agrees", "skipped")
            numbers = [column for column in columns if column not in words]
            output.print_table(columns, rows, numbers=numbers)


_Column = Callable[[dict[str, Any]], str]


def _tables(
    result: dict[str, Any],
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    def number(key: str, digits: int = 2, suffix: str = "") -> _Column:
        return lambda row: "" if row.get(key) is None else f"{row[key]:.{digits}f}{suffix}"

    def error(key: str) -> _Column:
        return lambda row: "" if row.get(key) is None else f"{row[key]:.1e}"

    def word(key: str) -> _Column:
        return lambda row: str(row.get(key, ""))

    def agrees(row: dict[str, Any]) -> str:
        return {True: "yes", False: "NO", None: ""}[row.get("agrees")]

    case: dict[str, _Column] = {"dtype": word("dtype"), "batch": word("batch")}
    tables: dict[str, tuple[str, dict[str, _Column]]] = {
        "pieces": (
            "pieces: fused against stock channels_last folded",
            {
                "piece": word("piece"),
                "us": number("us"),
                "10%": number("p10_us"),
                "90%": number("p90_us"),
                "stock us": number("stock_us"),
                "ratio": number("ratio", 2, "x"),
                "GB/s": number("gb_per_s", 0),
                "TFLOP/s": number("tflop_per_s", 1),
                "floor us": number("floor_us"),
                "of floor": number("of_floor"),
                "error": error("relative_l2"),
                "stock's": error("stock_relative_l2"),
                "agrees": agrees,
            },
        ),
        "totals": (
            "all pieces",
            {
                "ratio": number("geometric_mean", 2, "x"),
                "sum us": number("us", 1),
                "stock sum us": number("stock_us", 1),
            },
        ),
        "network": (
            "network",
            {
                "contender": word("contender"),
                "ms": number("ms", 3),
                "10%": number("p10_ms", 3),
                "90%": number("p90_ms", 3),
                "img/s": number("images_per_s", 0),
                "ratio": number("ratio", 2, "x"),
                "prepare s": number("prepare_s"),
                "error": error("relative_l2"),
                "agrees": agrees,
                "skipped": word("skipped"),
            },
        ),
        "memory": (
            "memory of an eager call",
            {
                "contender": word("contender"),
                "weights MiB": number("weights_mib", 1),
                "peak MiB": number("peak_mib", 1),
            },
        ),
        "first_calls": (
            "first call in a fresh process",
            {
                "contender": word("contender"),
                "import torch s": number("import_torch_s"),
                "import s": number("import_s"),
                "load s": number("load_s"),
                "patch s": number("patch_s"),
                "forward s": number("first_forward_s"),
                "total s": number("total_s"),
                "again s": number("second_forward_s", 4),
                "skipped": word("skipped"),
            },
        ),
    }
    for part, (title, columns) in tables.items():
        columns = case | columns
        rows = [[render(row) for render in columns.values()] for row in result[part]]
        yield title, list(columns), rows


if __name__ == "__main__":
    sys.exit(main())
