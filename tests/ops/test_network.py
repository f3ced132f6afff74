"""ops.network: a chain of ops in one call, and the CUDA graphs that replay it."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from onnx_helpers import randomise
from op_cases import DEVICES, DTYPES
from torch import Tensor

import torch_mbv2
from torch_mbv2 import ops
from torch_mbv2.chains import Network
from torch_mbv2.measure.conditions import exact_settings
from torch_mbv2.ops.network import Program
from torch_mbv2.weights import packing

RAW = torch.ops.torch_mbv2
SETTING = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 2, 2]]


def small_net(padding: str = "symmetric") -> torch.nn.Module:
    return randomise(
        torch_mbv2.MobileNetV2(10, inverted_residual_setting=SETTING, padding=padding)
    ).eval()


def network_of(fast: torch.nn.Module) -> Network:
    """The chain of the whole forward."""
    network = vars(fast)["torch_mbv2_network_0"].__self__
    assert isinstance(network, Network)
    return network


def images(n: int, device: str, dtype: torch.dtype = torch.float32, size: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, size, size - 1, generator=generator).to(device, dtype)


@pytest.fixture(autouse=True)
def no_replays():
    ops.forget_replays()
    yield
    ops.forget_replays()


# ------------------------------------------------------------------------------------ one call


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "off by one element": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "a part of a batch": lambda x: torch.cat([x, x])[len(x) :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_is_its_layers(device, dtype, padding, batch, layout):
    fast = torch_mbv2.patch(small_net(padding).to(device, dtype))
    network = network_of(fast)
    x = LAYOUTS[layout](images(batch, device, dtype))
    program = network.program(x)
    got = ops.network(x, program.weights(), program.text)
    expected = network.run_layers(x)
    assert got.shape == expected.shape == (batch, 10)
    assert got.stride() == expected.stride()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_map_keeps_its_layout(device):
    fast = torch_mbv2.patch(small_net().features.to(device))
    network = network_of(fast)
    x = images(2, device)
    program = network.program(x)
    got = ops.network(x, program.weights(), program.text)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, network.run_layers(x))


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_kept_dimension(device):
    """conv_pool makes (N, C); a layer that keeps height and width gives (N, C, 1, 1)."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 1), torch.nn.AdaptiveAvgPool2d(1)
    )
    fast = torch_mbv2.patch(randomise(net).eval().to(device))
    network = network_of(fast)
    x = images(2, device)
    program = network.program(x)
    got = ops.network(x, program.weights(), program.text)
    assert got.shape == (2, 16, 1, 1)
    assert torch.equal(got, network.run_layers(x))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    with torch.inference_mode(False), torch.no_grad():
        network = network_of(torch_mbv2.patch(small_net().to(device)))
        x = images(2, device)
        program = network.program(x)
        torch.library.opcheck(RAW.network.default, (x, program.weights(), program.text))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_and_exports_with_a_dynamic_batch(device):
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            network = network_of(torch_mbv2.patch(small_net().to(device)))
            program = network.program(images(1, device))
            self.register_buffer("weights", program.weights(), persistent=False)
            self.text = program.text

        def forward(self, x: Tensor) -> Tensor:
            return ops.network(x, self.weights, self.text)

    whole = Whole()
    x = images(3, device)
    with torch.no_grad():
        expected = whole(x)
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(whole, (images(2, device),), dynamic_shapes=shapes)
        assert torch.equal(program.module()(x), expected)
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(x), expected)


REFUSALS = {
    "": "the program has no step",
    "pool %0": "step 1 of the program, pool: there is no such op",
    "network %0": "step 1 of the program, network: there is no such op",
    "linear %0 @0:float32:8x4 - -": "step 1 of the program, linear: an argument is missing",
    "flatten %0 %0": "step 1 of the program, flatten: there are more arguments than it takes",
    "flatten %1": "step 1 of the program, flatten: there is no value %1 before it",
    "flatten %x": "step 1 of the program, flatten: a number was expected, got 'x'",
    "flatten -": "step 1 of the program, flatten: a value (%0) or a weight (@0:float32:8x8) was "
    "expected, got '-'",
    "flatten %0": "step 1 of the program, flatten: flatten takes (N, C, 1, 1) or (N, C), got "
    "(1, 4, 2, 2)",
    "global_avg_pool2d %0 1\nflatten %1\nflatten %0": "step 3 of the program, flatten: flatten "
    "takes (N, C, 1, 1) or (N, C), got (1, 4, 2, 2)",
    "unflatten %0": "step 1 of the program, unflatten: unflatten takes (N, C), got (1, 4, 2, 2)",
    "linear %0 @0:float64:8x4 - - -": "step 1 of the program, linear: a weight must be "
    "@byte:dtype:shape, got '@0:float64:8x4'",
    "linear %0 @0:float32:2x4 - - -": "",  # for the op to say
    "add %0 @8:float32:4 - -": "step 1 of the program, add: '@8:float32:4' must start at a "
    "multiple of 16 bytes and lie inside the 64 bytes of weights",
    "flatten @0:float32:2x4": "the program hands on its input",
    "add %0 %0 1_0 -": "step 1 of the program, add: a number was expected, got '1_0'",
    "add %0 %0 +1 -": "step 1 of the program, add: a number was expected, got '+1'",
    "add %0 %0 - 1e400": "step 1 of the program, add: a number was expected, got '1e400'",
    "add %0 %0 - 1e-400": "step 1 of the program, add: a number was expected, got '1e-400'",
    "avg_pool2d %0 1,1_0 1,1 0,0 0 0 -": "step 1 of the program, avg_pool2d: a number was "
    "expected, got '1_0'",
    "avg_pool2d %0 1,1 1,1 0,0 +1 0 -": "step 1 of the program, avg_pool2d: a number was "
    "expected, got '+1'",
    "add %0 @16:float32:16 - -": "step 1 of the program, add: '@16:float32:16' must start at a "
    "multiple of 16 bytes and lie inside the 64 bytes of weights",
}


@pytest.mark.parametrize("program", REFUSALS)
@pytest.mark.parametrize("device", DEVICES)
def test_refuses_what_is_no_program(device, program):
    x = torch.zeros(1, 4, 2, 2, device=device)
    weights = torch.zeros(64, dtype=torch.uint8, device=device)
    sentence = REFUSALS[program]
    expected = f"torch_mbv2::network: {sentence}" if sentence else "torch_mbv2::linear: weight must"
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        ops.network(x, weights, program)


@pytest.mark.parametrize("device", DEVICES)
def test_refuses_to_hand_on_its_input(device):
    x = torch.zeros(2, 4, 1, 1, device=device)
    weights = torch.zeros(0, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="the program hands on its input"):
        ops.network(x, weights, "flatten %0")


def without_data(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


@pytest.mark.skipif(not hasattr(RAW, "explain"), reason="needs the compiled library")
@pytest.mark.parametrize(
    ("op", "size", "arguments", "blocks"),
    [
        ("global_avg_pool2d", (1, 2**31 - 1, 1, 1), (False,), 2**26),
        ("im2col", (1, 1, 1, 2**31 - 1), ((1, 1), (1, 1), (0, 0), (1, 1)), 2**23),
        ("conv_pool", (1, 8, 1, 1), (without_data(2**31 - 1, 8, 1, 1), None, None, None), 2**24),
        ("linear", (1, 8), (without_data(2**31 - 1, 8), None, None, None), 2**26),
    ],
)
def test_the_largest_sizes_are_counted_right(op, size, arguments, blocks):
    """Sums of them do not overflow: so many thread blocks are launched, once."""
    program = Program()
    program.add(op, program.input, *arguments)
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    stride = torch.empty(size, device="meta", memory_format=layout).stride()
    device = [900, 132, 232448, 233472]
    (line,) = RAW.explain(program.text, size, stride, "float16", device).splitlines()
    assert int(line.split()[2]) == blocks


@pytest.mark.skipif(not hasattr(RAW, "explain"), reason="needs the compiled library")
@pytest.mark.parametrize(
    ("size", "stride", "device", "sentence"),
    [
        ([1, 8, 4, 4], [], [], "size and stride must have as many values, got 4 and 0"),
        ([1, 8, -4, 4], [1, 1, 1, 1], [], "numbers must be at least 0 and less than 2147483648"),
        ([1, 8, 4, 4], [1, 1, 1, 1], [900], "device must have 4 values"),
        ([1, 8, 4, 4], [1, 1, 1, 1], [900, 0, 1, 1], "device must have 4 values"),
    ],
)
def test_explain_refuses_nonsense(size, stride, device, sentence):
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        RAW.explain("global_avg_pool2d %0 0", size, stride, "float32", device)


@pytest.mark.skipif(not hasattr(RAW, "explain"), reason="needs the compiled library")
@pytest.mark.parametrize("op", ["linear", "conv2d", "conv_pool", "inverted_residual"])
def test_explain_tells_the_clocks_that_are_expected(op):
    def clocks(batch: int) -> int:
        program = Program()
        program.add(op, program.input, *arguments)
        device = [900, 132, 232448, 233472]
        size = [batch, 96] if op == "linear" else [batch, 96, 14, 14]
        stride = [96, 1] if op == "linear" else [96 * 14 * 14, 1, 96 * 14, 96]
        lines = RAW.explain(program.text, size, stride, "float16", device).splitlines()
        return sum(int(line.split()[-1]) for line in lines)

    def weight(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float16)

    expand, depthwise, project = weight(576, 96, 1, 1), weight(576, 1, 3, 3), weight(96, 576, 1, 1)
    packed = packing.pack_inverted_residual(expand, None, depthwise, None, project, None)
    arguments = {
        "linear": (weight(1000, 96), None, None, None),
        "conv2d": (weight(16, 96, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1, None, None),
        "conv_pool": (weight(1280, 96, 1, 1), None, 0.0, 6.0),
        "inverted_residual": (
            *(expand, None, depthwise, None, project, None, packed),
            *((1, 1), (1, 1, 1, 1), True, 0.0, 6.0),
        ),
    }[op]
    assert 0 < clocks(1) <= clocks(64) < clocks(1024)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (torch.zeros(4), "weights must be uint8 of shape (L,), contiguous, got float32 of (4,)"),
        (
            torch.zeros(2, 2, dtype=torch.uint8),
            "weights must be uint8 of shape (L,), contiguous, got uint8 of (2, 2)",
        ),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_refuses_other_weights(device, weights, sentence):
    with pytest.raises(RuntimeError, match=re.escape(f"torch_mbv2::network: {sentence}")):
        ops.network(torch.zeros(1, 4, 2, 2, device=device), weights.to(device), "flatten %0")


def test_refuses_what_requires_grad():
    with torch.inference_mode(False):
        x = torch.zeros(1, 4, 1, 1, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
            ops.network(x, torch.zeros(0, dtype=torch.uint8), "flatten %0")


# ------------------------------------------------------------------------------------- replays


@pytest.mark.cuda
@torch.inference_mode()
def test_replays_from_the_second_time_on():
    fast = torch_mbv2.patch(small_net().cuda().half())
    network = network_of(fast)
    batches = [images(n, "cuda", torch.float16) for n in (2, 2, 2, 1, 2, 1, 1)]
    batches = [x + i for i, x in enumerate(batches)]  # each other values, in other memory
    outputs = [fast(x) for x in batches]
    for x, output in zip(batches, outputs, strict=True):
        assert torch.equal(output, network.run_layers(x))
    graphs, scratch = ops.replays()
    assert graphs == 2, "one for each batch size"
    assert scratch > 0
    ops.forget_replays()
    assert ops.replays() == (0, 0)
    assert torch.equal(fast(batches[0]), outputs[0])


@pytest.mark.cuda
@torch.inference_mode()
def test_replays_are_bounded():
    fast = torch_mbv2.patch(small_net().cuda().half())
    network = network_of(fast)
    batches = [images(n, "cuda", torch.float16) for n in range(1, 60)]
    for x in batches * 2 + batches[:3] * 2:
        assert torch.equal(fast(x), network.run_layers(x))
    assert ops.replays()[0] <= 32


@pytest.mark.cuda
@torch.inference_mode()
def test_large_networks_are_not_replayed():
    """Their scratch memory would stay, and their launches are faster than the GPU."""
    fast = torch_mbv2.patch(small_net().cuda().half())
    x = images(512, "cuda", torch.float16, size=129)
    for _ in range(3):
        fast(x)
    assert ops.replays()[1] <= 64 << 20


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_threads_with_streams_of_their_own(dtype):
    fast = torch_mbv2.patch(small_net().to("cuda", dtype))
    batches = [images(n, "cuda", dtype) for n in (1, 2, 3)]
    expected = [fast(x).clone() for x in batches]
    torch.cuda.synchronize()
    failures: list[str] = []

    def run(number: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(100):
                k = (i + number) % len(batches)
                if not torch.equal(fast(batches[k]), expected[k]):
                    failures.append(f"thread {number}, call {i}")
                    return

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(run, range(6)))  # what a thread raises is raised here
    assert failures == []


@pytest.mark.cuda
@torch.inference_mode()
def test_threads_on_one_stream():
    fast = torch_mbv2.patch(small_net().cuda().half())
    x = images(2, "cuda", torch.float16)
    expected = fast(x).clone()
    failures: list[int] = []

    def run(number: int) -> None:
        with torch.inference_mode():
            outputs = [fast(x) for _ in range(100)]
            failures.extend(number for y in outputs if not torch.equal(y, expected))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))  # what a thread raises is raised here
    assert failures == []


@pytest.mark.cuda
@torch.inference_mode()
def test_captured_by_the_user():
    fast = torch_mbv2.patch(small_net().cuda().half())
    x = images(2, "cuda", torch.float16)
    for _ in range(3):
        fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fast(x)
    other = images(3, "cuda", torch.float16)[:2] * 2
    x.copy_(other)
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(output, fast(other))


@pytest.mark.cuda
@torch.inference_mode()
def test_captured_at_the_first_call():
    """Nothing that belongs to the capture is kept for later calls."""
    fast = torch_mbv2.patch(small_net().cuda().half())
    x = images(2, "cuda", torch.float16)
    torch_mbv2.patch(small_net().cuda().half())(x)  # kernels are loaded outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fast(x)
    graph.replay()
    expected = output.clone()
    del graph, output
    torch.cuda.empty_cache()
    assert torch.equal(fast(x), expected)
    assert torch.equal(fast(x), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("change", ["load_state_dict", "bfloat16", "round trip"])
@torch.inference_mode()
def test_renewed_weights(change):
    fast = torch_mbv2.patch(small_net().cuda().half())
    x = images(2, "cuda", torch.float16)
    for _ in range(3):
        before = fast(x)
    if change == "load_state_dict":
        fast.load_state_dict({name: value * 1.5 for name, value in fast.state_dict().items()})
        assert not torch.equal(fast(x), before)
    elif change == "bfloat16":
        fast.bfloat16()
        x = x.bfloat16()
    else:
        fast.cpu().cuda()
        assert torch.equal(fast(x), before)
    for _ in range(3):
        assert torch.equal(fast(x), network_of(fast).run_layers(x))


@pytest.mark.cuda
@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_edited_weights_are_noticed(change):
    # Parameters that are made in inference mode count no versions.
    with torch.inference_mode(False), torch.no_grad():
        fast = torch_mbv2.patch(small_net().cuda())
        x = images(2, "cuda")
        layer = fast.classifier[-1]
        for _ in range(3):
            before = fast(x)
        if change == "in place":
            layer.weight.mul_(2)
        else:
            layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
        after = fast(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, network_of(fast).run_layers(x))


@pytest.mark.cuda
@torch.inference_mode()
def test_a_captured_graph_reads_renewed_weights():
    """They lie where they did, as parameters that are loaded do."""
    fast = torch_mbv2.patch(small_net().cuda())
    x = images(2, "cuda")
    for _ in range(3):
        fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fast(x)
    fast.load_state_dict({name: value * 1.5 for name, value in fast.state_dict().items()})
    expected = fast(x)
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.cuda
@torch.inference_mode()
def test_layers_take_what_the_op_refuses():
    """An add that spreads one operand over the other."""

    class Squeeze(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1)
            self.last = torch.nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(y + self.pool(y))

    stock = randomise(Squeeze()).eval().cuda()
    fast = torch_mbv2.patch(stock)
    x = images(2, "cuda")
    with exact_settings():
        for _ in range(3):
            torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@torch.inference_mode()
def test_linear_layers_on_maps():
    """Their 4-D outputs are contiguous, not channels_last."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    stock = randomise(net).eval().cuda()
    fast = torch_mbv2.patch(stock)
    x = torch.randn(2, 3, 4, 5, device="cuda")
    for _ in range(3):
        torch.testing.assert_close(fast(x), stock(x), rtol=1e-5, atol=1e-5)
    assert fast(x).is_contiguous()


@pytest.mark.cuda
@torch.inference_mode()
def test_poisoned_memory():
    """Neither an output nor what steps hand on is read before it is written."""
    fast = torch_mbv2.patch(small_net().cuda().half())
    x = images(2, "cuda", torch.float16)
    expected = fast(x).clone()
    for _ in range(4):
        poison = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 10, 1 << 20)]
        del poison
        output = fast(x)
        assert torch.equal(output, expected)
        output.fill_(float("nan"))
        del output


@pytest.mark.cuda
@torch.inference_mode()
def test_more_elements_than_32_bits_count():
    """Of the whole batch: of a map between two steps, and of the output."""
    free, _ = torch.cuda.mem_get_info()
    if free < 30 << 30:
        pytest.skip("needs 30 GB of device memory")
    net = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1))
    fast = torch_mbv2.patch(randomise(net).eval().cuda().half())
    pixel = torch.randn(3, 8, 8, 8, device="cuda", dtype=torch.float16)
    few = fast(pixel)
    batch = 2**31 // pixel[0].numel() + 2
    x = pixel[torch.arange(batch, device="cuda") % 3]
    x = x.contiguous(memory_format=torch.channels_last)
    output = fast(x)
    places = [0, 1, batch // 2, batch - 2, batch - 1]
    assert all(torch.equal(output[i], few[i % 3]) for i in places)


# ---------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def whole_networks() -> dict[torch.dtype, torch.nn.Module]:
    net = randomise(torch_mbv2.MobileNetV2(32)).eval().cuda()
    with exact_settings():
        return {dtype: torch_mbv2.patch(net).to(dtype) for dtype in (torch.float16, torch.float32)}


@pytest.mark.cuda
@pytest.mark.parametrize("batch", range(2, 258))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@torch.inference_mode()
def test_equal_images_of_a_batch_give_equal_rows(whole_networks, dtype, batch):
    """Bitwise, wherever in the batch they are and whatever the others are."""
    fast = whole_networks[dtype]
    image = images(1, "cuda", dtype, size=64)
    x = image.repeat(batch, 1, 1, 1)
    x[batch // 2] = 7.0
    rows = fast(x)
    others = [i for i in range(batch) if i != batch // 2]
    assert torch.equal(rows[others], rows[:1].expand(batch - 1, -1))
    assert torch.equal(fast(x), rows), "repeats"
