"""Reading an ONNX model into a `Graph`: immutable, cheap to rewrite since copies share tensors."""

from __future__ import annotations

import graphlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.inliner
import torch
from google.protobuf.message import DecodeError

from torch_mbv2.errors import ModelError

OLDEST_OPSET = 7
NEWEST_OPSET = onnx.defs.onnx_opset_version()
REEXPORT = "export it again with torch.onnx.export(model.eval(), args, 'model.onnx')"

Shape = tuple[int | None, ...]

_FLOATS = ("float32", "float16", "bfloat16", "float64")
# protobuf's limit, beyond which a file needs external data.
_LARGEST_FILE = 2**31
# Nodes that inlined functions may come to; a few nested functions could ask for any number.
_MOST_NODES = 100_000
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
        return f"node {quoted(self.name or ''.join(self.outputs[:1]))} ({quoted(self.op)[1:-1]})"


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order, the constant tensors that they read, inputs and outputs."""

    nodes: tuple[Node, ...]
    tensors: Mapping[str, np.ndarray]
    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    opsets: Mapping[str, int]
    source: str = "the ONNX model"  # what messages call it
    notes: tuple[str, ...] = ()  # what the user must know of how it was read

    @property
    def opset(self) -> int:
        return self.opsets[""]

    @cached_property
    def float_dtype(self) -> np.dtype:
        """That of most weights; float32 where there are none."""
        sizes: dict[np.dtype, int] = {}
        for array in self.tensors.values():
            if array.dtype.name in _FLOATS:
                sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
        return max(sizes, key=sizes.__getitem__, default=np.dtype(np.float32))

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

    def is_read(self, value: str) -> bool:
        """Whether a node reads `value`, or it is an output; "" is no value."""
        return bool(value) and (value in self.users or value in self.output_names)

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

    def check_types(self) -> None:
        """Raise ModelError for a node that is given, or said to compute, what it cannot."""
        try:
            onnx.shape_inference.infer_shapes(self.to_model(large_tensors=False), check_type=True)
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.source}: does not fit together: {first_line(error)}"
            ) from error


def declared_shape(value: onnx.ValueInfoProto) -> Shape | None:
    """The declared shape of an input or output, None for each size that is not a fixed number."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim
    )


def declared_dtype(value: onnx.ValueInfoProto) -> torch.dtype | None:
    """The dtype of an input, float32 where none is declared; None if PyTorch has no such type."""
    kind = value.type.tensor_type.elem_type or onnx.TensorProto.FLOAT
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    if dtype.name == "bfloat16":  # an extension type, unknown to PyTorch
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        return None


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
    opset = opsets[""]
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{where}: opset {opset} is too old, at least {OLDEST_OPSET} is needed; {REEXPORT}"
        )
    if opset > NEWEST_OPSET:
        raise ModelError(
            f"{where}: opset {opset} is newer than the installed package onnx {onnx.__version__} "
            f"knows ({NEWEST_OPSET}): pip install -U onnx, or {REEXPORT}"
        )
    if model.functions:
        _check_functions(model, where)
        model = onnx.inliner.inline_local_functions(model)
    if model.graph.sparse_initializer:
        raise ModelError(f"{where}: the model has sparse weights, which are not supported")
    graph = Graph(
        nodes=tuple(_from_proto(node, opset, where) for node in model.graph.node),
        tensors={t.name: _to_array(t, where) for t in model.graph.initializer},
        inputs=tuple(model.graph.input),
        outputs=tuple(model.graph.output),
        opsets=opsets,
        source=where,
    )
    _check(graph)
    graph = _sort(graph)
    return _upgrade(graph) if opset < 9 else graph


# ----------------------------------------------------------------------------------- the file


def _read_proto(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
) -> tuple[onnx.ModelProto, str]:
    """A ModelProto with all its weights inside, and what to call it in messages."""
    where, folder = "the ONNX model", None
    if isinstance(source, onnx.ModelProto):
        model = source
    else:
        if isinstance(source, bytes):
            data = source
        else:
            path = Path(source)
            where, folder, data = str(path), path.parent, _read_file(path)
        try:
            model = onnx.ModelProto.FromString(data)
        except DecodeError:
            raise ModelError(
                f"{where}: not an ONNX model, or a damaged one ({len(data)} bytes)"
            ) from None
    tensors = [t for t in _tensors(model) if onnx.external_data_helper.uses_external_data(t)]
    if tensors:
        if folder is None:
            raise ModelError("the ONNX model's weights are in another file: pass the path instead")
        _load_external(tensors, folder, where)
    return model, where


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"{path}: not a file")
        if size >= _LARGEST_FILE:
            raise ModelError(
                f"{path}: an ONNX file cannot have {size} bytes, only 2 GiB; export the weights "
                "as external data"
            )
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # such as a null character
        raise ModelError(f"{str(path)!r}: {error}") from error


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that the graph holds: weights, and the values of Constant nodes."""
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _load_external(tensors: Sequence[onnx.TensorProto], folder: Path, where: str) -> None:
    """Read the weights that lie in files of `folder`; nothing outside it, and no more than the
    tensors need."""
    sizes: dict[str, int] = {}
    total = 0
    try:
        for tensor in tensors:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location, needed = entries.get("location", ""), _byte_count(tensor)
            size = sizes.setdefault(location, (folder / location).stat().st_size)
            offset = int(entries.get("offset") or 0)
            if int(entries.get("length") or needed) != needed:
                raise ValueError(f"the length of {quoted(tensor.name)} does not fit its shape")
            if offset < 0 or offset + needed > size:
                raise ValueError(f"{quoted(location)} ends before {quoted(tensor.name)}")
            total += needed
            # Without it everything up to the end of the file would be read.
            if "length" not in entries:
                tensor.external_data.add(key="length", value=str(needed))
        if total > 2 * sum(sizes.values()):
            raise ValueError("many of them lie in the same place")
        for tensor in tensors:
            if _byte_count(tensor):  # else a length of 0, which means the whole file
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        names = sorted({e.value for t in tensors for e in t.external_data if e.key == "location"})
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(
            f"{where}: its weights, in {', '.join(map(_short, names[:3]))} beside it, cannot be "
            f"read: {first_line(why)}"
        ) from error


def _byte_count(tensor: onnx.TensorProto) -> int:
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError(f"{quoted(tensor.name)} has a negative size")
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    bits = 4 if name.endswith("INT4") or name == "FLOAT4E2M1" else 2 if name.endswith("INT2") else 0
    count = math.prod(tensor.dims)
    if bits:
        return -(-count * bits // 8)
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _to_array(tensor: onnx.TensorProto, where: str) -> np.ndarray:
    try:
        if any(dim < 0 for dim in tensor.dims):
            raise ValueError(f"it has the shape {list(tensor.dims)}")
        if onnx.external_data_helper.uses_external_data(tensor):
            raise ValueError("its values are in another file")
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{where}: damaged: the tensor {quoted(tensor.name)}: {first_line(error)}"
        ) from error


# ---------------------------------------------------------------------------------- the graph


def _check_functions(model: onnx.ModelProto, where: str) -> None:
    """Raise ModelError for functions that cannot be inlined: that call each other in circles, or
    come to too many nodes."""
    calls = {(_domain(f.domain), f.name, f.overload): [*_calls(f.node)] for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    try:
        for key in graphlib.TopologicalSorter(calls).static_order():
            sizes[key] = sum(sizes[call] for call in calls.get(key, ())) if key in calls else 1
    except graphlib.CycleError:
        raise ModelError(f"{where}: its functions call each other in circles") from None
    total = sum(sizes.get(call, 1) for call in _calls(model.graph.node))
    if total > _MOST_NODES:
        raise ModelError(f"{where}: its functions come to {total} nodes, which is too many")


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str, str]]:
    """What the nodes call, and those in their graphs: domain, name and overload."""
    for node in nodes:
        yield _domain(node.domain), node.op_type, node.overload
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _calls(graph.node)


def _check(graph: Graph) -> None:
    """Raise ModelError for a graph that no later step can make sense of."""
    where = graph.source
    defined = {"", *graph.tensors, *(value.name for value in graph.inputs)}
    for node in graph.nodes:
        strange = _strange_attribute(node, graph.opset)
        if strange is not None:
            raise ModelError(f"{where}: {node} has {strange}; is the file damaged?")
        if not any(node.outputs):
            raise ModelError(f"{where}: {node} computes nothing; is the file damaged?")
        for value in node.outputs:
            if value and value in defined:
                raise ModelError(f"{where}: {node} computes {quoted(value)}, which exists already")
            defined.add(value)
        _check_arity(node, graph)
    for node in graph.nodes:
        missing = [value for value in node.inputs if value not in defined]
        if missing:
            raise ModelError(f"{where}: {node} reads {quoted(missing[0])}, which nothing computes")
    missing = sorted(graph.output_names - defined)
    if missing:
        raise ModelError(f"{where}: nothing computes the output {quoted(missing[0])}")
    if not graph.outputs:
        raise ModelError(f"{where}: the model has no output")
    for image in graph.inputs:
        shape = declared_shape(image) or ()
        if any(size is not None and size < 0 for size in shape):
            raise ModelError(
                f"{where}: the input {quoted(image.name)} has a negative size: {list(shape)}"
            )
    arrays = [*graph.tensors.values()]
    for node in graph.nodes:
        arrays += [value for value in node.attributes.values() if isinstance(value, np.ndarray)]
    layers = any(node.op in ("Conv", "Gemm") and not node.domain for node in graph.nodes)
    if layers and arrays and not any(array.dtype.name in _FLOATS for array in arrays):
        raise ModelError(f"{where}: not a float model; load the one that it was made from")


def _strange_attribute(node: Node, opset: int) -> str | None:
    """What a standard operator's attribute is that it cannot have."""
    try:
        known = onnx.defs.get_schema(node.op, opset, node.domain).attributes
    except onnx.defs.SchemaError:
        return None  # not a standard operator
    for name, value in node.attributes.items():
        if name not in known:
            return f"an attribute {quoted(name)}, which opset {opset} does not know"
        wanted = cast(Enum, known[name].type).name  # an enum, which onnx's stubs leave out
        kind = _ATTRIBUTE_TYPES.get(wanted.removesuffix("S"), object)
        several = isinstance(value, list)
        fits = all(isinstance(item, kind) for item in (value if several else [value]))
        if several != wanted.endswith("S") or not fits:
            return f"an attribute {quoted(name)} that must be {wanted.lower()}, got {_short(value)}"
    missing = [n for n, a in known.items() if a.required and n not in node.attributes]
    return f"no attribute {missing[0]!r}" if missing else None


_ATTRIBUTE_TYPES: dict[str, type | tuple[type, ...]] = {
    "INT": int,
    "FLOAT": float,
    "STRING": (str, bytes),
    "TENSOR": np.ndarray,
}


def _check_arity(node: Node, graph: Graph) -> None:
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, node.domain)
    except onnx.defs.SchemaError:
        return
    given = len(node.inputs)
    required = node.inputs[: schema.min_input]
    if not schema.min_input <= given <= schema.max_input or not all(required):
        raise ModelError(
            f"{graph.source}: {node} has {sum(map(bool, node.inputs))} inputs, which is not what "
            "its operator takes; is the file damaged?"
        )


def _sort(graph: Graph) -> Graph:
    """The graph with every node behind those whose values it reads."""
    defined = {"", *graph.tensors, *(value.name for value in graph.inputs)}
    for node in graph.nodes:
        if not defined.issuperset(node.inputs):
            break
        defined.update(node.outputs)
    else:
        return graph
    before = {
        node: [graph.producers[v] for v in node.inputs if v in graph.producers]
        for node in graph.nodes
    }
    try:
        return replace(graph, nodes=tuple(graphlib.TopologicalSorter(before).static_order()))
    except graphlib.CycleError as error:
        first = error.args[1][0]
        raise ModelError(
            f"{graph.source}: {first} reads what is computed from its own output; is the file "
            "damaged?"
        ) from None


def _upgrade(graph: Graph) -> Graph:
    """A graph of opset 7 or 8 as one of opset 9, which differ in little that is met in images."""
    changes = {}
    for node in graph.nodes:
        if node.op == "BatchNormalization" and not node.domain:
            attributes = dict(node.attributes)
            if not attributes.pop("spatial", 1):
                raise ModelError(
                    f"{graph.source}: {node} normalises every pixel by itself (spatial=0), which "
                    "is not supported"
                )
            changes[node] = (replace(node, attributes=attributes),)
        elif node.op in ("Scan", "Upsample") and not node.domain:
            raise ModelError(f"{graph.source}: {node}, opset {graph.opset}, is too old; {REEXPORT}")
    return replace(graph.rewrite(changes), opsets={**graph.opsets, "": 9})


def _from_proto(proto: onnx.NodeProto, opset: int, where: str) -> Node:
    words = (proto.op_type, proto.domain, proto.name, *proto.input, *proto.output)
    if not all(isinstance(word, str) for word in (*words, *(a.name for a in proto.attribute))):
        raise ModelError(f"{where}: damaged: a name in it is no text")  # protobuf gives bytes
    attributes = {}
    for attribute in proto.attribute:
        node = Node(proto.op_type, tuple(proto.input), tuple(proto.output), {}, proto.name)
        try:
            value = onnx.helper.get_attribute_value(attribute)
        except ValueError as error:
            raise ModelError(
                f"{where}: damaged: the attribute {quoted(attribute.name)} of {node}: "
                f"{first_line(error)}"
            ) from error
        if isinstance(value, onnx.TensorProto):
            value = _to_array(value, where)
        elif isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif attribute.type in (
            onnx.AttributeProto.GRAPH,
            onnx.AttributeProto.GRAPHS,
            onnx.AttributeProto.SPARSE_TENSOR,
        ):
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type).lower()
            raise ModelError(
                f"{where}: node {quoted(node.name or ''.join(node.outputs[:1]))} "
                f"({_short(node.op)}, opset {opset}) has a {kind} attribute, which cannot be "
                "converted; export the model without control flow"
            )
        elif value is None:
            raise ModelError(
                f"{where}: damaged: the attribute {quoted(attribute.name)} of {node} has no value"
            )
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
    inputs = list(node.inputs)
    while inputs and not inputs[-1]:
        inputs.pop()  # means the same, and not every reader knows it
    proto = onnx.helper.make_node(node.op, inputs, node.outputs, name=node.name, domain=node.domain)
    for name, value in node.attributes.items():
        if isinstance(value, np.ndarray):
            value = onnx.numpy_helper.from_array(value)
        empty = isinstance(value, Sequence) and not isinstance(value, str) and not len(value)
        kind = onnx.AttributeProto.INTS if empty else None
        proto.attribute.append(onnx.helper.make_attribute(name, value, attr_type=kind))
    return proto


def first_line(error: object) -> str:
    """The first line of an error's message, for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return _short(lines[0].rstrip("."), 200) if lines else type(error).__name__


def quoted(text: str) -> str:
    """A name out of a file, in quotes and no longer than a sentence bears."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _short(value: object, length: int = 60) -> str:
    """What a file holds, on one line, without its control characters."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= length else f"{text[: length - 3]}..."
