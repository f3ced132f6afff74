"""Converting any other graph with onnx2torch, and its result into stock PyTorch modules."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import fx, nn

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.onnx.clean import constant_axes
from torch_mbv2.onnx.graph import Graph, Node, first_line

# onnx2torch 1.5 has converters up to this opset; `lower` writes newer graphs down to it.
OPSET = 17


def convert(graph: Graph) -> fx.GraphModule:
    """The module, in eval mode, that computes `graph`.

    Raises ModelError that names the node, its operator and the opset for what cannot be converted,
    and UnavailableError without onnx2torch.
    """
    try:
        import onnx2torch
        from onnx2torch.node_converters import get_converter
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "this ONNX model is not a MobileNetV2; converting it needs the package "
            f"{error.name}: pip install 'torch-mbv2[onnx]'"
        ) from None
    lowered = rename_nodes(lower(graph))
    for node in lowered.nodes:
        try:
            get_converter(node.op, lowered.opsets.get(node.domain, 1), node.domain)
        except NotImplementedError:
            raise _unsupported(node, graph) from None
    model = lowered.to_model()
    try:
        converted = onnx2torch.convert(model)
    except Exception as error:  # whatever a converter raises: most are bare KeyErrors
        node = _culprit(model, lowered)
        if node is None:
            raise ModelError(
                f"{graph.source}: cannot be converted to PyTorch: {first_line(error)}"
            ) from error
        raise _unsupported(node, graph, error) from error
    return _to_stock(converted).eval()


def _unsupported(node: Node, graph: Graph, error: Exception | None = None) -> ModelError:
    why = f" ({type(error).__name__}: {first_line(error)})" if error is not None else ""
    return ModelError(
        f"{graph.source}: {node}, opset {graph.opset}, cannot be converted to PyTorch{why}; "
        "export the model without that operator, or with another opset_version"
    )


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
        stem = stem if stem.isidentifier() else re.sub(r"\W", "_", f"n_{stem}", flags=re.ASCII)
        name, count = stem, 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        nodes.append(replace(node, name=name))
    return replace(graph, nodes=tuple(nodes))


def lower(graph: Graph) -> Graph:
    """A graph of a newer opset written down to `OPSET`, where its nodes ask for nothing newer."""
    if graph.opset <= OPSET:
        return graph
    changes = {}
    for node in graph.nodes:
        if not node.domain:
            changes[node] = (_lower_node(node, graph),)
    return replace(graph.rewrite(changes), opsets={**graph.opsets, "": OPSET})


def _lower_node(node: Node, graph: Graph) -> Node:
    """`node` with the attributes and inputs that its operator has at `OPSET`."""
    try:
        new = onnx.defs.get_schema(node.op, graph.opset, "")
    except onnx.defs.SchemaError:
        raise _unsupported(node, graph) from None
    if new.since_version <= OPSET and node.op != "Reshape":
        return node
    if node.op == "Reshape":
        node = _without_allowzero(node, graph)
    try:
        old = onnx.defs.get_schema(node.op, OPSET, "")
    except onnx.defs.SchemaError:
        raise _unsupported(node, graph) from None
    attributes = {
        name: value
        for name, value in node.attributes.items()
        if name in old.attributes or not _is_default(value, new.attributes.get(name))
    }
    inputs = node.inputs
    if "axes" in old.attributes and len(inputs) == 2 and len(old.inputs) == 1:
        axes = constant_axes(node, graph)
        if axes is not None:
            inputs, attributes = inputs[:1], {**attributes, "axes": axes}
    newer = sorted(set(attributes) - set(old.attributes))
    if newer or len(inputs) > old.max_input:
        raise _unsupported(node, graph)
    return replace(node, inputs=inputs, attributes=attributes)


def _is_default(value: Any, attribute: Any) -> bool:
    """Whether `value` is what leaving the attribute out means, as far as the schema says."""
    if attribute is None:
        return False
    if isinstance(value, (list, tuple)) and not attribute.default_value.name:
        return set(value) == {1}  # dilations, the only list that newer opsets added
    return bool(attribute.default_value.name) and value == _attribute(attribute.default_value)


def _attribute(proto: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value


def _without_allowzero(node: Node, graph: Graph) -> Node:
    """A Reshape without `allowzero` where its constant sizes are not 0, so that it says nothing."""
    shape = graph.tensors.get(node.inputs[1])
    concat = graph.producers.get(node.inputs[1])
    if shape is None and concat is not None and concat.op == "Concat":
        parts = [graph.tensors[name] for name in concat.inputs if name in graph.tensors]
    else:
        parts = [shape] if shape is not None else []
    if not parts or any((part == 0).any() for part in parts):
        return node
    attributes = {name: v for name, v in node.attributes.items() if name != "allowzero"}
    return replace(node, attributes=attributes)


def _to_stock(module: fx.GraphModule) -> fx.GraphModule:
    """onnx2torch's own modules become stock ones where there is one that means the same."""
    from onnx2torch.node_converters.binary_math_operations import OnnxBinaryMathOperation
    from onnx2torch.node_converters.global_average_pool import (
        OnnxGlobalAveragePoolWithKnownInputShape,
    )

    for name, child in list(module.named_children()):
        if isinstance(child, OnnxGlobalAveragePoolWithKnownInputShape) and child._x_dims == [2, 3]:
            setattr(module, name, nn.AdaptiveAvgPool2d(1))
        elif isinstance(child, nn.Sequential):
            setattr(module, name, nn.Sequential(*_stock_pads(child)))
    functions = {torch.add: operator.add, torch.sub: operator.sub, torch.mul: operator.mul}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        child = module.get_submodule(node.target)
        if isinstance(child, OnnxBinaryMathOperation) and child.broadcast is None:
            function = functions.get(child.math_op_function)
            if function is not None:
                node.op, node.target = "call_function", function
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _stock_pads(layers: nn.Sequential) -> Iterator[nn.Module]:
    from onnx2torch.node_converters.pad import OnnxPadStatic

    for layer in layers:
        zeros = isinstance(layer, OnnxPadStatic) and layer.mode == "constant"
        if zeros and not layer.constant_value and len(layer.pads) == 4:
            yield nn.ZeroPad2d(tuple(layer.pads))
        else:
            yield layer
