"""The way from the last feature map to the logits: global pool, flatten, linear layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from torch_mbv2.onnx.graph import Graph, Node, Shape

# Operators whose output has as many images as what they read first.
_KEEP_BATCH = frozenset(
    (
        *("Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Conv", "Div", "HardSigmoid"),
        *("HardSwish", "LeakyRelu", "Max", "MaxPool", "Min", "Mul", "Pad", "PRelu", "Relu"),
        *("Sigmoid", "Sub"),
    )
)


def merge_means(graph: Graph) -> Graph:
    """A mean over one dimension of a mean over another becomes one mean over both."""
    before = None
    while graph is not before:
        before, graph = graph, _merge_a_mean(graph)
    return graph


def _merge_a_mean(graph: Graph) -> Graph:
    shapes: dict[str, Shape] | None = None
    for first in graph.nodes:
        second = graph.sole_user(first.outputs[0]) if first.op == "ReduceMean" else None
        if second is None or second.op != "ReduceMean":
            continue
        shapes = graph.shapes() if shapes is None else shapes
        keep = first.attributes.get("keepdims", 1)
        rank = len(shapes.get(first.inputs[0]) or ())
        inner = _reduced(first, graph, rank)
        if not inner or keep != second.attributes.get("keepdims", 1):
            continue
        left = [axis for axis in range(rank) if keep or axis not in inner]
        outer = _reduced(second, graph, len(left))
        axes = sorted({*inner, *(left[axis] for axis in outer or ())})
        if not outer or len(axes) != len(inner) + len(outer):
            continue
        name = next(graph.fresh("axes"))
        if graph.opset < 18:
            attributes = {"keepdims": keep, "axes": axes}
            merged = replace(second, inputs=first.inputs[:1], attributes=attributes)
        else:
            merged = replace(second, inputs=(first.inputs[0], name), attributes={"keepdims": keep})
        return graph.rewrite({first: (), second: (merged,)}, {name: np.array(axes, np.int64)})
    return graph


def _reduced(node: Node, graph: Graph, rank: int) -> list[int] | None:
    """The dimensions that a reduction goes over, as numbers from 0; None if not known."""
    axes = constant_axes(node, graph)
    return None if axes is None or not rank else sorted(axis % rank for axis in axes)


def constant_axes(node: Node, graph: Graph) -> list[int] | None:
    """The constant axes of a node, by attribute or by second input."""
    if "axes" in node.attributes:
        return list(node.ints("axes", []))
    axes = graph.tensors.get(node.input(1))
    return None if axes is None else [int(axis) for axis in axes.reshape(-1)]


def means_to_pools(graph: Graph) -> Graph:
    """ReduceMean over height and width, and AveragePool over a whole map, become
    GlobalAveragePool."""
    if not any(node.op in ("ReduceMean", "AveragePool") for node in graph.nodes):
        return graph
    shapes = graph.shapes()
    names = graph.fresh("pooled")
    changes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        shape = shapes.get(node.input(0))
        if shape is None or len(shape) != 4:
            continue
        if node.op == "ReduceMean" and _reduced(node, graph, 4) == [2, 3]:
            keep = node.attributes.get("keepdims", 1)
        elif node.op == "AveragePool" and _whole_map(node, shape):
            keep = 1
        else:
            continue
        pooled = node.outputs[0] if keep else next(names)
        pool = Node("GlobalAveragePool", (node.inputs[0],), (pooled,), name=node.name)
        flat = Node("Flatten", (pooled,), node.outputs, {"axis": 1}, name=f"{node.name}_flat")
        changes[node] = (pool,) if keep else (pool, flat)
    return graph.rewrite(changes)


def _whole_map(node: Node, shape: Shape) -> bool:
    padded = any(node.ints("pads", [0])) or node.attributes.get("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    dilated = set(node.ints("dilations", [1])) != {1}
    return not padded and not dilated and node.ints("kernel_shape", []) == shape[2:]


def flatten_pools(graph: Graph) -> Graph:
    """Reshapes, Squeezes and Transposes that take a (N, C, 1, 1) map to (N, C) become Flatten(1).

    Where the file says the batch as a number, the result serves any batch.
    """
    if not any(node.op == "GlobalAveragePool" for node in graph.nodes):
        return graph
    shapes = graph.shapes()
    changes: dict[Node, tuple[Node, ...]] = {}
    for pool in graph.nodes:
        channels = _pooled_channels(pool, shapes)
        if channels == 0:
            continue
        for first in graph.users.get(pool.outputs[0], ()):
            chain: list[Node] = []
            node: Node | None = first
            while node is not None and _keeps_order(node, shapes):
                chain.append(node)
                # With C columns there are N rows.
                after = shapes.get(node.outputs[0], ())
                columns = channels is not None and len(after) == 2 and after[1] == channels
                if columns or (node is first and _flattens(node, pool, channels, graph)):
                    flat = Node("Flatten", pool.outputs, node.outputs, {"axis": 1}, node.name)
                    changes.update(dict.fromkeys(chain, ()))
                    changes[node] = (flat,)
                    break
                node = graph.sole_user(node.outputs[0])
    return graph.rewrite(changes)


def _pooled_channels(node: Node, shapes: Mapping[str, Shape]) -> int | None:
    """The channels of a (N, C, 1, 1) map that `node` computes, None if not known; 0 for any other
    node."""
    shape = shapes.get(node.outputs[0])
    if node.op not in ("Conv", "GlobalAveragePool") or shape is None or len(shape) != 4:
        return 0
    if node.op == "Conv" and shape[2:] != (1, 1):
        return 0
    return shape[1]


def _keeps_order(node: Node, shapes: Mapping[str, Shape]) -> bool:
    """Whether a node changes the shape of its input, and not the order of the elements."""
    if node.op != "Transpose":
        return node.op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
    shape = shapes.get(node.inputs[0], ())
    order = node.ints("perm", ())
    if sorted(order) != list(range(len(shape))):
        return False
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


def _flattens(node: Node, pool: Node, channels: int | None, graph: Graph) -> bool:
    """Whether a node behind a pool is Flatten(1), or a Reshape to its batch size and the rest."""
    if node.op == "Flatten":
        return node.attributes.get("axis", 1) in (1, -3)
    if node.op != "Reshape":
        return False
    target = graph.tensors.get(node.inputs[1])
    if target is not None:  # 0 takes the input's size
        return target.tolist() == [0, -1] and not node.attributes.get("allowzero", 0)
    concat = graph.producers.get(node.inputs[1])
    if concat is None or concat.op != "Concat" or len(concat.inputs) != 2:
        return False
    columns = graph.tensors.get(concat.inputs[1])
    if columns is None or columns.size != 1:
        return False
    if int(columns.item()) == channels:
        return True
    if int(columns.item()) != -1:
        return False
    return _is_batch_size(concat.inputs[0], graph, _of_same_batch(pool, graph))


def _of_same_batch(pool: Node, graph: Graph) -> list[str]:
    """Values whose first size is that of `pool`'s output: its ancestors, as far as no operator can
    have changed that."""
    values = [pool.outputs[0], pool.inputs[0]]
    while (node := graph.producers.get(values[-1])) is not None and node.op in _KEEP_BATCH:
        data = next((name for name in node.inputs if name not in graph.tensors), None)
        if data is None:
            break
        values.append(data)
    return values


def _is_batch_size(value: str, graph: Graph, batched: Collection[str]) -> bool:
    """Whether `value` is computed as the first size of one of the values `batched`."""
    first = False
    while (node := graph.producers.get(value)) is not None:
        if node.op == "Shape":
            start, end = node.attributes.get("start", 0), node.attributes.get("end")
            return node.inputs[0] in batched and start == 0 and (first or end == 1)
        if node.op == "Gather":
            index = graph.tensors.get(node.inputs[1])
            if index is None or index.size != 1 or index.any():
                return False
            first = True
        elif node.op == "Slice" and graph.opset >= 10:
            bounds = [graph.tensors[name] for name in node.inputs[1:] if name in graph.tensors]
            if len(bounds) != len(node.inputs[1:]) or any(bound.size != 1 for bound in bounds):
                return False
            if [int(bound.item()) for bound in bounds] != [0, 1, 0, 1][: len(bounds)]:
                return False
            first = True
        elif node.op not in ("Unsqueeze", "Squeeze", "Cast", "Reshape"):
            return False
        value = node.inputs[0]
    return False


def pooled_convs_to_gemm(graph: Graph) -> Graph:
    """A 1x1 convolution of a global pool's output becomes Gemm, where that is flattened next."""
    changes: dict[Node, tuple[Node, ...]] = {}
    tensors: dict[str, np.ndarray] = {}
    names = graph.fresh("classifier")
    for conv in graph.nodes:
        weight = graph.tensors.get(conv.input(1))
        pool = graph.producers.get(conv.input(0))
        flat = graph.sole_user(conv.outputs[0]) if conv.op == "Conv" else None
        if pool is None or pool.op != "GlobalAveragePool" or weight is None:
            continue
        if flat is None or flat.op != "Flatten" or flat.attributes.get("axis", 1) != 1:
            continue
        plain = weight.shape[2:] == (1, 1) and conv.attributes.get("group", 1) == 1
        if not plain or any(conv.ints("pads", ())):
            continue
        matrix, rows = next(names), next(names)
        tensors[matrix] = weight.reshape(weight.shape[:2])
        gemm = Node(
            "Gemm", (rows, matrix, *conv.inputs[2:]), flat.outputs, {"transB": 1}, conv.name
        )
        changes[conv] = (Node("Flatten", pool.outputs, (rows,), {"axis": 1}, flat.name),)
        changes[flat] = (gemm,)
    return graph.rewrite(changes, tensors)


def matmuls_to_gemm(graph: Graph) -> Graph:
    """MatMul of a matrix with a constant one, and the Add of a constant vector behind it, become
    Gemm."""
    if not any(node.op == "MatMul" for node in graph.nodes):
        return graph
    shapes = graph.shapes()
    changes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        weight = graph.tensors.get(node.input(1))
        if node.op != "MatMul" or weight is None or weight.ndim != 2:
            continue
        if len(shapes.get(node.inputs[0], ())) != 2:
            continue
        add = graph.sole_user(node.outputs[0])
        bias = _other_input(add, node.outputs[0]) if add is not None and add.op == "Add" else ""
        vectors = ((weight.shape[1],), (1, weight.shape[1]))
        if add is not None and bias in graph.tensors and graph.tensors[bias].shape in vectors:
            gemm = replace(node, op="Gemm", inputs=(*node.inputs, bias), outputs=add.outputs)
            changes[add] = ()
        else:
            gemm = replace(node, op="Gemm")
        changes[node] = (gemm,)
    return graph.rewrite(changes)


def _other_input(node: Node, value: str) -> str:
    first, second = node.inputs
    return second if first == value else first
