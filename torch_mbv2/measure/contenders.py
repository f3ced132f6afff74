"""Whom a patched model is timed against: each way to run a stock model, and how to get it ready.

A new rival is a function that makes a `Ready` of a `Work`, and a line in `CONTENDERS`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from torch_mbv2 import testing
from torch_mbv2.patch import fold_norms, patch

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a contender has to do.

    Attributes:
        stock: the model, in eval mode, on its device and in its dtype; not to be changed.
        images: the batch, as the model takes it, contiguous; not to be changed.
        layout: the memory format in which a model that works in channels_last gets its images.
    """

    stock: nn.Module
    images: Tensor
    layout: torch.memory_format = torch.channels_last


@dataclass(frozen=True)
class Ready:
    """A contender that has chosen, compiled and captured all that it will.

    Attributes:
        call: computes the logits of `input`, (N, classes); the next call may overwrite them.
        input: its images; what is written to them, the next call computes with.
        captured_bytes: device memory of a CUDA graph, which PyTorch's allocator does not count as
            allocated while the graph is replayed.
        foreign: its memory is not PyTorch's allocator's.
    """

    call: Callable[[], Tensor]
    input: Tensor
    captured_bytes: int = 0
    foreign: bool = False


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    Attributes:
        title: for people.
        prepare: gets it ready. May raise anything: what others have written does.
        missing: why it cannot run on a device and how to get it, in a sentence; None if it can.
        compiles: torch.compile makes it, which must not do so again once it is ready.
    """

    title: str
    prepare: Callable[[Work], Ready]
    missing: Callable[[torch.device], str | None]
    compiles: bool = False


def _here(device: torch.device) -> None:
    """Nothing is missing."""


def _needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --------------------------------------------------------------------------- PyTorch and patched


def _module(work: Work, module: nn.Module, layout: torch.memory_format) -> Ready:
    images = work.images.clone(memory_format=layout)
    return Ready(torch.inference_mode()(functools.partial(module, images)), images)


def _eager(work: Work) -> Ready:
    return _module(work, copy.deepcopy(work.stock), torch.contiguous_format)


def _channels_last(work: Work) -> Ready:
    module = fold_norms(work.stock).to(memory_format=torch.channels_last)
    return _module(work, module, work.layout)


def _patched(work: Work) -> Ready:
    return _module(work, patch(work.stock), work.layout)


def _captured(ready: Ready) -> Ready:
    """The same as one CUDA graph."""
    ready.call()  # the first call tunes, which may take more memory than any later one
    (replay, logits), taken = _peak(lambda: testing.capture(ready.call))

    def call() -> Tensor:
        replay()
        return logits

    return Ready(call, ready.input, taken)


def _peak(function: Callable[[], T]) -> tuple[T, int]:
    """`function()`, and the bytes that it takes of the GPU's memory at most."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    return result, torch.cuda.max_memory_allocated() - before


def _cudagraph(work: Work) -> Ready:
    return in_new_thread(lambda: _captured(_channels_last(work)))


def in_new_thread(function: Callable[[], T]) -> T:
    """`function()`, where nobody has tuned cuDNN before: PyTorch keeps the algorithms that it found
    fastest in a cache of the thread, and a first call that finds them there takes no time."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function).result()


def _compile(work: Work) -> Ready:
    """torch.compile with frozen weights, as users call it: on a GPU mode="reduce-overhead", whose
    CUDA graphs copy the images and check guards at each call."""
    return _compiled(work, "reduce-overhead" if work.images.is_cuda else None)


def _compile_cudagraph(work: Work) -> Ready:
    """The same kernels in one CUDA graph, which does neither."""
    return _captured(_compiled(work, None))


def _compiled(work: Work, mode: str | None) -> Ready:
    import torch._inductor.config as inductor

    images = work.images.clone(memory_format=work.layout)
    module = copy.deepcopy(work.stock).to(memory_format=torch.channels_last)
    compiled = torch.compile(module, mode=mode)

    @torch.no_grad()  # an inference tensor cannot be frozen
    def call() -> Tensor:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = compiled(images)
        return logits

    def settle() -> None:  # records its CUDA graphs, and replays them
        call()
        call()

    taken = 0
    # Without the caches, so that the first call takes as long as it does on another machine.
    options = {"freezing": True, "force_disable_caches": True}
    with inductor.patch(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
        if mode is not None:
            _, taken = _peak(settle)
    return Ready(call, images, taken)


def _compile_missing(device: torch.device) -> str | None:
    if device.type == "cuda" and not _installed("triton"):
        return "needs the package triton: pip install triton"
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return "needs a C++ compiler: install g++, or name one in the variable CXX"
    return None


# ---------------------------------------------------------------------------------- ONNX Runtime


_ORT_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def _onnxruntime(work: Work) -> Ready:
    """ONNX Runtime on the exported model, with every fusion that it has; on a GPU in its own CUDA
    graph, on a CPU with as many threads as PyTorch."""
    import onnxruntime

    images = work.images.clone()
    onnxruntime.set_default_logger_severity(4)  # what fails is raised; the rest is tried otherwise
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads are busy waiting when it is somebody else's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    provider: Any = "CPUExecutionProvider"
    stream = None
    if images.is_cuda:
        stream = torch.cuda.Stream()
        provider = (
            "CUDAExecutionProvider",
            {
                "device_id": str(images.device.index or 0),
                "user_compute_stream": str(stream.cuda_stream),
                "enable_cuda_graph": "1",
                "use_tf32": "0",
            },
        )
    session = onnxruntime.InferenceSession(_export(work), options, providers=[provider])
    if images.is_cuda and session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("ONNX Runtime could not load its CUDA provider")
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    dtype = _ORT_DTYPES[target.type]  # that of images is another one if they are uint8, say
    logits = torch.empty(target.shape, dtype=dtype, device=images.device)
    run = onnxruntime.RunOptions()
    if stream is not None:  # whoever reads the logits waits for the stream
        run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    binding = session.io_binding()
    for bind, name, tensor in (
        (binding.bind_input, source.name, images),
        (binding.bind_output, target.name, logits),
    ):
        bind(
            name,
            device_type=tensor.device.type,
            device_id=tensor.device.index or 0,
            element_type=torch.empty(0, dtype=tensor.dtype).numpy().dtype,
            shape=tuple(tensor.shape),
            buffer_ptr=tensor.data_ptr(),
        )

    def call() -> Tensor:
        session.run_with_iobinding(binding, run)
        return logits

    if stream is None:
        return Ready(call, images, foreign=True)

    def call_on_stream() -> Tensor:
        stream.wait_stream(torch.cuda.current_stream())
        call()
        torch.cuda.current_stream().wait_stream(stream)
        return logits

    return Ready(call_on_stream, images, foreign=True)


def _export(work: Work) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(work.stock),
            (work.images,),
            cast(str, file),  # a file will do, too, without dynamo
            input_names=["images"],
            output_names=["logits"],
            dynamo=False,  # needs nothing besides the package onnx
        )
    return file.getvalue()


def _onnxruntime_missing(device: torch.device) -> str | None:
    package = "onnxruntime-gpu" if device.type == "cuda" else "onnxruntime"
    missing = [name for name in ("onnxruntime", "onnx") if not _installed(name)]
    if missing:
        names = ["onnx" if name == "onnx" else package for name in missing]
        return f"needs the package {' and '.join(names)}: pip install {' '.join(names)}"
    if device.type == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return (
                "the installed onnxruntime has no CUDA provider: pip uninstall onnxruntime; "
                "pip install onnxruntime-gpu"
            )
    return None


# -------------------------------------------------------------------------------------- TensorRT


def _tensorrt(work: Work) -> Ready:
    """TensorRT by way of Torch-TensorRT, in the dtypes of the model, as one CUDA graph."""
    import torch_tensorrt

    images = work.images.clone()
    engine = torch_tensorrt.compile(
        copy.deepcopy(work.stock), ir="dynamo", inputs=[images], min_block_size=1, disable_tf32=True
    )
    ready = _captured(Ready(torch.inference_mode()(functools.partial(engine, images)), images))
    return Ready(ready.call, images, foreign=True)


def _tensorrt_missing(device: torch.device) -> str | None:
    if device.type == "cuda" and not _installed("torch_tensorrt"):
        return "needs the package torch_tensorrt: pip install torch-tensorrt"
    return _needs_gpu(device)


# ------------------------------------------------------------------------------------------------

CONTENDERS: dict[str, Contender] = {
    "eager": Contender("eager", _eager, _here),
    "channels_last": Contender("channels_last, norms folded", _channels_last, _here),
    "cudagraph": Contender("channels_last, norms folded, CUDA graph", _cudagraph, _needs_gpu),
    "compile": Contender("torch.compile", _compile, _compile_missing, compiles=True),
    "compile_cudagraph": Contender(
        "torch.compile, CUDA graph",
        _compile_cudagraph,
        lambda device: _needs_gpu(device) or _compile_missing(device),
        compiles=True,
    ),
    "onnxruntime": Contender("ONNX Runtime", _onnxruntime, _onnxruntime_missing),
    "tensorrt": Contender("TensorRT", _tensorrt, _tensorrt_missing),
    "patched": Contender("patched", _patched, _here),
    "patched_cudagraph": Contender(
        "patched, CUDA graph", lambda work: _captured(_patched(work)), _needs_gpu
    ),
}
"""By the name that `--rivals` and the JSON of `bench` know them by, in the order of the tables."""

PATCHED = ("patched", "patched_cudagraph")
RIVALS = tuple(name for name in CONTENDERS if name not in PATCHED)


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """What people read instead of the names of the contenders, in a result of `bench`."""
    known = {name: contender.title for name, contender in CONTENDERS.items()}
    return known | {rival["name"]: rival["title"] for rival in result["rivals"]}
