"""scripts/every_case.py, for which a sanitizer runs on a GPU, here on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from torch_mbv2 import ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("every_case", ROOT / "scripts/every_case.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_ops_on_tensors_are_among_the_cases(script):
    cases = list(script.every_case())
    assert {case.op for case, _ in cases} == set(ops.SCHEMAS) - {"network"}
    assert {dtype for _, dtype in cases} == {torch.float32, torch.float16, torch.bfloat16}


def test_parts_share_all_cases(script, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(script, "run_case", lambda *case: ran.append(case) or True)
    monkeypatch.setattr(script, "run_network", lambda *network: True)
    for part in ("0/3", "1/3", "2/3"):
        assert script.main(["--part", part, "--device", "cpu"]) == 0
    expected = [(case, dtype, "cpu") for case, dtype in script.every_case()]
    assert sorted(map(str, ran)) == sorted(map(str, expected))
    assert "0 of them bad" in capsys.readouterr().out


def test_runs(script, capsys):
    assert script.main(["--part", "1/97", "--device", "cpu"]) == 0
    assert "cases, 0 of them bad" in capsys.readouterr().out


def test_of_some_ops_alone(script, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(script, "run_case", lambda case, *_: ran.append(case.op) or True)
    assert script.main(["--ops", "add", "linear", "--device", "cpu"]) == 0
    assert set(ran) == {"add", "linear"}


def test_what_is_not_finite_is_said(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "run_case", lambda case, dtype, device: dtype != torch.bfloat16)
    assert script.main(["--part", "1/97", "--device", "cpu"]) == 1
    assert "torch.bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["1", "4/4", "-1/3", "a/b"])
def test_parts_that_are_none_are_refused(script, part, capsys):
    with pytest.raises(SystemExit):
        script.main([f"--part={part}"])
    assert f"a part is I/N with I < N, as in 0/4, not {part}" in capsys.readouterr().err
