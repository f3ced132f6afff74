"""Skips tests marked `cuda`, with the reason, where the kernels cannot run."""

from __future__ import annotations

import pytest
import torch

import torch_mbv2


def pytest_collection_modifyitems(items):
    reason = torch_mbv2.why_not_available()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=f"needs the CUDA kernels: {reason}")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def exact_stock(monkeypatch):
    """Stock convolutions without TF32, as float32 is compared with (matmuls default to that)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
