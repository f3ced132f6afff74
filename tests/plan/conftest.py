"""Plans are host code: their tests compile programs of this folder, and run them without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Compiles a program of this folder, and runs it: what it prints."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("plans")
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    flags += ["-fno-sanitize-recover", f"-I{ROOT / 'csrc'}"]

    def run(name, *arguments):
        binary = folder / name
        if not binary.exists():
            source = Path(__file__).with_name(f"{name}.cpp")
            subprocess.run([COMPILER, *flags, source, "-o", binary], check=True)
        done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
