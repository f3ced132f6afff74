"""setup.py: the plan, and builds without a toolkit, with a stub of one, and in a copy."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools 77 or newer is needed")

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


def _import_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_mbv2_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup = _import_setup()


def _executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _make_toolkit(home: Path, version: str = "13.0") -> Path:
    """What setup.py takes for a toolkit: an nvcc that only tells its version, and the header."""
    _executable(
        home / "bin/nvcc", f'echo "Cuda compilation tools, release {version}, V{version}.1"'
    )
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    return home


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return _make_toolkit(tmp_path / "cuda")


def _environment(toolkit: Path, **more: str) -> dict[str, str]:
    """The least that a plan with kernels needs."""
    return {"CUDA_HOME": str(toolkit), "PATH": os.environ["PATH"], "CXX": "sh", **more}


# ---------------------------------------------------------------------------------- the toolkit


def test_toolkit_at_cuda_home(toolkit: Path) -> None:
    assert setup.find_toolkit({"CUDA_HOME": str(toolkit)}) == toolkit
    assert setup.toolkit_version(toolkit) == "13.0"


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h"])
def test_incomplete_toolkit(toolkit: Path, missing: str) -> None:
    (toolkit / missing).unlink()
    assert setup.find_toolkit({"CUDA_HOME": str(toolkit)}) is None


def test_wrong_cuda_home_is_not_replaced(tmp_path: Path) -> None:
    # Neither by the default place nor by an nvcc on PATH, which may be a wrapper script.
    _executable(tmp_path / "bin/nvcc", "exit 0")
    env = {"CUDA_HOME": str(tmp_path / "nowhere"), "PATH": str(tmp_path / "bin")}
    assert setup.find_toolkit(env) is None


@pytest.mark.parametrize("env", [{}, {"CUDA_HOME": ""}])
def test_default_place(env: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(setup.Path, "is_file", lambda path: bool(asked.append(path)) or True)
    assert setup.find_toolkit(env) == Path("/usr/local/cuda")
    assert asked[0] == Path("/usr/local/cuda/include/cuda_runtime.h")


def test_relative_cuda_home(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toolkit.parent)  # the build changes the folder
    assert setup.find_toolkit({"CUDA_HOME": "cuda"}) == toolkit


@pytest.mark.parametrize("script", ["exit 1", "echo hello"])
def test_nvcc_without_version(toolkit: Path, script: str) -> None:
    _executable(toolkit / "bin/nvcc", script)
    plan = setup.decide(_environment(toolkit), "13.0", [])
    assert not plan.built
    assert plan.reason == f"{toolkit}/bin/nvcc does not tell its version"


def test_nvcc_not_executable(toolkit: Path) -> None:
    (toolkit / "bin/nvcc").chmod(0o644)
    assert setup.toolkit_version(toolkit) is None


# ---------------------------------------------------------------------------- the architectures


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([], DEFAULT),
        ([(9, 0)], "9.0a"),
        ([(9, 0), (9, 0)], "9.0a"),
        ([(12, 0), (8, 6), (10, 0)], "8.6;10.0;12.0"),
    ],
)
def test_architectures_of_visible_gpus(capabilities: list, expected: str) -> None:
    assert setup.architectures({}, capabilities, "13.0") == (expected, "")


@pytest.mark.parametrize("cuda", ["12.6", "12.0"])
def test_default_architectures_of_an_older_toolkit(cuda: str) -> None:
    assert setup.architectures({}, [], cuda) == ("8.0;8.6;8.9+PTX;9.0a", "")


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("8.0;9.0a", "8.0;9.0a"),
        ("8.0 8.6  9.0+PTX", "8.0;8.6;9.0+PTX"),
        ("8.0;", "8.0"),
        ("Ampere;Hopper", "8.0;8.6+PTX;9.0+PTX"),
        ("native", "8.9"),
        ("", "8.9"),
    ],
)
def test_arch_list(wish: str, expected: str) -> None:
    env = {"TORCH_CUDA_ARCH_LIST": wish}
    assert setup.architectures(env, [(8, 9)], "13.0") == (expected, "")


def test_too_old_architectures_are_left_out(toolkit: Path) -> None:
    env = _environment(toolkit, TORCH_CUDA_ARCH_LIST="7.5 8.0 12.0+PTX")
    plan = setup.decide(env, "13.0", [])
    assert plan.built
    assert plan.archs == "8.0;12.0+PTX"
    assert "7.5 left out" in plan.summary()


def test_only_too_old_gpus(toolkit: Path) -> None:
    plan = setup.decide(_environment(toolkit), "13.0", [(7, 5)])
    assert not plan.built
    assert plan.reason == "the kernels need compute capability 8.0 or newer, not 7.5"


@pytest.mark.parametrize("wish", ["sm_90", "9", "8.0;Volta", "90a"])
def test_bad_arch_list(toolkit: Path, wish: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must hold architectures such as"):
        setup.decide(_environment(toolkit, TORCH_CUDA_ARCH_LIST=wish), "13.0", [])


# --------------------------------------------------------------------------------------- the plan


def test_plan_with_kernels(toolkit: Path) -> None:
    plan = setup.decide(_environment(toolkit), "13.2", [])
    assert plan.built
    assert (plan.archs, plan.cuda, plan.cuda_home) == (DEFAULT, "13.0", str(toolkit))
    assert plan.summary().startswith(
        f"torch_mbv2: building CUDA kernels for {DEFAULT} with CUDA 13.0, against torch "
    )


PROBLEMS = [
    ("torch 2.12.0 is built without CUDA", {"torch_cuda": None}),
    ("torch 2.9.1 is older than 2.10", {"torch_version": "2.9.1"}),
    ("the CUDA toolkit is 13.0, but torch was built with CUDA 12.8", {"torch_cuda": "12.8"}),
]


@pytest.mark.parametrize(("reason", "arguments"), PROBLEMS)
def test_plan_without_kernels(toolkit: Path, reason: str, arguments: dict[str, str | None]) -> None:
    arguments = {"torch_cuda": "13.0", "torch_version": "2.12.0", **arguments}
    plan = setup.decide(_environment(toolkit), capabilities=[], **arguments)
    assert not plan.built
    assert plan.summary() == f"torch_mbv2: no CUDA kernels, CPU only: {reason}"
    with pytest.raises(SystemExit) as error:
        setup.decide(_environment(toolkit, TORCH_MBV2_CUDA="1"), capabilities=[], **arguments)
    assert str(error.value) == f"torch_mbv2: TORCH_MBV2_CUDA=1, but {reason}"


def test_no_compiler(toolkit: Path) -> None:
    plan = setup.decide(_environment(toolkit, CXX="no-such-compiler -O1"), "13.0", [])
    assert plan.reason.startswith("there is no C++ compiler no-such-compiler")


@pytest.mark.parametrize(("wish", "built"), [("", True), ("1", True), ("0", False)])
def test_wish(toolkit: Path, wish: str, built: bool) -> None:
    assert setup.decide(_environment(toolkit, TORCH_MBV2_CUDA=wish), "13.0", []).built == built


@pytest.mark.parametrize("wish", ["yes", "2", " "])
def test_bad_wish(wish: str) -> None:
    with pytest.raises(SystemExit, match=f"must be 0, 1 or unset, got {wish!r}"):
        setup.decide({"TORCH_MBV2_CUDA": wish}, "13.0", [])


def test_spills_are_warnings_or_errors() -> None:
    (warnings,) = (f for f in setup.nvcc_flags({}) if f.startswith("-Xptxas="))
    (errors,) = (
        f for f in setup.nvcc_flags({"TORCH_MBV2_WERROR": "1"}) if f.startswith("-Xptxas=")
    )
    assert warnings == "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage"
    assert errors == f"{warnings},--warning-as-error"


def test_only_bindings_include_torch() -> None:
    # A .cu file that does takes minutes to compile.
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    including = {
        path.parent.name
        for path in sources
        if re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text())
    }
    assert including == {"bind"}
    # No Python in the library: that is what lets one build serve every Python.
    assert not any("Python.h" in path.read_text() for path in sources)


# ------------------------------------------------------------------------------------- the builds


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the checkout in which an earlier editable build left a library."""
    to = tmp_path / "copy"
    for folder in ("torch_mbv2", "csrc"):
        leave = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
        shutil.copytree(ROOT / folder, to / folder, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    (to / "torch_mbv2/_C.so").write_text("an earlier library")
    (to / "torch_mbv2/_build_info.json").write_text('{"built": true, "archs": "9.0a"}')
    return to


def _run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` without what the caller's environment says about builds."""
    ours = ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "TORCH_MBV2_CUDA", "TORCH_MBV2_WERROR", "MAX_JOBS")
    env = {**{k: v for k, v in os.environ.items() if k not in ours}, "OMP_NUM_THREADS": "1", **env}
    env.setdefault("PYTHONPATH", "")
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


USE = """
import torch, torch_mbv2
x = torch.randn(1, 8, 9, 9)
y = torch_mbv2.ops.conv2d(x, torch.randn(8, 1, 3, 3), groups=8, activation="relu6")
assert y.shape == (1, 8, 7, 7) and not torch_mbv2.is_available()
assert not torch.cuda.is_initialized()
print(torch_mbv2.__file__)
print(torch_mbv2.why_not_available())
"""


def test_wheel_and_sdist_without_kernels(copy: Path, tmp_path: Path) -> None:
    done = _run(copy, "setup.py", "-q", "bdist_wheel", "sdist", TORCH_MBV2_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch_mbv2: no CUDA kernels, CPU only: TORCH_MBV2_CUDA=0"]
    # The checkout's own, earlier build still works and is still told of.
    assert (copy / "torch_mbv2/_C.so").read_text() == "an earlier library"
    assert json.loads((copy / "torch_mbv2/_build_info.json").read_text())["built"]

    (wheel,) = (copy / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "torch_mbv2/_C.so" not in names
    assert "torch_mbv2/py.typed" in names
    record = json.loads((installed / "torch_mbv2/_build_info.json").read_text())
    assert record["built"] is False
    assert "cuda_home" not in record
    used = _run(tmp_path, "-c", USE, PYTHONPATH=str(installed))
    assert used.returncode == 0, used.stderr
    assert used.stdout.splitlines() == [
        str(installed / "torch_mbv2/__init__.py"),
        "built without CUDA kernels: TORCH_MBV2_CUDA=0",
    ]

    (sdist,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= set(names)
    assert "torch_mbv2/_C.so" not in names
    assert "torch_mbv2/_build_info.json" not in names


def test_in_place_without_toolkit(copy: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    done = _run(copy, "setup.py", "-q", "build_ext", "--inplace", CUDA_HOME=nowhere)
    assert done.returncode == 0, done.stderr
    reason = f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h at {nowhere}"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    assert done.stdout.splitlines() == [f"torch_mbv2: no CUDA kernels, CPU only: {reason}"]
    # The earlier library would be loaded otherwise.
    assert not (copy / "torch_mbv2/_C.so").exists()
    used = _run(copy, "-c", USE)
    assert used.returncode == 0, used.stderr
    assert used.stdout.splitlines() == [
        str(copy / "torch_mbv2/__init__.py"),
        f"built without CUDA kernels: {reason}",
    ]


def test_missing_toolkit_as_error(copy: Path, tmp_path: Path) -> None:
    done = _run(
        copy,
        *("setup.py", "-q", "build"),
        CUDA_HOME=str(tmp_path / "nowhere"),
        TORCH_MBV2_CUDA="1",
    )
    assert done.returncode == 1
    assert done.stderr.startswith("torch_mbv2: TORCH_MBV2_CUDA=1, but ")
    assert len(done.stderr.splitlines()) == 1
    assert not (copy / "build").exists()


def test_torch_missing(copy: Path) -> None:
    (copy / "torch.py").write_text("raise ModuleNotFoundError('torch')")
    done = _run(copy, "setup.py", "-q", "build")
    assert done.returncode == 1
    assert done.stderr == "torch_mbv2: its setup.py needs torch: pip install 'torch>=2.10'\n"


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_build_as_asked_for(copy: Path, tmp_path: Path) -> None:
    """MAX_JOBS, CUDA_HOME and the architectures reach ninja; a build that fails, as this one must,
    leaves what was there."""
    home = _make_toolkit(tmp_path / "cuda", torch.version.cuda or "")
    log = tmp_path / "ninja.log"
    _executable(
        tmp_path / "bin/ninja",
        f'[ "$1" = --version ] && exit\n(echo "$@"; cat build.ninja) > "{log}"\nexit 1',
    )
    _executable(tmp_path / "bin/c++", "exit 0")
    done = _run(
        copy,
        *("setup.py", "-q", "build_ext", "--inplace"),
        CUDA_HOME=str(home),
        MAX_JOBS="3",
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0a",
        TORCH_DONT_CHECK_COMPILER_ABI="1",
        TORCH_MBV2_WERROR="1",
    )
    assert done.returncode != 0
    assert "torch_mbv2: building CUDA kernels for 8.0;9.0a" in done.stdout
    text = log.read_text() if log.exists() else done.stderr
    assert "-j 3" in text.splitlines()[0]
    assert f"nvcc = {home}/bin/nvcc" in text
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in text
    assert sorted(set(re.findall(r"code=((?:sm|compute)_\w+)", text))) == ["sm_80", "sm_90a"]
    assert "--warning-as-error" in text
    assert all(str(path.relative_to(ROOT)) in text for path in (ROOT / "csrc").rglob("*.cu"))
    assert (copy / "torch_mbv2/_C.so").read_text() == "an earlier library"
    assert json.loads((copy / "torch_mbv2/_build_info.json").read_text())["archs"] == "9.0a"
