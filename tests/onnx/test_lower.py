"""Small graphs that are converted, and what surrounds a MobileNetV2, against ONNX Runtime."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import functools
import tracemalloc

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_helpers import IMAGE, WEIGHT, export, randomise, run, small_graph, small_model
from torch import nn

from torch_mbv2.errors import ModelError
from torch_mbv2.mobilenet import Architecture, Block, MobileNetV2, Preprocessing
from torch_mbv2.onnx import load_onnx
from torch_mbv2.onnx.lower import OPSET, explicit_splits, lower

RNG = np.random.default_rng(0)
VECTORS = {name: RNG.uniform(0.5, 2, 3).astype(np.float32) for name in "sbmv"}


def check(*nodes: tuple, image: np.ndarray = IMAGE, **options: object) -> nn.Module:
    """The module of a graph, which computes what ONNX Runtime does."""
    model = small_model(*nodes, **options)
    module = load_onnx(model)
    with torch.inference_mode():
        computed = module(torch.from_numpy(image))
    torch.testing.assert_close(
        computed, run(model, torch.from_numpy(image)), rtol=1e-4, atol=1e-5, equal_nan=True
    )
    return module


def refused(*nodes: tuple, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_onnx(small_model(*nodes, **options))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


# ---------------------------------------------------------------------------------- operators


@pytest.mark.parametrize(
    ("op", "attributes", "opset", "kind"),
    [
        ("Gelu", {}, 20, nn.GELU),
        ("Gelu", {"approximate": "tanh"}, 20, nn.GELU),
        ("Mish", {}, 18, nn.Mish),
        ("GlobalMaxPool", {}, 13, nn.AdaptiveMaxPool2d),
        ("GlobalMaxPool", {}, 22, nn.AdaptiveMaxPool2d),
        ("GlobalAveragePool", {}, 13, nn.AdaptiveAvgPool2d),
        ("GlobalAveragePool", {}, 22, nn.AdaptiveAvgPool2d),
    ],
)
def test_added_operators(op: str, attributes: dict, opset: int, kind: type[nn.Module]) -> None:
    module = check((op, "x", "y", attributes), opset=opset)
    assert kind in {type(layer) for layer in module.modules()}


def test_swish() -> None:
    """Of opset 24, which ONNX Runtime may not know yet."""
    module = load_onnx(small_model(("Swish", "x", "y"), opset=24))
    image = torch.from_numpy(IMAGE)
    torch.testing.assert_close(module(image), image * torch.sigmoid(image))
    assert "alpha 0.5 is not implemented" in refused(("Swish", "x", "y", {"alpha": 0.5}), opset=24)


@pytest.mark.parametrize("shape", [("n", 3, 6), ("n", 3, 6, 6, 6)], ids=str)
def test_pools_of_other_than_images(shape: tuple) -> None:
    """AdaptiveMaxPool2d would pool the wrong dimensions without a word."""
    assert "cannot be converted" in refused(("GlobalMaxPool", "x", "y"), shape=shape)
    image = RNG.normal(size=(2, *shape[1:])).astype(np.float32)
    check(("GlobalAveragePool", "x", "y"), shape=shape, image=image)


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (5, 9)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (3, 3), (2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("bias", ["", " b", " -"], ids=["none", "bias", "left out"])
def test_same_convolution_of_any_size(bias: str, kernel: int, stride: int, size: tuple) -> None:
    check(
        ("Conv", f"x w{bias}", "y", {"auto_pad": "SAME_UPPER", "strides": [stride, stride]}),
        shape=("n", 3, "h", "w"),
        image=RNG.normal(size=(2, 3, *size)).astype(np.float32),
        w=WEIGHT[:, :, :kernel, :kernel],
        b=np.arange(4, dtype=np.float32),
    )


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ({"auto_pad": "SAME_UPPER", "strides": [2, 1]}, (3, 3)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (3, 2)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2], "dilations": [2, 2]}, (3, 3)),
        ({"auto_pad": "SAME_UPPER", "strides": [3, 3]}, (2, 2)),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (3, 3)),
    ],
    ids=["strides", "window", "dilated", "stride beyond the window", "lower"],
)
def test_other_same_convolutions_are_refused(attributes: dict, kernel: tuple) -> None:
    message = refused(
        ("Conv", "x w", "y", attributes),
        shape=("n", 3, "h", "w"),
        w=WEIGHT[:, :, : kernel[0], : kernel[1]],
    )
    assert "cannot be converted to PyTorch" in message


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ([("Min", "x half", "y")], 13),
        ([("Max", "x half", "y")], 13),
        ([("Clip", "x - half", "y")], 13),
        ([("Clip", "x half -", "y")], 13),
        ([("Clip", "x", "y")], 13),
        ([("Clip", "x", "y", {"max": 0.5})], 9),
        ([("Softmax", "x", "y", {"axis": 2})], 11),
        ([("Softmax", "x", "y")], 13),
        ([("ReduceMean", "x axes", "y")], 18),
        ([("Squeeze", "v axes0", "v1"), ("Mul", "x v1", "y")], 13),
        ([("BatchNormalization", "x s b m v", "y")], 7),
        ([("Relu", "x", "r"), ("BatchNormalization", "r s b m v", "y")], 15),
        ([("Flatten", "x", "f"), ("Gemm", "f g c", "y", {"alpha": 0.5, "beta": 2.0})], 13),
        ([("Flatten", "x", "f"), ("Gemm", "f g -", "y")], 13),
        ([("Conv", "x w -", "y")], 13),
        ([("Reshape", "x size", "y", {"allowzero": 0})], 19),
        ([("Transpose", "x", "y")], 13),
        ([("HardSwish", "x", "y")], 22),
        ([("AveragePool", "x", "y", {"kernel_shape": [3, 3], "ceil_mode": 1})], 19),
    ],
    ids=lambda value: value[-1][0] if isinstance(value, list) else str(value),
)
def test_spellings_by_opset(nodes: list[tuple], opset: int) -> None:
    tensors = {name: v.reshape(1, 3, 1, 1) if opset == 13 else v for name, v in VECTORS.items()}
    check(
        *nodes,
        opset=opset,
        half=np.float32(0.5),
        axes=np.array([2, 3]),
        axes0=np.array([0]),
        g=RNG.normal(size=(108, 5)).astype(np.float32),
        c=RNG.normal(size=5).astype(np.float32),
        w=WEIGHT,
        size=np.array([0, -1]),
        **tensors,
    )


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ([("Pad", "x", "y", {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 1.5})], 10),
        ([("Dropout", "x", "d mask"), ("Cast", "mask", "m", {"to": 1}), ("Add", "d m", "y")], 13),
        ([("ReduceMean", "x", "y", {"noop_with_empty_axes": 1})], 18),
        ([("Reshape", "x sizes", "y", {"allowzero": 1})], 18),
        ([("Pad", "x pads - axes", "y")], 18),
        ([("MaxPool", "x", "m i", {"kernel_shape": [2, 2]}), ("Gather", "m i", "y")], 13),
        ([("ConvTranspose", "x w", "y", {"strides": [2, 2], "output_shape": [12, 12]})], 13),
        ([("LRN", "x", "y", {"size": 2})], 13),
    ],
    ids=["pad", "dropout", "mean", "reshape", "pad of axes", "indices", "size", "even window"],
)
def test_what_would_be_left_out_is_refused(nodes: list[tuple], opset: int) -> None:
    """Attributes and outputs that onnx2torch does not look at."""
    tensors = {"sizes": np.array([0, 3, 6, 6]), "pads": np.array([1, 1]), "axes": np.array([3])}
    tensors["w"] = np.ones((3, 4, 3, 3), np.float32)
    assert "cannot be converted to PyTorch" in refused(*nodes, opset=opset, **tensors)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[-2, -1], [-1, 1], [-1]], ids=str)
@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean"])
def test_axes_from_the_back(op: str, axes: list[int], keep: int) -> None:
    check((op, "x", "y", {"axes": axes, "keepdims": keep}))
    check((op, "x axes", "y", {"keepdims": keep}), opset=18, axes=np.array(axes))


@pytest.mark.parametrize("axes", [[-1, -2], [-2, -1], [2, -1], [3, 2]], ids=str)
def test_squeezed_axes_from_the_back(axes: list[int]) -> None:
    pool = ("ReduceMax", "x", "m", {"axes": [2, 3]})
    check(pool, ("Squeeze", "m axes", "y"), axes=np.array(axes))
    check(pool, ("Squeeze", "m", "y", {"axes": axes}), opset=11)


@pytest.mark.parametrize("axes", [[-1, -2], [-1, 0], [0, -2], [1, 2]], ids=str)
def test_unsqueezed_axes_from_the_back(axes: list[int]) -> None:
    check(("Unsqueeze", "x axes", "y"), axes=np.array(axes))
    check(("Unsqueeze", "x", "y", {"axes": axes}), opset=11)


@pytest.mark.parametrize("attributes", [{}, {"reverse": 1}, {"exclusive": 1}], ids=str)
def test_cumulative_sum(attributes: dict) -> None:
    check(("CumSum", "x axis", "y", attributes), axis=np.int64(1))


@pytest.mark.parametrize(
    "nodes",
    [
        [("Split", "x sizes", "y rest", {"axis": 1})],
        [("Split", "x sizes", "rest y", {"axis": 1})],
        [("Split", "x sizes", "y rest", {"axis": 1}), ("Neg", "y", "unused")],
        [("TopK", "x two", "y indices", {"axis": 1})],
        [("TopK", "x two", "values i", {"axis": 1}), ("Cast", "i", "y", {"to": 1})],
        [("MaxPool", "x", "y indices", {"kernel_shape": [2, 2]})],
        [("MaxPool", "x", "m indices", {"kernel_shape": [2, 2]}), ("Relu", "m", "y")],
    ],
    ids=["first", "second", "read", "values", "indices", "pool", "pool within"],
)
def test_one_of_several_outputs(nodes: list[tuple]) -> None:
    check(*nodes, sizes=np.array([1, 2]), two=np.array([2]))


def test_all_of_several_outputs() -> None:
    sizes = np.array([1, 2])
    model = small_model(("Split", "x s", "a b", {"axis": 1}), outputs=("b", "a"), s=sizes)
    image = torch.from_numpy(IMAGE)
    last, first = load_onnx(model)(image)
    assert torch.equal(first, image[:, :1])
    assert torch.equal(last, image[:, 1:])


RESIZES = [  # mode, coordinate_transformation_mode, nearest_mode, scale, whether PyTorch can
    ("nearest", "asymmetric", "floor", 1.5, True),
    ("nearest", "asymmetric", "floor", 2, True),
    ("nearest", "asymmetric", "ceil", 1.5, False),
    ("nearest", "asymmetric", "round_prefer_floor", 3, False),
    ("nearest", "half_pixel", "round_prefer_floor", 3, True),
    ("nearest", "pytorch_half_pixel", "round_prefer_ceil", 2, True),
    ("nearest", "half_pixel", "round_prefer_floor", 1.5, False),
    ("nearest", "half_pixel", "round_prefer_floor", 0.5, False),
    ("nearest", "half_pixel", "floor", 2, False),
    ("nearest", "align_corners", "floor", 2, False),
    ("linear", "half_pixel", "floor", 1.5, True),
    ("linear", "align_corners", "floor", 1.5, True),
    ("linear", "asymmetric", "floor", 1.5, False),
    ("cubic", "half_pixel", "floor", 2, True),
    ("cubic", "asymmetric", "floor", 2, False),
]


@pytest.mark.filterwarnings("ignore::UserWarning:onnx2torch")
@pytest.mark.parametrize(("mode", "grid", "rounding", "scale", "possible"), RESIZES)
def test_resize(mode: str, grid: str, rounding: str, scale: float, possible: bool) -> None:
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": grid,
        "nearest_mode": rounding,
    }
    tensors = {"scales": np.float32([1, 1, scale, scale])}
    node = ("Resize", "x - scales", "y", attributes)
    if possible:
        check(node, **tensors)
    else:
        assert "cannot be converted to PyTorch" in refused(node, **tensors)


@pytest.mark.parametrize("attributes", [{"cubic_coeff_a": -0.5}, {"exclude_outside": 1}], ids=str)
def test_other_cubic_resizes_are_refused(attributes: dict) -> None:
    node = ("Resize", "x - scales", "y", {"mode": "cubic", **attributes})
    refused(node, scales=np.float32([1, 1, 2, 2]))


@pytest.mark.parametrize("output", ["x", "w", "h"], ids=["input", "tensor", "size"])
def test_output_that_is_not_computed_is_refused(output: str) -> None:
    nodes = ("Relu", "x", "y"), ("Shape", "x", "s"), ("Gather", "s two", "h")
    message = refused(*nodes, outputs=("y", output), w=WEIGHT, two=np.int64(2))
    assert f"the output '{output}' is an input or a constant, which cannot be converted" in message


# ------------------------------------------------------------------------------------- opsets


def test_lower_to_the_newest_opset_of_onnx2torch() -> None:
    before = small_graph(
        ("Split", "x", "a b c", {"axis": 1, "num_outputs": 3}),
        ("ReduceMax", "a axes", "m"),
        ("Mish", "m", "y"),
        opset=18,
        axes=np.array([2, 3]),
    )
    after = lower(before)
    assert after.opset == OPSET
    assert [(node.op, node.domain) for node in after.nodes] == [
        ("Split", ""),
        ("ReduceMax", ""),
        ("Mish", "torch_mbv2"),
    ]
    assert after.nodes[1].attributes["axes"] == [2, 3]
    assert not any(node.domain for node in before.nodes)


@pytest.mark.parametrize(
    ("axis", "count", "sizes"),
    [(1, 3, [1, 1, 1]), (1, 2, [2, 1]), (-1, 4, [2, 2, 2, 0]), (2, 1, [6])],
)
def test_explicit_splits(axis: int, count: int, sizes: list[int]) -> None:
    """The last part is what is left."""
    outputs = " ".join(f"part{i}" for i in range(count))
    before = small_graph(
        ("Split", "x", outputs, {"axis": axis, "num_outputs": count}),
        ("Relu", "part0", "y"),
        opset=18,
    )
    (split, _) = explicit_splits(before).nodes
    assert explicit_splits(before).tensors[split.inputs[1]].tolist() == sizes
    assert split.attributes == {"axis": axis}


@pytest.mark.parametrize(
    "node",
    [
        ("Split", "x", "a b", {"axis": 0, "num_outputs": 2}),
        ("Split", "x sizes", "a b", {"axis": 1}),
    ],
    ids=["of the batch", "sizes given"],
)
def test_other_splits_stay(node: tuple) -> None:
    before = small_graph(node, ("Relu", "a", "y"), opset=18, sizes=np.array([1, 2]))
    assert explicit_splits(before) is before


@pytest.mark.parametrize(("count", "image"), [(2, IMAGE), (2, IMAGE[..., :5]), (3, IMAGE)])
def test_split_and_concat(count: int, image: np.ndarray) -> None:
    parts = [f"part{i}" for i in range(count)]
    check(
        ("Split", "x", " ".join(parts), {"axis": -1, "num_outputs": count}),
        ("Concat", " ".join(reversed(parts)), "y", {"axis": -1}),
        opset=18,
        shape=("n", *image.shape[1:]),
        image=image,
    )


# ------------------------------------------------------------------- what is declared as the input


def convolutions(channels: int, shape: tuple) -> onnx.ModelProto:
    model = small_model(
        ("Conv", "x w", "t"),
        ("Relu", "t", "r"),
        ("Conv", "r w2", "y"),
        shape=shape,
        w=WEIGHT,
        w2=np.ones((2, channels, 1, 1), np.float32),
    )
    for node, name in zip(model.graph.node, ("first", "act", "second"), strict=True):
        node.name = name
    return model


@pytest.mark.parametrize(
    ("channels", "shape", "name"),
    [
        (5, ("n", 3, 6, 6), "second"),
        (4, ("n", 2, 6, 6), "first"),
        (5, ("n", 3, "h", "w"), "second"),
    ],
)
def test_misfit_names_its_node(channels: int, shape: tuple, name: str) -> None:
    with pytest.raises(ModelError, match=rf"node '{name}' \(Conv\)") as caught:
        load_onnx(convolutions(channels, shape))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "shape", [("n", 3, "h", "w"), ("n", "c", "h", "w"), (1, 3, 6, 6), (4, 3, "h", 6)], ids=str
)
def test_open_sizes_are_no_misfit(shape: tuple) -> None:
    module = load_onnx(convolutions(4, shape))
    assert module(torch.from_numpy(IMAGE)).shape == (2, 2, 4, 4)


def test_input_without_a_declared_shape() -> None:
    model = convolutions(4, ("n", 3, 6, 6))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert load_onnx(model)(torch.from_numpy(IMAGE)).shape == (2, 2, 4, 4)


@pytest.mark.parametrize(
    "nodes",
    [
        [("Tile", "x many", "y")],
        [("Tile", "x many", "t"), ("ReduceMean", "t", "y")],
        [("Expand", "one sizes", "t"), ("Add", "x t", "y")],
        [("Pad", "x pads", "y")],
    ],
    ids=["tile", "tile within", "expand", "pad"],
)
def test_giant_values_are_refused_without_memory(nodes: list[tuple]) -> None:
    """Thousands of gigabytes; sizes are computed, values are not."""
    tracemalloc.start()
    message = refused(
        *nodes,
        many=np.array([1, 1, 100_000, 100_000]),
        sizes=np.array([1, 1, 1_000_000, 1_000_000]),
        pads=np.array([0, 0, 0, 0, 0, 0, 1_000_000, 1_000_000]),
        one=np.float32(1),
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "node " in message
    assert peak < 2**26


# ------------------------------------------------------------------- before and behind the network


@functools.cache
def network() -> tuple[MobileNetV2, bytes]:
    """A MobileNetV2 of two blocks, and its file from `image` to `logits`."""
    blocks = (Block(None, 8), Block(16, 8, residual=True))
    architecture = Architecture(8, blocks, 32, num_classes=5, norm=False)
    model = randomise(MobileNetV2.from_architecture(architecture))
    return model, export(model, torch.randn(2, 3, 16, 16)).SerializeToString()


def surrounded(
    *before: tuple,
    after: tuple[tuple, ...] = (),
    dtype: type = np.float32,
    opset: int = 13,
    shape: tuple = ("n", None, None, None),
    **tensors: object,
) -> onnx.ModelProto:
    """The network with nodes from `x` to `image`, and from `logits` to `y`."""
    model = onnx.load_model_from_string(network()[1])
    model.opset_import[0].version = opset
    first = [helper.make_node(op, i.split(), [o], **dict(*a)) for op, i, o, *a in before]
    last = [helper.make_node(op, i.split(), [o], **dict(*a)) for op, i, o, *a in after]
    nodes = [*first, *model.graph.node, *last]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()
    )
    if before:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, shape))
    if after:
        model.graph.output[0].CopyFrom(
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
        )
    return model


def photo(*, channels_last: bool, dtype: type = np.float32) -> torch.Tensor:
    values = np.random.default_rng(3).integers(0, 256, (2, 3, 16, 16))
    values = values.transpose(0, 2, 3, 1) if channels_last else values
    return torch.from_numpy(np.ascontiguousarray(values.astype(dtype)))


MEAN = np.float32([120, 115, 100])
STD = np.float32([60, 50, 70])
COLUMN = (3, 1, 1)
NHWC = ("Transpose", "b", "image", {"perm": [0, 3, 1, 2]})
PREPROCESSINGS = {
    "sub, div": (
        [("Sub", "x mean", "a"), ("Div", "a std", "image")],
        {"mean": MEAN.reshape(COLUMN), "std": STD.reshape(1, *COLUMN)},
    ),
    "mul, add": (
        [("Mul", "half x", "a"), ("Add", "std a", "image")],
        {"half": np.float32(0.5), "std": -STD.reshape(COLUMN)},
    ),
    "sub from": ([("Sub", "mean x", "image")], {"mean": MEAN.reshape(COLUMN)}),
    "cast": ([("Cast", "x", "image", {"to": 1})], {}),
    "cast, div": (
        [("Cast", "x", "a", {"to": 1}), ("Div", "a std", "image")],
        {"std": np.float32([50])},
    ),
    "channels last": ([("Identity", "x", "b"), NHWC], {}),
    "channels last, before": (
        [("Cast", "x", "f", {"to": 1}), ("Sub", "f mean", "a"), ("Div", "a std", "b"), NHWC],
        {"mean": MEAN, "std": STD.reshape(1, 1, 1, 3)},
    ),
    "channels last, behind": (
        [
            ("Transpose", "x", "t", {"perm": [0, 3, 1, 2]}),
            ("Sub", "t mean", "a"),
            ("Div", "a std", "image"),
        ],
        {"mean": MEAN.reshape(COLUMN), "std": STD.reshape(COLUMN)},
    ),
}


@pytest.mark.parametrize("name", [*PREPROCESSINGS])
def test_preprocessing(name: str) -> None:
    nodes, tensors = PREPROCESSINGS[name]
    dtype = np.uint8 if "Cast" in str(nodes) else np.float32
    model = surrounded(*nodes, dtype=dtype, **tensors)
    loaded = load_onnx(model)
    assert type(loaded) is MobileNetV2
    image = photo(channels_last="last" in name, dtype=dtype)
    assert loaded.architecture.preprocessing.channels_last == ("last" in name)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), run(model, image), rtol=1e-4, atol=1e-3)


def test_preprocessing_is_reduced_to_scale_and_shift() -> None:
    loaded = load_onnx(
        surrounded(
            ("Sub", "x mean", "a"),
            ("Div", "a std", "image"),
            mean=np.float32([2, 4, 6]).reshape(COLUMN),
            std=np.float32(2),
        )
    )
    expected = Preprocessing(False, scale=(0.5,), shift=(-1.0, -2.0, -3.0))
    assert loaded.architecture.preprocessing == expected


@pytest.mark.parametrize(
    ("nodes", "tensors"),
    [
        ([("Div", "one x", "image")], {}),
        ([("Mul", "x map", "image")], {"map": np.ones((16, 16), np.float32)}),
        ([("Sub", "x row", "image")], {"row": np.ones((1, 1, 16), np.float32)}),
        ([("Mul", "x x", "image")], {}),
        ([("Transpose", "x", "image", {"perm": [0, 1, 3, 2]})], {}),
        ([("Sqrt", "x", "image")], {}),
    ],
    ids=["divided by the image", "one a pixel", "one a column", "square", "turned", "root"],
)
def test_other_preprocessing_is_converted(nodes: list[tuple], tensors: dict) -> None:
    model = surrounded(*nodes, shape=("n", 3, 16, 16), one=np.float32(1), **tensors)
    loaded = load_onnx(model)
    assert type(loaded) is not MobileNetV2
    image = photo(channels_last=False) + 1
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), run(model, image), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("nodes", "opset", "output"),
    [
        ([("Softmax", "logits", "y")], 13, "softmax"),
        ([("Softmax", "logits", "y", {"axis": 1})], 13, "softmax"),
        ([("Softmax", "logits", "y")], 12, "softmax"),
        ([("LogSoftmax", "logits", "y", {"axis": -1})], 13, "log_softmax"),
        ([("Sigmoid", "logits", "y")], 13, "sigmoid"),
        ([("Cast", "logits", "y", {"to": 1})], 13, "logits"),
        ([("Softmax", "logits", "p"), ("Cast", "p", "y", {"to": 1})], 13, "softmax"),
        ([("Cast", "logits", "p", {"to": 1}), ("Softmax", "p", "y")], 13, "softmax"),
    ],
)
def test_postprocessing(nodes: list[tuple], opset: int, output: str) -> None:
    model = surrounded(after=tuple(nodes), opset=opset)
    loaded = load_onnx(model)
    assert type(loaded) is MobileNetV2
    assert loaded.architecture.output == output
    image = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), run(model, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "nodes",
    [
        [("Softmax", "logits", "y", {"axis": 0})],
        [("Softmax", "logits", "p"), ("Softmax", "p", "y")],
        [("Sigmoid", "logits", "p"), ("Softmax", "p", "y")],
        [("Mul", "logits two", "p"), ("Exp", "p", "y")],
        [("Relu", "logits", "y")],
    ],
    ids=["over the batch", "twice", "sigmoid, softmax", "exp", "relu"],
)
def test_other_postprocessing_is_converted(nodes: list[tuple]) -> None:
    model = surrounded(after=tuple(nodes), two=np.float32(2))
    loaded = load_onnx(model)
    assert type(loaded) is not MobileNetV2
    image = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), run(model, image), rtol=1e-4, atol=1e-4)


def test_logits_that_are_an_output_too() -> None:
    model = surrounded(after=(("Softmax", "logits", "y"),))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5]))
    probabilities, logits = load_onnx(model)(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(probabilities, logits.softmax(1))


def test_scaled_logits_are_scaled_weights() -> None:
    loaded = load_onnx(surrounded(after=(("Mul", "logits two", "y"),), two=np.float32(2)))
    assert type(loaded) is MobileNetV2
    torch.testing.assert_close(loaded.classifier[1].weight, 2 * network()[0].classifier[1].weight)


def test_network_without_surroundings_is_itself() -> None:
    model, data = network()
    loaded = load_onnx(data)
    assert loaded.architecture.preprocessing is None
    assert loaded.architecture.output == "logits"
    image = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), model(image))


def test_open_size_that_constants_imply() -> None:
    """The file declares any height and width, but a Reshape inside wants a map of 16 x 16."""
    head = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 256, 5))
    axes = {"image": {0: "n", 2: "h", 3: "w"}}
    proto = export(randomise(head), torch.zeros(1, 3, 32, 32), dynamic_axes=axes)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(load_onnx(proto)(image), run(proto, image), rtol=1e-4, atol=1e-5)


def test_open_features() -> None:
    """Nothing tells how many there are but the weights."""
    axes = {"image": {0: "n", 1: "d"}}
    proto = export(randomise(nn.Linear(7, 5)), torch.zeros(1, 7), dynamic_axes=axes)
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(load_onnx(proto)(rows), run(proto, rows), rtol=1e-4, atol=1e-5)
