"""Transposes, as converters from channels-last frameworks write them around every layer, move
behind the operators that they commute with, until they meet their inverse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from torch_mbv2.onnx.clean.constants import drop_identities
from torch_mbv2.onnx.clean.heads import constant_axes
from torch_mbv2.onnx.graph import Graph, Node

Permutation = tuple[int, ...]

# Elementwise in the first input; further ones are scalars.
_UNARY = frozenset(
    (
        *("Abs", "Cast", "Clip", "Elu", "Exp", "HardSigmoid", "HardSwish", "LeakyRelu", "Neg"),
        *("Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"),
    )
)
_BINARY = frozenset(("Add", "Div", "Max", "Min", "Mul", "Sub"))


def sink_transposes(graph: Graph) -> Graph:
    """Each Transpose moves down through elementwise operators, paddings, means and concatenations,
    as long as all their inputs are transposed alike; inverse ones cancel."""
    if not any(node.op == "Transpose" for node in graph.nodes):
        return graph
    sinker = _Sinker(graph)
    for node in graph.nodes:
        sinker.visit(node)
    return _lift_above_pads(drop_identities(sinker.result()))


def _lift_above_pads(graph: Graph) -> Graph:
    """A Transpose right behind a Pad that nothing else reads goes before it, so that the Pad stands
    at the convolution that it pads for."""
    changes: dict[Node, tuple[Node, ...]] = {}
    tensors: dict[str, np.ndarray] = {}
    names = graph.fresh("lifted")
    for pad in graph.nodes:
        transpose = graph.sole_user(pad.outputs[0]) if pad.op == "Pad" else None
        if transpose is None or transpose.op != "Transpose" or transpose.domain or pad.domain:
            continue
        order = transpose.ints("perm", ())
        moved = move_pads(pad, order, graph, names, tensors)
        if moved is not None:
            value = next(names)
            changes[pad] = (replace(transpose, inputs=pad.inputs[:1], outputs=(value,)),)
            inputs = (value, *moved.inputs[1:])
            changes[transpose] = (replace(moved, inputs=inputs, outputs=transpose.outputs),)
    return graph.rewrite(changes, tensors)


def move_pads(
    pad: Node,
    order: Permutation,
    graph: Graph,
    names: Iterator[str],
    tensors: dict[str, np.ndarray],
) -> Node | None:
    """A Pad with its pads in another order of the dimensions; None if they are not constant."""
    by_attribute = "pads" in pad.attributes
    pads = pad.attributes["pads"] if by_attribute else graph.tensors.get(pad.input(1))
    if pads is None or pad.input(3) or len(pads) != 2 * len(order):
        return None
    moved = np.asarray(pads, np.int64).reshape(2, -1)[:, list(order)].reshape(-1)
    if by_attribute:
        return replace(pad, attributes={**pad.attributes, "pads": moved.tolist()})
    name = next(names)
    tensors[name] = moved
    return replace(pad, inputs=(pad.inputs[0], name, *pad.inputs[2:]))


class _Sinker:
    """One pass over the nodes. A transposed value is no more than a note of what it transposes,
    until a node reads it that needs it computed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.views: dict[str, tuple[str, Permutation]] = {}  # value -> what it transposes, and how
        self.computed: set[str] = set()
        self.names = graph.fresh("moved")

    def result(self) -> Graph:
        for value in self.graph.outputs:
            if self.read(value.name) != value.name:
                source, _ = self.views[value.name]
                self.nodes.append(Node("Identity", (source,), (value.name,)))
        tensors = {**self.graph.tensors, **self.tensors}
        return replace(self.graph, nodes=tuple(self.nodes), tensors=tensors)

    def read(self, value: str) -> str:
        """The name under which a node finds `value`, computed if need be."""
        if value not in self.views:
            return value
        source, order = self.views[value]
        if order == tuple(range(len(order))):
            return source
        if value not in self.computed:
            self.computed.add(value)
            self.nodes.append(Node("Transpose", (source,), (value,), {"perm": order}, value))
        return value

    def visit(self, node: Node) -> None:
        if node.op == "Transpose" and not node.domain and "perm" in node.attributes:
            order = node.ints("perm", ())
            source, before = self.views.get(node.inputs[0], (node.inputs[0], order))
            if sorted(order) == list(range(len(before))):
                if node.inputs[0] in self.views:
                    order = tuple(before[axis] for axis in order)
                self.views[node.outputs[0]] = (source, order)
                return
        if not node.domain and len(node.outputs) == 1 and self.move(node):
            return
        self.nodes.append(replace(node, inputs=tuple(self.read(value) for value in node.inputs)))

    def move(self, node: Node) -> bool:
        """Emit `node` in front of the transposition of its inputs, if it commutes with that."""
        views = [self.views[value] for value in node.inputs if value in self.views]
        orders = {order for _, order in views}
        if len(orders) != 1:
            return False
        (order,) = orders
        moved = None
        if node.op in _UNARY and len(views) == 1 and node.inputs[0] in self.views:
            if all(self.is_scalar(value) for value in node.inputs[1:]):
                moved = replace(node, inputs=(views[0][0], *node.inputs[1:]))
        elif node.op in _BINARY and len(node.inputs) == 2:
            operands = [self.operand(value, order) for value in node.inputs]
            known = tuple(operand for operand in operands if operand is not None)
            if len(known) == len(operands):
                moved = replace(node, inputs=known)
        elif node.op == "Concat" and len(views) == len(node.inputs):
            axis = order[node.attributes["axis"] % len(order)]
            moved = replace(
                node, inputs=tuple(source for source, _ in views), attributes={"axis": axis}
            )
        elif node.op == "Pad" and len(views) == 1:
            back = tuple(np.argsort(order).tolist())
            moved = move_pads(node, back, self.graph, self.names, self.tensors)
            if moved is not None:
                moved = replace(moved, inputs=(views[0][0], *moved.inputs[1:]))
        elif node.op == "ReduceMean" and len(views) == 1:
            moved, order = self.mean(node, views[0][0], order)
        if moved is None:
            return False
        value = next(self.names)
        self.nodes.append(replace(moved, outputs=(value,)))
        self.views[node.outputs[0]] = (value, order)
        return True

    def is_scalar(self, value: str) -> bool:
        return not value or (value in self.graph.tensors and self.graph.tensors[value].size == 1)

    def operand(self, value: str, order: Permutation) -> str | None:
        """What an elementwise operator reads for `value` when it works before the transposition."""
        if value in self.views:
            return self.views[value][0]
        array = self.graph.tensors.get(value)
        if array is None or array.ndim > len(order):
            return None
        if array.size == 1:
            return value
        name = next(self.names)
        array = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
        self.tensors[name] = array.transpose(np.argsort(order))
        return name

    def mean(self, node: Node, source: str, order: Permutation) -> tuple[Node | None, Permutation]:
        axes = constant_axes(node, self.graph)
        rank = len(order)
        if not axes or any(not -rank <= axis < rank for axis in axes):
            return None, order
        reduced = sorted(order[axis] for axis in axes)
        if not node.attributes.get("keepdims", 1):
            left = [axis for axis in order if axis not in reduced]
            order = tuple(sorted(left).index(axis) for axis in left)
        if "axes" in node.attributes:
            return replace(
                node, inputs=(source,), attributes={**node.attributes, "axes": reduced}
            ), order
        name = next(self.names)
        self.tensors[name] = np.array(reduced, np.int64)
        return replace(node, inputs=(source, name)), order
