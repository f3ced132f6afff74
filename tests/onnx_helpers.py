"""Making small ONNX models for the tests, and comparing with ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[2] / "shared"

# fp32 against fp32 over 53 layers, another order of summation: some 20 roundings of 6e-8.
RELATIVE = 1e-5


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms and biases get random values, so that losing or mixing up any of them shows.

    The norms are also settled: a layer's output has mean and deviation of order 1, so that ReLU6
    sees values below 0 and above 6 in every layer, and the logits depend on the image.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 1.0, 3.0),
                (module.bias, -1.0, 2.0),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.uniform_(-1, 1, generator=generator)
    return model.eval()


def export(model: nn.Module, example: Tensor, **options: object) -> onnx.ModelProto:
    """The model by the legacy exporter, with a batch of any size, or by `dynamo=True`."""
    if not options.get("dynamo", False):
        options = {"dynamo": False, "dynamic_axes": {"image": {0: "n"}, "logits": {0: "n"}}} | options
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
    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def relative_error(output: Tensor, expected: Tensor) -> float:
    """The relative L2 error, in float64."""
    output, expected = output.double(), expected.double()
    assert output.shape == expected.shape
    return float((output - expected).norm() / expected.norm())
