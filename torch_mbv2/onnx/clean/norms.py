"""Batch norms and other affine maps of channels, folded into the convolution before them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from torch_mbv2.onnx.graph import Graph, Node


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
        inputs = (conv.inputs[1], *norm.inputs[1:5])
        bias = graph.tensors.get(conv.input(2))
        if graph.sole_user(conv.outputs[0]) is None or not graph.tensors.keys() >= {*inputs}:
            continue
        epsilon = norm.attributes.get("epsilon", 1e-5)
        if (conv.input(2) and bias is None) or epsilon < 0:
            continue
        values = [graph.tensors[name].astype(np.float64) for name in inputs]
        weight, gamma, beta, mean, variance = values
        dtype = graph.tensors[inputs[0]].dtype
        scale = gamma / np.sqrt(variance + epsilon)
        shift = beta + ((0.0 if bias is None else bias.astype(np.float64)) - mean) * scale
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        pair = (next(names), next(names))
        tensors[pair[0]] = weight.astype(dtype)
        tensors[pair[1]] = shift.astype(dtype)
        changes[conv] = (replace(conv, inputs=(conv.inputs[0], *pair), outputs=norm.outputs),)
        changes[norm] = ()
    return graph.rewrite(changes, tensors)


def fold_affine(graph: Graph) -> Graph:
    """Additions to, and multiplications of, channels by constants, such as a batch norm written out
    or the scale of quantised weights, go into the convolution or matrix product before them."""
    names = graph.fresh("affine")
    tensors: dict[str, np.ndarray] = {}
    changes: dict[Node, tuple[Node, ...]] = {}
    for layer in graph.nodes:
        weight = graph.tensors.get(layer.input(1))
        bias = graph.tensors.get(layer.input(2))
        axis = _output_axis(layer, weight)
        if weight is None or axis is None:
            continue
        if layer.input(2) and (bias is None or bias.ndim != 1):
            continue
        channels = weight.shape[axis]
        scale = np.ones(channels)
        shift = np.zeros(channels) if bias is None else bias.astype(np.float64)
        last, chain = layer, []
        while (follower := graph.sole_user(last.outputs[0])) is not None:
            vector = _channel_vector(follower, last.outputs[0], channels, layer, graph)
            if vector is None:
                break
            if follower.op in ("Add", "Sub"):
                if layer.op == "MatMul":
                    break  # it has no bias; `matmuls_to_gemm` sees to that
                shift = shift + (vector if follower.op == "Add" else -vector)
            else:
                factor = vector if follower.op == "Mul" else 1 / vector
                scale, shift = scale * factor, shift * factor
            chain.append(last)
            last = follower
        if not chain or not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            continue
        inputs = [layer.inputs[0], layer.inputs[1]]
        if (scale != 1).any():
            inputs[1] = next(names)
            shape = [-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)]
            scaled = weight.astype(np.float64) * scale.reshape(shape)
            tensors[inputs[1]] = scaled.astype(weight.dtype)
        if layer.op != "MatMul":
            inputs.append(next(names))
            tensors[inputs[2]] = shift.astype(weight.dtype)
        changes.update(dict.fromkeys(chain, ()))
        changes[last] = (replace(layer, inputs=tuple(inputs), outputs=last.outputs),)
    return graph.rewrite(changes, tensors)


def _output_axis(layer: Node, weight: np.ndarray | None) -> int | None:
    """The dimension of the weight that is the layer's output channels; None for other nodes."""
    if weight is None or layer.domain or not np.issubdtype(weight.dtype, np.floating):
        return None
    if layer.op == "Conv" and weight.ndim == 4:
        return 0
    if layer.op == "MatMul" and weight.ndim == 2:
        return 1
    if layer.op == "Gemm" and weight.ndim == 2:
        plain = layer.attributes.get("alpha", 1.0) == 1.0 == layer.attributes.get("beta", 1.0)
        return (0 if layer.attributes.get("transB", 0) else 1) if plain else None
    return None


def _channel_vector(
    node: Node, value: str, channels: int, layer: Node, graph: Graph
) -> np.ndarray | None:
    """The constants, one a channel, that `node` adds to or multiplies `value` by; else None."""
    if node.op not in ("Add", "Div", "Mul", "Sub") or node.domain or len(node.inputs) != 2:
        return None
    if node.inputs[0] != value and node.op in ("Div", "Sub"):
        return None
    array = graph.tensors.get(node.inputs[1] if node.inputs[0] == value else node.inputs[0])
    if array is None or not np.isfinite(array).all() or (node.op == "Div" and not array.all()):
        return None
    shape = [1] * 4 if layer.op == "Conv" else [1] * 2
    shape[1] = channels
    if array.ndim > len(shape):
        return None
    padded = (1,) * (len(shape) - array.ndim) + array.shape
    if any(n not in (1, full) for n, full in zip(padded, shape, strict=True)):
        return None
    return np.broadcast_to(array.reshape(-1), channels).astype(np.float64)
