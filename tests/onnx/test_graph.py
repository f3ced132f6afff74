"""Files that are no usable model: one clear sentence each."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import contextlib
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")

import numpy as np
import torch
from onnx import TensorProto, helper

from torch_mbv2.errors import ModelError, UnavailableError
from torch_mbv2.onnx import load_onnx


def model(nodes: list[onnx.NodeProto], opset: int = 13, **tensors: np.ndarray) -> onnx.ModelProto:
    """A model from `x` (N, 3, 8, 8) to `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def convolution() -> onnx.ModelProto:
    weight = np.ones((4, 3, 3, 3), np.float32)
    return model([helper.make_node("Conv", ["x", "weight"], ["y"], name="first")], weight=weight)


def rejected(source: object) -> str:
    """The sentence with which `source` is refused."""
    with pytest.raises(ModelError) as caught:
        load_onnx(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    assert rejected(path) == f"{path}: No such file or directory"


def test_folder(tmp_path: Path) -> None:
    assert rejected(str(tmp_path)) == f"{tmp_path}: Is a directory"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"This is a text, not a model.\n" * 20,
        b"{}",
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        bytes(64),
    ],
    ids=["empty", "text", "json", "image", "zeros"],
)
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert rejected(path).startswith(f"{path}: not an ONNX model")


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file(part: float, tmp_path: Path) -> None:
    data = convolution().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(part * len(data))])
    assert str(path) in rejected(path)


def test_truncated_behind_the_graph() -> None:
    """The opset comes last in a file: a cut there leaves a graph that says no version."""
    cut = convolution()
    del cut.opset_import[:]
    assert "names no ONNX opset; is the file complete?" in rejected(cut)


def test_tensor_of_another_size_than_declared() -> None:
    damaged = convolution()
    damaged.graph.initializer[0].dims[0] = 5
    assert "the ONNX model: damaged: " in rejected(damaged)


def test_attribute_that_does_not_exist() -> None:
    """A misspelt attribute would silently mean its default."""
    damaged = convolution()
    damaged.graph.node[0].attribute.append(helper.make_attribute("padz", [1, 1, 1, 1]))
    assert "node 'first' (Conv) has an attribute 'padz'" in rejected(damaged)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes(seed: int) -> None:
    """Whatever a byte turns into: a model or one sentence, no other exception."""
    rng = np.random.default_rng(seed)
    data = bytearray(convolution().SerializeToString())
    for position in rng.integers(0, len(data), 3):
        data[position] = rng.integers(256)
    with contextlib.suppress(ModelError):
        load_onnx(bytes(data))


def test_missing_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(convolution(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert load_onnx(path) is not None
    assert "weights are in another file" in rejected(path.read_bytes())
    (tmp_path / "w.data").unlink()
    message = rejected(path)
    assert message.startswith(f"{path}: its weights, in w.data beside it, cannot be read")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_external_data_elsewhere(location: str, tmp_path: Path) -> None:
    """A model cannot make the loader read files outside its folder."""
    (tmp_path / "secret").write_bytes(bytes(432))
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    onnx.save(convolution(), path, save_as_external_data=True, location="w.data", size_threshold=0)
    outside = onnx.load(path, load_external_data=False)
    for entry in outside.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(outside.SerializeToString())
    assert "cannot be read" in rejected(path)


def test_node_that_reads_nothing() -> None:
    broken = model([helper.make_node("Relu", ["missing"], ["y"], name="act")])
    assert "node 'act' (Relu) reads 'missing', which nothing computes" in rejected(broken)


def test_output_that_nothing_computes() -> None:
    broken = model([helper.make_node("Relu", ["x"], ["z"])])
    assert "nothing computes the output 'y'" in rejected(broken)


def test_old_opset() -> None:
    assert "opset 5 is too old" in rejected(model([helper.make_node("Relu", ["x"], ["y"])], 5))


def test_scale_that_is_computed() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["scale"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
    ]
    message = rejected(model(nodes))
    assert (
        "node 'quantise' (QuantizeLinear) has a scale or zero point that is no constant" in message
    )


def test_operator_of_the_optimiser() -> None:
    node = helper.make_node("BiasGelu", ["x", "weight"], ["y"], domain="com.microsoft")
    message = rejected(model([node], weight=np.ones(8, np.float32)))
    assert "comes from ONNX Runtime's optimiser: load the file that was optimised" in message


def test_integer_model() -> None:
    integers = convolution()
    weight = np.ones((4, 3, 3, 3), np.int32)
    integers.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
    assert "not a float model" in rejected(integers)


@pytest.mark.parametrize("operator", ["BatchNormalization", "Dropout"])
def test_training_mode(operator: str) -> None:
    if operator == "Dropout":
        inputs, attributes = ["x", "ratio", "training"], {}
        tensors = {"ratio": np.float32(0.5), "training": np.array(True)}
    else:
        inputs, attributes = ["x", "v", "v", "v", "v"], {"training_mode": 1}
        tensors = {"v": np.ones(3, np.float32)}
    node = helper.make_node(operator, inputs, ["y"], name="layer", **attributes)
    message = rejected(model([node], 15, **tensors))
    assert "is in training mode: call model.eval() and export the model again" in message


def test_control_flow() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])],
        "body",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    node = helper.make_node(
        "If", ["flag"], ["y"], name="branch", then_branch=body, else_branch=body
    )
    message = rejected(model([node], flag=np.array(True)))
    assert "node 'branch' (If, opset 13) has a graph attribute" in message


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="load_onnx takes a path, bytes or a ModelProto"):
        load_onnx(3)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_mbv2.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delattr("torch_mbv2.onnx.graph", raising=False)
    monkeypatch.delattr("torch_mbv2.onnx.clean", raising=False)
    with pytest.raises(UnavailableError, match=r"needs the package onnx: pip install"):
        load_onnx("model.onnx")


# --------------------------------------------------------------------------------- hostile files


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """What happens inside takes little memory and time, whatever a file asks for."""
    load_onnx(convolution())  # what is imported and cached is not the file's
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**25
        assert time.perf_counter() - start < 5
    finally:
        tracemalloc.stop()


def rejected_cheaply(source: object) -> str:
    """As `rejected`, cheaply, in a line that a terminal can show."""
    with cheap():
        message = rejected(source)
    assert message.isprintable()
    return message


def test_nodes_in_any_order() -> None:
    nodes = [
        helper.make_node("Add", ["b", "a"], ["y"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Relu", ["x"], ["a"]),
    ]
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(load_onnx(model(nodes))(image), torch.zeros_like(image))


@pytest.mark.parametrize(
    "links",
    [[("x", "y"), ("y", "y2"), ("y2", "y")], [("a", "a")], [("b", "a"), ("a", "b")]],
    ids=str,
)
def test_cycle(links: list[tuple[str, str]]) -> None:
    nodes = [helper.make_node("Add", ["x", a], [b], name=f"to_{b}") for a, b in links]
    nodes.append(helper.make_node("Relu", [links[-1][1]], ["end"]))
    broken = model(nodes)
    broken.graph.output[0].name = "end"
    message = rejected_cheaply(broken)
    assert "computed from its own output" in message or "which exists already" in message


@pytest.mark.parametrize("value", ["x", "weight", "a"])
def test_value_computed_twice(value: str) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["x"], [value], name="again"),
        helper.make_node("Add", ["a", "weight"], ["y"]),
    ]
    message = rejected(model(nodes, weight=np.ones(8, np.float32)))
    assert f"node 'again' (Neg) computes '{value}', which exists already" in message


def test_negative_size_of_a_weight() -> None:
    broken = convolution()
    broken.graph.initializer[0].dims[0] = -4
    assert "the tensor 'weight': it has the shape [-4, 3, 3, 3]" in rejected_cheaply(broken)


def test_negative_size_of_the_input() -> None:
    broken = convolution()
    broken.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -8
    assert "the input 'x' has a negative size: [None, 3, -8, 8]" in rejected_cheaply(broken)


HUGE = 10**12


def test_giant_weight() -> None:
    broken = convolution()
    broken.graph.initializer[0].dims[0] = HUGE
    assert "damaged: the tensor 'weight'" in rejected_cheaply(broken)


def test_giant_input() -> None:
    broken = convolution()
    for dim in broken.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = HUGE
    assert str(HUGE) in rejected_cheaply(broken)


def test_giant_constant() -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["c"], name="giant"),
        helper.make_node("Mul", ["x", "c"], ["y"]),
    ]
    assert "node 'giant' (ConstantOfShape)" in rejected_cheaply(model(nodes, size=np.array([HUGE])))


# ------------------------------------------------------------------------ hostile external data


def external(folder: Path, *, constant: bool = False, data: bytes = bytes(432)) -> onnx.ModelProto:
    """The convolution, whose weight (4, 3, 3, 3) of 432 bytes lies in `folder`/w.data."""
    (folder / "w.data").write_bytes(data)
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4, 3, 3, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "0"), ("length", "432")):
        tensor.external_data.add(key=key, value=value)
    outside = convolution()
    del outside.graph.initializer[:]
    if constant:
        node = helper.make_node("Constant", [], ["weight"])
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
        outside.graph.node.insert(0, node)
    else:
        outside.graph.initializer.append(tensor)
    return outside


def located(outside: onnx.ModelProto) -> TensorProto:
    """The tensor that lies elsewhere."""
    (tensor,) = outside.graph.initializer or [outside.graph.node[0].attribute[0].t]
    return tensor


def saved(outside: onnx.ModelProto, folder: Path, **entries: str | None) -> Path:
    """The model in a file of `folder`, with these entries of its external data set or left out."""
    tensor = located(outside)
    kept = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(outside.SerializeToString())
    return path


@pytest.mark.parametrize("constant", [False, True], ids=["initializer", "constant"])
def test_external_data(constant: bool, tmp_path: Path) -> None:
    weight = np.arange(108, dtype=np.float32)
    data = bytes(16) + weight.tobytes() + bytes(7)
    path = saved(external(tmp_path, constant=constant, data=data), tmp_path, offset="16")
    (loaded,) = load_onnx(path).parameters()
    np.testing.assert_array_equal(loaded.detach().numpy().reshape(-1), weight)


@pytest.mark.parametrize("constant", [False, True], ids=["initializer", "constant"])
@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"offset": "1"}, "'w.data' ends before 'weight'"),
        ({"offset": str(HUGE), "length": None}, "'w.data' ends before 'weight'"),
        ({"offset": "-4"}, "'w.data' ends before 'weight'"),
        ({"offset": "none"}, "invalid literal"),
        ({"length": "431"}, "the length of 'weight' does not fit its shape"),
        ({"length": str(HUGE)}, "the length of 'weight' does not fit its shape"),
        ({"length": "-1"}, "the length of 'weight' does not fit its shape"),
        ({"location": "missing.data"}, "No such file or directory"),
        ({"location": "."}, ""),
        ({"location": ""}, ""),
        ({"location": None}, ""),
        ({"location": "/dev/zero"}, ""),
        ({"location": "w.data\0"}, "null"),
        ({"location": "a/../../folder/w.data"}, ""),
    ],
    ids=str,
)
def test_external_data_that_does_not_fit(
    entries: dict, why: str, constant: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = saved(external(folder, constant=constant), folder, **entries)
    message = rejected_cheaply(path)
    assert message.startswith(f"{path}: its weights, in ")
    assert why in message


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_external_data_is_no_larger_than_its_tensor(tmp_path: Path) -> None:
    """A file of 1 TiB, as far as its length goes, of which nothing is asked for."""
    outside = external(tmp_path)
    located(outside).dims[0] = 0
    with (tmp_path / "w.data").open("r+b") as file:
        file.truncate(2**40)
    path = saved(outside, tmp_path, length=None)
    with cheap():
        (weight,) = load_onnx(path).parameters()
    assert weight.shape == (0, 3, 3, 3)


def test_external_tensor_of_a_giant_shape(tmp_path: Path) -> None:
    outside = external(tmp_path)
    located(outside).dims[0] = HUGE
    assert "ends before 'weight'" in rejected_cheaply(saved(outside, tmp_path, length=None))


def test_external_tensor_of_a_negative_size(tmp_path: Path) -> None:
    outside = external(tmp_path)
    located(outside).dims[0] = -4
    assert "'weight' has a negative size" in rejected_cheaply(saved(outside, tmp_path))


def test_many_tensors_in_one_place(tmp_path: Path) -> None:
    """A small file whose weights would fill the memory."""
    outside = external(tmp_path, data=bytes(2**22))
    weight = located(outside)
    weight.dims[:] = [2**20]
    weight.external_data[2].value = str(2**22)
    for i in range(1000):
        copy = outside.graph.initializer.add()
        copy.CopyFrom(weight)
        copy.name = f"copy{i}"
    path = tmp_path / "model.onnx"
    path.write_bytes(outside.SerializeToString())
    assert "many of them lie in the same place" in rejected_cheaply(path)


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_link_to_data_elsewhere(link: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = saved(external(folder), folder)
    (tmp_path / "secret").write_bytes(bytes(432))
    (folder / "w.data").unlink()
    if link == "symbolic":
        (folder / "w.data").symlink_to(tmp_path / "secret")
    else:
        (folder / "w.data").hardlink_to(tmp_path / "secret")
    assert "cannot be read" in rejected_cheaply(path)


# ---------------------------------------------------------------------------- hostile functions


def functions(bodies: dict[str, list[onnx.NodeProto]], overload: str = "") -> onnx.ModelProto:
    """A model that calls the last of these functions, each of `a` that computes `b`."""
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("local", 1)]
    called = model([helper.make_node([*bodies][-1], ["x"], ["y"], domain="local")])
    called.graph.node[0].overload = overload
    called.opset_import.append(opsets[1])
    called.ir_version = 10
    for name, nodes in bodies.items():
        function = helper.make_function("local", name, ["a"], ["b"], nodes, opsets)
        function.overload = overload
        called.functions.append(function)
    return called


def call(name: str, source: str = "a", result: str = "b", overload: str = "") -> onnx.NodeProto:
    return helper.make_node(name, [source], [result], domain="local", overload=overload)


def test_functions_are_inlined() -> None:
    called = functions(
        {"inner": [helper.make_node("Relu", ["a"], ["b"])], "outer": [call("inner")]}
    )
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(load_onnx(called)(image), image.relu())


@pytest.mark.parametrize("names", [["f"], ["f", "g"], ["f", "g", "h"]], ids=len)
def test_functions_that_call_each_other(names: list[str]) -> None:
    bodies = {name: [call(names[i - 1])] for i, name in enumerate(names)}
    message = rejected_cheaply(functions(bodies))
    assert message == "the ONNX model: its functions call each other in circles"


def twice(name: str, nested: bool, overload: str) -> list[onnx.NodeProto]:
    """A body that calls a function two times, from the branches of an If where `nested`."""
    if not nested:
        return [call(name, "a", "t", overload), call(name, "t", "b", overload)]
    branches = {}
    for branch in ("then_branch", "else_branch"):
        value = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
        node = call(name, "a", "b", overload)
        branches[branch] = helper.make_graph([node], branch, [], [value])
    flag = helper.make_node("Constant", [], ["f"], value=helper.make_tensor("f", 9, [], [1]))
    return [flag, helper.make_node("If", ["f"], ["b"], **branches)]


@pytest.mark.parametrize("overload", ["", "other"])
@pytest.mark.parametrize("nested", [False, True], ids=["direct", "in branches"])
def test_exponentially_many_nodes(nested: bool, overload: str) -> None:
    """Forty functions that each call the one before twice are a million million nodes."""
    bodies = {"f0": [helper.make_node("Relu", ["a"], ["b"])]}
    for i in range(40):
        bodies[f"f{i + 1}"] = twice(f"f{i}", nested, overload)
    bomb = functions(bodies, overload)
    if overload:  # small ones of the same names, which nobody calls
        harmless = functions(dict.fromkeys(bodies, bodies["f0"]))
        bomb.functions.extend(harmless.functions)
    assert "its functions come to" in rejected_cheaply(bomb)


# ----------------------------------------------------------------------------------- odd content


def test_sparse_weights() -> None:
    sparse = convolution()
    values = helper.make_tensor("weight", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [HUGE - 1])
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [HUGE]))
    del sparse.graph.initializer[:]
    assert "has sparse weights, which are not supported" in rejected_cheaply(sparse)


@pytest.mark.parametrize("opset", [10_000, 2**62])
def test_new_opset(opset: int) -> None:
    message = rejected(model([helper.make_node("Relu", ["x"], ["y"])], opset))
    assert f"opset {opset} is newer than the installed package onnx" in message


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("group", [1, 1], "int"),
        ("auto_pad", 3, "string"),
        ("strides", "two", "ints"),
        ("strides", 2, "ints"),
        ("strides", [1.5, 1.5], "ints"),
    ],
)
def test_attribute_of_another_type(name: str, value: object, wanted: str) -> None:
    damaged = convolution()
    damaged.graph.node[0].attribute.append(helper.make_attribute(name, value))
    message = rejected(damaged)
    assert f"node 'first' (Conv) has an attribute '{name}' that must be {wanted}" in message


def test_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    assert f"cannot have {2**31} bytes, only 2 GiB" in rejected_cheaply(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    path = tmp_path / "model.onnx"
    os.mkfifo(path)
    assert rejected_cheaply(path) == f"{path}: not a file"


LONG = "\x1b[2J\n\r\u2028name" * 1000


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.ClearField("input") or node.input.append(LONG),
        lambda node: setattr(node, "op_type", LONG),
        lambda node: setattr(node, "domain", LONG),
        lambda node: node.attribute.append(helper.make_attribute(LONG, 1)),
        lambda node: node.attribute.append(helper.make_attribute("group", LONG)),
        lambda node: node.ClearField("output") or node.output.append(LONG),
        lambda node: node.attribute.append(helper.make_attribute("auto_pad", LONG)),
    ],
    ids=["input", "operator", "domain", "attribute", "value", "output", "mode"],
)
def test_names_that_no_terminal_should_see(change: Callable[[onnx.NodeProto], None]) -> None:
    damaged = convolution()
    damaged.graph.node[0].name = LONG
    change(damaged.graph.node[0])
    assert rejected(damaged).isprintable()


def test_file_name_in_a_message_of_one_line(tmp_path: Path) -> None:
    path = saved(external(tmp_path), tmp_path, location=LONG)
    assert rejected(path).isprintable()
