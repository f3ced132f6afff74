"""What is run to renew the results, what becomes of it, and what stays if it fails."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import bench_results
import pytest
import torch

import torch_mbv2
from torch_mbv2.cli import bench

ROOT = Path(__file__).resolve().parents[2]
OLD = "the old result"


@pytest.fixture(scope="module")
def renew_results(load_script):
    return load_script("renew_results")


@pytest.fixture
def machine(renew_results, monkeypatch):
    """Makes the machine one with or without a GPU: its name, and why kernels cannot run on it."""

    def become(gpu=None, why=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        monkeypatch.setattr(torch_mbv2, "why_not_available", lambda: why)
        monkeypatch.setattr(renew_results.platform, "machine", lambda: "x86_64")

    become()
    return become


class Processes:
    """Stands in for those that would be run: bench writes a result, or fails."""

    def __init__(self):
        self.argvs = []
        self.environments = []
        self.statuses = {}
        self.result = bench_results.result(layers=False)

    def run(self, argv, *, env, check):
        assert argv[0] == sys.executable
        assert check is False
        self.argvs.append(argv[1:])
        self.environments.append(env)
        if argv[1].endswith("render_results.py"):
            return subprocess.CompletedProcess(argv, self.statuses.get("render", 0))
        path = Path(argv[argv.index("--json") + 1])
        command = shlex.join(["python", *argv[1:]])
        path.write_text(json.dumps(self.result | {"command": command}))
        return subprocess.CompletedProcess(argv, self.statuses.get(path.stem, 0))

    @property
    def benches(self):
        """The arguments of each bench, without the file that it writes."""
        return [argv[2:-1] for argv in self.argvs if argv[:2] == ["-m", "torch_mbv2"]]

    @property
    def renders(self):
        return [argv for argv in self.argvs if argv[:2] != ["-m", "torch_mbv2"]]


@pytest.fixture
def processes(monkeypatch, renew_results):
    found = Processes()
    monkeypatch.setattr(renew_results.subprocess, "run", found.run)
    return found


@pytest.fixture
def renew(renew_results, machine, processes, tmp_path):
    """Runs the script on a folder with old results in it."""
    for name in ("h100", "x86"):
        (tmp_path / f"{name}.json").write_text(OLD)
    return lambda *argv: renew_results.main(["--results", str(tmp_path), *argv])


def stays(path):
    return path.read_text() == OLD


GPU = [
    *["bench", "torchvision:mobilenet_v2", "--batches", "1,8,32,128,256"],
    *["--dtypes", "float16,bfloat16,float32", "--layers"],
]
CPU = [
    *["bench", "torchvision:mobilenet_v2", "--device", "cpu", "--batches", "1,8,32"],
    *["--dtypes", "float32"],
]


def test_both_are_renewed_and_rendered(renew, machine, processes, tmp_path):
    machine("NVIDIA H100 80GB HBM3")
    assert renew() == 0
    assert processes.benches == [[*GPU, "--json"], [*CPU, "--json"]]
    assert processes.renders == [
        [str(ROOT / "scripts" / "render_results.py"), "--results", str(tmp_path)]
    ]
    assert processes.argvs[-1] == processes.renders[0]
    for name in ("h100", "x86"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found | {"command": ""} == processes.result | {"command": ""}


@pytest.mark.parametrize(
    ("argv", "gpu", "names", "renders"),
    [
        (["--only", "cpu"], "NVIDIA A100", ["x86"], 1),
        (["--only", "gpu"], "NVIDIA A100", ["a100"], 1),
        (["--no-render"], "NVIDIA A100", ["a100", "x86"], 0),
        (["--only", "cpu", "--no-render"], None, ["x86"], 0),
        ([], None, ["x86"], 1),
    ],
)
def test_what_is_renewed(renew, machine, processes, tmp_path, argv, gpu, names, renders):
    machine(gpu)
    assert renew(*argv) == 0
    renewed = [path.stem for path in sorted(tmp_path.iterdir()) if not stays(path)]
    assert renewed == names
    assert len(processes.benches) == len(names)
    assert len(processes.renders) == renders


@pytest.mark.parametrize(("gpu", "said"), [(None, True), ("NVIDIA H100", False)])
def test_machine_without_gpu_says_so(renew, machine, capsys, gpu, said):
    machine(gpu)
    assert renew() == 0
    assert ("only the CPU's results are renewed" in capsys.readouterr().out) == said


def test_recorded_command_makes_the_same_file(
    renew_results, machine, processes, monkeypatch, tmp_path
):
    """It names the file in the checkout, not the one that it was written to meanwhile."""
    monkeypatch.setattr(renew_results, "ROOT", tmp_path)
    assert renew_results.main(["--no-render", "--", "--rounds", "5"]) == 0
    found = json.loads((tmp_path / "scripts" / "results" / "x86.json").read_text())
    command = "python -m torch_mbv2 " + shlex.join([*CPU, "--rounds", "5"])
    assert found["command"] == f"{command} --json scripts/results/x86.json"
    assert processes.benches == [[*CPU, "--rounds", "5", "--json"]]


def test_recorded_command_of_another_folder(renew, tmp_path):
    assert renew() == 0
    command = json.loads((tmp_path / "x86.json").read_text())["command"]
    assert command.endswith(f" --json {tmp_path / 'x86.json'}")


def test_benches_run_with_the_package_of_the_checkout(renew, processes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("SOME_VARIABLE", "stays")
    assert renew() == 0
    assert {env["PYTHONPATH"] for env in processes.environments} == {f"{ROOT}{os.pathsep}elsewhere"}
    assert {env["SOME_VARIABLE"] for env in processes.environments} == {"stays"}


@pytest.mark.parametrize(
    ("bench", "status", "why"),
    [
        (1, 1, "a comparison failed (exit status 1): "),
        (2, 2, "bench could not run (exit status 2): "),
        (-9, 2, "bench could not run (exit status -9): "),
    ],
)
def test_failure_keeps_the_old_and_stops(
    renew, machine, processes, tmp_path, capsys, bench, status, why
):
    machine("NVIDIA H100")
    processes.statuses["h100"] = bench
    assert renew() == status
    assert stays(tmp_path / "h100.json")
    assert stays(tmp_path / "x86.json")
    assert len(processes.argvs) == 1
    assert f"{why}{tmp_path / 'h100.json'} stays as it was" in capsys.readouterr().out


def test_result_that_is_none_keeps_the_old(renew, processes, tmp_path, capsys):
    processes.result = {"verb": "bench", "schema": 1}
    assert renew() == 2
    assert stays(tmp_path / "x86.json")
    assert not processes.renders
    assert "in schema 1 instead of 2" in capsys.readouterr().err


def test_failure_of_the_rendering_is_passed_on(renew, processes):
    processes.statuses["render"] = 2
    assert renew() == 2


def test_interrupt_keeps_the_old(renew, processes, tmp_path, monkeypatch, renew_results):
    def interrupt(argv, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(renew_results.subprocess, "run", interrupt)
    assert renew() == 130
    assert stays(tmp_path / "x86.json")


@pytest.mark.parametrize(
    ("argv", "gpu", "why", "message"),
    [
        (["--only", "gpu"], None, None, "--only gpu: no CUDA GPU is visible to torch"),
        ([], "NVIDIA H100", "nothing is built", "the GPU's results need the kernels: nothing is"),
    ],
)
def test_unusable_gpu_is_refused_before_anything_runs(
    renew, machine, processes, capsys, argv, gpu, why, message
):
    machine(gpu, why)
    assert renew(*argv) == 2
    assert capsys.readouterr().err.startswith(f"renew_results: error: {message}")
    assert not processes.argvs


def test_cpu_needs_no_kernels(renew, machine):
    machine("NVIDIA H100", "nothing is built")
    assert renew("--only", "cpu") == 0


@pytest.mark.parametrize(
    ("package", "argv", "status"),
    [
        ("jsonschema", [], 2),
        ("matplotlib", [], 2),
        ("jsonschema", ["--no-render"], 2),
    ],
)
def test_missing_package_is_said_before_anything_runs(
    renew, processes, monkeypatch, capsys, package, argv, status
):
    monkeypatch.setitem(sys.modules, package, None)
    assert renew(*argv) == status
    assert "pip install 'torch-mbv2[bench]'" in capsys.readouterr().err
    assert not processes.argvs


def test_pictures_are_needed_to_render_only(renew, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert renew("--no-render") == 0


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx_4090_laptop"),
        ("Tesla T4", "t4"),
        ("NVIDIA RTX A6000", "rtx_a6000"),
        ("NVIDIA", "gpu"),
    ],
)
def test_gpu_name(renew_results, device, name):
    assert renew_results.gpu_name(device) == name


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("x86_64", "x86"),
        ("AMD64", "x86"),
        ("aarch64", "arm"),
        ("arm64", "arm"),
        ("riscv64", "riscv64"),
        ("", "cpu"),
    ],
)
def test_cpu_name(renew_results, machine, name):
    assert renew_results.cpu_name(machine) == name


@pytest.mark.parametrize("arguments", ["ON_GPU", "ON_CPU"])
def test_bench_knows_the_arguments(renew_results, arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args([renew_results.MODEL, *getattr(renew_results, arguments)])
    assert args.batches[:3] == [1, 8, 32]
    assert args.layers == (arguments == "ON_GPU")


def test_help_has_an_example(renew_results, capsys):
    with pytest.raises(SystemExit, match="0"):
        renew_results.main(["--help"])
    assert "python scripts/renew_results.py --only cpu -- --rounds 50" in capsys.readouterr().out
