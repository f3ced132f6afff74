"""Making small ONNX models for the tests, and comparing with ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

SHARED = Path(__file__).resolve().parents[2] / "shared"

# fp32 against fp32 over 53 layers, another order of summation: some 20 roundings of 6e-8.
RELATIVE = 1e-5


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases and batch norms get random values, so that losing or mixing up any shows.

    The norms' statistics are those of a batch of noise: the signal neither dies out nor blows up,
    and every ReLU6 sees values below 0 (a sixth) and above 6 (a fiftieth).
    """
    generator = torch.Generator().manual_seed(seed)
    channels = None
    norms = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            channels = channels or module.weight.shape[1]
            module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.uniform_(-1, 1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(1, 3, generator=generator)
            module.bias.data.uniform_(-1, 5, generator=generator)
            module.train()
            module.momentum = 1.0
            norms.append(module)
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(4, channels, 64, 64, generator=generator))
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()
    return model.eval()


def export(model: nn.Module, example: Tensor, **options: object) -> onnx.ModelProto:
    """The model by the legacy exporter, with a batch of any size, or by `dynamo=True`."""
    import onnx

    if not options.get("dynamo", False):
        options = {
            "dynamo": False,
            "dynamic_axes": {"image": {0: "n"}, "logits": {0: "n"}},
        } | options
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            buffer,
            input_names=["image"],
            output_names=["logits"],
            **options,
        )
    return onnx.load_model_from_string(buffer.getvalue())


def run(model: onnx.ModelProto | str, image: Tensor) -> Tensor:
    """What ONNX Runtime computes from `image`, the only input."""
    import onnxruntime

    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def relative_error(output: Tensor, expected: Tensor) -> float:
    """The relative L2 error, in float64."""
    output, expected = output.double(), expected.double()
    assert output.shape == expected.shape
    return float((output - expected).norm() / expected.norm())
