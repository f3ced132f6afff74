"""Results of `bench` as it would write them, made up: for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch_mbv2.measure

SCHEMA = json.loads(
    (Path(torch_mbv2.measure.__file__).parent / "bench.schema.json").read_text("utf-8")
)
TITLES = {
    "eager": "eager",
    "channels_last": "channels_last, norms folded",
    "cudagraph": "channels_last, norms folded, CUDA graph",
    "compile": "torch.compile",
    "compile_cudagraph": "torch.compile, CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "patched": "patched",
    "patched_cudagraph": "patched, CUDA graph",
}
MS = {  # of one image
    "eager": 3.4,
    "channels_last": 2.4,
    "cudagraph": 0.4,
    "compile": 0.35,
    "compile_cudagraph": 0.27,
    "onnxruntime": 0.5,
    "patched": 0.4,
    "patched_cudagraph": 0.1,
}
LAYERS = ("stem_block", "features.2", "features.3", "conv_pool", "classifier.1")


def row(contender, dtype="float16", batch=1, ms=None, **others):
    """A row of the whole network; ms: its median, by default one that grows with the batch."""
    ms = MS[contender] * (1 + batch / 16) if ms is None else ms
    graph = MS["patched_cudagraph"] * (1 + batch / 16)
    return {
        "dtype": dtype,
        "batch": batch,
        "contender": contender,
        "median_ms": ms,
        "p10_ms": 0.99 * ms,
        "p90_ms": 1.01 * ms,
        "calls": 10,
        "images_per_s": 1e3 * batch / ms,
        "first_call_s": 0.5,
        "peak_mib": 20.0 + batch,
        "over_patched": ms / (MS["patched"] * (1 + batch / 16)),
        "over_patched_cudagraph": ms / graph,
        "relative_l2": 1e-3,
        "max_abs": 1e-2,
        "error_ratio": 1.1,
        "top1_differs": 0,
        "near_ties": 0,
        "agrees": None if contender == "eager" else True,
    } | others


def skipped(contender, why, dtype="float16", batch=1):
    """A row of what could not be timed."""
    return {"dtype": dtype, "batch": batch, "contender": contender, "skipped": why}


def layer(name, dtype="float16", batch=1, level="block", us=5.0, **others):
    """A row of one layer."""
    return {
        "dtype": dtype,
        "batch": batch,
        "level": level,
        "layer": name,
        "kernel": "inverted_residual" if level == "block" else "gemm",
        "input": [batch, 24, 56, 56],
        "output": [batch, 24, 56, 56],
        "caches": "cold",
        "us": us,
        "p10_us": 0.99 * us,
        "p90_us": 1.01 * us,
        "stock_us": 3 * us,
        "stock_p10_us": 2.97 * us,
        "stock_p90_us": 3.03 * us,
        "heuristic_us": 4 * us,
        "heuristic_p10_us": 3.96 * us,
        "heuristic_p90_us": 4.04 * us,
        "ratio": 3.0,
        "heuristic_ratio": 4.0,
        "bytes": 300_000 * batch,
        "gb_per_s": 300 * batch / us,
        "stock_gb_per_s": 100 * batch / us,
        "flops": 50_000_000 * batch,
        "tflop_per_s": 50 * batch / us,
        "stock_tflop_per_s": 50 * batch / us / 3,
        "floor_us": 0.1 * batch,
        "of_floor": 0.1 * batch / us,
        "stock_of_floor": 0.1 * batch / us / 3,
        "relative_l2": 3e-4,
        "stock_relative_l2": 3e-4,
        "heuristic_relative_l2": 3e-4,
        "agrees": True,
        "stock_agrees": True,
    } | others


def total(dtype="float16", batch=1, level="block", **others):
    """A row of all layers."""
    return {
        "dtype": dtype,
        "batch": batch,
        "level": level,
        "us": 25.0,
        "stock_us": 75.0,
        "heuristic_us": 100.0,
        "geometric_mean": 3.0,
        "heuristic_geometric_mean": 4.0,
    } | others


def result(dtypes=("float16", "float32"), batches=(1, 8, 32), layers=True, **others):
    """A whole result, on a GPU, where TensorRT is missing."""
    cases = [(dtype, batch) for dtype in dtypes for batch in batches]
    missing = "needs the package torch_tensorrt: pip install torch-tensorrt"
    rows = []
    for case in cases:
        rows += [row(name, *case) for name in MS]
    per_layer = [layer(name, *case, us=4.0 + i) for case in cases for i, name in enumerate(LAYERS)]
    return {
        "schema": 2,
        "verb": "bench",
        "command": "python -m torch_mbv2 bench torchvision:mobilenet_v2 --json result.json",
        "date": "2030-01-02T03:04:05+00:00",
        "device": "cuda",
        "environment": {
            "gpus": [{"name": "GPU 9000", "capability": "9.0", "memory_gib": 80.0}],
            "driver": "600.1",
            "cpu": "CPU 1",
            "threads": 2,
            "system": "Linux",
            "python": "3.12.1",
            "torch": "2.99",
            "cuda": "13.9",
            "cudnn": "9.99",
            "torch_mbv2": "0.1.0",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "packages": {"onnx": "1.2.3"},
        },
        "kernels": {"available": True, "why_not_available": None, "archs": ["9.0a"], "build": {}},
        "clocks": {
            "sm_mhz": 1980.0,
            "max_sm_mhz": 1980.0,
            "memory_mhz": 2619.0,
            "max_memory_mhz": 2619.0,
            "temperature_c": 40.0,
            "power_w": 300.0,
        },
        "settings": {
            "tf32": False,
            "cudnn_benchmark": True,
            "caches": "warm: every call reads the same input and weights",
            "images": "normal noise, 32 different ones",
            "rounds": 20,
            "min_time_s": 0.02,
        },
        "ceilings": {"bytes_per_s": 3e12, "flops_per_s": dict.fromkeys(dtypes, 7e14)}
        if layers
        else None,
        "model": {
            "name": "some_net",
            "weights": "random",
            "pretrained": False,
            "input": [224, 192],
        },
        "report": {"summary": "all layers run on torch_mbv2 kernels", "note": None},
        "rivals": [
            {"name": name, "title": title, "missing": missing if name == "tensorrt" else None}
            for name, title in TITLES.items()
        ],
        "noise": {"limit": 0.05, "over": 0, "of": len(rows), "worst": 0.02},
        "agree": True,
        "rows": rows,
        "layers": per_layer if layers else [],
        "layer_totals": [total(*case) for case in cases] if layers else [],
    } | others
