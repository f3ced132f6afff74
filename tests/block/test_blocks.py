"""Whole MobileNetV2s on fused blocks, on a GPU, against float64 and stock PyTorch."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from onnx_helpers import randomise
from torch import Tensor, nn

import torch_mbv2
from torch_mbv2 import testing

pytestmark = pytest.mark.cuda

HALVES = [torch.float16, torch.bfloat16]
SIZES = [96, 128, 160, 192, 224, 225, 256, 299, 512, (200, 320)]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@functools.cache
def network(width: float = 1.0, padding: str = "symmetric") -> nn.Module:
    """In float32 on the GPU; its batch norms have the statistics of a few batches of noise, so that
    activations are of the size that they have in a trained network."""
    model = randomise(torch_mbv2.MobileNetV2(width_mult=width, padding=padding)).cuda().train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
    for seed in range(4):
        model(images(16, 160, torch.float32, seed))
    return model.eval()


def images(batch: int, size: int | tuple[int, int], dtype: torch.dtype, seed: int = 9) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(batch, 3, height, width, device="cuda", generator=generator)
    return x.to(dtype)


def rounded(dtype: torch.dtype, *arguments) -> nn.Module:
    """The stock network with its weights rounded to `dtype`."""
    return copy.deepcopy(network(*arguments)).to(dtype)


def check(stock: nn.Module, x: Tensor) -> None:
    """The logits of the patched model err at most half as much again as those of stock, both
    against float64 on the same rounded weights and images: the first and the last few of `x`."""
    some = torch.cat([x[:4], x[4:][-4:]])
    exact = copy.deepcopy(stock).double()(some.double())
    got = torch_mbv2.patch(stock)(x)
    got = torch.cat([got[:4], got[4:][-4:]])
    limit = testing.ERROR_RATIO * testing.relative_l2(stock(some), exact)
    assert testing.relative_l2(got, exact) <= limit


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_widths_and_sizes(width, size, dtype):
    check(rounded(dtype, width), images(2, size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [224, 225, (200, 321)], ids=str)
@pytest.mark.parametrize("width", [0.35, 1.0])
def test_padding_of_tensorflow(width, size, dtype):
    check(rounded(dtype, width, "same"), images(2, size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 31, 256])
def test_batches(batch, dtype):
    check(rounded(dtype), images(batch, 224, dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_no_images(dtype):
    out = torch_mbv2.patch(rounded(dtype))(images(0, 224, dtype))
    assert (out.shape, out.dtype) == ((0, 1000), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_of_float32_need_no_copy_in_half_precision(memory_format, dtype):
    fast = torch_mbv2.patch(rounded(dtype))
    x = images(4, 224, torch.float32).contiguous(memory_format=memory_format)
    assert torch.equal(fast(x), fast(x.to(dtype)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 32])
def test_a_hundred_runs_are_bitwise_equal(batch, dtype):
    fast, x = torch_mbv2.patch(rounded(dtype)), images(batch, 224, dtype)
    first = fast(x)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        differ += (fast(x) != first).sum()
    assert differ == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_an_image_gets_the_same_logits_in_every_batch(dtype):
    """But for roundings: tiles, and so the order of sums, may differ with the batch."""
    fast, x = torch_mbv2.patch(rounded(dtype)), images(31, 224, dtype)
    bound = 8 * testing.unit_roundoff(dtype)
    assert testing.relative_l2(torch.cat([fast(image[None]) for image in x]), fast(x)) < bound


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [2, 3, 8, 31, 32, 64, 129, 257])
def test_equal_images_get_bitwise_equal_rows_from_every_block(batch, dtype):
    """Wherever they are in the batch, also where a thread block has several of them."""
    fast = torch_mbv2.patch(rounded(dtype))
    outputs = []
    for module in fast.modules():
        if "packed" in dict(module.named_buffers(recurse=False)):
            module.register_forward_hook(lambda module, input, output: outputs.append(output))
    fast(images(1, 224, dtype).repeat(batch, 1, 1, 1))
    assert len(outputs) == 16 + 1
    assert all(torch.equal(output, output[:1].expand_as(output)) for output in outputs)


def test_runs_on_the_current_stream():
    fast, x = torch_mbv2.patch(rounded(torch.float16)), images(16, 224, torch.float16)
    expected = fast(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # on another stream, the blocks would read zeros
        late.copy_(x)
        got = fast(late)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("batch", [1, 8])
def test_replays_as_a_cuda_graph(batch, dtype):
    fast = torch_mbv2.patch(rounded(dtype))
    x = torch.zeros_like(images(batch, 224, dtype))
    replay, out = testing.capture(lambda: fast(x))
    for seed in range(3):
        x.copy_(images(batch, 224, dtype, seed))
        replay()
        assert torch.equal(out, fast(x))


def test_compiles_whole():
    fast, x = torch_mbv2.patch(rounded(torch.float16)), images(2, 224, torch.float16)
    expected = fast(x)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True)
    assert testing.relative_l2(compiled(x), expected) < testing.unit_roundoff(torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
def test_takes_at_most_a_third_of_the_memory_of_stock(dtype):
    stock, x = rounded(dtype), images(256, 224, dtype)
    peaks = []
    for model in (torch_mbv2.patch(stock), stock):
        model(x[:1])  # what libraries allocate once
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1] / 3


@pytest.mark.parametrize("dtype", HALVES)
def test_every_block_reads_packed_weights(dtype):
    """Else CUDA would run its layers one by one."""
    fast = torch_mbv2.patch(rounded(dtype))
    blocks = [m for m in fast.modules() if "packed" in dict(m.named_buffers(recurse=False))]
    assert len(blocks) == 16 + 1 + 1  # inverted residuals, the first one, and the stem with it
    assert all(block.packed.dtype == dtype for block in blocks)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_forward_is_nineteen_ops(dtype):
    fast, x = torch_mbv2.patch(rounded(dtype)), images(1, 224, torch.float32)
    fast(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast(x)
    ops = Counter(event.name for event in profile.events() if "::" in event.name)
    assert {name: n for name, n in ops.items() if name.startswith("torch_mbv2::")} == {
        "torch_mbv2::stem_block": 1,
        "torch_mbv2::inverted_residual": 16,
        "torch_mbv2::conv_pool": 1,
        "torch_mbv2::linear": 1,
    }
    assert not {"aten::copy_", "aten::contiguous", "aten::convolution"} & set(ops)
