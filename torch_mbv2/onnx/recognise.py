"""Recognising a MobileNetV2 by the structure of its graph, and rebuilding it with its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from torch_mbv2.mobilenet import (
    Architecture,
    Block,
    Clamp,
    MobileNetV2,
    Output,
    Padding,
    Preprocess,
    Preprocessing,
)
from torch_mbv2.onnx.clean.activations import clamp_bounds
from torch_mbv2.onnx.clean.norms import fold_batch_norms
from torch_mbv2.onnx.graph import Graph, Node, declared_shape

_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
_NORM = ("weight", "bias", "running_mean", "running_var")


class _Mismatch(Exception):
    """The graph is not a MobileNetV2."""


@dataclass(frozen=True)
class _Conv:
    """A convolution and what belongs to it: batch norm, activation."""

    weight: np.ndarray
    bias: np.ndarray | None
    norm: tuple[np.ndarray, ...] | None  # weight, bias, mean, variance
    epsilon: float
    activation: Clamp | None
    groups: int
    stride: int
    padding: Padding
    output: str


def recognise(graph: Graph) -> MobileNetV2 | None:
    """The network in eval mode with the graph's weights, if the cleaned graph is exactly a
    MobileNetV2, else None.

    Batch norms are kept if every convolution has one and no bias of its own, else folded.
    """
    for candidate in (graph, fold_batch_norms(graph)):
        try:
            return _Reader(candidate).network()
        except _Mismatch:
            continue
    return None


class _Reader:
    """Walks a graph from its input, taking pieces; anything unexpected raises `_Mismatch`."""

    def __init__(self, graph: Graph) -> None:
        _require(len(graph.inputs) == 1 and len(graph.outputs) == 1)
        self.graph = graph
        self.convs: list[_Conv] = []  # in the order of the network's modules
        self.nodes = 0  # taken so far

    def network(self) -> MobileNetV2:
        image, preprocessing = self.preprocessing(self.graph.inputs[0].name)
        stem = self.conv(image, kernel=3)
        _require(stem.groups == 1 and stem.activation is not None)
        blocks = []
        value = stem.output
        while not self.at_head(value):
            block, value = self.block(value)
            blocks.append(block)
        last = self.conv(value, kernel=1)
        _require(bool(blocks) and last.groups == 1 and last.activation is not None)
        weight, bias, logits = self.classifier(last.output)
        output = self.postprocessing(logits)
        _require(self.nodes == len(self.graph.nodes))

        norm = all(conv.norm is not None for conv in self.convs)
        _require(norm or all(conv.norm is None for conv in self.convs))
        _require(not norm or all(conv.bias is None for conv in self.convs))
        activations = {conv.activation for conv in self.convs if conv.activation is not None}
        dtypes = {conv.weight.dtype for conv in self.convs} | {weight.dtype}
        _require(len(activations) == 1 and len(dtypes) == 1)
        self.check_input(preprocessing, stem)
        architecture = Architecture(
            stem=stem.weight.shape[0],
            blocks=tuple(blocks),
            last=last.weight.shape[0],
            num_classes=weight.shape[0],
            in_channels=stem.weight.shape[1],
            stem_stride=stem.stride,
            stem_padding=stem.padding,
            activation=activations.pop(),
            norm=norm,
            preprocessing=preprocessing,
            output=output,
        )
        return _build(architecture, self.convs, weight, bias)

    def check_input(self, preprocessing: Preprocessing | None, stem: _Conv) -> None:
        """Whether the graph declares the input that the network takes."""
        declared = self.graph.inputs[0]
        kind = declared.type.tensor_type.elem_type
        _require(kind != onnx.TensorProto.UNDEFINED)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        if preprocessing is None:
            _require(dtype == stem.weight.dtype)
        else:
            _require(dtype.kind in "iuf" or dtype.name == "bfloat16")
        shape = declared_shape(declared)
        if shape is not None:
            last = preprocessing is not None and preprocessing.channels_last
            channels = shape[-1 if last else 1] if len(shape) == 4 else 0
            _require(channels in (None, stem.weight.shape[1]))

    def at_head(self, value: str) -> bool:
        """Whether what follows `value` is the last convolution: it leads to the global pool."""
        users = self.graph.users.get(value, ())
        for _ in range(3):  # convolution, batch norm, activation
            if len(users) != 1:
                return False
            users = self.graph.users.get(users[0].outputs[0], ())
            if len(users) == 1 and users[0].op == "GlobalAveragePool":
                return True
        return False

    def block(self, value: str) -> tuple[Block, str]:
        """The inverted residual that starts at `value`, and the value that it computes."""
        conv = self.conv(value)
        expanded = None
        if conv.groups == 1:
            _require(conv.weight.shape[2:] == (1, 1) and conv.activation is not None)
            expanded = conv.weight.shape[0]
            depthwise = self.conv(conv.output, kernel=3)
        else:
            depthwise = conv
            _require(depthwise.weight.shape[2:] == (3, 3))
        _require(depthwise.activation is not None)
        _require(depthwise.groups == depthwise.weight.shape[0] and depthwise.weight.shape[1] == 1)
        project = self.conv(depthwise.output, kernel=1)
        _require(project.groups == 1 and project.activation is None)

        output = project.output
        users = self.graph.users.get(value, ())
        residual = len(users) == 2
        if residual:
            add = self.sole_user(output)
            _require(add.op == "Add" and {*add.inputs} == {value, output})
            _require(depthwise.stride == 1)
            self.nodes += 1
            output = add.outputs[0]
        else:
            _require(len(users) == 1)
        out = project.weight.shape[0]
        return Block(expanded, out, depthwise.stride, depthwise.padding, residual), output

    def conv(self, value: str, kernel: int | None = None) -> _Conv:
        """The convolution that reads `value`, with its batch norm and activation."""
        nodes = [node for node in self.graph.users.get(value, ()) if node.op == "Conv"]
        _require(len(nodes) == 1 and value not in self.graph.output_names)
        node = nodes[0]
        weight = self.tensor(node.inputs[1])
        bias = self.tensor(node.inputs[2]) if node.input(2) else None
        _require(weight.ndim == 4 and node.inputs[0] == value)
        _require(kernel in (None, weight.shape[2]) and weight.shape[2] == weight.shape[3])
        strides = node.ints("strides", (1, 1))
        _require(strides[0] == strides[1] and set(node.ints("dilations", (1, 1))) == {1})
        padding = _padding(node, weight.shape[2], strides[0])
        self.nodes += 1

        output = node.outputs[0]
        norm, epsilon = None, 1e-5
        follower = self.graph.sole_user(output)
        if follower is not None and follower.op == "BatchNormalization":
            norm = tuple(self.tensor(name) for name in follower.inputs[1:5])
            _require(all(array.shape == weight.shape[:1] for array in norm))
            _require(all(array.dtype == weight.dtype for array in norm))
            # The file holds a float32: 1e-5 comes back as 9.99999974e-06.
            epsilon = float(f"{follower.attributes.get('epsilon', 1e-5):.7g}")
            _require(0 < epsilon < math.inf)
            output = follower.outputs[0]
            self.nodes += 1
            follower = self.graph.sole_user(output)
        activation = self.activation(follower)
        if follower is not None and activation is not None:
            output = follower.outputs[0]
            self.nodes += 1
        groups = int(node.attributes.get("group", 1))
        conv = _Conv(weight, bias, norm, epsilon, activation, groups, strides[0], padding, output)
        self.convs.append(conv)
        return conv

    def activation(self, node: Node | None) -> Clamp | None:
        """ "relu" or "relu6" if `node` is one."""
        if node is None or node.op not in ("Relu", "Clip"):
            return None
        bounds = clamp_bounds(node, self.graph)
        _require(bounds in ((0.0, 6.0), (0.0, None)))
        return "relu6" if bounds == (0.0, 6.0) else "relu"

    def classifier(self, value: str) -> tuple[np.ndarray, np.ndarray | None, str]:
        """Weight (classes, channels) and bias of global pool, Flatten(1), Gemm, and its value."""
        pool = self.sole_user(value)
        _require(pool.op == "GlobalAveragePool")
        flatten = self.sole_user(pool.outputs[0])
        _require(flatten.op == "Flatten")
        _require(flatten.attributes.get("axis", 1) in (1, -3))
        gemm = self.sole_user(flatten.outputs[0])
        _require(gemm.op in ("Gemm", "MatMul"))
        _require(gemm.inputs[0] == flatten.outputs[0] and not gemm.attributes.get("transA", 0))
        _require(gemm.attributes.get("alpha", 1.0) == 1.0 == gemm.attributes.get("beta", 1.0))
        self.nodes += 3
        weight = self.tensor(gemm.inputs[1])
        _require(weight.ndim == 2)
        if not gemm.attributes.get("transB", 0):
            weight = weight.T
        bias = self.tensor(gemm.inputs[2]) if gemm.input(2) else None
        if bias is not None:
            _require(bias.shape in ((weight.shape[0],), (1, weight.shape[0])))
            bias = bias.reshape(-1)
        return weight, bias, gemm.outputs[0]

    def preprocessing(self, value: str) -> tuple[str, Preprocessing | None]:
        """What casts, arithmetic with constants and a transposition do to the image, in any order,
        and the value that they compute. Whole numbers wrap and divide otherwise: they may only be
        cast to floats."""
        chain: list[Node] = []
        start = value
        while (node := self.graph.sole_user(value)) is not None:
            if node.domain or node.op not in ("Add", "Cast", "Div", "Mul", "Sub", "Transpose"):
                break
            chain.append(node)
            value = node.outputs[0]
        axis = 3 if any(node.op == "Transpose" for node in chain) else 1
        channels_last = axis == 3
        scale, shift = np.ones(1), np.zeros(1)
        value = start
        kind = self.graph.inputs[0].type.tensor_type.elem_type
        for node in chain:
            if node.op == "Transpose":
                _require(axis == 3 and node.ints("perm", ()) == (0, 3, 1, 2))
                axis = 1
            elif node.op == "Cast":
                kind = node.attributes["to"]
                _require(kind in _FLOATS)
            else:
                _require(kind in _FLOATS)
                operand = self.channels(node, value, axis)
                if node.op == "Mul":
                    scale, shift = scale * operand, shift * operand
                elif node.op == "Div":
                    _require(node.inputs[0] == value and bool(operand.all()))
                    scale, shift = scale / operand, shift / operand
                elif node.op == "Add":
                    shift = shift + operand
                elif node.inputs[0] == value:
                    shift = shift - operand
                else:
                    scale, shift = -scale, operand - shift
            self.nodes += 1
            value = node.outputs[0]
        if value == start:
            return value, None
        _require(bool(np.isfinite(scale).all() and np.isfinite(shift).all()))
        return value, Preprocessing(channels_last, tuple(scale.tolist()), tuple(shift.tolist()))

    def channels(self, node: Node, value: str, axis: int) -> np.ndarray:
        """The constants, one in all or one a channel, that `node` combines with an image `value`
        whose channels are dimension `axis`."""
        others = [name for name in node.inputs if name != value]
        _require(len(others) == 1)
        array = self.tensor(others[0])
        _require(array.ndim <= 4)
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        _require(array.size == array.shape[axis])
        return array.reshape(-1).astype(np.float64)

    def postprocessing(self, value: str) -> Output:
        """What is made of the logits before they are the graph's output."""
        kinds: dict[str, Output] = {
            "Softmax": "softmax",
            "LogSoftmax": "log_softmax",
            "Sigmoid": "sigmoid",
        }
        kind: Output = "logits"
        while (node := self.graph.sole_user(value)) is not None:
            # A cast gives the dtype back that the images came in; here that is the weights'.
            _require(node.op in (*kinds, "Cast") and not node.domain)
            if node.op == "Cast":
                _require(node.attributes["to"] in _FLOATS)
            else:
                default = 1 if self.graph.opset < 13 else -1
                _require(kind == "logits" and node.attributes.get("axis", default) in (1, -1))
                kind = kinds[node.op]
            self.nodes += 1
            value = node.outputs[0]
        _require(value == self.graph.outputs[0].name)
        return kind

    def sole_user(self, value: str) -> Node:
        node = self.graph.sole_user(value)
        if node is None:
            raise _Mismatch
        return node

    def tensor(self, name: str) -> np.ndarray:
        _require(name in self.graph.tensors)
        return self.graph.tensors[name]


def _require(condition: bool) -> None:
    if not condition:
        raise _Mismatch


def _padding(node: Node, kernel: int, stride: int) -> Padding:
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto == "SAME_UPPER" and kernel == 3 and 1 <= stride <= kernel:
        return "same"
    _require(auto == "NOTSET")
    top, left, bottom, right = node.ints("pads", (0, 0, 0, 0))
    _require(kernel == 3 or (not any((top, left, bottom, right)) and stride == 1))
    _require(all(0 <= side < kernel for side in (top, left, bottom, right)))
    return left, right, top, bottom


def _build(
    architecture: Architecture, convs: list[_Conv], weight: np.ndarray, bias: np.ndarray | None
) -> MobileNetV2:
    """The network with its weights; made on the meta device, so that nothing random is drawn."""
    try:
        with torch.device("meta"):
            model = MobileNetV2.from_architecture(architecture).eval()
    except ValueError as error:  # a residual between different shapes
        raise _Mismatch from error
    state: dict[str, Tensor] = {}
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d)
    names = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    remaining = iter(names)
    for conv in convs:
        name, _ = next(remaining)
        state[f"{name}.weight"] = _tensor(conv.weight)
        if conv.norm is None:
            zeros = np.zeros(conv.weight.shape[0], conv.weight.dtype)
            state[f"{name}.bias"] = _tensor(zeros if conv.bias is None else conv.bias)
        else:
            name, module = next(remaining)
            module.eps = conv.epsilon
            for key, array in zip(_NORM, conv.norm, strict=True):
                state[f"{name}.{key}"] = _tensor(array)
            state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    zeros = np.zeros(weight.shape[0], weight.dtype)
    state["classifier.1.weight"] = _tensor(weight)
    state["classifier.1.bias"] = _tensor(zeros if bias is None else bias)
    if architecture.preprocessing is not None:
        preprocess = Preprocess(architecture.preprocessing).eval()
        model.preprocess = preprocess.to(_tensor(weight).dtype)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # shapes that do not fit each other
        raise _Mismatch from error
    return model


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor with its own memory. numpy's bfloat16 is an extension type, unknown to PyTorch."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
