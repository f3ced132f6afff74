"""Activations that are clamps, in one spelling: Relu, or Clip with two bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from torch_mbv2.onnx.graph import Graph, Node

Bounds = tuple[float | None, float | None]


def merge_clamps(graph: Graph) -> Graph:
    """Relu, Clip, and Max or Min with a constant, one behind the other, become one Relu or Clip."""
    names = graph.fresh("bound")
    changes: dict[Node, tuple[Node, ...]] = {}
    tensors: dict[str, np.ndarray] = {}
    for first in graph.nodes:
        bounds = clamp_bounds(first, graph)
        if bounds is None or first in changes:
            continue
        last, chain = first, []
        while (follower := graph.sole_user(last.outputs[0])) is not None:
            after = clamp_bounds(follower, graph)
            if after is None:
                break
            chain.append(last)
            last, bounds = follower, _compose(bounds, after)
        if not chain and first.op in ("Clip", "Relu"):
            continue
        source = _data(first, graph)
        changes.update(dict.fromkeys(chain, ()))
        if bounds == (0.0, None):
            clamp = replace(last, op="Relu", inputs=(source,), attributes={})
        elif graph.opset < 11:
            limits = {"min": bounds[0], "max": bounds[1]}
            kept = {name: limit for name, limit in limits.items() if limit is not None}
            clamp = replace(last, op="Clip", inputs=(source,), attributes=kept)
        else:
            dtype = _bound_dtype((*chain, last), graph)
            inputs = [source]
            for limit in bounds:
                inputs.append("" if limit is None else next(names))
                if limit is not None:
                    tensors[inputs[-1]] = np.array(limit, dtype)
            clamp = replace(last, op="Clip", inputs=tuple(inputs), attributes={})
        changes[last] = (clamp,)
    return graph.rewrite(changes, tensors)


def clamp_bounds(node: Node, graph: Graph) -> Bounds | None:
    """The (min, max) of a node that is a clamp of one value, None for no bound; else None.

    Bounds that are integers are none, as they would not fit into floats.
    """
    if node.domain or node.op not in ("Clip", "Max", "Min", "Relu"):
        return None
    if node.op == "Relu":
        return 0.0, None
    if node.op == "Clip" and graph.opset < 11:
        return _bound(node.attributes.get("min")), _bound(node.attributes.get("max"))
    limits = node.inputs[1:] if node.op == "Clip" else _constants(node, graph)
    arrays = [graph.tensors.get(name) for name in limits if name]
    if any(array is None or array.size != 1 or array.dtype.kind in "iu" for array in arrays):
        return None
    if node.op == "Clip":
        low, high = (graph.tensors[node.input(i)].item() if node.input(i) else None for i in (1, 2))
        return _bound(low), _bound(high)
    if len(node.inputs) != 2 or len(limits) != 1 or graph.tensors[limits[0]].ndim > 1:
        return None
    limit = float(graph.tensors[limits[0]].item())
    return (limit, None) if node.op == "Max" else (None, limit)


def _constants(node: Node, graph: Graph) -> list[str]:
    return [name for name in node.inputs if name in graph.tensors]


def _data(node: Node, graph: Graph) -> str:
    """The value that a clamp clamps."""
    if node.op in ("Max", "Min"):
        return next(name for name in node.inputs if name not in graph.tensors)
    return node.inputs[0]


def _bound_dtype(clamps: Iterable[Node], graph: Graph) -> np.dtype:
    """Of the bounds, which must have the data's: what one of the clamps has, else what the weights
    of the graph have."""
    for node in clamps:
        for name in _constants(node, graph):
            return graph.tensors[name].dtype
    return graph.float_dtype


def _bound(limit: float | None) -> float | None:
    """A bound beyond the float32 range, as exporters write for none, is none."""
    largest = float(np.finfo(np.float32).max)
    return None if limit is None or abs(limit) >= largest else float(limit)


def _compose(first: Bounds, second: Bounds) -> Bounds:
    """The bounds of a clamp behind another."""

    def clamp(limit: float) -> float:
        low, high = second
        limit = limit if low is None else max(limit, low)
        return limit if high is None else min(limit, high)

    low, high = first
    return (
        second[0] if low is None else clamp(low),
        second[1] if high is None else clamp(high),
    )
