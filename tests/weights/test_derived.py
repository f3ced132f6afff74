"""What is derived from parameters follows them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from onnx_helpers import randomise
from torch import nn

import torch_mbv2
from torch_mbv2 import modules
from torch_mbv2.weights.derived import Sources

SETTING = [[1, 8, 1, 1], [6, 16, 2, 2]]


def blocks(dtype: torch.dtype = torch.float16) -> dict[str, modules._FusedBlock]:
    """A stem block and an inverted residual, by kind; what is made in inference mode counts no
    versions."""
    with torch.inference_mode(False):
        net = randomise(torch_mbv2.MobileNetV2(10, inverted_residual_setting=SETTING))
        fast = torch_mbv2.patch(net, level="block").to(dtype)
    found = {m.kind: m for m in fast.modules() if isinstance(m, modules._FusedBlock)}
    assert set(found) == {"stem_block", "inverted_residual"}
    return found


def packed_of(block: modules._FusedBlock) -> torch.Tensor:
    """What the op is given."""
    schema = getattr(torch.ops.torch_mbv2, block.kind).default._schema
    names = [argument.name for argument in schema.arguments]
    return block.arguments(None)[names.index("packed") - 1]


PARAMETERS = [
    (kind, f"{name}_{what}")
    for kind, names in (
        ("stem_block", ("stem", "depthwise", "project")),
        ("inverted_residual", ("expand", "depthwise", "project")),
    )
    for name in names
    for what in ("weight", "bias")
]


@pytest.mark.parametrize("change", ["in place", "replaced"])
@pytest.mark.parametrize(("kind", "name"), PARAMETERS)
def test_blocks_pack_edited_parameters_anew(kind, name, change):
    block = blocks()[kind]
    packed = packed_of(block)
    before, place = packed.clone(), packed.data_ptr()
    others = {n: b for n, b in block.exact_biases.items() if n != name}
    parameter = getattr(block, name)
    with torch.no_grad():
        if change == "in place":
            parameter.mul_(2)
        else:
            setattr(block, name, nn.Parameter(parameter * 2, requires_grad=False))
    packed = packed_of(block)
    assert not torch.equal(packed, before)
    assert packed.data_ptr() == place  # graphs that users captured read there
    assert torch.equal(packed, block._pack())
    if name in block.exact_biases:
        assert torch.equal(block.exact_biases[name], getattr(block, name).float())
    for other, exact in others.items():
        assert block.exact_biases[other] is exact  # more exact than their parameters


def test_what_is_not_edited_is_not_packed_again(monkeypatch):
    block = blocks()["inverted_residual"]
    monkeypatch.setattr(block, "_pack", lambda: pytest.fail("packed again"))
    packed_of(block)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_follow_their_own_parameters(copied):
    block = blocks()["inverted_residual"]
    twin = copied(block)
    assert torch.equal(packed_of(twin), packed_of(block))
    with torch.no_grad():
        twin.project_weight.mul_(2)
    assert not torch.equal(packed_of(twin), packed_of(block))
    assert torch.equal(packed_of(block), block._pack())


def test_a_move_keeps_the_exact_biases():
    block = blocks(torch.float32)["inverted_residual"]
    exact = {name: bias.clone() for name, bias in block.exact_biases.items()}
    block.half()
    packed_of(block)
    assert all(torch.equal(bias, exact[name]) for name, bias in block.exact_biases.items())


@pytest.mark.parametrize("edit", ["nothing", "in place", "replaced", "removed", "added"])
def test_edited_parameters_are_noticed(edit):
    layer = torch_mbv2.patch(nn.Linear(4, 4).eval())
    other = torch_mbv2.patch(nn.Linear(4, 4, bias=False).eval())
    sources = Sources([layer, other])
    with torch.no_grad():
        if edit == "in place":
            layer.weight.mul_(2)
        elif edit == "replaced":
            layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
        elif edit == "removed":
            layer.bias = None
        elif edit == "added":
            other.bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    assert sources.are_as_they_were() == (edit == "nothing")
