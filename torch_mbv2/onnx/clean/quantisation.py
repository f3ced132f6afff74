"""Quantised graphs as their float equivalent: weights are dequantised, activations not rounded.

Three spellings are read: QuantizeLinear and DequantizeLinear around float operators (QDQ), the
QLinear operators, and weights in integers with activations quantised as they come (dynamic). What a
quantised value means in float is tracked through the graph, so that every operator works on that.

Quantising also saturates, and quantisers drop a ReLU or ReLU6 that this makes superfluous. It is
put back where a convolution, product or sum is quantised to a range that starts at exactly 0. It is
ReLU6 if more such ranges, those of sums aside, end at 6 than beyond: a smaller range is only what
was seen in calibration, and a larger one, or that of a residual sum, is then no activation, but of
values that happened to be positive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from torch_mbv2.errors import ModelError
from torch_mbv2.onnx.clean.constants import drop_identities
from torch_mbv2.onnx.graph import Graph, Node

NOTE = (
    "a quantised model, loaded as its float equivalent: weights are dequantised, activations are "
    "not rounded to integers"
)

_STANDARD = frozenset(
    (
        *("ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"),
        *("QLinearConv", "QLinearMatMul", "QuantizeLinear"),
    )
)
# Operators of ONNX Runtime that work on one quantised tensor, and the float ones they stand for.
_UNARY = {
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearSigmoid": "Sigmoid",
    "QLinearSoftmax": "Softmax",
}
_RUNTIME = frozenset(
    (
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearAdd", "QLinearConcat"),
        *("DequantizeLinear", "QuantizeLinear", "QLinearMul", *_UNARY),
    )
)
# Operators that leave the values of a tensor as they are, so that they may work on integers.
_MOVES = frozenset(
    (
        *("Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split"),
        *("Squeeze", "Transpose", "Unsqueeze"),
    )
)
# What a dropped activation stood behind.
_ACTIVATED = frozenset(
    ("Add", "BatchNormalization", "Conv", "Gemm", "MatMul", "QGemm", "QLinearAdd", "QLinearConv")
)

Meaning = tuple[np.ndarray, np.ndarray]
"""The scale and the zero point of a quantised value."""
# Of these, what has a ReLU behind it in some networks, and a ReLU6 in none.
_SUMS = frozenset(("Add", "QLinearAdd"))


def is_quantised(node: Node) -> bool:
    """Whether `node` computes with, or from or to, quantised values."""
    return node.op in (_RUNTIME if node.domain == "com.microsoft" else _STANDARD)


def dequantise(graph: Graph) -> Graph:
    """The float graph that a quantised one approximates, with `NOTE` among its notes.

    Raises ModelError for a scale or zero point that is no constant.
    """
    if not any(is_quantised(node) for node in graph.nodes):
        return graph
    return _Dequantiser(graph).result()


class _Dequantiser:
    """One pass over the nodes. Float and quantised values keep their names; of a quantised one,
    `meaning` says how it was quantised, and the value is the float that it means."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.tensors = dict(graph.tensors)
        self.meaning: dict[str, Meaning] = {}
        self.sums: set[str] = set()  # outputs of integer products: what follows casts and scales
        self.names = graph.fresh("dequantised")
        self.upper = self.upper_bound()
        for node in graph.nodes:
            self.visit(node)

    def result(self) -> Graph:
        outputs = []
        for value in self.graph.outputs:
            if value.name in self.meaning or value.name in self.sums:
                shape = value.type.tensor_type.shape if value.type.HasField("tensor_type") else None
                value = onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, None)
                if shape is not None:
                    value.type.tensor_type.shape.CopyFrom(shape)
            outputs.append(value)
        return drop_identities(
            replace(
                self.graph,
                nodes=tuple(self.nodes),
                tensors=self.tensors,
                outputs=tuple(outputs),
                notes=(*self.graph.notes, NOTE),
            )
        )

    # ------------------------------------------------------------------ ranges and activations

    def upper_bound(self) -> float | None:
        """That of the activations that quantisation stands for: 6 or None."""
        votes = 0
        for node in self.graph.nodes:
            for value, scale, zero in self.quantisations(node):
                producer = self.graph.producers.get(value)
                if producer is None or producer.op not in _ACTIVATED - _SUMS:
                    continue
                if self.starts_at_zero(scale, zero, node):
                    step, high = self.range_of(scale, zero, node)
                    votes += (abs(high - 6.0) <= step) - (high > 6.0 + step)
        return 6.0 if votes > 0 else None

    def range_of(self, scale: str, zero: str, node: Node) -> tuple[float, float]:
        """The step and the upper end of a range that starts at 0."""
        step = float(np.max(self.constant(scale, node)))
        return step, step * self.levels(zero, node)

    def quantisations(self, node: Node) -> Iterator[tuple[str, str, str]]:
        """The float value (or, where the operator computes it, the output) that a node quantises,
        with the names of scale and zero point."""
        if node.op == "QuantizeLinear":
            yield node.inputs[0], node.input(1), node.input(2)
        elif node.op in ("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"):
            yield node.outputs[0], node.input(6), node.input(7)
        elif node.op == "QGemm" and node.input(7):
            yield node.outputs[0], node.input(7), node.input(8)

    def is_activated(self, node: Node, value: str, scale: str, zero: str) -> bool:
        """Whether an activation was dropped before `value` is quantised so."""
        producer = self.graph.producers.get(value)
        if producer is None or producer.op not in _ACTIVATED:
            return False
        if not self.starts_at_zero(scale, zero, node):
            return False
        if self.upper is None:
            return True
        step, high = self.range_of(scale, zero, node)
        return producer.op not in _SUMS and high <= self.upper + step

    def starts_at_zero(self, scale: str, zero: str, node: Node) -> bool:
        point = self.zero_point(zero, node)
        lowest = np.iinfo(point.dtype).min if np.issubdtype(point.dtype, np.integer) else None
        return point.size == 1 and lowest is not None and int(point.item()) == lowest

    def levels(self, zero: str, node: Node) -> int:
        info = np.iinfo(self.zero_point(zero, node).dtype)
        return int(info.max) - int(info.min)

    # ---------------------------------------------------------------------------------- tensors

    def constant(self, name: str, node: Node) -> np.ndarray:
        if name not in self.tensors:
            raise ModelError(
                f"{self.graph.source}: {node} has a scale or zero point that is no constant, which "
                "is not supported: load the float model that it was made from"
            )
        return self.tensors[name]

    def zero_point(self, name: str, node: Node) -> np.ndarray:
        if name:
            return self.constant(name, node)
        # Of QuantizeLinear since opset 21, whose default 0 stands for uint8.
        kind = node.attributes.get("output_dtype", 0) or onnx.TensorProto.UINT8
        return np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(kind))

    def quantised(
        self, node: Node, array: np.ndarray, scale: str, zero: str, axis: int
    ) -> np.ndarray:
        """A float tensor in integers, as QuantizeLinear makes it."""
        point = self.zero_point(zero, node)
        info = np.iinfo(point.dtype)
        scales = _along(self.constant(scale, node), array, axis)
        whole: np.ndarray = np.rint(array.astype(np.float64) / scales) + _along(point, array, axis)
        return whole.clip(info.min, info.max).astype(point.dtype)

    def floats(self, node: Node, array: np.ndarray, scale: str, zero: str, axis: int) -> np.ndarray:
        """What a tensor of integers means."""
        scales = self.constant(scale, node)
        if node.attributes.get("block_size", 0):
            raise ModelError(
                f"{self.graph.source}: {node} is quantised in blocks, which is not supported: load "
                "the float model that it was made from"
            )
        offset = _along(self.zero_point(zero, node), array, axis) if zero else 0.0
        means: np.ndarray = (array.astype(np.float64) - offset) * _along(scales, array, axis)
        dtype = scales.dtype if np.issubdtype(scales.dtype, np.floating) else np.float32
        return means.astype(dtype)

    def add_tensor(self, array: np.ndarray) -> str:
        name = next(self.names)
        self.tensors[name] = array
        return name

    # ------------------------------------------------------------------------------------ nodes

    def visit(self, node: Node) -> None:
        if not is_quantised(node):
            self.pass_on(node)
        elif node.op == "QuantizeLinear":
            self.quantize_linear(node)
        elif node.op == "DequantizeLinear":
            self.dequantize_linear(node)
        elif node.op == "DynamicQuantizeLinear":
            self.alias(node.inputs[0], node.outputs[0])
            for value, array in zip(node.outputs[1:], (np.float32(1), np.uint8(0)), strict=False):
                self.tensors[value] = np.asarray(array)
            self.meaning[node.outputs[0]] = (np.ones((), np.float32), np.zeros((), np.uint8))
        elif node.op in ("ConvInteger", "MatMulInteger"):
            weight = self.tensors.get(node.inputs[1])
            if weight is None or node.inputs[0] not in self.meaning:
                raise self.unsupported(node)
            scale, point = self.meaning[node.inputs[0]]
            if scale.size != 1 or not np.array_equal(point, self.zero_point(node.input(2), node)):
                raise self.unsupported(node)
            zero = _along(self.zero_point(node.input(3), node), weight, 0 if weight.ndim > 2 else 1)
            # What follows multiplies by the scale of the input, which its float meaning has.
            means = ((weight.astype(np.float64) - zero) / scale.item()).astype(np.float32)
            op = node.op.removesuffix("Integer")
            self.emit(op, (node.inputs[0], self.add_tensor(means)), node, node.attributes)
            self.sums.add(node.outputs[0])
        elif node.op in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            both = node.op == "MatMulIntegerToFloat"
            matrix = self.operand(node, 1, *((3, 5) if both else (2, 3)), axis=1)
            data = self.operand(node, 0, 2, 4, axis=1) if both else node.inputs[0]
            inputs, bias = (data, matrix), node.input(6 if both else 4)
            if not bias:
                self.emit("MatMul", inputs, node, {})
            else:
                product = next(self.names)
                self.nodes.append(Node("MatMul", inputs, (product,), {}, node.name))
                self.emit("Add", (product, bias), node, {})
        else:
            self.operator(node)

    def unsupported(self, node: Node) -> ModelError:
        return ModelError(
            f"{self.graph.source}: {node} works on quantised values in a way that is not "
            "supported: load the float model that it was made from"
        )

    def pass_on(self, node: Node) -> None:
        """A node that is none of quantisation's own."""
        quantised = [value for value in node.inputs if value in self.meaning]
        if node.op == "Cast" and node.inputs[0] in self.sums:
            self.alias(node.inputs[0], node.outputs[0])
            return
        if quantised and node.op not in _MOVES:
            raise self.unsupported(node)
        if quantised:
            meaning = self.meaning[quantised[0]]
            operands = node.inputs if node.op == "Concat" else quantised
            if not all(_alike(meaning, self.meaning.get(value)) for value in operands):
                raise self.unsupported(node)
            self.meaning.update(dict.fromkeys(node.outputs, meaning))
        self.nodes.append(node)

    def alias(self, source: str, value: str) -> None:
        self.nodes.append(Node("Identity", (source,), (value,), {}, value))

    def quantize_linear(self, node: Node) -> None:
        source, scale, zero = node.inputs[0], node.input(1), node.input(2)
        output = node.outputs[0]
        axis = int(node.attributes.get("axis", 1))
        if source in self.tensors:
            self.tensors[output] = self.quantised(node, self.tensors[source], scale, zero, axis)
            return
        self.activate(source, output, self.is_activated(node, source, scale, zero))
        self.meaning[output] = (self.constant(scale, node), self.zero_point(zero, node))

    def activate(self, source: str, output: str, activated: bool) -> None:
        """`output` is `source` behind the activation that was dropped, if there was one."""
        if not activated:
            self.alias(source, output)
        elif self.upper is None:
            self.nodes.append(Node("Relu", (source,), (output,), {}, output))
        elif self.graph.opset < 11:
            bounds = {"min": 0.0, "max": self.upper}
            self.nodes.append(Node("Clip", (source,), (output,), bounds, output))
        else:
            dtype = self.graph.float_dtype
            limits = [self.add_tensor(np.array(limit, dtype)) for limit in (0.0, self.upper)]
            self.nodes.append(Node("Clip", (source, *limits), (output,), {}, output))

    def dequantize_linear(self, node: Node) -> None:
        source, scale, zero = node.inputs[0], node.input(1), node.input(2)
        output = node.outputs[0]
        if source in self.tensors:
            axis = int(node.attributes.get("axis", 1))
            self.tensors[output] = self.floats(node, self.tensors[source], scale, zero, axis)
        elif source in self.meaning:
            self.check_alike(node, source, scale, zero)
            self.alias(source, output)
        else:  # an input of the graph
            self.from_integers(node, source, output, scale, zero)

    def from_integers(self, node: Node, source: str, output: str, scale: str, zero: str) -> None:
        """Compute what an integer input of the graph means."""
        scales = self.constant(scale, node)
        if scales.size != 1:
            raise self.unsupported(node)
        offset = -self.zero_point(zero, node).astype(np.float64) * scales
        kind = onnx.helper.np_dtype_to_tensor_dtype(scales.dtype)
        cast, scaled = next(self.names), next(self.names)
        factor = self.add_tensor(scales.reshape(()))
        shift = self.add_tensor(offset.astype(scales.dtype).reshape(()))
        self.nodes += [
            Node("Cast", (source,), (cast,), {"to": kind}, cast),
            Node("Mul", (cast, factor), (scaled,), {}, scaled),
            Node("Add", (scaled, shift), (output,), {}, output),
        ]

    def check_alike(self, node: Node, source: str, scale: str, zero: str) -> None:
        """Refuse a value that is read with another scale or zero point than it was written with."""
        read = self.constant(scale, node), self.zero_point(zero, node)
        if not _alike(self.meaning[source], read):
            raise self.unsupported(node)

    def operand(self, node: Node, value: int, scale: int, zero: int, axis: int) -> str:
        """The float tensor or value that an input of an operator means; `value`, `scale` and `zero`
        are the inputs' numbers."""
        source = node.input(value)
        if source in self.tensors:
            array = self.tensors[source]
            return self.add_tensor(
                self.floats(node, array, node.input(scale), node.input(zero), axis)
            )
        if source in self.meaning:
            self.check_alike(node, source, node.input(scale), node.input(zero))
            return source
        output = next(self.names)
        self.from_integers(node, source, output, node.input(scale), node.input(zero))
        return output

    def operator(self, node: Node) -> None:
        """A QLinear operator, or QGemm: the float one on what its operands mean."""
        attributes = dict(node.attributes)
        if node.op in ("QLinearConv", "QGemm"):
            transposed = node.op == "QGemm" and attributes.get("transB", 0)
            axis = 0 if node.op == "QLinearConv" or transposed else 1
            inputs = [self.operand(node, 0, 1, 2, 0), self.operand(node, 3, 4, 5, axis)]
            bias = node.input(8 if node.op == "QLinearConv" else 6)
            if bias:
                array = self.constant(bias, node).astype(np.float64)
                scales = self.constant(node.input(1), node).astype(np.float64)
                scales = scales * self.constant(node.input(4), node).astype(np.float64)
                scales = scales * attributes.get("alpha", 1.0)  # of QGemm
                inputs.append(self.add_tensor((array * scales.reshape(-1)).astype(np.float32)))
        elif node.op in ("QLinearMatMul", "QLinearAdd", "QLinearMul"):
            inputs = [self.operand(node, 0, 1, 2, 0), self.operand(node, 3, 4, 5, 1)]
        elif node.op == "QLinearConcat":
            inputs = [self.operand(node, i, i + 1, i + 2, 0) for i in range(2, len(node.inputs), 3)]
        else:
            inputs = [self.operand(node, 0, 1, 2, 0)]
            if attributes.pop("channels_last", 0):
                raise self.unsupported(node)
            # Of the Softmax that it stands for; opset 13 gave `axis` another meaning.
            opset = attributes.pop("opset", self.graph.opset)
            if (opset < 13) != (self.graph.opset < 13):
                raise self.unsupported(node)
        op = _UNARY.get(node.op, node.op.removeprefix("QLinear").removeprefix("Q"))
        quantised = list(self.quantisations(node))
        if not quantised:
            self.emit(op, inputs, node, attributes)
        else:
            ((_, scale, zero),) = quantised
            plain = next(self.names)
            self.nodes.append(Node(op, tuple(inputs), (plain,), attributes, node.name))
            activated = self.is_activated(node, node.outputs[0], scale, zero)
            self.activate(plain, node.outputs[0], activated)
            self.meaning[node.outputs[0]] = (
                self.constant(scale, node),
                self.zero_point(zero, node),
            )
        if node.op in _UNARY or node.op == "QLinearConcat":
            first = 3 if node.op in _UNARY else 0
            self.meaning[node.outputs[0]] = (
                self.constant(node.input(first), node),
                self.zero_point(node.input(first + 1), node),
            )

    def emit(
        self, op: str, inputs: Iterable[str], node: Node, attributes: Mapping[str, Any]
    ) -> None:
        self.nodes.append(Node(op, tuple(inputs), node.outputs, dict(attributes), node.name))


def _alike(first: Meaning, second: Meaning | None) -> bool:
    """Whether two values were quantised with the same scale and zero point."""
    return second is not None and all(map(np.array_equal, first, second))


def _along(vector: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
    """A scale or zero point, one in all or one a channel, ready to broadcast against a tensor."""
    vector = vector.astype(np.float64)
    if vector.size == 1:
        return vector.reshape(())
    shape = [1] * array.ndim
    shape[axis] = vector.size
    return vector.reshape(shape)
