"""Padding: whatever adds zeros around a convolution's input becomes the convolution's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from torch_mbv2.onnx.clean.constants import drop_identities
from torch_mbv2.onnx.graph import Graph, Node, Shape

# Heights and widths for which computed pads are compared with those of SAME: all residues of any
# stride in use, sizes below the window, and common ones.
_PROBES = (*range(1, 20), 31, 32, 33, 95, 96, 97, 224, 225, 240, 299, 300, 512, 1023, 4096)


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
    known = [size for size in weight or () if size is not None]
    if weight is None or len(known) != len(weight):
        return None
    kernel = node.ints("kernel_shape", known[2:])
    rank = len(kernel)
    auto = node.attributes["auto_pad"]
    if auto == "NOTSET":
        return list(node.ints("pads", [0] * 2 * rank))
    if auto == "VALID":
        return [0] * 2 * rank
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return None
    sizes = (shapes.get(node.inputs[0]) or (None,) * (rank + 2))[2:]
    begins, ends = [], []
    for size, k, s, d in zip(
        sizes,
        kernel,
        node.ints("strides", [1] * rank),
        node.ints("dilations", [1] * rank),
        strict=True,
    ):
        if k == 1:
            total = 0  # whatever the stride
        elif s == 1:
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


def recognise_same_padding(graph: Graph) -> Graph:
    """A Pad that adds to each image what TensorFlow's SAME adds, computed from the image's size,
    becomes its convolution's `auto_pad`.

    Exporters write the computation in many ways, so it is not matched but tried out.
    """
    changes: dict[Node, tuple[Node, ...]] = {}
    for pad in graph.nodes:
        if pad.op != "Pad" or pad.domain or len(pad.inputs) < 2 or pad.inputs[1] in graph.tensors:
            continue
        conv = graph.sole_user(pad.outputs[0])
        if conv is None or conv.op != "Conv" or not _fills_with_zeros(pad, graph):
            continue
        weight = graph.tensors.get(conv.inputs[1])
        plain = conv.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        plain &= not any(conv.ints("pads", ())) and set(conv.ints("dilations", (1,))) == {1}
        if weight is None or weight.ndim != 4 or not plain:
            continue
        kernel, strides = weight.shape[2:], conv.ints("strides", (1, 1))
        # A stride beyond the window is padded at some sizes only, which `SamePad2d` does not know.
        if any(s > k for s, k in zip(strides, kernel, strict=True)):
            continue
        if _pads_as_same(pad, graph, kernel, strides):
            attributes = {k: v for k, v in conv.attributes.items() if k != "pads"}
            changes[conv] = (
                replace(
                    conv,
                    inputs=(pad.inputs[0], *conv.inputs[1:]),
                    attributes={**attributes, "auto_pad": "SAME_UPPER"},
                ),
            )
            changes[pad] = ()
    return graph.rewrite(changes)


def _fills_with_zeros(pad: Node, graph: Graph) -> bool:
    if pad.attributes.get("mode", "constant") != "constant" or pad.input(3):
        return False
    fill = pad.input(2)
    return not fill or (fill in graph.tensors and not graph.tensors[fill].any())


def _pads_as_same(
    pad: Node, graph: Graph, kernel: tuple[int, ...], strides: tuple[int, ...]
) -> bool:
    """Whether the pads that are computed from the shape of the padded image are those of SAME."""
    needed, shapes, nodes = {pad.inputs[1]}, [], []
    for node in reversed(graph.nodes[: graph.nodes.index(pad)]):
        if not needed.intersection(node.outputs):
            continue
        if node.op == "Shape" and node.inputs[0] == pad.inputs[0]:
            shapes.append(node)
            continue
        nodes.append(node)
        needed.update(value for value in node.inputs if value)
        if len(nodes) > 200:
            return False
    computed = {value for node in (*nodes, *shapes) for value in node.outputs}
    tensors = {name: graph.tensors[name] for name in needed if name in graph.tensors}
    if not shapes or not needed <= computed | tensors.keys():
        return False
    int64 = onnx.TensorProto.INT64
    alone = replace(
        graph,
        nodes=tuple(reversed(nodes)),
        tensors=tensors,
        inputs=tuple(
            onnx.helper.make_tensor_value_info(node.outputs[0], int64, [None]) for node in shapes
        ),
        outputs=(onnx.ValueInfoProto(name=pad.inputs[1]),),
    )
    try:
        evaluator = ReferenceEvaluator(alone.to_model())
        for height, width in zip(_PROBES, reversed(_PROBES), strict=True):
            shape = np.array([3, 5, height, width], np.int64)
            feeds = {
                node.outputs[0]: shape[node.attributes.get("start", 0) : node.attributes.get("end")]
                for node in shapes
            }
            (pads,) = evaluator.run(None, feeds)
            totals = [
                max((-(-size // s) - 1) * s + k - size, 0)
                for size, k, s in zip((height, width), kernel, strides, strict=True)
            ]
            begins = [total // 2 for total in totals]
            ends = [total - begin for total, begin in zip(totals, begins, strict=True)]
            if list(pads) != [0, 0, *begins, 0, 0, *ends]:
                return False
    except Exception:  # the evaluator raises whatever numpy does; the padding then stays
        return False
    return True
