"""Reshapes whose target is computed from the batch size, written with constants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from torch_mbv2.onnx.graph import Graph, Node, Shape


def simplify_reshapes(graph: Graph) -> Graph:
    """A Reshape to sizes of which all but one are constant gets a constant target: the number of
    elements tells the last one."""
    shapes: dict[str, Shape] | None = None
    names = graph.fresh("target")
    tensors: dict[str, np.ndarray] = {}
    changes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        concat = graph.producers.get(node.input(1)) if node.op == "Reshape" else None
        if concat is None or concat.op != "Concat" or concat.domain:
            continue
        parts = [graph.tensors.get(name) for name in concat.inputs]
        if sum(part is None for part in parts) != 1:
            continue
        # What is computed must be one number: with two unknown, -1 would be ambiguous.
        computed = next(n for n in concat.inputs if n not in graph.tensors)
        shapes = graph.shapes() if shapes is None else shapes
        if shapes.get(computed) != (1,) or any(
            (part < 1).any() for part in parts if part is not None
        ):
            continue
        name = next(names)
        tensors[name] = np.concatenate(
            [np.array([-1]) if part is None else part.reshape(-1) for part in parts]
        ).astype(np.int64)
        attributes = {k: v for k, v in node.attributes.items() if k != "allowzero"}
        changes[node] = (replace(node, inputs=(node.inputs[0], name), attributes=attributes),)
    return graph.rewrite(changes, tensors)
