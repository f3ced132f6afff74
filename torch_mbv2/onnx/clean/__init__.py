"""The pre-pass: small steps, each `Graph -> Graph`, that reduce the many spellings of a network to
one, so that recognising and converting see few forms. A new spelling is a new step in `STEPS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch_mbv2.onnx.clean.activations import merge_clamps
from torch_mbv2.onnx.clean.constants import (
    drop_identities,
    drop_tensor_inputs,
    evaluate,
    fold_constants,
)
from torch_mbv2.onnx.clean.heads import (
    flatten_pools,
    matmuls_to_gemm,
    means_to_pools,
    merge_means,
    pooled_convs_to_gemm,
)
from torch_mbv2.onnx.clean.layout import sink_transposes
from torch_mbv2.onnx.clean.norms import fold_affine
from torch_mbv2.onnx.clean.padding import explicit_padding, fold_pads, recognise_same_padding
from torch_mbv2.onnx.clean.quantisation import dequantise
from torch_mbv2.onnx.clean.runtime import refuse_other_domains, split_fused
from torch_mbv2.onnx.graph import Graph


def clean(graph: Graph) -> Graph:
    """`graph` after every step."""
    for step in STEPS:
        graph = step(graph)
    return graph


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
    dequantise,
    split_fused,
    evaluate,
    drop_dead,
    refuse_other_domains,
    sink_transposes,
    merge_clamps,
    fold_affine,
    explicit_padding,
    recognise_same_padding,
    fold_pads,
    merge_means,
    means_to_pools,
    flatten_pools,
    pooled_convs_to_gemm,
    matmuls_to_gemm,
    drop_dead,
)
