"""What onnx2torch has no converter for. Importing this adds it, for the operators of `lower`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx2torch.node_converters.registry import add_converter
from onnx2torch.utils.common import OnnxMapping, OperationConverterResult, onnx_mapping_from_node
from torch import nn

from torch_mbv2.mobilenet import SamePad2d
from torch_mbv2.onnx.lower import DOMAIN, IMAGE_POOL, SAME_CONV

_MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "Gelu": lambda attributes: nn.GELU(attributes.get("approximate", "none")),
    "GlobalMaxPool": lambda attributes: nn.AdaptiveMaxPool2d(1),
    IMAGE_POOL: lambda attributes: nn.AdaptiveAvgPool2d(1),
    "Mish": lambda attributes: nn.Mish(),
    "Swish": lambda attributes: _swish(attributes.get("alpha", 1.0)),
}


def _swish(alpha: float) -> nn.Module:
    if alpha != 1.0:
        raise NotImplementedError(f"alpha {alpha} is not implemented")
    return nn.SiLU()


def _added(node: Any, graph: Any) -> OperationConverterResult:
    module = _MODULES[node.operation_type](node.attributes)
    return OperationConverterResult(module, onnx_mapping_from_node(node))


for _name in _MODULES:
    add_converter(operation_type=_name, version=1, domain=DOMAIN)(_added)


def _same_conv(node: Any, graph: Any) -> OperationConverterResult:
    weight, *bias = (graph.initializers[name].to_torch() for name in node.input_values[1:])
    strides = set(node.attributes.get("strides", (1, 1)))
    sizes = set(weight.shape[2:])
    if weight.dim() != 4 or len(sizes) != 1 or len(strides) != 1:
        raise NotImplementedError("auto_pad of windows that are not square is not implemented")
    if set(node.attributes.get("dilations", (1, 1))) != {1}:
        raise NotImplementedError("auto_pad of dilated windows is not implemented")
    (size,), (stride,) = sizes, strides
    groups = node.attributes.get("group", 1)
    with torch.device("meta"):
        conv = nn.Conv2d(
            weight.shape[1] * groups, len(weight), size, stride, groups=groups, bias=bool(bias)
        )
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        conv.bias = nn.Parameter(bias[0], requires_grad=False)
    return OperationConverterResult(
        nn.Sequential(SamePad2d(size, stride), conv),
        OnnxMapping(inputs=tuple(node.input_values[:1]), outputs=tuple(node.output_values)),
    )


add_converter(operation_type=SAME_CONV, version=1, domain=DOMAIN)(_same_conv)
