"""The schemas, which Python has and the compiled library may have: they are the same, and the
library's are not defined again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_mbv2
from torch_mbv2 import ops


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_what_is_registered_is_what_python_has(op):
    overload = getattr(torch.ops.torch_mbv2, op).default
    assert overload._schema == torch._C.parse_schema(f"torch_mbv2::{ops.SCHEMAS[op]}")
    assert torch.Tag.pt2_compliant_tag in overload.tags


#: What the library alone has: it tells of plans and graphs.
TELLS = {"explain", "replays", "forget_replays"}
HAS_LIBRARY = hasattr(torch.ops.torch_mbv2, "explain")


def test_every_op_has_a_schema_and_a_wrapper():
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    expected = {*ops.SCHEMAS, *(TELLS if HAS_LIBRARY else ())}
    assert {f"torch_mbv2::{op}" for op in expected} == {
        name for name in names if name.startswith("torch_mbv2::")
    }
    assert all(callable(getattr(where, op)) for op in ops.SCHEMAS for where in (ops, ops.raw))


@pytest.mark.skipif(HAS_LIBRARY, reason="there is such a library")
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


ALONE = """
import torch
torch.ops.load_library({library!r})
missing = [op for op in {ops!r} if not hasattr(torch.ops.torch_mbv2, op)]
assert not missing, missing
x = torch.ones(2, 8, 5, 5, device={device!r})
weight = torch.ones(8, 8, 1, 1, device={device!r})
arguments = (x, weight, None, [1, 1], [0] * 4, [1, 1], 1, None, 4.0)
if {device!r} == "cuda":
    assert torch.equal(torch.ops.torch_mbv2.conv2d(*arguments), torch.full_like(x, 4))
import sys
assert "torch_mbv2" not in sys.modules
"""


@pytest.mark.skipif(not HAS_LIBRARY, reason="needs the compiled library")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_library_alone_has_every_op(device):
    """Without the Python package."""
    library = str(Path(torch_mbv2.__file__).with_name("_C.so"))
    code = ALONE.format(library=library, ops=[*ops.SCHEMAS, *TELLS], device=device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
