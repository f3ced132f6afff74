"""Making small ONNX models for the tests, and comparing with ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

    from torch_mbv2.onnx.graph import Graph

SHARED = Path(__file__).resolve().parents[3] / "shared"

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


# ------------------------------------------------------------------ small graphs, written by hand

IMAGE = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32)


def small_model(
    *nodes: tuple,
    opset: int = 13,
    shape: Sequence[int | str] = ("n", 3, 6, 6),
    dtype: np.dtype | type = np.float32,
    outputs: Sequence[str] = ("y",),
    **tensors: object,
) -> onnx.ModelProto:
    """A model from `x` to `outputs`; a node is (operator, inputs, outputs, attributes), in which
    "-" stands for an input or output that is left out, and `domain` is an attribute."""
    from onnx import helper, numpy_helper

    def names(text: str) -> list[str]:
        return ["" if name == "-" else name for name in text.split()]

    protos = [
        helper.make_node(op, names(inputs), names(results), **dict(*rest))
        for op, inputs, results, *rest in nodes
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        protos,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    domains = sorted({"", *(node.domain for node in protos)})
    opsets = [helper.make_opsetid(domain, 1 if domain else opset) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def small_graph(*nodes: tuple, **options: object) -> Graph:
    """As `small_model`, read."""
    from torch_mbv2.onnx.graph import read

    return read(small_model(*nodes, **options))


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def compute(graph: Graph, image: np.ndarray = IMAGE) -> list[np.ndarray]:
    """The outputs of a graph by onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(graph.to_model()).run(None, {"x": image})


def assert_same(before: Graph, after: Graph, image: np.ndarray = IMAGE) -> None:
    """Both graphs compute the same, by onnx's own evaluator, but for the rounding of weights."""
    for computed, expected in zip(compute(after, image), compute(before, image), strict=True):
        assert computed.dtype == expected.dtype
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-5)
