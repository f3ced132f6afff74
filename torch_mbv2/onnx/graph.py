"""Reading an ONNX model into a `Graph`: immutable, cheap to rewrite since copies share tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from torch_mbv2.errors import ModelError

OLDEST_OPSET = 7
REEXPORT = "export it again with torch.onnx.export(model.eval(), args, 'model.onnx')"

Shape = tuple[int | None, ...]

_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
_QUANTISED = {
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
}
# Larger tensors cannot be shapes or axes; shape inference does without their values.
_SMALL = 1024


@dataclass(frozen=True, eq=False)
class Node:
    """One operator call; compared and hashed by identity."""

    op: str
    inputs: tuple[str, ...]  # "" where an optional input is left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""

    def ints(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(i) for i in self.attributes.get(name, default))

    def input(self, index: int) -> str:
        return self.inputs[index] if index < len(self.inputs) else ""

    def __str__(self) -> str:
        return f"node {self.name or ''.join(self.outputs[:1])!r} ({self.op})"


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order, the constant tensors that they read, inputs and outputs."""

    nodes: tuple[Node, ...]
    tensors: Mapping[str, np.ndarray]
    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    opsets: Mapping[str, int]
    source: str = "the ONNX model"  # what messages call it

    @property
    def opset(self) -> int:
        return self.opsets[""]

    @cached_property
    def output_names(self) -> frozenset[str]:
        return frozenset(value.name for value in self.outputs)

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that computes each value."""
        return {value: node for node in self.nodes for value in node.outputs if value}

    @cached_property
    def users(self) -> Mapping[str, Sequence[Node]]:
        """The nodes that read each value, once for each input that does; a value nobody reads is
        not in it."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                users.setdefault(value, []).append(node)
        return users

    def sole_user(self, value: str) -> Node | None:
        """The only reader of `value`; None if there are more or fewer, or it is a graph output."""
        users = self.users.get(value, ())
        return users[0] if len(users) == 1 and value not in self.output_names else None

    def rewrite(
        self,
        changes: Mapping[Node, Iterable[Node]],
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> Graph:
        """A graph in which each node that `changes` names is replaced, and `tensors` are added."""
        if not changes and not tensors:
            return self
        nodes: list[Node] = []
        for node in self.nodes:
            nodes.extend(changes.get(node, (node,)))
        return replace(self, nodes=tuple(nodes), tensors={**self.tensors, **(tensors or {})})

    def fresh(self, stem: str) -> Iterator[str]:
        """Names that nothing in the graph has yet."""
        taken = {value for node in self.nodes for value in (*node.inputs, *node.outputs)}
        taken.update(self.tensors, (value.name for value in self.inputs))
        count = 0
        while True:
            name = f"{stem}_{count}"
            count += 1
            if name not in taken:
                yield name

    def to_model(self, *, large_tensors: bool = True) -> onnx.ModelProto:
        """The graph as a ModelProto; without `large_tensors`, these are inputs of known shape."""
        initializers, inputs = [], list(self.inputs)
        for name, array in self.tensors.items():
            if large_tensors or array.size <= _SMALL:
                initializers.append(onnx.numpy_helper.from_array(array, name))
            else:
                kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                inputs.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
        graph = onnx.helper.make_graph(
            [_to_proto(node) for node in self.nodes],
            "graph",
            inputs,
            list(self.outputs),
            initializers,
        )
        opsets = [onnx.helper.make_opsetid(domain, v) for domain, v in self.opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def shapes(self) -> dict[str, Shape]:
        """The shape of every value that shape inference knows; None is an unknown size."""
        known: dict[str, Shape] = {name: array.shape for name, array in self.tensors.items()}
        try:
            # Without data_prop: on sizes out of a damaged file it runs on for ever.
            model = onnx.shape_inference.infer_shapes(self.to_model(large_tensors=False))
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            return known
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
            shape = declared_shape(value)
            if shape is not None:
                known.setdefault(value.name, shape)
        return known


def declared_shape(value: onnx.ValueInfoProto) -> Shape | None:
    """The declared shape of an input or output, None for each size that is not a fixed number."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim
    )


def read(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> Graph:
    """The graph of an ONNX file, of its bytes, or of a ModelProto (which is not changed).

    Raises ModelError, in one sentence with the way out, for whatever cannot be a usable model.
    """
    model, where = _read_proto(source)
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{where}: not an ONNX model, or an empty one: it has no graph")
    opsets = {_domain(opset.domain): opset.version for opset in model.opset_import}
    if "" not in opsets:
        raise ModelError(f"{where}: the model names no ONNX opset; is the file complete?")
    if opsets[""] < OLDEST_OPSET:
        raise ModelError(
            f"{where}: opset {opsets['']} is too old, at least {OLDEST_OPSET} is needed; {REEXPORT}"
        )
    if opsets[""] < 9:
        model = _upgrade(model, 9, where)
        opsets[""] = 9
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    try:
        graph = Graph(
            nodes=tuple(_from_proto(node, opsets[""], where) for node in model.graph.node),
            tensors={t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer},
            inputs=tuple(model.graph.input),
            outputs=tuple(model.graph.output),
            opsets=opsets,
            source=where,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{where}: damaged: {first_line(error)}") from error
    _check(graph, model, where)
    return graph


def _read_proto(source: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[Any, str]:
    """A ModelProto with all its weights inside, and what to call it in messages."""
    if isinstance(source, onnx.ModelProto):
        if any(onnx.external_data_helper.uses_external_data(t) for t in source.graph.initializer):
            raise ModelError("the ONNX model's weights are in another file: pass the path instead")
        return source, "the ONNX model"
    if isinstance(source, bytes):
        where, data = "the ONNX model", source
        folder = None
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        where, folder = str(path), path.parent
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{where}: {error.strerror or error}") from error
    else:
        raise TypeError(f"load_onnx takes a path, bytes or a ModelProto, got {type(source)}")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(
            f"{where}: not an ONNX model, or a damaged one ({len(data)} bytes)"
        ) from None
    external = [
        t for t in model.graph.initializer if onnx.external_data_helper.uses_external_data(t)
    ]
    if external and folder is None:
        raise ModelError("the ONNX model's weights are in another file: pass the path instead")
    if external:
        try:
            onnx.external_data_helper.load_external_data_for_model(model, str(folder))
        except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
            names = {e.value for t in external for e in t.external_data if e.key == "location"}
            raise ModelError(
                f"{where}: its weights, in {', '.join(sorted(names))} beside it, cannot be read: "
                f"{first_line(error)}"
            ) from error
    return model, where


def _upgrade(model: onnx.ModelProto, opset: int, where: str) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:
        raise ModelError(
            f"{where}: cannot be converted to opset {opset}: {first_line(error)}; {REEXPORT}"
        ) from error


def _check(graph: Graph, model: onnx.ModelProto, where: str) -> None:
    """Raise ModelError for a graph that no later step can make sense of."""
    defined = {"", *graph.tensors, *(value.name for value in graph.inputs)}
    for node in graph.nodes:
        strange = _unknown_attribute(node, graph.opset)
        if strange is not None:
            raise ModelError(
                f"{where}: {node} has an attribute {strange!r}, which opset {graph.opset} does not "
                "know; is the file damaged?"
            )
        missing = [value for value in node.inputs if value not in defined]
        if missing:
            raise ModelError(f"{where}: {node} reads {missing[0]!r}, which nothing computes")
        defined.update(node.outputs)
        if node.op in _QUANTISED:
            raise ModelError(
                f"{where}: {node} makes this a quantised model, which is not supported: "
                "load the float model that it was made from"
            )
        if node.domain == "com.microsoft":
            raise ModelError(
                f"{where}: {node} comes from ONNX Runtime's optimiser: load the file before it"
            )
    missing = sorted(graph.output_names - defined)
    if missing:
        raise ModelError(f"{where}: nothing computes the output {missing[0]!r}")
    if not graph.outputs:
        raise ModelError(f"{where}: the model has no output")
    if not graph.tensors and not any(node.op == "Constant" for node in graph.nodes):
        return
    kinds = {t.data_type for t in model.graph.initializer}
    kinds.update(
        a.t.data_type for n in model.graph.node if n.op_type == "Constant" for a in n.attribute
    )
    if not kinds.intersection(_FLOATS) and any(node.op in ("Conv", "Gemm") for node in graph.nodes):
        raise ModelError(f"{where}: not a float model; load the one that it was made from")


def _unknown_attribute(node: Node, opset: int) -> str | None:
    """An attribute that a standard operator does not have."""
    try:
        known = onnx.defs.get_schema(node.op, opset, node.domain).attributes
    except onnx.defs.SchemaError:
        return None  # not a standard operator
    return next((name for name in node.attributes if name not in known), None)


def _from_proto(proto: onnx.NodeProto, opset: int, where: str) -> Node:
    words = (proto.op_type, proto.domain, proto.name, *proto.input, *proto.output)
    if not all(isinstance(word, str) for word in (*words, *(a.name for a in proto.attribute))):
        raise ValueError(f"a name in it is no text: {words}")  # protobuf gives such as bytes
    attributes = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value)
        elif isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif attribute.type in (
            onnx.AttributeProto.GRAPH,
            onnx.AttributeProto.GRAPHS,
            onnx.AttributeProto.SPARSE_TENSOR,
        ):
            name = proto.name or (proto.output[0] if proto.output else "")
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type).lower()
            raise ModelError(
                f"{where}: node {name!r} ({proto.op_type}, opset {opset}) has a {kind} attribute, "
                "which cannot be converted; export the model without control flow"
            )
        elif value is None:
            raise ValueError(f"attribute {attribute.name!r} of node {proto.name!r} has no value")
        attributes[attribute.name] = value
    return Node(
        proto.op_type,
        tuple(proto.input),
        tuple(proto.output),
        attributes,
        proto.name,
        _domain(proto.domain),
    )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _to_proto(node: Node) -> onnx.NodeProto:
    proto = onnx.helper.make_node(
        node.op, node.inputs, node.outputs, name=node.name, domain=node.domain
    )
    for name, value in node.attributes.items():
        if isinstance(value, np.ndarray):
            value = onnx.numpy_helper.from_array(value)
        empty = isinstance(value, Sequence) and not isinstance(value, str) and not len(value)
        kind = onnx.AttributeProto.INTS if empty else None
        proto.attribute.append(onnx.helper.make_attribute(name, value, attr_type=kind))
    return proto


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
