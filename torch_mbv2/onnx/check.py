"""Checking that a graph fits together: what PyTorch would complain of only when it is run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.graph import (
    Graph,
    Node,
    Shape,
    declared_dtype,
    declared_shape,
    first_line,
    quoted,
)

# Operators that work along one dimension.
_AXIS = frozenset(("Concat", "Gather", "LogSoftmax", "Softmax", "Split"))
# Operators whose further inputs are vectors of sizes, axes or positions.
_SIZES = frozenset(("Expand", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Unsqueeze"))


def check_layers(graph: Graph) -> None:
    """Raise ModelError for layers whose weights and settings do not fit each other, of which
    PyTorch would complain only when they are run."""
    shapes = graph.shapes()
    for node in graph.nodes:
        wrong = None if node.domain else _misfit(node, graph, shapes)
        if wrong is not None:
            raise ModelError(f"{graph.source}: {node} has {wrong}; is the file damaged?")


def _misfit(node: Node, graph: Graph, shapes: Mapping[str, Shape]) -> str | None:
    axis, rank = node.attributes.get("axis", 0), len(shapes.get(node.input(0), (0,) * 8))
    if node.op in _AXIS and not -rank <= axis < rank:
        return f"the axis {axis}, and an input of {rank} dimensions"
    ranks = {len(shapes[name]) for name in node.inputs if name in shapes}
    if node.op == "Concat" and len(ranks) > 1:
        return f"inputs of {' and '.join(map(str, sorted(ranks)))} dimensions"
    arrays = [graph.tensors.get(name) for name in node.inputs]
    constants = [array for array in arrays if array is not None]
    if node.op in ("BatchNormalization", "Conv", "Gemm"):
        dtypes = {array.dtype.name for array in constants}
        if not dtypes <= {"float32", "float16", "bfloat16", "float64"}:
            return f"weights of type {', '.join(sorted(dtypes))}"
        if node.op != "BatchNormalization" and len(dtypes) > 1:
            return f"weights of types {' and '.join(sorted(dtypes))}"
    epsilon = node.attributes.get("epsilon", 1e-5)
    if node.op == "BatchNormalization" and not 0 <= epsilon < math.inf:
        return f"an epsilon of {epsilon}"
    if node.op in _SIZES and any(a is not None and a.ndim > 1 for a in arrays[1:]):
        return "sizes that are no vector"
    if node.op != "Conv" or len(arrays) < 2 or arrays[1] is None:
        return None
    weight, rank = arrays[1], arrays[1].ndim - 2
    for name, count in (("strides", rank), ("dilations", rank), ("pads", 2 * rank)):
        values = node.ints(name, (1,) * count)
        least = 0 if name == "pads" else 1
        if len(values) != count or not all(least <= value < 2**31 for value in values):
            return f"{name} {list(values)[:6]}, and a weight of shape {weight.shape}"
    kernel = node.ints("kernel_shape", weight.shape[2:])
    if kernel != weight.shape[2:]:
        return f"kernel_shape {list(kernel)[:6]}, and a weight of shape {weight.shape}"
    groups = int(node.attributes.get("group", 1))
    if groups < 1 or len(weight) % groups:
        return f"{groups} groups, and a weight of shape {weight.shape}"
    if len(arrays) > 2 and arrays[2] is not None and arrays[2].shape != weight.shape[:1]:
        return f"a bias of shape {arrays[2].shape}, and a weight of shape {weight.shape}"
    return None


def check_runs(module: fx.GraphModule, graph: Graph, nodes: Mapping[str, Node]) -> None:
    """Raise ModelError if the module cannot be run on what the graph declares as its inputs, or
    needs tensors of more than `_LARGEST` elements for it.

    nodes: those of the graph, by the names that they have in the module.

    Nothing is computed but sizes: floats are on the meta device. Where sizes cannot be told without
    values, the check ends.
    """
    shapes = [declared_shape(value) or (None,) * 4 for value in graph.inputs]
    if any(None in shape[1:] for shape in shapes if len(shape) != 4):
        return  # no images, so that nothing is known of the sizes that are left open
    image = any(None in shape[1:] for shape in shapes)
    first: ModelError | None = None
    for side in _SIDES if image else _SIDES[:1]:
        error = _failure(module, graph, nodes, side)
        if error is None:
            return
        first = first or error
    assert first is not None
    raise first


def _failure(
    module: fx.GraphModule, graph: Graph, nodes: Mapping[str, Node], side: int
) -> ModelError | None:
    """Why the module cannot be run, with images of `side` pixels where the size is open."""
    checker = _Checker(module)
    images = [_example(value, graph, side) for value in graph.inputs]
    try:
        with torch.no_grad():
            checker.run(*images)
    except Exception as error:  # as a layer finds its input wrong
        if re.search(r"\b(device|meta)\b", str(error), re.IGNORECASE):
            return None
        node = nodes.get(checker.place, f"node {checker.place!r}")
        return ModelError(
            f"{graph.source}: {node}, opset {graph.opset}, cannot be run on what the model "
            f"declares as its input: {first_line(error)}"
        )
    return None


class _Checker(fx.Interpreter):
    """Runs a module on the meta device; whole numbers, which sizes are computed with, are real."""

    place = ""
    """The name of the node that is run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # which would be added to the message

    def run_node(self, n: fx.Node) -> Any:
        self.place = str(n.target if n.op == "call_module" else n.name)
        value = super().run_node(n)
        if isinstance(value, Tensor):
            _check_size(value.shape)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        # A scalar goes with tensors of any device, and may be what a Pad fills with.
        return value if value.dim() == 0 else _without_values(value)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if type(module).__name__ == "OnnxShape":
            return torch.tensor(args[0].shape[module._start : module._end])
        if type(module).__name__ in ("OnnxConstantOfShape", "OnnxTile"):  # real, if the data is
            _check_size(args[-1].tolist())
        elif type(module).__name__ == "OnnxRange":
            start, limit, step = (float(x) for x in args)
            _check_size([max(0, (limit - start) / step)])
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        empty = {name: _without_values(tensor) for name, tensor in tensors.items()}
        return torch.func.functional_call(module, empty, args, kwargs)


def _check_size(shape: Sequence[float]) -> None:
    if any(size < 0 for size in shape):
        raise ValueError(f"it would have the shape {list(shape)}")
    count = math.prod(shape)
    if count > _LARGEST:
        raise ValueError(f"it would have {count:.0f} elements")


def _without_values(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) and x.is_floating_point() else x


# Images to try where a graph leaves their size open: constants inside may imply one.
_SIDES = (224, 32, 64, 96, 128, 160, 192, 240, 256, 288, 299, 320, 384, 448, 512, 16, 8, 28, 48)
# Elements of a tensor that one image may need: 16 GiB in float32.
_LARGEST = 2**32


def _example(value: onnx.ValueInfoProto, graph: Graph, side: int) -> Tensor:
    """A tensor like a graph's input: one image of `side` pixels, as far as nothing is declared."""
    shape = declared_shape(value) or (None,) * 4
    channels_last = len(shape) == 4 and shape[1] != 3 and shape[3] == 3
    defaults = (1, side, side, 3) if channels_last else (1, 3, side, side)
    sizes = [defaults[i] if size is None else size for i, size in enumerate(shape)]
    dtype = declared_dtype(value)
    if dtype is None:
        raise ModelError(
            f"{graph.source}: the input {quoted(value.name)} is of a type that PyTorch lacks"
        )
    return torch.empty(sizes, dtype=dtype, device="meta")
