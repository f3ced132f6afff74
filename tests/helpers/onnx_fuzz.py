"""Mutated ONNX files, and what `load_onnx` makes of each.

A case is a seed: it chooses a small model, one or a few mutations, and whether the loader gets a
path, bytes or a ModelProto. A case fails unless the loader raises `torch_mbv2.errors.Error` with
one short line, or returns a module that runs on an image of the shape that the file declares.

    python tests/helpers/onnx_fuzz.py 17       this case, in this process: mutations and traceback
    python tests/helpers/onnx_fuzz.py 0 5000   cases 0 to 4999, in a worker: the failures by kind

Either way the process gets little memory, so that a case that asks for gigabytes fails.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import functools
import inspect
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import TensorProto, helper, numpy_helper
from onnx_helpers import export, randomise
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from torch import Tensor, nn

from torch_mbv2 import MobileNetV2, load_onnx
from torch_mbv2.errors import Error
from torch_mbv2.mobilenet import Architecture, Block

SIZE = 32
TIMEOUT = 20.0
"""Seconds after which a case hangs; a usual one takes 0.02."""
MEMORY = 2**29
"""Bytes of address space that a worker may take beyond what loading the seeds took."""
LIFETIME = 1000
"""Cases that a worker runs before a fresh one takes over: what torch.fx caches adds up."""
_LARGEST_REQUEST = 2**36
"""Bytes. A module that asks for more memory than `MEMORY` at once but less than this, when it runs,
does what its file says, and some machine could do it."""
LONGEST_MESSAGE = 600
_RAN, _TOO_LARGE = "ran", "loaded, but too large to run"
_LARGEST_INPUT = 2**18  # elements; larger images are not run
_OUTSIDE = "outside.bin"  # a file beside the model's folder, which no loader may open


# ----------------------------------------------------------------------------------------- seeds


@dataclass(frozen=True)
class Seed:
    """A model that loads and runs: the file's bytes, and its external data by the files' names."""

    data: bytes
    files: dict[str, bytes] = field(default_factory=dict)


class _Residual(nn.Module):
    """No MobileNetV2, so onnx2torch converts it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Sigmoid()
        )
        self.pool = nn.MaxPool2d(3, 2)
        self.head = nn.Linear(8 * 7 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.pool(x + self.body(x))
        return self.head(x.flatten(1)).softmax(1)


class _ChannelsLast(nn.Module):
    """Takes 8-bit pixels in NHWC, and goes back to that layout in between."""

    def __init__(self, model: MobileNetV2) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = (x.float() / 127.5 - 1).permute(0, 3, 1, 2)
        x = self.model.features[0](x).permute(0, 2, 3, 1).clamp(0, 4).permute(0, 3, 1, 2)
        return self.model.classifier(self.model.features[1:](x).mean((2, 3)))


@functools.cache
def seed_models() -> dict[str, Seed]:
    """The models that are mutated, by name."""
    image = torch.zeros(1, 3, SIZE, SIZE)
    pixels = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
    blocks = (Block(None, 8), Block(16, 12, stride=2), Block(24, 12, residual=True))
    mobilenet = randomise(MobileNetV2.from_architecture(Architecture(8, blocks, 16, 5)))
    keep = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    static = {"dynamic_axes": {}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        residual = _Residual().eval()
    protos = {
        "opset 9": export(mobilenet, image, opset_version=9),
        "opset 13": export(mobilenet, image, opset_version=13),
        "norms": export(mobilenet, image, opset_version=13, **keep),
        "residual": export(residual, image, opset_version=13, **static),
        "residual 18": export(residual, image, opset_version=18, **static, **keep),
        "channels last": export(_ChannelsLast(mobilenet), pixels, opset_version=13),
        "helper": _helper_model(),
    }
    for form in QuantFormat:
        protos[form.name] = _quantised(protos["opset 13"], form)
    seeds = {name: Seed(proto.SerializeToString()) for name, proto in protos.items()}
    return seeds | {"external": _with_external_data(protos["opset 13"])}


def _helper_model() -> onnx.ModelProto:
    """The spellings that exporters leave out: Constant, Identity, Pad, Reshape, Shape, Gather."""
    rng = np.random.default_rng(0)

    def constant(name: str, array: Any, kind: type = np.int64) -> onnx.NodeProto:
        return helper.make_node(
            "Constant", [], [name], value=numpy_helper.from_array(np.asarray(array, kind), name)
        )

    nodes = [
        constant("pads", [0, 0, 1, 1, 0, 0, 1, 1]),
        constant("zero", 0, np.float32),
        helper.make_node("Pad", ["image", "pads", "zero"], ["padded"], mode="constant"),
        constant("weight", rng.normal(0, 0.2, (4, 3, 3, 3)), np.float32),
        helper.make_node("Identity", ["weight"], ["same"]),
        helper.make_node("Conv", ["padded", "same", "bias"], ["conv"], strides=[2, 2]),
        constant("six", 6, np.float32),
        helper.make_node("Clip", ["conv", "zero", "six"], ["act"]),
        helper.make_node("GlobalAveragePool", ["act"], ["pooled"]),
        helper.make_node("Shape", ["pooled"], ["shape"]),
        constant("first", 0),
        helper.make_node("Gather", ["shape", "first"], ["batch"], axis=0),
        constant("axes", [0]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["rows"]),
        constant("rest", [-1]),
        helper.make_node("Concat", ["rows", "rest"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["pooled", "sizes"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "offset"], ["logits"], transB=1),
    ]
    tensors = {"bias": (4,), "matrix": (5, 4), "offset": (5,)}
    graph = helper.make_graph(
        nodes,
        "helper",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, SIZE, SIZE))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", 5))],
        [
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in tensors.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _quantised(proto: onnx.ModelProto, form: QuantFormat) -> onnx.ModelProto:
    class Reader(CalibrationDataReader):
        images = iter([{"image": np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE))}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return image and {name: array.astype(np.float32) for name, array in image.items()}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quantised.onnx")
        quantize_static(copy.deepcopy(proto), path, Reader(), quant_format=form)
        return onnx.load(path)


def _with_external_data(proto: onnx.ModelProto) -> Seed:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save_model(
            copy.deepcopy(proto),
            path,
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=0,
        )
        return Seed(path.read_bytes(), {"weights.bin": Path(folder, "weights.bin").read_bytes()})


# ------------------------------------------------------------------------------------- mutations

Mutation = Callable[[random.Random, onnx.ModelProto], str | None]
"""Changes the model and says how, or returns None where it has nothing to change."""
MUTATIONS: list[Mutation] = []

_SIZES = (-1, 0, 1, 2, 3, 7, 32, 33, 1000, 10**6, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-45, 3.4e38)
_STRINGS = (
    "",
    " ",
    "\x00",
    "\x1b[2J\r\n",
    "two\nlines",
    "\u2028\u202e",
    "x" * 100_000,
    "../" * 20 + "etc/passwd",
    "forward",
    "__class__",
    "0",
    "image",
    "logits",
    "'); __import__('os').system('true') #",
    "x = __import__('os').system('true')",
    "SAME_UPPER",
)
_FORBIDDEN = (_OUTSIDE, "link.bin", "/dev/zero", "/dev/stdin", "/proc/self/mem")
_LOCATIONS = (f"../{_OUTSIDE}", *_FORBIDDEN[1:], "weights.bin", "pipe", "model.onnx", ".", "")
_LOCATIONS += ("no\nsuch", "\x00", "x" * 5000)
_OPERATORS = sorted({"Nothing", *(schema.name for schema in onnx.defs.get_all_schemas())})


def _mutation(function: Mutation) -> Mutation:
    MUTATIONS.append(function)
    return function


def _messages(message: Message, path: str = "model") -> Iterator[tuple[str, Message]]:
    """Every message inside a message, itself first, and where it is."""
    yield path, message
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        if descriptor.is_repeated:
            for index, item in enumerate(value):
                yield from _messages(item, f"{path}.{descriptor.name}[{index}]")
        else:
            yield from _messages(value, f"{path}.{descriptor.name}")


def _fields(
    model: Message, *, repeated: bool | None = None, kinds: Iterable[int] = ()
) -> list[tuple[str, Message, FieldDescriptor]]:
    """The fields that are set, anywhere in the model, with their paths and owners."""
    return [
        (f"{path}.{descriptor.name}", message, descriptor)
        for path, message in _messages(model)
        for descriptor, _ in message.ListFields()
        if (repeated is None or descriptor.is_repeated == repeated)
        and (not kinds or descriptor.cpp_type in kinds)
    ]


@_mutation
def drop_field(rng: random.Random, model: onnx.ModelProto) -> str | None:
    path, owner, descriptor = rng.choice(_fields(model))
    owner.ClearField(descriptor.name)
    return path


@_mutation
def change_list(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """Drops, duplicates or moves an item of a repeated field."""
    found = _fields(model, repeated=True)
    if not found:
        return None
    path, owner, descriptor = rng.choice(found)
    items = list(getattr(owner, descriptor.name))
    index = rng.randrange(len(items))
    how = rng.choice(("drop", "duplicate", "move", "shuffle", "repeat 50 times"))
    item = items[index]
    if how == "shuffle":
        rng.shuffle(items)
    elif how == "duplicate":
        items.insert(rng.randrange(len(items) + 1), item)
    elif how == "repeat 50 times":
        items += [item] * 50
    else:
        del items[index]
        if how == "move":
            items.insert(rng.randrange(len(items) + 1), item)
    items = [copy.deepcopy(item) for item in items]
    owner.ClearField(descriptor.name)
    getattr(owner, descriptor.name).extend(items)
    return f"{how} {path}[{index}]"


@_mutation
def change_number(rng: random.Random, model: onnx.ModelProto) -> str | None:
    integers = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    enums, floats = (FieldDescriptor.CPPTYPE_ENUM,), (FieldDescriptor.CPPTYPE_FLOAT,)
    found = _fields(model, kinds=(*integers, *enums, *floats))
    if not found:
        return None
    path, owner, descriptor = rng.choice(found)
    value: Any
    if descriptor.cpp_type in floats:
        value = rng.choice(_FLOATS)
    elif descriptor.cpp_type in enums:
        value = rng.choice([entry.number for entry in descriptor.enum_type.values])
    elif descriptor.name in ("data_type", "elem_type"):
        value = rng.randrange(-1, 30)
    else:
        value = rng.choice(_SIZES)
        if descriptor.cpp_type == FieldDescriptor.CPPTYPE_INT32:
            value = max(-(2**31), min(value, 2**31 - 1))
    if descriptor.is_repeated:
        values = getattr(owner, descriptor.name)
        index = rng.randrange(len(values))
        values[index] = value
        return f"{path}[{index}] = {value}"
    setattr(owner, descriptor.name, value)
    return f"{path} = {value}"


@_mutation
def change_string(rng: random.Random, model: onnx.ModelProto) -> str | None:
    found = [f for f in _fields(model) if f[2].type == FieldDescriptor.TYPE_STRING]
    if not found:
        return None
    path, owner, descriptor = rng.choice(found)
    value = rng.choice(_STRINGS)
    if descriptor.is_repeated:
        values = getattr(owner, descriptor.name)
        values[rng.randrange(len(values))] = value
    else:
        setattr(owner, descriptor.name, value)
    return f"{path} = {value[:40]!a}"


@_mutation
def rename_everywhere(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """A value gets a strange name consistently, so that the graph is still the same."""
    names = [name for node in model.graph.node for name in (*node.input, *node.output) if name]
    if not names:
        return None
    old, new = rng.choice(names), rng.choice(_STRINGS)
    for node in model.graph.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                if name == old:
                    values[index] = new
        if rng.random() < 0.5:
            node.name = new
    graph = model.graph
    for owner in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        if owner.name == old:
            owner.name = new
    return f"{old} -> {new[:40]!a}"


@_mutation
def change_dim(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """A size of an initializer, or of a declared shape."""
    places: list[tuple[str, Any, Any]] = []
    for path, message in _messages(model):
        if isinstance(message, onnx.TensorProto):
            places += [(path, message.dims, index) for index in range(len(message.dims))]
        elif isinstance(message, onnx.TensorShapeProto.Dimension):
            places.append((path, message, "dim_value"))
    if not places:
        return None
    path, owner, key = rng.choice(places)
    value = rng.choice(_SIZES)
    if isinstance(key, int):
        owner[key] = value
    else:
        owner.dim_value = value
    return f"{path} {key} = {value}"


@_mutation
def change_wiring(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """A node reads, or says that it computes, some other value: cycles, duplicates, dead ends."""
    nodes = [node for node in model.graph.node if node.input or node.output]
    if not nodes:
        return None
    node = rng.choice(nodes)
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    which = rng.choice([side for side in ("input", "output") if getattr(node, side)])
    values = getattr(node, which)
    index = rng.randrange(len(values))
    own = list(node.output) if rng.random() < 0.3 else []
    values[index] = rng.choice(own or names)
    return f"{node.op_type}.{which}[{index}] = {values[index]!a}"


@_mutation
def change_operator(rng: random.Random, model: onnx.ModelProto) -> str | None:
    if not model.graph.node:
        return None
    node = rng.choice(model.graph.node)
    old = node.op_type
    node.op_type = rng.choice(_OPERATORS)
    if rng.random() < 0.1:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "ai.onnx", "\n"))
    if rng.random() < 0.3:
        del node.attribute[:]
    return f"{old} -> {node.domain!a} {node.op_type}"


@_mutation
def swap_operators(rng: random.Random, model: onnx.ModelProto) -> str | None:
    if not model.graph.node:
        return None
    one, other = rng.choice(model.graph.node), rng.choice(model.graph.node)
    one.op_type, other.op_type = other.op_type, one.op_type
    return f"{one.op_type} <-> {other.op_type}"


@_mutation
def change_attribute(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """An attribute that a node has, or one that its operator knows, gets any value of any type."""
    if not model.graph.node:
        return None
    node = rng.choice(model.graph.node)
    names = [attribute.name for attribute in node.attribute]
    if onnx.defs.has(node.op_type):
        names += sorted(onnx.defs.get_schema(node.op_type).attributes)
    name = rng.choice(names or ["axis"])
    size = rng.choice(_SIZES)
    value = rng.choice(
        (
            size,
            rng.choice(_FLOATS),
            rng.choice(_STRINGS),
            [size],
            [size] * 4,
            [rng.choice(_SIZES) for _ in range(rng.randrange(1, 9))],
            [1.5, math.nan],
            ["a", "b"],
            helper.make_tensor("t", TensorProto.FLOAT, [1], [math.nan]),
            helper.make_tensor("t", TensorProto.INT64, [2], [size, size]),
            model.graph,
        )
    )
    kept = [copy.deepcopy(a) for a in node.attribute if a.name != name]
    new = helper.make_attribute(name, copy.deepcopy(value))
    node.ClearField("attribute")
    node.attribute.extend([*kept, new])
    return f"{node.op_type}.{name} = {str(value)[:40]!a}"


@_mutation
def change_tensor(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """The values of an initializer or a Constant: too few, too many, of another type, NaN, huge."""
    tensors = [(p, m) for p, m in _messages(model) if isinstance(m, onnx.TensorProto)]
    if not tensors:
        return None
    path, tensor = rng.choice(tensors)
    how = rng.choice(("cut", "extend", "empty", "retype", "fill", "field", "segment", "external"))
    if how == "cut":
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif how == "extend":
        tensor.raw_data += b"\x7f" * rng.randrange(1, 1000)
    elif how == "empty":
        tensor.ClearField("raw_data")
    elif how == "retype":
        tensor.data_type = rng.randrange(-1, 30)
    elif how == "fill":
        pattern = rng.choice((b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\x00", b"\xff"))
        tensor.raw_data = (pattern * len(tensor.raw_data))[: len(tensor.raw_data)]
    elif how == "field":
        tensor.float_data.extend([0.5] * rng.randrange(1, 20))
    elif how == "segment":
        tensor.segment.begin, tensor.segment.end = 0, rng.choice(_SIZES)
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(_LOCATIONS))
    return f"{how} {path}"


@_mutation
def change_external_data(rng: random.Random, model: onnx.ModelProto) -> str | None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not tensors:
        return None
    tensor = rng.choice(tensors)
    key = rng.choice(("location", "offset", "length", "checksum", "basepath"))
    numbers = [str(n) for n in _SIZES] + ["x", "1e3", "", "1_0", " 1"]
    value = rng.choice(numbers if key in ("offset", "length") else _LOCATIONS)
    kept = [copy.deepcopy(entry) for entry in tensor.external_data if entry.key != key]
    tensor.ClearField("external_data")
    tensor.external_data.extend(kept)
    tensor.external_data.add(key=key, value=value)
    return f"{tensor.name}: {key} = {value[:40]!a}"


@_mutation
def change_opset(rng: random.Random, model: onnx.ModelProto) -> str | None:
    how = rng.choice(("version", "version", "version", "drop", "add", "ir_version"))
    if how == "drop":
        model.ClearField("opset_import")
    elif how == "add":
        domain = rng.choice(("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "x\ny"))
        model.opset_import.add(domain=domain, version=rng.choice((0, 1, 6, 11, 99)))
    elif how == "ir_version":
        model.ir_version = rng.choice(_SIZES)
    else:
        # Older than 9 has to be converted, which happens in C++.
        version = rng.choice((*range(-1, 27), 7, 8, 7, 8, 7, 8, 99, 2**31, 2**62))
        model.ClearField("opset_import")
        model.opset_import.add(version=version)
        how = f"{version}"
    return how


@_mutation
def change_interface(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """What the graph declares as its inputs, outputs and inner values."""
    graph = model.graph
    names = [name for node in graph.node for name in node.output if name] or ["x"]
    side = rng.choice(("input", "output", "value_info"))
    values = getattr(graph, side)
    how = rng.choice(("drop", "add", "retype", "scalar", "rank", "sequence", "duplicate"))
    if how == "add":
        shape = rng.choice((None, (), (1,), (1, 3, SIZE, SIZE), (-1,), ("n", "n")))
        info = helper.make_tensor_value_info(rng.choice(names), rng.randrange(0, 24), shape)
        values.append(info)
    elif not values:
        return None
    elif how == "drop":
        del values[rng.randrange(len(values))]
    elif how == "duplicate":
        values.append(copy.deepcopy(rng.choice(values)))
    else:
        value = rng.choice(values)
        kind = value.type.tensor_type
        if how == "retype":
            kind.elem_type = rng.randrange(0, 30)
        elif how == "scalar":
            kind.shape.ClearField("dim")
        elif how == "rank":
            kind.shape.dim.add(dim_value=rng.choice(_SIZES))
        else:
            value.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    return f"{how} {side}"


@_mutation
def add_huge_constant(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """A node reads a constant that is terabytes, or of no size at all, out of a few bytes."""
    consumers = [node for node in model.graph.node if node.input]
    if not consumers:
        return None
    node = rng.choice(consumers)
    sizes = rng.choice(([2**20, 2**20], [2**40], [10**5, 10**5], [2**62, 2**62], [-1, 5]))
    arrays = {
        "bomb_sizes": np.array(sizes, np.int64),
        "bomb_one": np.ones(1, np.float32),
        "bomb_start": np.array(0, np.int64),
        "bomb_end": np.array(2**40, np.int64),
        "bomb_step": np.array(1, np.int64),
    }
    operator, inputs = rng.choice(
        (
            ("ConstantOfShape", ["bomb_sizes"]),
            ("Expand", ["bomb_one", "bomb_sizes"]),
            ("Tile", ["bomb_one", "bomb_sizes"]),
            ("Range", ["bomb_start", "bomb_end", "bomb_step"]),
        )
    )
    model.graph.initializer.extend(numpy_helper.from_array(arrays[name], name) for name in inputs)
    model.graph.node.insert(0, helper.make_node(operator, inputs, ["bomb"]))
    node.input[rng.randrange(len(node.input))] = "bomb"
    return f"{operator} {sizes if 'bomb_sizes' in inputs else 2**40} before {node.op_type}"


@_mutation
def add_chain(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """Many nodes one behind the other, or ones that double a tensor until it fills the memory."""
    readers = [index for index, node in enumerate(model.graph.node) if node.input]
    if not readers:
        return None
    position = rng.choice(readers)
    node = copy.deepcopy(model.graph.node[position])
    operator, count = rng.choice((("Relu", 300), ("Relu", 3000), ("Sigmoid", 3000), ("Concat", 40)))
    links = []
    for index in range(count):
        inputs = [node.input[0]] * (2 if operator == "Concat" else 1)
        links.append(helper.make_node(operator, inputs, [f"link_{index}"]))
        node.input[0] = f"link_{index}"
    if operator == "Concat":
        for link in links:
            link.attribute.append(helper.make_attribute("axis", 0))
    before, after = model.graph.node[:position], model.graph.node[position + 1 :]
    nodes = copy.deepcopy([*before, *links, node, *after])
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return f"{count} {operator} before {node.op_type}"


@_mutation
def add_recursion(rng: random.Random, model: onnx.ModelProto) -> str | None:
    """Graphs in attributes, deep inside each other, or functions without end."""
    if not model.graph.node:
        return None
    node = rng.choice(model.graph.node)
    how = rng.choice(("subgraphs", "recursive function", "exponential functions"))
    if how == "subgraphs":
        inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
        for _ in range(rng.choice((1, 10, 25))):  # protobuf takes 100 messages in each other
            branch = helper.make_node("If", ["c"], ["y"], then_branch=inner)
            inner = helper.make_graph([branch], "g", [], [])
        node.attribute.append(helper.make_attribute("body", inner))
        return f"{how} in {node.op_type}"
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("d", 1)]
    count = (
        1 if how == "recursive function" else 30
    )  # each but the first calls the one before twice
    for index in range(count):
        called, domain = (f"f{index - 1}", "d") if index else ("Relu", "")
        if how == "recursive function":
            called, domain = "f0", "d"
        calls = [
            helper.make_node(called, ["x"], ["t"], domain=domain),
            helper.make_node(called, ["t"], ["y"], domain=domain),
        ]
        model.functions.append(helper.make_function("d", f"f{index}", ["x"], ["y"], calls, opsets))
    model.opset_import.add(domain="d", version=1)
    node.domain, node.op_type = "d", f"f{count - 1}"
    return f"{how} at {node.name}"


def change_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The file with bytes flipped, inserted, deleted, cut off, repeated or set to zero."""
    if not data:
        return data, "nothing"
    start = rng.randrange(len(data))
    # Weights are most of a file, and changing them changes little.
    start = start if rng.random() < 0.5 else start % min(len(data), 2000)
    end = start + rng.choice((1, 1, 2, 8, 100))
    how = rng.choice(("flip", "flip", "insert", "delete", "truncate", "repeat", "zero"))
    piece = data[start:end]
    new = {
        "flip": bytes(byte ^ (1 << rng.randrange(8)) for byte in piece),
        "insert": rng.randbytes(end - start) + piece,
        "delete": b"",
        "truncate": b"",
        "repeat": piece * 3,
        "zero": bytes(len(piece)),
    }[how]
    tail = b"" if how == "truncate" else data[end:]
    return data[:start] + new + tail, f"change_bytes: {how} {start}:{end}"


# ----------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A file, and how the loader gets it."""

    model: str  # the name of the seed model
    mutations: list[str]
    form: str  # "path", "bytes" or "proto"
    data: bytes
    files: dict[str, bytes]


def make_case(seed: int, models: dict[str, Seed]) -> Case:
    """The case of a seed: always the same."""
    rng = random.Random(seed)
    name = rng.choice(sorted(models))
    model = models[name]
    files = dict(model.files)
    proto = onnx.ModelProto.FromString(model.data)
    done: list[str] = []
    on_bytes = rng.random() < 0.2
    for _ in range(0 if on_bytes else rng.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        mutation = rng.choice(MUTATIONS)
        said = mutation(rng, proto)
        if said is not None:
            done.append(f"{mutation.__name__}: {said}")
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError):  # nested too deep: there is no such file
        data = model.data
    form = rng.choice(("path", "bytes", "proto"))
    if files:
        form = "path"
        if rng.random() < 0.2:
            files["weights.bin"], said = change_bytes(rng, files["weights.bin"])
            done.append(f"weights.bin: {said}")
    for _ in range(rng.choice((1, 1, 2, 5, 20)) if on_bytes else 0):
        data, said = change_bytes(rng, data)
        done.append(said)
    if form == "proto":
        try:
            onnx.ModelProto.FromString(data)
        except DecodeError:
            form = "bytes"
    return Case(name, done, form, data, files)


@dataclass(frozen=True)
class Outcome:
    """What became of a case. `kind` is "" for a good end; failures of one kind share it."""

    seed: int
    kind: str
    detail: str  # the loader's message or the traceback
    seconds: float = 0.0


def run_case(seed: int, case: Case, folder: Path) -> Outcome:
    """Load the case and run what comes back. `folder` gets the files."""
    inside = folder / "model"
    inside.mkdir(exist_ok=True)
    for path in inside.iterdir():
        path.unlink()
    (folder / _OUTSIDE).write_bytes(bytes(2**16))
    (inside / "link.bin").symlink_to(folder / _OUTSIDE)
    os.mkfifo(inside / "pipe")
    for name, content in case.files.items():
        (inside / name).write_bytes(content)
    path = inside / "model.onnx"
    path.write_bytes(case.data)
    source: Any = path if case.form == "path" else case.data
    given = b""
    if case.form == "proto":
        source = onnx.ModelProto.FromString(case.data)
        given = source.SerializeToString()
    _suspicious.clear()
    start = time.monotonic()
    kind, detail = _judge(source, case.data)
    if case.form == "proto" and source.SerializeToString() != given:
        kind = "forbidden: changes the ModelProto that it was given"
    if _suspicious:
        kind = f"forbidden: {_suspicious[0]}"
    seconds = time.monotonic() - start
    return Outcome(seed, kind, _printable(detail), seconds)


def _printable(text: str) -> str:
    """The end of a text, of a length and of characters that a terminal can show."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[-4000:])


def _judge(source: Any, data: bytes) -> tuple[str, str]:
    try:
        module = load_onnx(source)
    except Error as error:
        return _judge_message(error), str(error)
    except Exception as error:
        return _kind("load", error), traceback.format_exc()
    try:
        inputs = _declared_inputs(onnx.ModelProto.FromString(data))
        inputs = inputs[: len(inspect.signature(module.forward).parameters)]
        if sum(math.prod(shape) for shape, _ in inputs) > _LARGEST_INPUT:
            return "", _TOO_LARGE
        with torch.inference_mode():
            output = module(*(torch.ones(shape, dtype=dtype) for shape, dtype in inputs))
    except Exception as error:
        request = re.search(r"you tried to allocate (\d+) bytes", str(error))
        if request and int(request[1]) < _LARGEST_REQUEST:
            return "", _TOO_LARGE
        return _kind("run", error), traceback.format_exc()
    outputs = output if isinstance(output, (tuple, list)) else [output]
    strange = [type(value).__name__ for value in outputs if not isinstance(value, Tensor)]
    return (f"run: the output is a {strange[0]}" if strange else ""), _RAN


def _judge_message(error: Error) -> str:
    """What is wrong with how an error is told, if anything."""
    message = str(error)
    place = _places(error)
    if not message.strip():
        return f"message: empty {place}"
    if len(message) > LONGEST_MESSAGE:
        return f"message: longer than {LONGEST_MESSAGE} characters {place}"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in message):
        return f"message: line breaks or control characters {place}"
    return ""


def _kind(phase: str, error: Exception) -> str:
    return f"{phase}: {type(error).__name__} {_places(error)}"


def _places(error: BaseException) -> str:
    """Where in torch_mbv2 an error came from, and where it was raised, PyTorch left out."""
    frames = traceback.extract_tb(error.__traceback__)
    return _sites([(frame.filename, frame.name) for frame in reversed(frames)])


def _sites(frames: list[tuple[str, str]]) -> str:
    """Of (file, function), the innermost first: "[the first in torch_mbv2 | the first]"."""
    named = [(Path(file).parts, f"{Path(file).name}:{function}") for file, function in frames]
    ours = [name for parts, name in named if "torch_mbv2" in parts]
    theirs = [name for parts, name in named if not {"torch", Path(__file__).name} & {*parts}]
    theirs = [name for name in theirs if not name.startswith("<")] or [name for _, name in named]
    return f"[{ours[0] if ours else '-'} | {theirs[0] if theirs else '-'}]"


_TORCH_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}  # the others are spelt alike


def _declared_inputs(model: onnx.ModelProto) -> list[tuple[list[int], torch.dtype]]:
    """The shape and dtype that a file declares for each of its inputs; an image's where it is
    silent."""
    given = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name in given:
            continue
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim] if kind.HasField("shape") else [0] * 4
        usual = [1, 3, SIZE, SIZE, *[1] * len(dims)]
        shape = [dim if dim > 0 else usual[axis] for axis, dim in enumerate(dims)]
        name = TensorProto.DataType.Name(kind.elem_type) if kind.elem_type else "FLOAT"
        dtype = getattr(torch, _TORCH_NAMES.get(name, name.lower()), None)
        if not isinstance(dtype, torch.dtype) or name in ("INT4", "UINT4", "INT2", "UINT2"):
            raise TypeError(f"torch has no tensors of the declared type {name}")
        inputs.append((shape, dtype))
    return inputs


# --------------------------------------------------------------------------------------- workers

_suspicious: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Notes what no file may cause."""
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        _suspicious.append(event)
    elif event == "open" and args[1] != "wb" and str(args[0]).endswith(_FORBIDDEN):
        _suspicious.append("opens a file outside the model's folder")


def _confine(models: dict[str, Seed], folder: Path) -> None:
    """Limit this process and watch it, once it has imported all that loading needs."""
    torch.set_num_threads(1)
    for name, model in models.items():
        outcome = run_case(-1, Case(name, [], "path", model.data, model.files), folder)
        assert not outcome.kind, f"{name} itself fails: {outcome.kind}\n{outcome.detail}"
    sys.addaudithook(_audit)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(connection: Connection, models: dict[str, Seed], log: str) -> None:
    """A worker: receives seeds and sends outcomes. What it prints, and where it crashes, is in
    `log`."""
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.enable(stream)
    with tempfile.TemporaryDirectory() as folder:
        _confine(models, Path(folder))
        connection.send(None)
        while True:
            seed = connection.recv()
            if seed is None:
                return
            os.ftruncate(stream, 0)
            connection.send(run_case(seed, make_case(seed, models), Path(folder)))


class Worker:
    """A process that runs cases, started again after one that it does not survive."""

    def __init__(
        self,
        models: dict[str, Seed],
        serve: Callable[[Connection, dict[str, Seed], str], None] = _serve,
    ) -> None:
        self._models = models
        self._serve = serve
        descriptor, self._log = tempfile.mkstemp()
        os.close(descriptor)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["onnx2torch"])  # importing it and torch takes seconds
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=self._serve, args=(theirs, self._models, self._log), daemon=True
        )
        self._process.start()
        self._cases = 0
        theirs.close()
        try:
            self._connection.recv()
        except EOFError:
            raise RuntimeError(f"a worker does not start: {self._said()}") from None

    def run(self, seed: int) -> Outcome:
        if self._cases == LIFETIME:
            self._stop()
            self._start()
        self._cases += 1
        try:
            self._connection.send(seed)
            if self._connection.poll(TIMEOUT):
                return self._connection.recv()
            kind = f"hang: no end after {TIMEOUT:.0f} s"
            os.kill(self._process.pid, signal.SIGABRT)  # faulthandler writes where it is
        except (EOFError, ConnectionError):
            kind = "crash"
        self._process.join(TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        if kind == "crash":
            kind += f": exit status {self._process.exitcode}"
        said = self._said()
        self._connection.close()
        self._start()
        current = said.rpartition("Current thread")[2]
        frames = re.findall(r'File "([^"]*)", line \d+ in (\S+)', current)
        return Outcome(seed, f"{kind} {_sites(frames)}", said, TIMEOUT)

    def _said(self) -> str:
        said = Path(self._log).read_text(errors="replace")
        return _printable(said.partition("\nExtension modules")[0])

    def _stop(self) -> None:
        self._connection.send(None)
        self._process.join(TIMEOUT)
        self._connection.close()

    def close(self) -> None:
        self._stop()
        os.unlink(self._log)


class Pool:
    """A few workers."""

    def __init__(self, workers: int) -> None:
        models = seed_models()
        self._workers = [Worker(models) for _ in range(workers)]

    def run(self, seeds: Iterable[int]) -> Iterator[Outcome]:
        """The outcomes of the cases, in their order."""
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def run(seed: int) -> Outcome:
            worker = free.get()
            try:
                return worker.run(seed)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            yield from threads.map(run, seeds)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


# ---------------------------------------------------------------------------------- command line


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Mutated ONNX files, and what load_onnx makes of them."
    )
    parser.add_argument("seed", type=int, help="the case, or the first one")
    parser.add_argument("end", type=int, nargs="?", help="one more than the last case")
    args = parser.parse_args()
    logging.disable()  # the quantiser's advice
    if args.end is not None:
        return _survey(range(args.seed, args.end))
    case = make_case(args.seed, seed_models())
    print(f"model: {case.model}, as {case.form}", *case.mutations, sep="\n  ", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        _confine(seed_models(), Path(folder))
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        outcome = run_case(args.seed, case, Path(folder))
    print(outcome.detail, outcome.kind or "good", f"{outcome.seconds:.2f} s", sep="\n")
    return 1 if outcome.kind else 0


def _survey(seeds: range) -> int:
    """Runs many cases and prints the failures of each kind, the simplest first."""
    pool = Pool(1)
    failures: dict[str, list[Outcome]] = {}
    ends: Counter[str] = Counter()
    slowest = Outcome(-1, "", "")
    for outcome in pool.run(seeds):
        good = outcome.detail if outcome.detail in (_RAN, _TOO_LARGE) else "refused"
        slowest = max(slowest, outcome, key=lambda outcome: outcome.seconds)
        ends["failed" if outcome.kind else good] += 1
        if outcome.kind:
            print(f"seed {outcome.seed}: {outcome.kind}", file=sys.stderr, flush=True)
            failures.setdefault(outcome.kind, []).append(outcome)
    pool.close()
    for kind, outcomes in sorted(failures.items()):
        print(f"\n{kind}: {len(outcomes)} cases")
        some = {outcome.seed: make_case(outcome.seed, seed_models()) for outcome in outcomes[:50]}
        simplest = sorted(outcomes[:50], key=lambda outcome: len(some[outcome.seed].mutations))
        for outcome in simplest[:3]:
            case = some[outcome.seed]
            print(
                f"  seed {outcome.seed}: {case.model}, as {case.form}: {'; '.join(case.mutations)}"
            )
        print(f"    {simplest[0].detail.strip().splitlines()[-1][:LONGEST_MESSAGE]!a}")
    print(f"\n{len(seeds)} cases: {dict(ends)}")
    print(f"slowest: seed {slowest.seed}, {slowest.seconds:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
