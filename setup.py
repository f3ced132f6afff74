"""Builds the CUDA kernels where that is possible, else a pure-Python package that says why.

Environment: TORCH_MBV2_CUDA=1 makes a missing toolkit an error, =0 skips the kernels;
TORCH_MBV2_WERROR=1 makes register spills errors; CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are
honoured as in other PyTorch extensions.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit("torch_mbv2: its setup.py needs torch: pip install 'torch>=2.10'") from None

ROOT = Path(__file__).resolve().parent
# One build serves every torch from this one on (LibTorch stable ABI).
TORCH_TARGET = ("2.10", "0x020a000000000000")
# The kernels need bfloat16 arithmetic and asynchronous copies.
OLDEST_ARCH = (8, 0)
# What is built where no GPU is visible: every generation that the toolkit knows. 9.0a is not
# forward compatible, so another one gets PTX. Blackwell came with CUDA 12.8.
DEFAULT_ARCHS = {(12, 8): "8.0;8.6;8.9;9.0a;10.0;12.0+PTX", (0, 0): "8.0;8.6;8.9+PTX;9.0a"}
# What TORCH_CUDA_ARCH_LIST may hold besides numbers.
NAMED_ARCHS = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


@dataclass
class Plan:
    """What to build and why; written to torch_mbv2/_build_info.json, less this machine's paths."""

    built: bool
    reason: str
    archs: str = ""
    cuda_home: str = field(default="", repr=False)
    cuda: str = ""
    torch: str = str(torch.__version__)
    target: str = TORCH_TARGET[0]

    def summary(self) -> str:
        """The one line that is printed."""
        if not self.built:
            return f"torch_mbv2: no CUDA kernels, CPU only: {self.reason}"
        return (
            f"torch_mbv2: building CUDA kernels for {self.archs} with CUDA {self.cuda}, against "
            f"torch {self.torch}, for torch {self.target} or newer: {self.reason}"
        )


def find_toolkit(env: Mapping[str, str]) -> Path | None:
    """$CUDA_HOME, else /usr/local/cuda, if a toolkit is there. `which nvcc` is no guide: it may be
    a wrapper script far from the toolkit."""
    home = Path(env.get("CUDA_HOME") or "/usr/local/cuda").absolute()
    complete = (home / "include/cuda_runtime.h").is_file() and (home / "bin/nvcc").is_file()
    return home if complete else None


def toolkit_version(home: Path) -> str | None:
    """The release that nvcc tells, such as "13.0"; None if it tells none."""
    try:
        done = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True)
    except OSError:
        return None
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match.group(1) if match else None


def architectures(
    env: Mapping[str, str], capabilities: Sequence[tuple[int, int]], cuda: str
) -> tuple[str, str]:
    """The architectures to build for, and those left out because they are too old for the kernels:
    $TORCH_CUDA_ARCH_LIST, else the visible GPUs', else a stated default list.

    Args:
        env: the environment.
        capabilities: of the visible GPUs.
        cuda: the toolkit's version.

    Raises:
        SystemExit: $TORCH_CUDA_ARCH_LIST holds something that is no architecture.
    """
    wish = env.get("TORCH_CUDA_ARCH_LIST", "")
    if wish and wish != "native":
        names = [
            arch
            for name in re.split(r"[; ,]+", wish.strip("; ,"))
            for arch in NAMED_ARCHS.get(name, name).split(";")
        ]
    elif capabilities:
        names = [
            f"{major}.{minor}{'a' if major == 9 else ''}"
            for major, minor in sorted(set(capabilities))
        ]
    else:
        version = tuple(int(part) for part in cuda.split("."))
        names = next(archs for least, archs in DEFAULT_ARCHS.items() if version >= least).split(";")
    kept, left_out = [], []
    for name in dict.fromkeys(names):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                f"torch_mbv2: TORCH_CUDA_ARCH_LIST must hold architectures such as 8.0, 9.0a or "
                f"12.0+PTX, got {name!r}"
            )
        enough = (int(match.group(1)), int(match.group(2))) >= OLDEST_ARCH
        (kept if enough else left_out).append(name)
    return ";".join(kept), ";".join(left_out)


def decide(
    env: Mapping[str, str],
    torch_cuda: str | None,
    capabilities: Sequence[tuple[int, int]],
    torch_version: str = str(torch.__version__),
) -> Plan:
    """Whether to build the kernels, for which architectures, and why (not).

    Args:
        env: the environment.
        torch_cuda: `torch.version.cuda`.
        capabilities: of the visible GPUs.
        torch_version: `torch.__version__`.

    Raises:
        SystemExit: TORCH_MBV2_CUDA=1, and the kernels cannot be built; or a variable's value has no
            meaning.
    """
    wish = env.get("TORCH_MBV2_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"torch_mbv2: TORCH_MBV2_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return Plan(False, "TORCH_MBV2_CUDA=0", torch=torch_version)
    least = tuple(int(part) for part in TORCH_TARGET[0].split("."))
    compiler = shlex.split(env.get("CXX") or "c++")[0]
    home = find_toolkit(env)
    cuda = toolkit_version(home) if home is not None else None
    archs = ""
    reason = "CUDA toolkit found"
    problem = None
    if torch_cuda is None:
        problem = f"torch {torch_version} is built without CUDA"
    elif tuple(int(part) for part in torch_version.split(".")[:2]) < least:
        problem = f"torch {torch_version} is older than {TORCH_TARGET[0]}"
    elif home is None:
        where = env.get("CUDA_HOME") or "/usr/local/cuda (CUDA_HOME is not set)"
        problem = f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h at {where}"
    elif cuda is None:
        problem = f"{home}/bin/nvcc does not tell its version"
    elif cuda.split(".")[0] != torch_cuda.split(".")[0]:
        problem = f"the CUDA toolkit is {cuda}, but torch was built with CUDA {torch_cuda}"
    elif shutil.which(compiler, path=env.get("PATH")) is None:
        problem = f"there is no C++ compiler {compiler} (the variable CXX names another)"
    else:
        archs, left_out = architectures(env, capabilities, cuda)
        needed = "{}.{}".format(*OLDEST_ARCH)
        if not archs:
            problem = f"the kernels need compute capability {needed} or newer, not {left_out}"
        elif left_out:
            reason += f"; {left_out} left out, the kernels need {needed} or newer"
    if problem is None:
        return Plan(True, reason, archs, str(home), cuda or "", torch_version)
    if wish == "1":
        raise SystemExit(f"torch_mbv2: TORCH_MBV2_CUDA=1, but {problem}")
    return Plan(False, problem, cuda=cuda or "", torch=torch_version)


def nvcc_flags(env: Mapping[str, str]) -> list[str]:
    """Flags of every .cu file. These files include no torch header."""
    ptxas = "--warn-on-spills,--warn-on-local-memory-usage"
    if env.get("TORCH_MBV2_WERROR") == "1":
        ptxas += ",--warning-as-error"
    return ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", f"-Xptxas={ptxas}"]


def recording(command: type[Command], plan: Plan, *, record: bool) -> type[Command]:
    """`command`, which prints the plan and leaves it next to what was built: in the package's own
    folder for an editable or in-place build, else in the build's, so that a wheel built from a
    checkout does not touch what is installed from there. A library of an earlier plan goes.

    A build that fails leaves the earlier library and its record as they were.
    """

    class Recording(command):  # type: ignore[valid-type,misc]
        def run(self) -> None:
            if record:
                print(plan.summary(), flush=True)
            super().run()
            if not record:
                return
            in_place = getattr(self, "editable_mode", False) or getattr(self, "inplace", False)
            package = (ROOT if in_place else Path(self.build_lib)) / "torch_mbv2"
            package.mkdir(parents=True, exist_ok=True)
            if not plan.built:
                (package / "_C.so").unlink(missing_ok=True)
            entries = {key: value for key, value in asdict(plan).items() if key != "cuda_home"}
            (package / "_build_info.json").write_text(json.dumps(entries, indent=2) + "\n")

        def get_source_files(self) -> list[str]:
            """What goes into an sdist: also the headers, and kernels that are not built here."""
            patterns = ("csrc/**/*.*", "scripts/*.*", "tests/**/*.*")
            found = sorted(p for pattern in patterns for p in Path().glob(pattern))
            more = [str(p) for p in found if p.is_file() and p.suffix != ".pyc"]
            return [*super().get_source_files(), *more]

    return Recording


class Wheel(bdist_wheel):
    """Tags the wheel: the library is no Python module, so it serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def extension(plan: Plan) -> tuple[list, dict[str, type[Command]]]:
    """The extension modules and build commands for `plan`."""
    if not plan.built:
        return [], {
            "bdist_wheel": Wheel,
            "build_py": recording(build_py, plan, record=True),
            "build_ext": recording(build_ext, plan, record=True),
        }
    os.environ["CUDA_HOME"] = plan.cuda_home
    os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    # Imported here: it looks for CUDA_HOME at import.
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = plan.cuda_home

    class Build(cpp_extension.BuildExtension):
        """Names the library _C.so: it is no Python module, so it has no Python's tag."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # A library for other architectures is no newer than its sources, but out of date.
            self.force = True

        def get_ext_filename(self, fullname: str) -> str:
            return f"{fullname.replace('.', '/')}.so"

    # Relative to here: setuptools refuses absolute sources.
    sources = sorted(str(p) for kind in ("*.cpp", "*.cu") for p in Path("csrc").rglob(kind))
    headers = sorted(str(p) for p in Path("csrc").rglob("*.*h"))
    module = cpp_extension.CUDAExtension(
        "torch_mbv2._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": [
                "-O2",
                "-g0",  # PyTorch's headers would fill half of the library
                "-std=c++20",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET[1]}",
                "-DUSE_CUDA",
            ],
            "nvcc": nvcc_flags(os.environ),
        },
        py_limited_api=True,
    )
    build = Build.with_options(use_ninja=True, no_python_abi_suffix=True)
    return [module], {
        "bdist_wheel": Wheel,
        "build_py": recording(build_py, plan, record=False),
        "build_ext": recording(build, plan, record=True),
    }


def main() -> None:
    os.chdir(ROOT)
    capabilities = []
    if torch.version.cuda is not None and torch.cuda.is_available():
        capabilities = [
            torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
        ]
    plan = decide(os.environ, torch.version.cuda, capabilities)
    modules, commands = extension(plan)
    setup(ext_modules=modules, cmdclass=commands)


if __name__ == "__main__":
    main()
