"""Loading the library, and every reason why the kernels cannot run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_mbv2
from torch_mbv2 import _extension

PACKAGE = Path(torch_mbv2.__file__).parent
HERE = f"this is torch {torch.__version__}, CUDA {torch.version.cuda}"
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch is built without CUDA"
)


def _record(package: Path, **info: object) -> None:
    (package / "_build_info.json").write_text(json.dumps(info))


def _library_of_another_torch(path: Path) -> None:
    """A library that needs a function that this torch has not."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler cc")
    source = "void of_a_newer_torch(void); void f(void) { of_a_newer_torch(); }"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


def _python(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_never_built(tmp_path: Path) -> None:
    why = "built without CUDA kernels: setup.py has not been run"
    assert _extension._load_from(tmp_path) == why


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "_build_info.json").write_text(text)
    assert _extension.build_info(tmp_path) == {}


@pytest.mark.parametrize("stale", [False, True])
def test_built_without_kernels(tmp_path: Path, stale: bool) -> None:
    _record(tmp_path, built=False, reason="TORCH_MBV2_CUDA=0")
    if stale:
        (tmp_path / "_C.so").touch()
    assert _extension._load_from(tmp_path) == "built without CUDA kernels: TORCH_MBV2_CUDA=0"


def test_library_missing(tmp_path: Path) -> None:
    _record(tmp_path, built=True, reason="CUDA toolkit found")
    assert _extension._load_from(tmp_path) == f"the library {tmp_path / '_C.so'} is missing"


def test_torch_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "_C.so").touch()  # not opened: the loader's sentence would be about libtorch_cuda
    why = f"this torch ({torch.__version__}) is built without CUDA"
    assert _extension._load_from(tmp_path) == why


@needs_cuda_build
def test_library_damaged(tmp_path: Path) -> None:
    _record(tmp_path, built=True, torch="2.13.0", cuda="13.0")
    (tmp_path / "_C.so").write_text("no library")
    why = _extension._load_from(tmp_path)
    assert why is not None
    assert why.startswith(f"the library could not be loaded: {tmp_path / '_C.so'}: ")
    assert why.endswith(f"(built with torch 2.13.0, CUDA 13.0; {HERE})")


@needs_cuda_build
def test_library_of_another_torch(tmp_path: Path) -> None:
    _library_of_another_torch(tmp_path / "_C.so")
    why = _extension._load_from(tmp_path)
    assert why is not None
    assert "undefined symbol: of_a_newer_torch" in why
    assert why.endswith(f"(built with torch ?, CUDA ?; {HERE})")


@needs_cuda_build
def test_import_with_a_damaged_library(tmp_path: Path) -> None:
    leave = shutil.ignore_patterns("_C.so", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "torch_mbv2", ignore=leave)
    (tmp_path / "torch_mbv2/_C.so").write_text("no library")
    script = """
import torch, torch_mbv2
torch_mbv2.ops.add(torch.ones(1, 8, 2, 2), torch.ones(1, 8, 2, 2))
print(torch_mbv2.why_not_available())
"""
    done = _python(script, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"the library could not be loaded: {tmp_path}/torch_mbv2/_C.so: ")


def test_import_without_a_gpu(tmp_path: Path) -> None:
    script = """
import torch, torch_mbv2
assert not torch.cuda.is_initialized()
torch_mbv2.ops.add(torch.ones(1, 8, 2, 2), torch.ones(1, 8, 2, 2))
print(torch_mbv2.why_not_available())
"""
    hidden = {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(PACKAGE.parent)}
    done = _python(script, tmp_path, **hidden)
    assert done.returncode == 0, done.stderr
    why = _extension._load_error() or "no CUDA GPU is visible to torch"
    assert done.stdout.strip() == why


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a machine with the library, built for 8.0 and 9.0a."""
    monkeypatch.setattr(_extension, "_load_error", lambda: None)
    monkeypatch.setattr(_extension, "build_info", lambda: {"archs": "8.0;9.0a"})
    return monkeypatch


def test_no_gpu(loaded: pytest.MonkeyPatch) -> None:
    loaded.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_mbv2.why_not_available() == "no CUDA GPU is visible to torch"
    assert not torch_mbv2.is_available()


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        ((8, 9), None),
        ((9, 0), None),
        ((7, 5), "GPU compute capability 7.5 is not supported; 8.0 or newer needed"),
        (
            (12, 0),
            "the kernels are built for 8.0;9.0a, not for this GPU's compute capability 12.0: "
            "build again with TORCH_CUDA_ARCH_LIST=12.0",
        ),
    ],
)
def test_gpu(loaded: pytest.MonkeyPatch, capability: tuple[int, int], why: str | None) -> None:
    loaded.setattr(torch.cuda, "is_available", lambda: True)
    loaded.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert torch_mbv2.why_not_available() == why
    assert torch_mbv2.is_available() == (why is None)


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # machine code runs on later minor versions of its major one
        ("8.9", (8, 6), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),  # "a" is for that one alone, its PTX too
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("8.0;8.6;8.9;9.0a;10.0;12.0+PTX", (12, 1), True),
        ("Hopper", (9, 0), True),  # unknown here, so no reason to refuse
    ],
)
def test_architectures_covered(archs: str, capability: tuple[int, int], covered: bool) -> None:
    assert _extension._covers(archs, capability) == covered


@pytest.mark.skipif(
    not _extension.build_info().get("built"), reason="built without CUDA kernels here"
)
def test_built_library_loads() -> None:
    assert _extension.load(), torch_mbv2.why_not_available()
