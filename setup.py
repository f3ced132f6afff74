"""Builds the CUDA kernels where that is possible, else a pure-Python package that says why.

Environment: TORCH_MBV2_CUDA=1 makes a missing toolkit an error, =0 skips the kernels;
TORCH_MBV2_WERROR=1 makes register spills errors; CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are
honoured as in other PyTorch extensions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent
PACKAGE = ROOT / "torch_mbv2"
# One build serves every torch from this one on (LibTorch stable ABI).
TORCH_TARGET = ("2.10", "0x020a000000000000")
# What is built where no GPU is visible: every generation the kernels are written for. 9.0a is not
# forward compatible, so the newest gets PTX.
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


@dataclass
class Plan:
    """What to build and why; written to torch_mbv2/_build_info.json."""

    built: bool
    reason: str
    archs: str = ""
    cuda_home: str = field(default="", repr=False)
    cuda: str = ""
    torch: str = torch.__version__
    target: str = TORCH_TARGET[0]


def find_toolkit(env: Mapping[str, str]) -> Path | None:
    """$CUDA_HOME, else /usr/local/cuda, if a toolkit is there. `which nvcc` is no guide: it may be a
    wrapper script far from the toolkit."""
    home = Path(env.get("CUDA_HOME") or "/usr/local/cuda")
    complete = (home / "include/cuda_runtime.h").is_file() and (home / "bin/nvcc").is_file()
    return home if complete else None


def toolkit_version(home: Path) -> str:
    """The release that nvcc tells, such as "13.0"."""
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def architectures(env: Mapping[str, str], capabilities: list[tuple[int, int]]) -> str:
    """$TORCH_CUDA_ARCH_LIST, else the visible GPUs', else a stated default list."""
    if env.get("TORCH_CUDA_ARCH_LIST"):
        return env["TORCH_CUDA_ARCH_LIST"]
    if capabilities:
        names = (f"{major}.{minor}{'a' * (major == 9)}" for major, minor in capabilities)
        return ";".join(sorted(set(names)))
    return DEFAULT_ARCHS


def decide(
    env: Mapping[str, str],
    torch_cuda: str | None,
    capabilities: list[tuple[int, int]],
) -> Plan:
    """Whether to build the kernels, for which architectures, and why (not).

    Args:
        env: the environment.
        torch_cuda: `torch.version.cuda`.
        capabilities: of the visible GPUs.

    Raises:
        SystemExit: TORCH_MBV2_CUDA=1, and the kernels cannot be built.
    """
    wish = env.get("TORCH_MBV2_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"torch_mbv2: TORCH_MBV2_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return Plan(False, "TORCH_MBV2_CUDA=0")
    home = find_toolkit(env)
    cuda = toolkit_version(home) if home is not None else ""
    if torch_cuda is None:
        problem = f"torch {torch.__version__} is a CPU-only build"
    elif home is None:
        where = env.get("CUDA_HOME") or "/usr/local/cuda (CUDA_HOME is not set)"
        problem = f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h at {where}"
    elif cuda.split(".")[0] != torch_cuda.split(".")[0]:
        problem = f"the CUDA toolkit is {cuda}, but torch was built with CUDA {torch_cuda}"
    else:
        return Plan(True, "CUDA toolkit found", architectures(env, capabilities), str(home), cuda)
    if wish == "1":
        raise SystemExit(f"torch_mbv2: TORCH_MBV2_CUDA=1, but {problem}")
    return Plan(False, problem, cuda=cuda)


def nvcc_flags(env: Mapping[str, str]) -> list[str]:
    """Flags of every .cu file. These files include no torch header."""
    ptxas = "--warn-on-spills,--warn-on-local-memory-usage"
    if env.get("TORCH_MBV2_WERROR") == "1":
        ptxas += ",--warning-as-error"
    return ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", f"-Xptxas={ptxas}"]


def extension(plan: Plan) -> tuple[list, dict]:
    """The extension modules and build commands for `plan`."""
    if not plan.built:
        return [], {}
    os.environ["CUDA_HOME"] = plan.cuda_home
    os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    # Imported here: it looks for CUDA_HOME at import.
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = plan.cuda_home

    class Build(cpp_extension.BuildExtension):
        """Names the library _C.so: it is no Python module, so it has no Python's tag."""

        def get_ext_filename(self, fullname: str) -> str:
            return f"{fullname.replace('.', '/')}.so"

        def get_export_symbols(self, ext: object) -> list[str]:
            return []

    sources = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc").glob("*.cu"))]
    headers = sorted(str(p) for p in Path("csrc").glob("*.*h"))
    module = cpp_extension.CUDAExtension(
        "torch_mbv2._C",
        sources,
        depends=headers,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": [
                "-O2",
                "-std=c++20",
                "-fvisibility=hidden",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET[1]}",
                "-DUSE_CUDA",
            ],
            "nvcc": nvcc_flags(os.environ),
        },
        py_limited_api=True,
    )
    return [module], {"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)}


def main() -> None:
    capabilities = []
    if torch.version.cuda is not None and torch.cuda.is_available():
        capabilities = [
            torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
        ]
    plan = decide(os.environ, torch.version.cuda, capabilities)
    record = {key: value for key, value in asdict(plan).items() if key != "cuda_home"}
    (PACKAGE / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")
    if plan.built:
        print(
            f"torch_mbv2: building CUDA kernels for {plan.archs} with CUDA {plan.cuda}, "
            f"against torch {plan.torch}, for torch {plan.target} or newer"
        )
    else:
        print(f"torch_mbv2: no CUDA kernels, CPU only: {plan.reason}")
    modules, commands = extension(plan)
    setup(ext_modules=modules, cmdclass=commands)


if __name__ == "__main__":
    main()
