"""Skips tests marked `cuda`, with the reason, where the kernels cannot run, and has the fixtures
that several files share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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


@pytest.fixture(scope="module")
def one_thread():
    """For models that are too small for more: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def load_script():
    """Imports a script that needs the extra `bench`, by its name."""
    pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

    def load(name):
        path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
