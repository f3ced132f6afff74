"""Converting any other graph with onnx2torch, and its result into stock PyTorch modules."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterator
from dataclasses import replace

import onnx
import torch
from torch import fx, nn

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.onnx.check import check_layers, check_runs
from torch_mbv2.onnx.graph import Graph, Node, first_line, quoted
from torch_mbv2.onnx.lower import lower, unsupported


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
        culprit = _culprit(model, lowered)
        if culprit is None:
            raise ModelError(
                f"{graph.source}: cannot be converted to PyTorch: {first_line(error)}"
            ) from error
        raise unsupported(culprit, graph, error) from error
    module = _to_stock(converted).eval()
    names = (node.name for node in rename_nodes(graph).nodes)
    check_runs(module, graph, dict(zip(names, graph.nodes, strict=True)))
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
    given = [x for x in node.args[1:] if isinstance(x, fx.Node) and x.op == "get_attr"]
    if node.kwargs or len(given) != len(node.args[1:]):
        return None
    tensors = [module.get_buffer(str(x.target)) for x in given]
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


def _stock_pads(layers: nn.Sequential) -> Iterator[nn.Module]:
    from onnx2torch.node_converters.pad import OnnxPadStatic

    for layer in layers:
        if (
            isinstance(layer, OnnxPadStatic)
            and layer.mode == "constant"
            and not layer.constant_value
            and len(layer.pads) == 4
        ):
            yield nn.ZeroPad2d(tuple(layer.pads))
        else:
            yield layer
