"""The fit of the cost models' constants, without a GPU: times are made up from the models."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
GPU = {
    "name": "NVIDIA H200",
    "arch": 900,
    "multiprocessors": 132,
    "shared_per_block": 232448,
    "shared_per_multiprocessor": 233472,
}
# As if of another GPU: factors of the constants.
OTHERS = {
    "block.busy_instruction": 2.5,
    "block.alone_start": 0.3,
    "block.alone_product": 0.3,
    "product.half_products": 0.4,
    "product.start": 6.0,
    "product.half_chain": 3.0,
    "conv_pool.latency": 2.0,
    "conv_pool.resident_start": 4.0,
}


@pytest.fixture(scope="module")
def fit_costs(tmp_path_factory):
    """The script, which builds in a folder of its own."""
    spec = importlib.util.spec_from_file_location("fit_costs", ROOT / "scripts/fit_costs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_costs"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    module.BUILD = tmp_path_factory.mktemp("build")
    yield module
    del sys.modules["fit_costs"]


@pytest.fixture(scope="module")
def open_model(fit_costs):
    """Opens the program of the cost models."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    program = fit_costs.build_model()
    return lambda: fit_costs.CostModel(program, GPU)


@pytest.fixture(scope="module")
def measurements(fit_costs, open_model):
    """Made up: what the models expect with other constants, and noise."""
    chance = random.Random(0)
    times = {}
    with open_model() as model:
        others = {name: value * OTHERS.get(name, 1.0) for name, value in model.constants.items()}
        for problem in fit_costs.problems([1, 32]):
            names = model.candidates(problem)
            times[problem] = dict.fromkeys(names)
        for name in fit_costs.MODELS:
            clocks = iter(model.clocks(name, others))
            for problem, candidates in times.items():
                if problem.split()[0].replace("stem", "block") != name:
                    continue
                for candidate in candidates:
                    taken = next(clocks) * math.exp(chance.gauss(0, 0.01))
                    candidates[candidate] = {
                        "clocks": 1.0,
                        "microseconds": taken / 1980,
                        "megahertz": 1980.0,
                    }
    return {"gpu": GPU, "quick": True, "times": times}


@pytest.fixture
def file(fit_costs, measurements, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(fit_costs.dump(measurements))
    return path


@pytest.fixture
def copies(fit_costs, tmp_path, monkeypatch):
    """Copies of what --write changes."""
    header = tmp_path / "csrc/plan/architecture.h"
    shutil.copytree(ROOT / "csrc/plan", header.parent)
    shutil.copytree(ROOT / "csrc/conv_pool", tmp_path / "csrc/conv_pool")
    monkeypatch.setattr(fit_costs, "HEADER", header)
    monkeypatch.setattr(fit_costs, "RESULTS", tmp_path)
    return header


class FakeModel:
    """Three candidates of every problem, which take what the constant `order` says."""

    def __init__(self):
        self.problems = []

    def candidates(self, problem):
        self.problems.append(problem)
        return ["a", "b", "c"]

    def clocks(self, name, constants):
        count = sum(problem.startswith(name) for problem in self.problems)
        return [constants["a"], constants["b"], constants["c"]] * count


def timed_at(**microseconds):
    return {
        name: {"clocks": 1.0, "microseconds": value, "megahertz": 1000.0}
        for name, value in microseconds.items()
    }


# ------------------------------------------------------------------------------------------- model


def test_every_layer_has_candidates(fit_costs, open_model):
    problems = fit_costs.problems([1, 256])
    kinds = [problem.split()[0] for problem in problems]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "stem": 2,
        "block": 2 * 11,
        "product": 2 * 2 * 20,
        "conv_pool": 2 * 2,
    }
    with open_model() as model:
        assert all(model.candidates(problem) for problem in problems)


def test_starts_from_the_constants_in_use(open_model):
    with open_model() as model:
        assert len(model.constants) == 29
        assert all(
            least <= model.constants[name] <= most for name, (least, most) in model.bounds.items()
        )
        assert model.about.endswith("(sm_90)")


@pytest.mark.parametrize(
    "problem",
    ["pool dtype=float16", "product dtype=float16 m=1 n=8", "product dtype=int8 m=1 n=8 k=8"],
)
def test_refuses_what_is_no_problem(fit_costs, open_model, problem, capfd):
    with open_model() as model, pytest.raises(fit_costs.Error, match="gave no answer"):
        model.candidates(problem)
    assert f"the problem '{problem}' " in capfd.readouterr().err


# --------------------------------------------------------------------------------------------- fit


def test_choices_get_as_good_as_the_times_allow(fit_costs, open_model, measurements):
    def mean_losses(constants):
        return {
            name: sum(losses) / len(losses)
            for name in fit_costs.MODELS
            for losses in [
                [
                    problem.loss(clocks)
                    for problem, clocks in fit_costs.expectations(model, timed, name, constants)
                ]
            ]
        }

    with open_model() as model:
        timed = fit_costs.gather(model, measurements)
        before = mean_losses(model.constants)
        after = mean_losses(fit_costs.fit(model, timed))
    assert before["block"] > 0.02
    assert before["product"] > 0.02
    assert all(after[name] <= before[name] for name in fit_costs.MODELS)
    assert all(loss < 0.01 for loss in after.values())  # the noise


def test_constants_stay_in_their_bounds(fit_costs):
    found = fit_costs.descend(
        lambda constants: abs(constants["x"] - 7) + abs(constants["y"] - 0.1),
        {"x": 1.0, "y": 2.0},
        {"x": (1e-6, 1e9), "y": (1.0, 32.0)},
    )
    assert found["x"] == pytest.approx(7, rel=0.05)
    assert found["y"] == 1.0


def test_times_of_other_kernels_are_refused(fit_costs):
    times = {"product dtype=float16 batch=1 m=1 n=8 k=8": timed_at(a=1.0, d=2.0)}
    with pytest.raises(fit_costs.Error, match=r"no candidate d of product .* measure again"):
        fit_costs.gather(FakeModel(), {"gpu": GPU, "times": times})


# ------------------------------------------------------------------------------------------ report


def test_the_report_is_right(fit_costs):
    model = FakeModel()
    times = {
        "product dtype=float16 batch=1 m=1 n=8 k=8": timed_at(a=12.0, b=10.0, c=20.0),
        "product dtype=float16 batch=1 m=2 n=8 k=8": timed_at(a=10.0, b=10.5),
        "product dtype=float16 batch=8 m=8 n=8 k=8": timed_at(a=15.0, b=10.0, c=10.0),
        "conv_pool dtype=float32 batch=8 pixels=49 k=8 n=8": timed_at(a=10.0),
    }
    timed = fit_costs.gather(model, {"gpu": GPU, "times": times})
    before, after = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 3.0, "b": 2.0, "c": 1.0}
    lines = [line.split() for line in fit_costs.report(model, timed, before, after).splitlines()]
    assert [[word for word in line if word != "%"] for line in lines[2:-1]] == [
        # c is chosen, but was not timed for m = 2: b stands for it
        ["product", "float16", "1", "2", "10.0", "20.0", "52.5", "100.0"],
        ["product", "float16", "8", "1", "50.0", "50.0", "0.0", "0.0"],
        ["conv_pool", "float32", "8", "1", "0.0", "0.0", "0.0", "0.0"],
        ["product", "all", "all", "3", "23.3", "50.0", "35.0", "100.0"],
        ["conv_pool", "all", "all", "1", "0.0", "0.0", "0.0", "0.0"],
    ]
    assert lines[-1][:4] == ["2", "choices", "after", "the"]


# ------------------------------------------------------------------------------------------- write


def test_write_changes_nothing_outside_the_markers(fit_costs, file, copies, open_model, capsys):
    old = copies.read_text()
    assert fit_costs.main(["--measurements", str(file), "--write"]) == 0
    assert "slower than the fastest" in capsys.readouterr().out
    new = copies.read_text()
    begin, end = "  // fit_costs: begin sm_90\n", "  // fit_costs: end sm_90\n"
    assert new.split(begin)[0] == old.split(begin)[0]
    assert new.split(end)[1] == old.split(end)[1]
    body = new.split(begin)[1].split(end)[0].splitlines()
    assert body[0] == '  Architecture a = measured(900, "NVIDIA H200");'
    with open_model() as model:
        assert [line.split()[0] for line in body[1:]] == [f"a.{name}" for name in model.constants]
    written = copies.parents[2] / "costs-sm90.json"
    assert fit_costs.load(written) == fit_costs.load(file)


def test_what_is_written_compiles(fit_costs, copies, open_model, tmp_path):
    with open_model() as model:
        constants = {name: 2 * value for name, value in model.constants.items()}
    gpu = {**GPU, "arch": 800, "name": 'NVIDIA "A100"'}
    copies.write_text(fit_costs.replaced(copies.read_text(), gpu, constants))
    program = tmp_path / "architecture"
    source = ROOT / "tests/plan/architecture.cpp"
    command = [COMPILER, "-std=c++20", f"-I{copies.parents[1]}", source, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program, "800", "870"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == (
        "800 800 tiles are chosen by times measured on NVIDIA A100 (sm_80)"
    )


def test_write_needs_the_markers(fit_costs):
    with pytest.raises(fit_costs.Error, match="must have '// fit_costs: begin sm_103' and its end"):
        fit_costs.replaced((ROOT / "csrc/plan/architecture.h").read_text(), {"arch": 1030}, {})


# ----------------------------------------------------------------------------------------- command


def test_measures_what_the_program_prints(fit_costs, tmp_path, capsys):
    program = tmp_path / "timer"
    lines = [
        GPU,
        {"problem": "product m=1", "candidate": "tile=0", **timed_at(x=2.0)["x"]},
        {"problem": "product m=1", "candidate": "tile=1", "clocks": 1.0, "error": "refused"},
        {"problem": "product m=2", "error": "it does not fit the GPU's memory"},
    ]
    text = "\n".join(map(json.dumps, lines))
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/problems\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    result = fit_costs.measure(program, ["product m=1", "product m=2"], quick=True)
    assert result == {
        "gpu": GPU,
        "quick": True,
        "times": {"product m=1": {"tile=0": {**timed_at(x=2.0)["x"]}}},
    }
    assert (tmp_path / "problems").read_text() == "product m=1\nproduct m=2\n"
    errors = capsys.readouterr().err
    assert "not timed: product m=1 tile=1: refused\n" in errors
    assert "not timed: product m=2: it does not fit the GPU's memory\n" in errors


def test_needs_a_gpu(fit_costs, open_model, monkeypatch, capsys):
    monkeypatch.setattr(fit_costs, "_visible_gpu", lambda: None)
    assert fit_costs.main(["--arch", "9.0a"]) == 2
    assert "no CUDA GPU is visible" in capsys.readouterr().err
    assert fit_costs.main(["--build-only"]) == 2
    assert "--arch must say what to build for" in capsys.readouterr().err


def test_needs_a_toolkit(fit_costs, open_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert fit_costs.main(["--arch", "9.0a", "--build-only"]) == 2
    assert f"no {tmp_path}/bin/nvcc to build it with" in capsys.readouterr().err


def test_needs_an_architecture(fit_costs, open_model, capsys):
    assert fit_costs.main(["--arch", "hopper", "--build-only"]) == 2
    assert "--arch must be an architecture such as 8.0 or 9.0a, got 'hopper'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", json.dumps({"gpu": GPU, "times": {}}), '{"gpu": {"name": ""}, "times": {}}'],
)
def test_needs_measurements(fit_costs, tmp_path, capsys, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    assert fit_costs.main(["--measurements", str(path)]) == 2
    assert f"{path} holds no measurements as --json writes them" in capsys.readouterr().err


def test_program_that_fails(fit_costs, tmp_path):
    program = tmp_path / "timer"
    program.write_text("#!/bin/sh\nexit 2\n")
    program.chmod(0o755)
    with pytest.raises(fit_costs.Error, match="timer ended with status 2"):
        fit_costs.measure(program, ["product m=1"], quick=False)


def test_help_has_examples(fit_costs, capsys):
    with pytest.raises(SystemExit) as ended:
        fit_costs.main(["--help"])
    assert ended.value.code == 0
    assert "python3 scripts/fit_costs.py --write" in capsys.readouterr().out


def test_kernels_are_compiled_as_they_are_for_torch(fit_costs):
    """Else the times are of other code."""
    text = (ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in text for flag in fit_costs.NVCC_FLAGS)


def test_all_that_is_included_decides_whether_a_program_is_up_to_date(fit_costs):
    names = {path.name for path in fit_costs._included([ROOT / "scripts/fit_costs.cu"])}
    assert {"fit_costs.cu", "fit_costs.h", "element.cuh", "gemm.h", "architecture.h"} <= names
    assert "kernel.cuh" not in names
