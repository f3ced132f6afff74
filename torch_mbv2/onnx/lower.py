"""Writing a graph in what onnx2torch knows: an older opset, and for the rest our own domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.clean.heads import constant_axes
from torch_mbv2.onnx.graph import Graph, Node, Shape, first_line

# onnx2torch 1.5 has converters up to this opset.
OPSET = 17

DOMAIN = "torch_mbv2"
"""The domain of the operators that `registry` converts."""

ADDED = frozenset(("Gelu", "GlobalMaxPool", "Mish", "Swish"))
"""Standard operators that onnx2torch lacks."""

SAME_CONV = "SameConv"
"""A Conv whose `auto_pad` is SAME_UPPER, and the size of its input unknown."""

IMAGE_POOL = "ImagePool"
"""A GlobalAveragePool of images; onnx2torch's own depends on their size."""

# Operators that onnx2torch computes one axis after the other.
_AXIS_BY_AXIS = frozenset(("ReduceMax", "ReduceMin", "ReduceProd", "Squeeze", "Unsqueeze"))


def lower(graph: Graph) -> Graph:
    """A graph that asks for nothing newer than `OPSET`, and for what onnx2torch lacks in `DOMAIN`.

    Raises ModelError for an operator that cannot be written so.
    """
    graph = explicit_splits(positive_axes(single_outputs(graph)))
    shapes = graph.shapes()
    changes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node.domain:
            continue
        image = len(shapes.get(node.input(0), ())) == 4
        if _converted_wrongly(node, graph) or (node.op == "GlobalMaxPool" and not image):
            raise unsupported(node, graph)
        if node.op == "Clip" and not node.input(1) and node.input(2):
            # onnx2torch takes the name of a bound that is left out for that of a value.
            changes[node] = (replace(node, op="Min", inputs=(node.inputs[0], node.inputs[2])),)
        elif node.op == "CumSum":
            changes[node] = (replace(node, attributes={"reverse": 0, **node.attributes}),)
        elif node.op in ADDED:
            if not onnx.defs.has(node.op, graph.opset, ""):
                raise unsupported(node, graph)
            changes[node] = (replace(node, domain=DOMAIN),)
        elif node.op == "Conv" and node.attributes.get("auto_pad") == "SAME_UPPER":
            changes[node] = (replace(node, op=SAME_CONV, domain=DOMAIN),)
        elif node.op == "GlobalAveragePool" and image:
            changes[node] = (replace(node, op=IMAGE_POOL, domain=DOMAIN),)
        elif graph.opset > OPSET:
            changes[node] = (_lower_node(node, graph),)
    opsets = {**graph.opsets, "": min(graph.opset, OPSET), DOMAIN: 1}
    return replace(graph.rewrite(changes), opsets=opsets)


def _converted_wrongly(node: Node, graph: Graph) -> bool:
    """Whether onnx2torch would make something else of a node, without a word."""
    if node.op == "Pad":
        return bool(node.attributes.get("value", 0.0))  # before opset 11
    if node.op == "ConvTranspose":
        return "output_shape" in node.attributes
    if node.op == "LRN":
        size: int = node.attributes["size"]
        return size % 2 == 0
    return node.op == "Resize" and not _interpolates(node, graph)


def _interpolates(node: Node, graph: Graph) -> bool:
    """Whether `F.interpolate` resizes as a Resize says."""
    mode: str = node.attributes.get("mode", "nearest")
    if graph.opset < 11:
        return mode == "nearest"
    grid: str = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    if mode != "nearest":
        usual: bool = node.attributes.get("cubic_coeff_a", -0.75) == -0.75
        return usual and not node.attributes.get("exclude_outside", 0) and grid != "asymmetric"
    rounding: str = node.attributes.get("nearest_mode", "round_prefer_floor")
    if rounding == "floor":
        return grid == "asymmetric"
    # Scaled up by whole numbers, the nearest pixel to the centre is the one that PyTorch takes.
    scales = graph.tensors.get(node.input(2), np.empty(0))
    whole = scales.size > 0 and bool((scales >= 1).all() and (scales == np.floor(scales)).all())
    return whole and rounding.startswith("round") and grid.endswith("half_pixel")


def single_outputs(graph: Graph) -> Graph:
    """Further outputs of a node go where nothing reads them, and one of several is no output of the
    graph itself: onnx2torch would give all of them.

    Raises ModelError for further outputs that onnx2torch lacks, and that are read.
    """
    names = graph.fresh("part")
    changes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if node.domain or len(node.outputs) == 1:
            continue
        if node.op not in ("Split", "TopK"):
            if any(map(graph.is_read, node.outputs[1:])):
                raise unsupported(node, graph)
            changes[node] = (replace(node, outputs=node.outputs[:1]),)
            continue
        parts = {name: next(names) for name in node.outputs if name in graph.output_names}
        outputs = tuple(parts.get(name, name) for name in node.outputs)
        copies = [Node("Identity", (part,), (name,), {}, name) for name, part in parts.items()]
        changes[node] = (replace(node, outputs=outputs), *copies)
    return graph.rewrite(changes)


def positive_axes(graph: Graph) -> Graph:
    """Several axes of one node are counted from the front: onnx2torch takes one after the other,
    and mistakes those that are counted from the back.

    Raises ModelError where the number of dimensions is not known.
    """
    changes: dict[Node, tuple[Node, ...]] = {}
    shapes: Mapping[str, Shape] | None = None
    tensors: dict[str, np.ndarray] = {}
    names = graph.fresh("axes")
    for node in graph.nodes:
        axes = constant_axes(node, graph) if node.op in _AXIS_BY_AXIS else None
        if node.domain or not axes or len(axes) == 1 or min(axes) >= 0:
            continue
        shapes = graph.shapes() if shapes is None else shapes
        rank = len(shapes.get(node.inputs[0], ()))
        if rank and node.op == "Unsqueeze":
            rank += len(axes)
        if not -rank <= min(axes) <= max(axes) < rank:
            raise unsupported(node, graph)
        axes = [axis % rank for axis in axes]
        if "axes" in node.attributes:
            changes[node] = (replace(node, attributes={**node.attributes, "axes": axes}),)
        else:
            name = next(names)
            tensors[name] = np.array(axes, np.int64)
            changes[node] = (replace(node, inputs=(node.inputs[0], name)),)
    return graph.rewrite(changes, tensors)


def explicit_splits(graph: Graph) -> Graph:
    """Split into `num_outputs` parts, of opset 18, says the sizes of the parts."""
    changes: dict[Node, tuple[Node, ...]] = {}
    tensors: dict[str, np.ndarray] = {}
    names = graph.fresh("parts")
    shapes: Mapping[str, Shape] | None = None
    for node in graph.nodes:
        count = int(node.attributes.get("num_outputs", 0))
        if node.op != "Split" or node.domain or count < 1:
            continue
        shapes = graph.shapes() if shapes is None else shapes
        shape = shapes.get(node.inputs[0], ())
        axis = int(node.attributes.get("axis", 0))
        size = shape[axis] if -len(shape) <= axis < len(shape) else None
        if size is None:
            continue
        part = -(-size // count)
        last = size - (count - 1) * part
        name = next(names)
        tensors[name] = np.array([part] * (count - 1) + [last], np.int64)
        changes[node] = (replace(node, inputs=(node.inputs[0], name), attributes={"axis": axis}),)
    return graph.rewrite(changes, tensors)


def _lower_node(node: Node, graph: Graph) -> Node:
    """`node` with the attributes and inputs that its operator has at `OPSET`."""
    try:
        new = onnx.defs.get_schema(node.op, graph.opset, "")
    except onnx.defs.SchemaError:
        raise unsupported(node, graph) from None
    if new.since_version <= OPSET and node.op != "Reshape":
        return node
    if node.op == "Reshape":
        node = _without_allowzero(node, graph)
    try:
        old = onnx.defs.get_schema(node.op, OPSET, "")
    except onnx.defs.SchemaError:
        raise unsupported(node, graph) from None
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
        raise unsupported(node, graph)
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


def unsupported(node: Node, graph: Graph, error: Exception | None = None) -> ModelError:
    """What to raise for a node that cannot be converted."""
    why = f" ({type(error).__name__}: {first_line(error)})" if error is not None else ""
    return ModelError(
        f"{graph.source}: {node}, opset {graph.opset}, cannot be converted to PyTorch{why}; "
        "export the model without that operator, or with another opset_version"
    )
