"""Every form of a MobileNetV2 file gives the same network: equal to ONNX Runtime, on the same
kernels, and as good as the plain form for torch.export."""

# ruff: noqa: E402 (the skips come before the imports that need what may be missing)

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter

import pytest

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is the reference here")

import numpy as np
import onnx_forms
import reports
import torch
from onnx import TensorProto, numpy_helper
from onnx_forms import FORMS, LOW_PRECISION, QUANTISED, Form
from onnx_helpers import RELATIVE, relative_error, run
from torch import nn
from torch.export import ExportedProgram

import torch_mbv2
from torch_mbv2 import testing
from torch_mbv2.errors import ModelError
from torch_mbv2.measure.conditions import exact_settings
from torch_mbv2.mobilenet import Architecture, MobileNetV2
from torch_mbv2.onnx import load_onnx
from torch_mbv2.patch import fold_norms


@pytest.fixture(scope="module", params=[*FORMS])
def form(request: pytest.FixtureRequest) -> Form:
    if "dynamo" in request.param:
        pytest.importorskip("onnxscript", reason="the dynamo exporter needs onnxscript")
    return FORMS[request.param]()


@pytest.fixture(scope="module")
def model(form: Form) -> nn.Module:
    return load_onnx(form.model)


@pytest.fixture(scope="module")
def plain_kernels() -> Counter:
    return kernels(onnx_forms.plain())


def kernels(model: nn.Module) -> Counter:
    """How many layers each fused block or kernel takes."""
    return reports.counts(model)


def layers(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def test_form_is_recognised(form: Form, model: nn.Module, plain_kernels: Counter) -> None:
    assert type(model) is MobileNetV2
    assert not any(module.training for module in model.modules())
    assert len(layers(model, nn.Conv2d)) == 52
    assert len(layers(model, nn.Linear)) == 1
    names = {name for name, _ in onnx_forms.plain().named_parameters()}
    assert names.issuperset(
        name for name, _ in model.named_parameters() if not name.endswith("bias")
    )
    assert kernels(model) == plain_kernels


@pytest.mark.parametrize("batch", onnx_forms.BATCHES)
def test_form_equals_onnx_runtime(form: Form, model: nn.Module, batch: int) -> None:
    if batch not in form.batches:
        pytest.skip(f"the file takes batches of {form.batches} only")
    images = form.images[:batch]
    expected = run(form.reference or form.model, images)
    with torch.inference_mode():
        assert relative_error(model(images), expected) < RELATIVE


def test_form_takes_any_batch(form: Form, model: nn.Module) -> None:
    """Also where the file itself takes one only."""
    images = form.images[:1].expand(3, *form.images.shape[1:])
    with torch.inference_mode():
        assert model(images).shape == (3, onnx_forms.CLASSES)


@functools.cache
def exported(architecture: Architecture, dtype: torch.dtype, size: torch.Size) -> ExportedProgram:
    """The program of a network, which does not depend on its weights."""
    model = MobileNetV2.from_architecture(architecture).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (torch.zeros(2, *size, dtype=dtype),), dynamic_shapes=shapes)


def test_form_exports_with_a_dynamic_batch(form: Form, model: MobileNetV2) -> None:
    images = form.images[:1].expand(3, *form.images.shape[1:])
    program = exported(model.architecture, images.dtype, images.shape[1:]).module()
    program.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert relative_error(program(images), model(images)) < RELATIVE


@pytest.mark.parametrize("name", [*LOW_PRECISION])
def test_low_precision(name: str, plain_kernels: Counter) -> None:
    form = LOW_PRECISION[name]()
    model = load_onnx(form.model)
    assert type(model) is MobileNetV2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert kernels(model) == plain_kernels
    with torch.inference_mode():
        output = model(form.images)
        expected = form.network(form.images.float())
    assert output.dtype == torch.float16
    # Roundings of 2^-11, of weights and activations, in 53 layers.
    assert relative_error(output, expected) < 53 * 2.0**-11
    assert relative_error(output, run(form.model, form.images)) < 53 * 2.0**-11


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "legacy exporter, opset 13",
        "auto_pad SAME_UPPER of any size",
        "uint8 NHWC input with Cast, Sub, Div and Transpose",
        "NHWC input with one Transpose",
        "Softmax at the end",
    ],
)
def test_form_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Patched, the error against float64 is at most half as much again as that of stock."""
    form = FORMS[name]()
    stock = load_onnx(form.model).cuda().to(dtype)
    images = form.images.cuda()
    if images.is_floating_point():
        images = images.to(dtype)
    exact = copy.deepcopy(stock).double()
    with torch.inference_mode(), exact_settings():
        expected = exact(images.double() if images.is_floating_point() else images)
        found = torch_mbv2.patch(stock)(images)
        # Folding rounds weights once more; these few channels show that.
        forms = (stock(images), fold_norms(stock)(images))
    assert found.dtype == dtype
    ratios = [testing.error_ratio(found, form, expected) for form in forms]
    assert min(ratios) <= testing.ERROR_RATIO


def test_report_names_preprocessing() -> None:
    form = FORMS["uint8 NHWC input with Cast, Sub, Div and Transpose"]()
    (row,) = torch_mbv2.report(load_onnx(form.model)).stock
    assert (row.name, row.kind, row.reason) == ("preprocess", "Preprocess", "no kernel for it")


@pytest.mark.parametrize("name", [*QUANTISED])
def test_quantised(name: str, plain_kernels: Counter) -> None:
    """The weights are the original's but for a quantisation step, and the activations are back."""
    form = QUANTISED[name]()
    with pytest.warns(UserWarning, match="a quantised model, loaded as its float equivalent"):
        model = load_onnx(form.model)
    assert type(model) is MobileNetV2
    assert model.architecture.activation == "relu6"
    assert kernels(model) == plain_kernels
    tensors = {t.name: numpy_helper.to_array(t) for t in form.model.graph.initializer}
    names = [
        node.input[1] for node in onnx_forms.legacy().graph.node if node.op_type in ("Conv", "Gemm")
    ]
    found = dict(zip(names, layers(model, (nn.Conv2d, nn.Linear)), strict=True))
    quantised = [name for name in names if f"{name}_quantized" in tensors]
    assert len(quantised) >= 52
    for name in quantised:
        weight, scale, zero = (
            tensors[f"{name}_{part}"].astype(np.float64)
            for part in ("quantized", "scale", "zero_point")
        )
        per_channel = (-1,) + (1,) * (weight.ndim - 1) if scale.size > 1 else ()
        weight = (weight - zero.reshape(per_channel)) * scale.reshape(per_channel)
        np.testing.assert_allclose(found[name].weight.detach(), weight, rtol=1e-6, atol=0)
    with torch.inference_mode():
        # Rounding activations to 8 bits, in 53 layers, costs several percent with these weights.
        assert relative_error(model(form.images), run(form.model, form.images)) < 0.2


NO_REAL_ARITHMETIC = {
    "cast to whole numbers": [
        ("Cast", "pixels", "whole", {"to": TensorProto.INT32}),
        ("Cast", "whole", "floats", {"to": TensorProto.FLOAT}),
        ("Mul", "floats factor", "scaled", {}),
    ],
    "division of whole numbers": [
        ("Cast", "pixels", "whole", {"to": TensorProto.INT32}),
        ("Div", "whole divisor", "divided", {}),
        ("Cast", "divided", "scaled", {"to": TensorProto.FLOAT}),
    ],
}


@pytest.mark.parametrize("chain", [*NO_REAL_ARITHMETIC])
def test_whole_numbers_before_the_stem_are_not_bent(chain: str) -> None:
    """They round and wrap, so that no scale and shift does the same."""
    pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")
    proto = onnx_forms.fresh()
    steps, shape = NO_REAL_ARITHMETIC[chain], ["n", 3, onnx_forms.SIZE, onnx_forms.SIZE]
    tensors = {"factor": np.float32(1 / 8), "divisor": np.int32(32)}
    onnx_forms.prepend(proto, steps, TensorProto.FLOAT, shape, **tensors)
    images = onnx_forms.pixels().permute(0, 3, 1, 2).float().contiguous() + 0.5
    model = load_onnx(proto)
    assert type(model) is not MobileNetV2
    with torch.inference_mode():
        assert relative_error(model(images), run(proto, images)) < RELATIVE


def test_operators_of_other_domains_are_refused() -> None:
    """Whatever they are called."""
    proto = onnx_forms.fresh()
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    add.domain = "acme"
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    with pytest.raises(ModelError, match=r"\(Add\), opset 13, .* is of the domain 'acme'"):
        load_onnx(proto)


def test_nothing_is_said_of_a_float_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_onnx(onnx_forms.legacy())


def test_layout_of_onnx_runtime_is_refused(tmp_path) -> None:
    """ORT_ENABLE_ALL writes blocked weights for the machine it runs on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "all.onnx")
    onnxruntime.InferenceSession(
        onnx_forms.legacy().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    written = onnx.load(tmp_path / "all.onnx")
    if not any(node.domain == "com.microsoft.nchwc" for node in written.graph.node):
        pytest.skip("ONNX Runtime has no such layout for this processor")
    with pytest.raises(ModelError, match="ONNX Runtime's optimiser: load the file that was optim"):
        load_onnx(written)
