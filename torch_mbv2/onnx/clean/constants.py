"""Constants and known sizes: what a graph computes from them is computed once, here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.clean.shapes import simplify_reshapes
from torch_mbv2.onnx.graph import Graph, Node, Shape

# Operators of one result whose inputs are broadcast against each other.
_ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "And", "Ceil", "Clip", "Div", "Equal", "Floor", "Greater"),
        *("GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not"),
        *("Or", "Pow", "Round", "Sqrt", "Sub", "Where"),
    )
)
# Operators that move or convert elements; these serve weights of any size.
_MOVES = frozenset(("Cast", "CastLike", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
# What exporters compute sizes, pads and statistics with.
_ARITHMETIC = frozenset(
    (
        *_ELEMENTWISE,
        *_MOVES,
        *("Concat", "ConstantOfShape", "Expand", "Gather", "ReduceProd", "Shape", "Size", "Slice"),
    )
)
# Elements of a tensor that is such a size, or a batch norm's statistics; weights are larger.
_SMALL = 4096


def fold_constants(graph: Graph) -> Graph:
    """Constant nodes become tensors."""
    tensors = {}
    changes = {}
    for node in graph.nodes:
        if node.op == "Constant" and not node.domain:
            array = _constant(node)
            if array is not None:
                tensors[node.outputs[0]] = array
                changes[node] = ()
    return graph.rewrite(changes, tensors)


def _constant(node: Node) -> np.ndarray | None:
    for name, value in node.attributes.items():
        if name == "value":
            array: np.ndarray = value
            return array
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    return None


def drop_identities(graph: Graph) -> Graph:
    """Identity and inference-mode Dropout nodes go; their readers read what went in."""
    _check_inference(graph)
    sources: dict[str, str] = {}  # output of a dropped node -> the value that it repeats
    outputs: dict[str, str] = {}  # value -> graph output that repeats it, whose name it takes
    dropped = set()
    for node in graph.nodes:
        if node.op not in ("Identity", "Dropout") or node.domain:
            continue
        if any(map(graph.is_read, node.outputs[1:])):  # a Dropout's mask
            continue
        source = sources.get(node.inputs[0], node.inputs[0])
        if node.outputs[0] not in graph.output_names:
            sources[node.outputs[0]] = source
        elif source in graph.producers and source not in {*graph.output_names, *outputs}:
            outputs[source] = node.outputs[0]
        else:
            continue  # an input, a tensor or a second output: the copy stays
        dropped.add(node)

    def read(value: str) -> str:
        source = sources.get(value, value)
        return outputs.get(source, source)

    nodes = tuple(
        replace(
            node,
            inputs=tuple(read(value) for value in node.inputs),
            outputs=tuple(outputs.get(value, value) for value in node.outputs),
        )
        for node in graph.nodes
        if node not in dropped
    )
    return replace(graph, nodes=nodes) if dropped else graph


def _check_inference(graph: Graph) -> None:
    """Raise ModelError for a graph exported in training mode."""
    for node in graph.nodes:
        training = node.attributes.get("training_mode", 0)
        if node.op == "Dropout" and node.input(2) in graph.tensors:
            training = bool(graph.tensors[node.inputs[2]])
        if node.op == "BatchNormalization" and any(node.outputs[1:]):
            training = True
        if training and node.op in ("BatchNormalization", "Dropout"):
            raise ModelError(
                f"{graph.source}: {node} is in training mode: "
                "call model.eval() and export the model again"
            )


def drop_tensor_inputs(graph: Graph) -> Graph:
    """Tensors are no inputs of the graph, as they were before IR version 4."""
    return replace(
        graph, inputs=tuple(value for value in graph.inputs if value.name not in graph.tensors)
    )


def evaluate(graph: Graph) -> Graph:
    """Arithmetic on small tensors and on known sizes, such as exporters write for pads, is done.

    The first size of a value is left open, so that a batch declared as a number binds nobody.
    """
    if not any(node.op in _ARITHMETIC for node in graph.nodes):
        return graph
    before = None
    while graph is not before:  # a pad made known makes the sizes behind it known
        before, graph = graph, simplify_reshapes(_evaluate_once(graph))
    return graph


def _evaluate_once(graph: Graph) -> Graph:
    known = graph.shapes() if any(node.op == "Shape" for node in graph.nodes) else {}
    tensors = dict(graph.tensors)
    sizes: dict[str, Shape] = {}  # output of Shape -> what is known of it
    changes = {}
    for node in graph.nodes:
        if node.op not in _ARITHMETIC or node.domain or len(node.outputs) != 1:
            continue
        output, source = node.outputs[0], node.inputs[0]
        value = None
        if node.op == "Shape" and (source in tensors or source in known):
            shape = tensors[source].shape if source in tensors else (None, *known[source][1:])
            sizes[output] = shape[node.attributes.get("start", 0) : node.attributes.get("end")]
            if None not in sizes[output]:
                value = np.array(sizes[output], np.int64)
        elif node.op == "Gather" and source in sizes and node.inputs[1] in tensors:
            index = tensors[node.inputs[1]]
            picked = [sizes[source][int(i)] for i in index.reshape(-1)]
            if None not in picked:
                value = np.array(picked, np.int64).reshape(index.shape)
        elif all(name in tensors for name in node.inputs if name):
            value = _compute(node, graph, tensors)
        if value is not None:
            tensors[output] = value
            changes[node] = ()
    return graph.rewrite(changes, tensors) if changes else graph


def _compute(node: Node, graph: Graph, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What a node computes from constants; None if that is large, or fails."""
    inputs = {name: tensors[name] for name in node.inputs if name}
    if node.op not in _MOVES and any(array.size > _SMALL for array in inputs.values()):
        return None
    if node.op == "Concat" and sum(inputs[name].size for name in node.inputs) > _SMALL:
        return None
    if node.op in ("ConstantOfShape", "Expand"):
        target = inputs[node.inputs[-1]].tolist()
        if math.prod(float(size) for size in np.ravel(target)) > _SMALL:
            return None
    if node.op in _ELEMENTWISE:
        try:
            if math.prod(np.broadcast_shapes(*(a.shape for a in inputs.values()))) > _SMALL:
                return None
        except ValueError:
            return None
    alone = replace(
        graph,
        nodes=(node,),
        tensors=inputs,
        inputs=(),
        outputs=(onnx.ValueInfoProto(name=node.outputs[0]),),
    )
    try:
        with np.errstate(all="ignore"):
            (value,) = ReferenceEvaluator(alone.to_model()).run(None, {})
    except Exception:  # the evaluator raises whatever numpy does; the node then stays
        return None
    value = np.asarray(value)
    return value if node.op in _MOVES or value.size <= _SMALL else None
