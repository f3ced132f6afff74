"""The mean that conv_pool gives an image depends neither on its place in the batch nor on the other
images, bit by bit, whatever thread blocks the batch is cut into."""

from __future__ import annotations

import pytest
import torch

from torch_mbv2 import ops, testing

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(dtype, batch, height, width, k, n):
    """Every third image is the same one, the others are noise; all are right."""
    generator = torch.Generator("cuda").manual_seed(0)

    def r(*shape):
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x = r(batch, k, height, width).to(memory_format=torch.channels_last)
    x[::3] = x[:1].clone()
    weight, bias = r(n, k, 1, 1) / k**0.5, r(n)
    with torch.inference_mode():
        got = ops.conv_pool(x, weight, bias, "relu6")
    same = got[::3]
    assert torch.equal(same, same[:1].expand_as(same))
    pixels = x.flatten(2).transpose(1, 2)
    for first in range(0, batch, 32):
        part = slice(first, first + 32)
        exact = pixels[part].double() @ weight[:, :, 0, 0].double().T + bias.double()
        testing.assert_close(got[part], exact.clamp(0, 6).mean(1), testing.BLOCK_BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 3, 7, 8, 16, 31, 32, 33, 64, 100, 128, 200, 256, 257])
def test_of_the_head_of_mobilenet(batch, dtype):
    check(dtype, batch, 7, 7, 320, 1280)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 5), (5, 5), (5, 7), (6, 6), (7, 10), (31, 33)],
)
@pytest.mark.parametrize("k", [8, 160, 256, 448, 640])
def test_of_other_sizes(height, width, k, dtype):
    check(dtype, 257, height, width, k, 200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_channels_that_no_vector_divides(dtype):
    check(dtype, 37, 5, 7, 13, 7)
