"""The schemas, which Python has and the compiled library may have: they are the same, and the
library's are not defined again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from torch_mbv2 import ops


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_what_is_registered_is_what_python_has(op):
    overload = getattr(torch.ops.torch_mbv2, op).default
    assert overload._schema == torch._C.parse_schema(f"torch_mbv2::{ops.SCHEMAS[op]}")
    assert torch.Tag.pt2_compliant_tag in overload.tags


def test_every_op_has_a_schema_and_a_wrapper():
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert {f"torch_mbv2::{op}" for op in ops.SCHEMAS} == {
        name for name in names if name.startswith("torch_mbv2::")
    }
    assert all(callable(getattr(where, op)) for op in ops.SCHEMAS for where in (ops, ops.raw))


def test_a_library_may_have_the_schemas():
    """As one that defines, without tags, what Python then adds fakes and implementations to."""
    schema = ops.SCHEMAS["add"]
    code = f"""
import torch
library = torch.library.Library("torch_mbv2", "DEF")
library.define({schema!r})
library.impl("conv_pool", lambda *_: None, "CUDA")  # before its schema
from torch_mbv2 import ops
op = torch.ops.torch_mbv2.add.default
assert torch.Tag.pt2_compliant_tag in op.tags
x = torch.ones(2, 3, 4, 5)
assert torch.equal(op(x, x, None, None), x + x)
assert ops.add(x.to("meta"), x.to("meta")).stride() == (60, 1, 15, 3)
assert torch._C._dispatch_has_kernel_for_dispatch_key("torch_mbv2::conv_pool", "CUDA")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
