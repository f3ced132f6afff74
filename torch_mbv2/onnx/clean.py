"""The pre-pass: small steps, each `Graph -> Graph`, that reduce the many spellings of a network to
one, so that recognising and converting see few forms. A new spelling is a new step in `STEPS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.graph import Graph, Node, Shape

# What exporters compute sizes and pads with.
_ARITHMETIC = frozenset(
    (
        *(
            "Add",
            "Ceil",
            "Div",
            "Equal",
            "Floor",
            "Max",
            "Min",
            "Mod",
            "Mul",
            "Neg",
            "Sub",
            "Where",
        ),
        *("Cast", "CastLike", "Concat", "ConstantOfShape", "Expand", "Gather", "Reshape", "Shape"),
        *("Slice", "Squeeze", "Transpose", "Unsqueeze"),
    )
)
# Elements of a tensor that is such a size, or a batch norm's statistics; weights are larger.
_SMALL = 4096


def clean(graph: Graph) -> Graph:
    """`graph` after every step."""
    for step in STEPS:
        graph = step(graph)
    return graph


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
            return value
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
        if node.op not in ("Identity", "Dropout") or node.domain or any(node.outputs[1:]):
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
        before, graph = graph, _evaluate_once(graph)
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
    if any(array.size > _SMALL for array in inputs.values()):
        return None
    if node.op in ("ConstantOfShape", "Expand"):
        target = inputs[node.inputs[-1]].tolist()
        if np.prod([float(size) for size in target]) > _SMALL:
            return None
    alone = replace(
        graph,
        nodes=(node,),
        tensors=inputs,
        inputs=(),
        outputs=(onnx.ValueInfoProto(name=node.outputs[0]),),
    )
    try:
        (value,) = ReferenceEvaluator(alone.to_model()).run(None, {})
    except Exception:  # the evaluator raises whatever numpy does; the node then stays
        return None
    value = np.asarray(value)
    return value if value.size <= _SMALL else None


def explicit_padding(graph: Graph) -> Graph:
    """A convolution's `auto_pad` becomes `pads`, where the sizes are known or the stride is 1."""
    convs = [node for node in graph.nodes if node.op == "Conv" and "auto_pad" in node.attributes]
    if not convs:
        return graph
    shapes = graph.shapes()
    changes = {}
    for conv in convs:
        pads = _pads(conv, shapes)
        if pads is not None:
            attributes = {**conv.attributes, "pads": pads}
            del attributes["auto_pad"]
            changes[conv] = (replace(conv, attributes=attributes),)
    return graph.rewrite(changes)


def _pads(node: Node, shapes: Mapping[str, Shape]) -> list[int] | None:
    """A convolution's pads in ONNX order (all begins, then all ends); None if not known."""
    weight = shapes.get(node.inputs[1])
    if weight is None or None in weight:
        return None
    kernel = node.ints("kernel_shape", weight[2:])
    rank = len(kernel)
    auto = node.attributes["auto_pad"]
    if auto == "NOTSET":
        return list(node.ints("pads", [0] * 2 * rank))
    if auto == "VALID":
        return [0] * 2 * rank
    sizes = (shapes.get(node.inputs[0]) or (None,) * (rank + 2))[2:]
    begins, ends = [], []
    for size, k, s, d in zip(
        sizes,
        kernel,
        node.ints("strides", [1] * rank),
        node.ints("dilations", [1] * rank),
        strict=True,
    ):
        if s == 1:
            total = (k - 1) * d
        elif size is None:
            return None
        else:
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        begins.append(less if auto == "SAME_UPPER" else more)
        ends.append(more if auto == "SAME_UPPER" else less)
    return begins + ends


def fold_pads(graph: Graph) -> Graph:
    """A Pad with zeros that only a convolution reads becomes the convolution's pads; one that adds
    nothing goes."""
    changes: dict[Node, tuple[Node, ...]] = {}
    for pad in graph.nodes:
        added = _zero_pads(pad, graph) if pad.op == "Pad" else None
        if added is None:
            continue
        if not any(added):
            changes[pad] = (replace(pad, op="Identity", inputs=pad.inputs[:1], attributes={}),)
            continue
        conv = graph.sole_user(pad.outputs[0])
        if conv is None or conv.op != "Conv" or conv.inputs[0] != pad.outputs[0]:
            continue
        if conv.attributes.get("auto_pad", "NOTSET") != "NOTSET":
            continue
        rank = len(added) // 2
        if rank < 3 or any(added[:2] + added[rank : rank + 2]) or min(added) < 0:
            continue
        spatial = added[2:rank] + added[rank + 2 :]
        old = conv.ints("pads", [0] * len(spatial))
        pads = [a + b for a, b in zip(old, spatial, strict=True)]
        attributes = {**conv.attributes, "pads": pads}
        inputs = (pad.inputs[0], *conv.inputs[1:])
        changes[conv] = (replace(conv, inputs=inputs, attributes=attributes),)
        changes[pad] = ()
    return drop_identities(graph.rewrite(changes))


def _zero_pads(pad: Node, graph: Graph) -> list[int] | None:
    """The pads of every dimension; None unless they are constant and fill with zeros."""
    if pad.attributes.get("mode", "constant") != "constant" or pad.input(3):
        return None
    if graph.opset < 11:
        return None if pad.attributes.get("value", 0.0) else list(pad.ints("pads", []))
    fill = pad.input(2)
    if fill and (fill not in graph.tensors or graph.tensors[fill].any()):
        return None
    pads = graph.tensors.get(pad.inputs[1])
    return None if pads is None else [int(p) for p in pads]


def merge_means(graph: Graph) -> Graph:
    """A mean over one dimension of a mean over another becomes one mean over both."""
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
        tensors = {name: np.array(axes, np.int64)}
        return merge_means(graph.rewrite({first: (), second: (merged,)}, tensors))
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
    """Reshapes and Squeezes that take a global pool's (N, C, 1, 1) to (N, C) become Flatten(1).

    Where the file says the batch as a number, the result serves any batch.
    """
    shapes: dict[str, Shape] | None = None
    changes: dict[Node, tuple[Node, ...]] = {}
    for pool in graph.nodes:
        if pool.op != "GlobalAveragePool":
            continue
        shapes = graph.shapes() if shapes is None else shapes
        shape = shapes.get(pool.outputs[0])
        if shape is None or len(shape) != 4:
            continue
        for first in graph.users.get(pool.outputs[0], ()):
            chain: list[Node] = []
            node: Node | None = first
            while node is not None and node.op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
                chain.append(node)
                # All of these keep the elements' order, so with C columns there are N rows.
                after = shapes.get(node.outputs[0], ())
                columns = shape[1] is not None and len(after) == 2 and after[1] == shape[1]
                if columns or (node is first and _flattens(node, pool, shape[1], graph)):
                    flat = Node("Flatten", pool.outputs, node.outputs, {"axis": 1}, node.name)
                    changes.update(dict.fromkeys(chain, ()))
                    changes[node] = (flat,)
                    break
                node = graph.sole_user(node.outputs[0])
    return graph.rewrite(changes)


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
    batched = (pool.inputs[0], pool.outputs[0], *(value.name for value in graph.inputs))
    return _is_batch_size(concat.inputs[0], graph, batched)


def _is_batch_size(value: str, graph: Graph, batched: tuple[str, ...]) -> bool:
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
            bounds = [graph.tensors.get(name) for name in node.inputs[1:]]
            if any(bound is None or bound.size != 1 for bound in bounds):
                return False
            if [int(bound.item()) for bound in bounds] != [0, 1, 0, 1][: len(bounds)]:
                return False
            first = True
        elif node.op not in ("Unsqueeze", "Squeeze", "Cast", "Reshape"):
            return False
        value = node.inputs[0]
    return False


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
        if bias in graph.tensors and graph.tensors[bias].shape in (
            (weight.shape[1],),
            (1, weight.shape[1]),
        ):
            gemm = replace(node, op="Gemm", inputs=(*node.inputs, bias), outputs=add.outputs)
            changes[add] = ()
        else:
            gemm = replace(node, op="Gemm")
        changes[node] = (gemm,)
    return graph.rewrite(changes)


def _other_input(node: Node, value: str) -> str:
    first, second = node.inputs
    return second if first == value else first


def fold_batch_norms(graph: Graph) -> Graph:
    """A BatchNormalization behind a convolution that nothing else reads goes into its weights.

    Not part of `clean`: a MobileNetV2 whose batch norms are all there keeps them.
    """
    producers = graph.producers
    names = graph.fresh("folded")
    tensors: dict[str, np.ndarray] = {}
    changes: dict[Node, tuple[Node, ...]] = {}
    for norm in graph.nodes:
        conv = producers.get(norm.input(0))
        if norm.op != "BatchNormalization" or conv is None or conv.op != "Conv":
            continue
        values = [graph.tensors.get(name) for name in (conv.inputs[1], *norm.inputs[1:5])]
        bias = graph.tensors.get(conv.input(2))
        if graph.sole_user(conv.outputs[0]) is None or any(value is None for value in values):
            continue
        if conv.input(2) and bias is None:
            continue
        weight, gamma, beta, mean, variance = (value.astype(np.float64) for value in values)
        scale = gamma / np.sqrt(variance + norm.attributes.get("epsilon", 1e-5))
        shift = beta + ((0.0 if bias is None else bias.astype(np.float64)) - mean) * scale
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        pair = (next(names), next(names))
        tensors[pair[0]] = weight.astype(values[0].dtype)
        tensors[pair[1]] = shift.astype(values[0].dtype)
        changes[conv] = (replace(conv, inputs=(conv.inputs[0], *pair), outputs=norm.outputs),)
        changes[norm] = ()
    return graph.rewrite(changes, tensors)


def drop_dead(graph: Graph) -> Graph:
    """Nodes and tensors that no output needs go."""
    needed = set(graph.output_names)
    nodes = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            nodes.append(node)
            needed.update(value for value in node.inputs if value)
    tensors = {name: array for name, array in graph.tensors.items() if name in needed}
    return replace(graph, nodes=tuple(reversed(nodes)), tensors=tensors)


STEPS: tuple[Callable[[Graph], Graph], ...] = (
    fold_constants,
    drop_identities,
    drop_tensor_inputs,
    evaluate,
    explicit_padding,
    fold_pads,
    merge_means,
    means_to_pools,
    flatten_pools,
    matmuls_to_gemm,
    drop_dead,
)
