"""The ops in PyTorch's ways: opcheck, torch.compile, torch.export, streams, graphs and devices."""

from __future__ import annotations

import pytest
import torch
from op_arguments import GOOD, arguments
from op_cases import DEVICES, DTYPES
from torch import Tensor

from torch_mbv2 import ops, testing

RAW = torch.ops.torch_mbv2

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(op, device):
    with torch.inference_mode(False):
        overload = getattr(RAW, op).default
        torch.library.opcheck(overload, tuple(arguments(op, {}, device, device)))


def network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """A bit of every op."""
    dense, depthwise, point, head = weights
    y = ops.conv2d(x, dense, stride=2, padding=1, activation="relu6")
    z = ops.conv2d(y, depthwise, padding=(0, 2, 1, 1), groups=len(depthwise), activation="relu")
    z = ops.add(ops.conv2d(z, point), y)
    z = ops.inverted_residual(z, point, None, depthwise, None, point, None, residual=True)
    y = ops.stem_block(x, dense, None, depthwise, None, point, None)
    z = ops.conv2d_winograd(ops.avg_pool2d(z, 2), dense.repeat(1, 8, 1, 1)[:, :16], padding=1)
    columns = ops.im2col(z, 1)
    pooled = ops.global_avg_pool2d(z) + columns.mean(2) + ops.conv_pool(y, point, None, "relu6")
    return ops.linear(pooled, head, activation=(-1, 1))


def network_weights(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 3, 3, 3), (16, 1, 3, 3), (16, 16, 1, 1), (10, 16))
    return [torch.randn(s, generator=generator).to(device, dtype) / 4 for s in shapes]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device, dynamic):
    with torch.inference_mode(False), torch.no_grad():
        torch._dynamo.reset()
        weights, x = network_weights(device), torch.randn(5, 3, 17, 16, device=device)
        backend = "inductor" if device == "cuda" else "aot_eager"
        compiled = torch.compile(network, fullgraph=True, backend=backend, dynamic=dynamic)
        torch.testing.assert_close(compiled(x, weights), network(x, weights))
        torch.testing.assert_close(compiled(x[:3], weights), network(x[:3], weights))


@pytest.mark.parametrize("device", DEVICES)
def test_exports_with_a_dynamic_batch(device):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, weight in enumerate(network_weights(device)):
                self.register_buffer(f"weight{i}", weight)

        def forward(self, x: Tensor) -> Tensor:
            return network(x, list(self.buffers()))

    with torch.inference_mode(False), torch.no_grad():
        module = Network()
        example = (torch.randn(2, 3, 17, 16, device=device),)
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=512)}}
        exported = torch.export.export(module, example, dynamic_shapes=shapes)
        names = {str(node.target) for node in exported.graph.nodes}
        assert {f"torch_mbv2.{op}.default" for op in GOOD} <= names
        x = torch.randn(5, 3, 17, 16, device=device)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.cuda
def test_runs_on_the_current_stream():
    weights = network_weights("cuda", torch.float16)
    x = torch.randn(64, 3, 64, 64, device="cuda", dtype=torch.float16)
    expected = network(x, weights)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # on another stream, the ops would read zeros
        late.copy_(x)
        got = network(late, weights)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_as_a_cuda_graph(dtype):
    weights = network_weights("cuda", dtype)
    x = torch.zeros(4, 3, 33, 32, device="cuda", dtype=dtype)
    replay, out = testing.capture(lambda: network(x, weights))
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        replay()
        assert torch.equal(out, network(x, weights))


@pytest.mark.cuda
def test_runs_on_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weights, x = network_weights("cuda:1"), torch.randn(2, 3, 17, 16, device="cuda:1")
    torch.testing.assert_close(network(x, weights).cpu(), network(x.cpu(), network_weights("cpu")))
