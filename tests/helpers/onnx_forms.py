"""The forms in which exporters, converters and optimisers write one and the same MobileNetV2.

`FORMS` maps a name to a function that makes the form. All are of one narrow network with all of its
52 convolutions (`plain`), except where a form needs another head or padding.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx_helpers import export, randomise
from torch import Tensor, nn

from torch_mbv2.mobilenet import MobileNetV2

CLASSES, SIZE = 10, 64
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Form:
    """One form of a network.

    Attributes:
        model: the file.
        network: what it was made from.
        images: what the file takes, a batch of max(BATCHES), or of the only size it takes.
        reference: a file that ONNX Runtime can run instead, where it cannot run `model`.
        batches: sizes that ONNX Runtime can run.
    """

    model: onnx.ModelProto
    network: nn.Module
    images: Tensor
    reference: onnx.ModelProto | None = None
    batches: tuple[int, ...] = field(default=BATCHES)


FORMS: dict[str, Callable[[], Form]] = {}


def form(name: str) -> Callable[[Callable[[], Form]], Callable[[], Form]]:
    def register(make: Callable[[], Form]) -> Callable[[], Form]:
        FORMS[name] = functools.cache(make)
        return make

    return register


def images(*shape: int, seed: int = 0) -> Tensor:
    size = shape or (max(BATCHES), 3, SIZE, SIZE)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def plain(padding: str = "symmetric") -> MobileNetV2:
    return randomise(MobileNetV2(width_mult=0.25, num_classes=CLASSES, padding=padding))


@functools.cache
def legacy(opset: int = 13, padding: str = "symmetric") -> onnx.ModelProto:
    return export(plain(padding), images(), opset_version=opset)


def fresh(opset: int = 13, padding: str = "symmetric") -> onnx.ModelProto:
    """The file of the legacy exporter, to be changed."""
    proto = onnx.ModelProto()
    proto.CopyFrom(legacy(opset, padding))
    return proto


# -------------------------------------------------------------------------------- exporters

for _opset in range(7, 21):

    @form(f"legacy exporter, opset {_opset}")
    def _(opset: int = _opset) -> Form:
        return Form(legacy(opset), plain(), images())


for _opset in range(21, onnx.defs.onnx_opset_version() + 1):

    @form(f"opset {_opset}")
    def _(opset: int = _opset) -> Form:
        """Nothing but types changed in these; ONNX Runtime does not know the newest."""
        proto = fresh(20)
        proto.opset_import[0].version = opset
        return Form(proto, plain(), images(), reference=legacy(20))


for _opset in (7, 9, 13, 17):

    @form(f"batch norms kept, opset {_opset}")
    def _(opset: int = _opset) -> Form:
        preserve = torch.onnx.TrainingMode.PRESERVE
        options = {"training": preserve, "do_constant_folding": False}
        return Form(export(plain(), images(), opset_version=opset, **options), plain(), images())


def dynamo(opset: int | None, shapes: tuple | None, network: nn.Module | None = None) -> Form:
    network = network or plain()
    options = {} if opset is None else {"opset_version": opset}
    proto = export(network, images(), dynamo=True, dynamic_shapes=shapes, verbose=False, **options)
    return Form(proto, network, images(), batches=BATCHES if shapes else (max(BATCHES),))


@form("dynamo exporter, default, dynamic batch")
def _() -> Form:
    return dynamo(None, ({0: torch.export.Dim("batch")},))


@form("dynamo exporter, opset 23, dynamic batch, height and width")
def _() -> Form:
    axes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    return dynamo(23, (axes,))


for _opset in (18, 21):

    @form(f"dynamo exporter, opset {_opset}, fixed batch")
    def _(opset: int = _opset) -> Form:
        return dynamo(opset, None)


@form("dynamic batch, height and width")
def _() -> Form:
    axes = {"image": {0: "n", 2: "h", 3: "w"}, "logits": {0: "n"}}
    return Form(export(plain(), images(), dynamic_axes=axes), plain(), images())


@form("fixed batch")
def _() -> Form:
    proto = export(plain(), images(2, 3, SIZE, SIZE), dynamic_axes={})
    return Form(proto, plain(), images(2, 3, SIZE, SIZE), batches=(2,))


# ------------------------------------------------------------------------------------- heads


class Head(MobileNetV2):
    """MobileNetV2 with another way from the map to the logits."""

    def __init__(self, head: str) -> None:
        super().__init__(CLASSES, width_mult=0.25)
        self.head = head
        self.conv = nn.Conv2d(1280, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        pool = functools.partial(F.adaptive_avg_pool2d, x, 1)
        classify = self.classifier
        return {
            "flatten": lambda: classify(pool().flatten(1)),
            "view": lambda: classify(pool().view(x.shape[0], -1)),
            "view with the channels": lambda: classify(pool().view(x.shape[0], 1280)),
            "static reshape": lambda: classify(pool().reshape(-1, 1280)),
            "squeeze": lambda: classify(pool().squeeze(3).squeeze(2)),
            "mean": lambda: classify(x.mean([2, 3])),
            "mean over axes from the end": lambda: classify(x.mean([-2, -1])),
            "mean twice": lambda: classify(x.mean(3).mean(2)),
            "kept mean twice": lambda: classify(x.mean(2, True).mean(3, True).flatten(1)),
            "avg_pool2d": lambda: classify(F.avg_pool2d(x, 2).flatten(1)),
            "conv and flatten": lambda: self.conv(pool()).flatten(1),
            "conv and view": lambda: self.conv(pool()).view(x.shape[0], -1),
            "conv and squeeze": lambda: self.conv(pool()).squeeze(3).squeeze(2),
            "conv of a mean": lambda: self.conv(x.mean([2, 3], True)).flatten(1),
            "matmul": lambda: (
                torch.matmul(pool().flatten(1), classify[1].weight.t()) + classify[1].bias
            ),
        }[self.head]()


HEADS = (
    *("flatten", "view", "view with the channels", "static reshape", "squeeze", "mean"),
    *("mean over axes from the end", "mean twice", "kept mean twice", "avg_pool2d"),
    *("conv and flatten", "conv and view", "conv and squeeze", "conv of a mean", "matmul"),
)
for _head in HEADS:
    for _opset in (9, 18):

        @form(f"head {_head}, opset {_opset}")
        def _(head: str = _head, opset: int = _opset) -> Form:
            network = randomise(Head(head))
            return Form(export(network, images(), opset_version=opset), network, images())


for _head in ("conv and view", "mean twice", "view"):

    @form(f"head {_head}, dynamo exporter")
    def _(head: str = _head) -> Form:
        return dynamo(None, ({0: torch.export.Dim("batch")},), randomise(Head(head)))


@form("244 x 244, no batch norm, mean twice, opset 9")
def _() -> Form:
    """The network of the project that this one succeeds."""
    network = Head("mean twice")
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                bias = nn.Parameter(torch.zeros(child.out_channels))
                child.bias = bias
    network = randomise(network)
    x = images(2, 3, 244, 244)
    return Form(export(network, x, opset_version=9), network, x, batches=(1, 2))


# ----------------------------------------------------------------------------------- padding


@form("asymmetric pads as attribute")
def _() -> Form:
    proto = fresh(padding="same")
    fold_pad_nodes(proto)
    return Form(proto, plain("same"), images())


@form("pads as Pad nodes")
def _() -> Form:
    assert any(node.op_type == "Pad" for node in legacy(padding="same").graph.node)
    return Form(legacy(padding="same"), plain("same"), images())


@form("pads computed from the size of the image")
def _() -> Form:
    axes = {"image": {0: "n", 2: "h", 3: "w"}, "logits": {0: "n"}}
    proto = export(plain("same"), images(), dynamic_axes=axes)
    assert any(node.op_type == "Mod" for node in proto.graph.node)
    return Form(proto, plain("same"), images())


for _auto in ("SAME_UPPER of a fixed size", "SAME_UPPER of any size"):

    @form(f"auto_pad {_auto}")
    def _(auto: str = _auto) -> Form:
        proto = fresh(padding="same")
        fold_pad_nodes(proto)
        for node in convolutions(proto):
            if kernel(node) == [3, 3]:
                replace_attribute(node, "pads", helper.make_attribute("auto_pad", "SAME_UPPER"))
        if auto.endswith("any size"):
            for axis in (2, 3):
                proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"axis{axis}"
            del proto.graph.value_info[:]
        return Form(proto, plain("same"), images())


def convolutions(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for node in proto.graph.node if node.op_type == "Conv")


def kernel(node: onnx.NodeProto) -> list[int]:
    return next(list(a.ints) for a in node.attribute if a.name == "kernel_shape")


def replace_attribute(node: onnx.NodeProto, name: str, new: onnx.AttributeProto) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, new])


def fold_pad_nodes(proto: onnx.ModelProto) -> None:
    """Pad nodes, which are those of strided 3x3 convolutions, go into the convolutions."""
    sources = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Pad"}
    for node in convolutions(proto):
        if node.input[0] in sources:
            node.input[0] = sources[node.input[0]]
            replace_attribute(node, "pads", helper.make_attribute("pads", [0, 0, 1, 1]))
    kept = [node for node in proto.graph.node if node.op_type != "Pad"]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


# -------------------------------------------------------------- layouts, inputs and outputs


def prepend(proto: onnx.ModelProto, nodes: list[tuple], dtype: int, shape: list, **tensors) -> None:
    """Put `nodes`, of (operator, inputs, output, attributes), between a new input and the old."""
    name = proto.graph.input[0].name
    made = [
        helper.make_node(op, inputs.split(), [output], **attributes)
        for op, inputs, output, attributes in nodes
    ]
    made[-1].output[0] = name
    old = list(proto.graph.node)
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.node.extend([*made, *old])
    proto.graph.input.append(helper.make_tensor_value_info("pixels", dtype, shape))
    for key, array in tensors.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), key))


def append(proto: onnx.ModelProto, op: str, dtype: int = TensorProto.FLOAT, **attributes) -> None:
    name = proto.graph.output[0].name
    proto.graph.node.append(helper.make_node(op, [name], ["result"], **attributes))
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("result", dtype, None))


NHWC = ["n", SIZE, SIZE, 3]
TO_NCHW = ("Transpose", "pixels", "nchw", {"perm": [0, 3, 1, 2]})


@form("NHWC input with one Transpose")
def _() -> Form:
    proto = fresh(padding="same")
    prepend(proto, [TO_NCHW], TensorProto.FLOAT, NHWC)
    return Form(proto, plain("same"), images().permute(0, 2, 3, 1).contiguous())


@form("NHWC with Transposes around every layer")
def _() -> Form:
    """As converters write it that do not look beyond one layer: pads, activations, adds and the
    mean work in channels_last, each convolution between two Transposes."""
    network = plain("same")
    proto = fresh(padding="same")
    fold_pad_nodes(proto)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 1, 1, 0]), "one_row_and_column")
    )
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> None:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))

    for node in proto.graph.node:
        result = node.output[0]
        if node.op_type == "Conv":
            source = node.input[0]
            if helper.make_attribute("pads", [0, 0, 1, 1]) in node.attribute:
                add("Pad", [source, "one_row_and_column"], f"{result}_padded")
                replace_attribute(node, "pads", helper.make_attribute("pads", [0] * 4))
                source = f"{result}_padded"
            add("Transpose", [source], f"{result}_in", perm=[0, 3, 1, 2])
            node.input[0], node.output[0] = f"{result}_in", f"{result}_out"
            nodes.append(node)
            add("Transpose", [f"{result}_out"], result, perm=[0, 2, 3, 1])
        elif node.op_type == "GlobalAveragePool":
            add("ReduceMean", list(node.input), result, axes=[1, 2])
        else:
            nodes.append(node)
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    sizes[1].dim_value, sizes[3].dim_value = SIZE, 3
    return Form(proto, network, images().permute(0, 2, 3, 1).contiguous())


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (max(BATCHES), SIZE, SIZE, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@form("uint8 NHWC input with Cast, Sub, Div and Transpose")
def _() -> Form:
    proto = fresh()
    steps = [
        ("Cast", "pixels", "floats", {"to": TensorProto.FLOAT}),
        ("Sub", "floats mean", "centred", {}),
        ("Div", "centred std", "scaled", {}),
        ("Transpose", "scaled", "nchw", {"perm": [0, 3, 1, 2]}),
    ]
    tensors = {"mean": np.float32(MEAN), "std": np.float32(STD)}
    prepend(proto, steps, TensorProto.UINT8, NHWC, **tensors)
    return Form(proto, plain(), pixels())


@form("uint8 NHWC input with Transpose, Cast, Div by 255, Sub and Mul")
def _() -> Form:
    proto = fresh()
    steps = [
        ("Transpose", "pixels", "nchw", {"perm": [0, 3, 1, 2]}),
        ("Cast", "nchw", "floats", {"to": TensorProto.FLOAT}),
        ("Div", "floats most", "unit", {}),
        ("Sub", "unit mean", "centred", {}),
        ("Mul", "centred inverse", "scaled", {}),
    ]
    channels = (1, 3, 1, 1)
    tensors = {
        "most": np.float32(255),
        "mean": np.float32(MEAN).reshape(channels) / 255,
        "inverse": 255 / np.float32(STD).reshape(channels),
    }
    prepend(proto, steps, TensorProto.UINT8, NHWC, **tensors)
    return Form(proto, plain(), pixels())


@form("NCHW input scaled to [-1, 1]")
def _() -> Form:
    proto = fresh()
    steps = [("Mul", "pixels factor", "scaled", {}), ("Add", "offset scaled", "shifted", {})]
    tensors = {"factor": np.float32(1 / 127.5), "offset": np.float32(-1)}
    prepend(proto, steps, TensorProto.FLOAT, ["n", 3, SIZE, SIZE], **tensors)
    return Form(proto, plain(), pixels().permute(0, 3, 1, 2).float().contiguous())


for _tail in ("Softmax", "LogSoftmax", "Sigmoid"):

    @form(f"{_tail} at the end")
    def _(tail: str = _tail) -> Form:
        proto = fresh()
        append(proto, tail, **({} if tail == "Sigmoid" else {"axis": -1}))
        return Form(proto, plain(), images())


@form("Softmax at the end, opset 9")
def _() -> Form:
    proto = fresh(9)
    append(proto, "Softmax")
    return Form(proto, plain(), images())


# ----------------------------------------------------------------------------------- weights


def hold_in_constants(proto: onnx.ModelProto) -> None:
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in proto.graph.initializer
    ]
    old = list(proto.graph.node)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend([*nodes, *old])


@form("weights in Constant nodes")
def _() -> Form:
    proto = fresh()
    hold_in_constants(proto)
    return Form(proto, plain(), images())


@form("weights listed as inputs")
def _() -> Form:
    proto = fresh(8)
    for tensor in proto.graph.initializer:
        if tensor.name not in {value.name for value in proto.graph.input}:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(value)
    return Form(proto, plain(), images())


@form("biases shared through Identity")
def _() -> Form:
    """As the legacy exporter writes an untrained network."""
    network = MobileNetV2(width_mult=0.25, num_classes=CLASSES).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 2  # or the signal dies out
    proto = export(network, images())
    assert any(node.op_type == "Identity" for node in proto.graph.node)
    return Form(proto, network, images())


@form("weights stored in float16 with Cast")
def _() -> Form:
    network = copy.deepcopy(plain()).half().float()
    proto = export(network, images())
    halves = []
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim < 2:
            continue
        halves.append(
            helper.make_node("Cast", [f"{tensor.name}_half"], [tensor.name], to=TensorProto.FLOAT)
        )
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}_half"))
    old = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*halves, *old])
    return Form(proto, network, images())


@form("batch norms written out as Mul and Add")
def _() -> Form:
    """On weights that are transposed and reshaped in the graph, as some converters leave them."""
    proto = fresh()
    generator = np.random.default_rng(0)
    weights = {t.name: t for t in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "Conv":
            nodes.append(node)
            continue
        tensor = weights[node.input[1]]
        array = numpy_helper.to_array(tensor)
        factor = generator.uniform(0.5, 2, (len(array), 1, 1)).astype(np.float32)
        bias = numpy_helper.to_array(weights[node.input[2]])
        stem = node.output[0]
        stored = (array / factor[..., None]).transpose(2, 3, 1, 0)  # as HWIO
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(stored), f"{stem}_hwio"))
        for name, value in (("factor", factor), ("shift", bias.reshape(1, -1, 1, 1))):
            proto.graph.initializer.append(numpy_helper.from_array(value, f"{stem}_{name}"))
        nodes += [
            helper.make_node("Transpose", [f"{stem}_hwio"], [f"{stem}_w"], perm=[3, 2, 0, 1]),
            helper.make_node("Conv", [node.input[0], f"{stem}_w"], [f"{stem}_conv"]),
            helper.make_node("Mul", [f"{stem}_conv", f"{stem}_factor"], [f"{stem}_scaled"]),
            helper.make_node("Add", [f"{stem}_scaled", f"{stem}_shift"], [stem]),
        ]
        nodes[-3].attribute.extend(node.attribute)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return Form(proto, plain(), images())


@form("ReLU6 as Relu and Min")
def _() -> Form:
    proto = fresh()
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(6), "six"))
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "Clip":
            nodes.append(helper.make_node("Relu", [node.input[0]], [f"{node.output[0]}_relu"]))
            node = helper.make_node("Min", [f"{node.output[0]}_relu", "six"], [node.output[0]])
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return Form(proto, plain(), images())


# ------------------------------------------------------------------------------- optimised


for _level in ("BASIC", "EXTENDED"):
    for _kept in ("", ", batch norms kept"):

        @form(f"optimised by ONNX Runtime, {_level.lower()}{_kept}")
        def _(level: str = _level, kept: str = _kept) -> Form:
            import onnxruntime

            source = FORMS["batch norms kept, opset 13"]().model if kept else legacy()
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(
                onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "optimised.onnx"
                options.optimized_model_filepath = str(path)
                onnxruntime.InferenceSession(
                    source.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
                proto = onnx.load(path)
            fused = any(node.op_type == "FusedConv" for node in proto.graph.node)
            assert fused == (level == "EXTENDED")
            return Form(proto, plain(), images())


# ------------------------------------------------------------------------- low precision


def half(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).half()


LOW_PRECISION: dict[str, Callable[[], Form]] = {}


def low_precision(name: str) -> Callable[[Callable[[], Form]], Callable[[], Form]]:
    def register(make: Callable[[], Form]) -> Callable[[], Form]:
        LOW_PRECISION[name] = functools.cache(make)
        return make

    return register


@low_precision("float16")
def _() -> Form:
    return Form(export(half(plain()), images().half()), plain(), images().half())


@low_precision("float16 with float32 input and output")
def _() -> Form:
    proto = export(half(plain()), images().half())
    steps = [("Cast", "pixels", "halves", {"to": TensorProto.FLOAT16})]
    prepend(proto, steps, TensorProto.FLOAT, ["n", 3, SIZE, SIZE])
    append(proto, "Cast", to=TensorProto.FLOAT)
    return Form(proto, plain(), images())


# ------------------------------------------------------------------------------- quantised

QUANTISED: dict[str, Callable[[], Form]] = {}


class Calibration:
    def __init__(self, name: str) -> None:
        self.batches = iter([{name: images(4, 3, SIZE, SIZE, seed=s).numpy()} for s in (1, 2)])

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def quantise(operator: bool, per_channel: bool, symmetric: bool) -> onnx.ModelProto:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    CalibrationDataReader.register(Calibration)
    with tempfile.TemporaryDirectory() as folder:
        source, target = (str(Path(folder) / name) for name in ("float.onnx", "int8.onnx"))
        onnx.save(legacy(), source)
        quantize_static(
            source,
            target,
            Calibration("image"),
            quant_format=QuantFormat.QOperator if operator else QuantFormat.QDQ,
            per_channel=per_channel,
            # 7 bits: on CPUs without VNNI, ONNX Runtime saturates sums of two products at 16 bits.
            reduce_range=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": symmetric},
        )
        return onnx.load(target)


for _operator in (False, True):
    for _per_channel in (False, True):
        for _symmetric in (False, True):
            _name = ", ".join(
                (
                    "QOperator" if _operator else "QDQ",
                    "per channel" if _per_channel else "per tensor",
                    "symmetric int8" if _symmetric else "uint8",
                )
            )

            def _make(
                operator: bool = _operator,
                per_channel: bool = _per_channel,
                symmetric: bool = _symmetric,
            ) -> Form:
                return Form(quantise(operator, per_channel, symmetric), plain(), images())

            QUANTISED[_name] = functools.cache(_make)


def _dynamic() -> Form:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = (str(Path(folder) / name) for name in ("float.onnx", "int8.onnx"))
        onnx.save(legacy(), source)
        quantize_dynamic(source, target, weight_type=QuantType.QUInt8)
        return Form(onnx.load(target), plain(), images())


QUANTISED["dynamic"] = functools.cache(_dynamic)
