"""Operators of ONNX Runtime's optimiser, written out in standard ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.graph import Graph, Node, quoted

_DOMAIN = "com.microsoft"
# What a fused activation's parameters are called in the operator of its own.
_PARAMETERS = {"HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}


def split_fused(graph: Graph) -> Graph:
    """FusedConv, FusedGemm and FusedMatMul become what they were fused from.

    Raises ModelError for any other operator of the optimiser.
    """
    names = graph.fresh("split")
    tensors: dict[str, np.ndarray] = {}
    changes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if not node.domain.startswith(_DOMAIN):
            continue
        if node.op not in ("FusedConv", "FusedGemm", "FusedMatMul") or node.domain != _DOMAIN:
            raise ModelError(
                f"{graph.source}: {node} comes from ONNX Runtime's optimiser: load the file that "
                "was optimised, or optimise with graph_optimization_level ORT_ENABLE_EXTENDED"
            )
        changes[node] = _split(node, graph, names, tensors)
    return graph.rewrite(changes, tensors)


def _split(
    node: Node, graph: Graph, names: Iterator[str], tensors: dict[str, np.ndarray]
) -> tuple[Node, ...]:
    """The nodes that a fused one stands for; constants that they read go into `tensors`."""
    rest = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    layer = replace(node, op=node.op.removeprefix("Fused"), domain="", attributes=rest)
    if node.op == "FusedMatMul":
        plain = {"alpha", "transA", "transB", "transBatchA", "transBatchB"}
        if any(rest.get(name, 0) for name in plain - {"alpha"}) or rest.get("alpha", 1.0) != 1.0:
            raise ModelError(
                f"{graph.source}: {node} transposes or scales its operands, which is not "
                "supported: load the file that ONNX Runtime optimised"
            )
        return (replace(layer, attributes={}),)
    nodes = [layer]

    def follow(op: str, *more: str, **attributes: float) -> None:
        value = next(names)
        before = nodes[-1]
        nodes[-1] = replace(before, outputs=(value,))
        nodes.append(Node(op, (value, *more), before.outputs, attributes, f"{node.name}_{op}"))

    if node.op == "FusedConv" and node.input(3):
        nodes[0] = replace(layer, inputs=tuple(layer.inputs[:3]))
        follow("Add", node.input(3))
    activation = node.attributes.get("activation", "")
    if node.op == "FusedGemm":
        parameters = [
            node.attributes[name]
            for name in ("activation_alpha", "activation_beta")
            if name in node.attributes
        ]
    else:
        parameters = list(node.attributes.get("activation_params", ()))
    if activation == "Clip":
        low, high = parameters
        if graph.opset < 11:
            follow("Clip", min=low, max=high)
        else:
            bounds = [next(names), next(names)]
            for name, bound in zip(bounds, (low, high), strict=True):
                tensors[name] = np.array(bound, graph.float_dtype)
            follow("Clip", *bounds)
    elif activation in ("HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"):
        follow(activation, **dict(zip(_PARAMETERS.get(activation, ()), parameters, strict=False)))
    elif activation:
        raise ModelError(
            f"{graph.source}: {node} has the activation {activation!r}, which is not supported: "
            "load the file that ONNX Runtime optimised"
        )
    return tuple(nodes)


def refuse_other_domains(graph: Graph) -> Graph:
    """Raise ModelError for an operator that is not standard ONNX, of which nothing is known but the
    name; no step behind this one looks at domains."""
    for node in graph.nodes:
        if node.domain:
            raise ModelError(
                f"{graph.source}: {node}, opset {graph.opset}, cannot be converted to PyTorch: it "
                f"is of the domain {quoted(node.domain)}; export the model without that operator"
            )
    return graph
