"""Converting any other graph with onnx2torch, and its result into stock PyTorch modules."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.onnx.graph import Graph, Node, declared_dtype, declared_shape, first_line, quoted
from torch_mbv2.onnx.lower import check_layers, lower, unsupported


def convert(graph: Graph) -> fx.GraphModule:
    """The module, in eval mode, that computes `graph`.

    Raises ModelError that names the node, its operator and the opset for what cannot be converted
    or does not fit together, and UnavailableError without onnx2torch.
    """
    try:
        import onnx2torch
        from onnx2torch.node_converters import get_converter

        from torch_mbv2.onnx import registry  # noqa: F401 (adds converters)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "this ONNX model is not a MobileNetV2; converting it needs the package "
            f"{error.name}: pip install 'torch-mbv2[onnx]'"
        ) from None
    constant = sorted(graph.output_names - graph.producers.keys())
    if constant:
        raise ModelError(
            f"{graph.source}: the output {quoted(constant[0])} is an input or a constant, which "
            "cannot be converted to PyTorch; export the model without it"
        )
    lowered = rename_nodes(lower(graph))
    for node in lowered.nodes:
        try:
            get_converter(node.op, lowered.opsets.get(node.domain, 1), node.domain)
        except NotImplementedError:
            raise unsupported(node, graph) from None
    check_layers(graph)
    graph.check_types()
    model = lowered.to_model()
    try:
        # onnx2torch draws the weights of the layers that it makes before it sets them.
        with torch.random.fork_rng(devices=[]):
            converted = onnx2torch.convert(model)
    except Exception as error:  # whatever a converter raises: most are bare KeyErrors
        node = _culprit(model, lowered)
        if node is None:
            raise ModelError(
                f"{graph.source}: cannot be converted to PyTorch: {first_line(error)}"
            ) from error
        raise unsupported(node, graph, error) from error
    module = _to_stock(converted).eval()
    _check_runs(module, graph)
    return module


def _culprit(model: onnx.ModelProto, graph: Graph) -> Node | None:
    """The first node whose own conversion fails."""
    from onnx2torch.node_converters import get_converter
    from onnx2torch.onnx_graph import OnnxGraph
    from onnx2torch.utils.safe_shape_inference import safe_shape_inference

    try:
        whole = OnnxGraph(safe_shape_inference(model).graph)
    except Exception:
        return None
    for node, converted in zip(graph.nodes, whole.nodes.values(), strict=True):
        try:
            version = graph.opsets.get(node.domain, 1)
            get_converter(node.op, version, node.domain)(converted, whole)
        except Exception:
            return node
    return None


def rename_nodes(graph: Graph) -> Graph:
    """Nodes get names that are Python identifiers and no attribute of a module.

    torch.fx writes the names of submodules into the source of `forward`, unescaped: without this a
    name in the file could be code.
    """
    taken = {"initializers", *dir(fx.GraphModule(nn.Module(), fx.Graph()))}
    nodes = []
    for node in graph.nodes:
        stem = re.sub(r"\W+", "_", node.name, flags=re.ASCII).strip("_") or node.op.lower()
        stem = (
            stem
            if stem.isidentifier() and not keyword.iskeyword(stem)
            else re.sub(r"\W", "_", f"n_{stem}", flags=re.ASCII)
        )
        name, count = stem, 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        nodes.append(replace(node, name=name))
    return replace(graph, nodes=tuple(nodes))


def _to_stock(module: fx.GraphModule) -> fx.GraphModule:
    """onnx2torch's own modules become stock ones where there is one that means the same, and what
    they read from constant tensors is written into the graph."""
    from onnx2torch.node_converters.binary_math_operations import OnnxBinaryMathOperation
    from onnx2torch.node_converters.reshape import OnnxReshape
    from onnx2torch.node_converters.slice import OnnxSlice

    for name, child in list(module.named_children()):
        if isinstance(child, nn.Sequential):
            setattr(module, name, nn.Sequential(*_stock_pads(child)))
    for node in module.graph.nodes:
        if node.op == "call_module" and "/" in node.target:  # onnx2torch puts the domain before it
            name = node.target.rpartition("/")[2]
            module.add_module(name, module.get_submodule(node.target))
            node.target = name
    functions = {torch.add: operator.add, torch.sub: operator.sub, torch.mul: operator.mul}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        child = module.get_submodule(node.target)
        if isinstance(child, OnnxBinaryMathOperation) and child.broadcast is None:
            function = functions.get(child.math_op_function)
            if function is not None:
                node.op, node.target = "call_function", function
            continue
        constants = _constant_arguments(module, node)
        if constants is None:
            continue
        data = node.args[0]
        if isinstance(child, OnnxReshape):
            with module.graph.inserting_before(node):
                sizes = [  # 0 stands for the size that the data has there
                    size or module.graph.call_method("size", (data, axis))
                    for axis, size in enumerate(constants[0])
                ]
            node.op, node.target, node.args = "call_function", torch.reshape, (data, sizes)
        elif isinstance(child, OnnxSlice) and (slices := _slices(*constants)) is not None:
            node.op, node.target, node.args = "call_function", operator.getitem, (data, slices)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _constant_arguments(module: fx.GraphModule, node: fx.Node) -> list[list[int]] | None:
    """The arguments of a call behind the first, if they are vectors of whole numbers."""
    if node.kwargs or not all(isinstance(x, fx.Node) and x.op == "get_attr" for x in node.args[1:]):
        return None
    tensors = [module.get_buffer(str(x.target)) for x in node.args[1:]]
    if not tensors or any(t.dim() != 1 or t.is_floating_point() for t in tensors):
        return None
    return [t.tolist() for t in tensors]


def _slices(
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> tuple[slice, ...] | None:
    """What to index with for an ONNX Slice; None if it counts axes from the end, or backwards."""
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if min(axes, default=0) < 0 or min(steps, default=1) < 1:
        return None
    parts = {axis: slice(a, b, s) for axis, a, b, s in zip(axes, starts, ends, steps, strict=True)}
    return tuple(parts.get(axis, slice(None)) for axis in range(max(parts, default=-1) + 1))


def _check_runs(module: fx.GraphModule, graph: Graph) -> None:
    """Raise ModelError if the module cannot be run on what it declares as its inputs, or needs
    tensors of more than `_LARGEST` elements for it.

    Nothing is computed but sizes: floats are on the meta device. Where sizes cannot be told without
    values, the check ends.
    """
    shapes = [declared_shape(value) or (None,) * 4 for value in graph.inputs]
    if any(None in shape[1:] for shape in shapes if len(shape) != 4):
        return  # no images, so that nothing is known of the sizes that are left open
    image = any(None in shape[1:] for shape in shapes)
    first: ModelError | None = None
    for side in _SIDES if image else _SIDES[:1]:
        error = _failure(module, graph, side)
        if error is None:
            return
        first = first or error
    assert first is not None
    raise first


def _failure(module: fx.GraphModule, graph: Graph, side: int) -> ModelError | None:
    """Why the module cannot be run, with images of `side` pixels where the size is open."""
    checker = _Checker(module)
    images = [_example(value, graph, side) for value in graph.inputs]
    try:
        with torch.no_grad():
            checker.run(*images)
    except Exception as error:  # as a layer finds its input wrong
        if re.search(r"\b(device|meta)\b", str(error), re.IGNORECASE):
            return None
        names = [node.name for node in rename_nodes(graph).nodes]
        where = checker.place
        node = graph.nodes[names.index(where)] if where in names else f"node {where!r}"
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
_SIDES = (224, 32, 64, 96, 128, 160, 192, 240, 256, 299, 320, 384, 512)
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


def _stock_pads(layers: nn.Sequential) -> Iterator[nn.Module]:
    from onnx2torch.node_converters.pad import OnnxPadStatic

    for layer in layers:
        zeros = isinstance(layer, OnnxPadStatic) and layer.mode == "constant"
        if zeros and not layer.constant_value and len(layer.pads) == 4:
            yield nn.ZeroPad2d(tuple(layer.pads))
        else:
            yield layer
