"""Damaged and hostile ONNX files: one clear error, or a module that runs. See onnx_fuzz.py.

The environment variable TORCH_MBV2_FUZZ is how many cases to run; default: 300.
"""

from __future__ import annotations

import os

import pytest
from torch import nn

pytest.importorskip("onnx2torch", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

import fragile_worker
import onnx_fuzz

from torch_mbv2.errors import ModelError

CASES = int(os.environ.get("TORCH_MBV2_FUZZ", "300"))
CHUNK = 25


@pytest.fixture(scope="module")
def pool():
    pool = onnx_fuzz.Pool(workers=2)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "seeds",
    [range(start, min(start + CHUNK, CASES)) for start in range(0, CASES, CHUNK)],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)
def test_mutated_files(pool, seeds):
    failed = [outcome for outcome in pool.run(seeds) if outcome.kind]
    assert not failed, "\n\n".join(
        f"python tests/helpers/onnx_fuzz.py {outcome.seed}: {outcome.kind}\n{outcome.detail}"
        for outcome in failed
    )


# ----------------------------------------------------------------------------------- the harness


@pytest.fixture(scope="module")
def first_cases():
    return [onnx_fuzz.make_case(seed, onnx_fuzz.seed_models()) for seed in range(300)]


@pytest.mark.parametrize("mutation", onnx_fuzz.MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_is_tried(first_cases, mutation):
    assert any(
        said.startswith(mutation.__name__) for case in first_cases for said in case.mutations
    )


def test_every_model_and_form_is_tried(first_cases):
    assert {case.model for case in first_cases} == set(onnx_fuzz.seed_models())
    assert {case.form for case in first_cases} == {"path", "bytes", "proto"}


def test_cases_are_reproducible(first_cases):
    assert onnx_fuzz.make_case(7, onnx_fuzz.seed_models()) == first_cases[7]


def raising(error):
    def load(source):
        raise error

    return load


def returning(module):
    return lambda source: module


class Text(nn.Module):
    def forward(self, image):
        return "text"


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (raising(ModelError("it is damaged")), ""),
        (returning(nn.LayerNorm((3, 32, 32))), ""),
        (raising(KeyError("x")), "load: KeyError ["),
        (raising(MemoryError()), "load: MemoryError ["),
        (raising(ModelError("")), "message: empty ["),
        (raising(ModelError("x" * 601)), "message: longer than 600 characters ["),
        (raising(ModelError("two\nlines")), "message: line breaks or control characters ["),
        (raising(ModelError("\x1b[2J")), "message: line breaks or control characters ["),
        (returning(nn.LayerNorm((3, 32, 33))), "run: RuntimeError ["),
        (returning(Text()), "run: the output is a str"),
        (lambda source: source.Clear(), "forbidden: changes the ModelProto"),
        (lambda source: onnx_fuzz._audit("os.system", (b"true",)), "forbidden: os.system"),
        (
            lambda source: onnx_fuzz._audit("open", ("../outside.bin", None, 0)),
            "forbidden: opens a file outside",
        ),
    ],
)
def test_verdict(monkeypatch, tmp_path, load, kind):
    data = onnx_fuzz.seed_models()["helper"].data
    monkeypatch.setattr(onnx_fuzz, "load_onnx", load)
    outcome = onnx_fuzz.run_case(0, onnx_fuzz.Case("helper", [], "proto", data, {}), tmp_path)
    assert outcome.kind.startswith(kind)
    assert bool(outcome.kind) == bool(kind)


def test_worker_outlives_crashes_and_hangs(monkeypatch):
    monkeypatch.setattr(onnx_fuzz, "TIMEOUT", 1.0)
    worker = onnx_fuzz.Worker({}, serve=fragile_worker.serve)
    kinds = [worker.run(seed).kind for seed in range(4)]
    worker.close()
    assert kinds == [
        "",
        "crash: exit status 3 [- | -]",
        "hang: no end after 1 s [- | fragile_worker.py:serve]",
        "",
    ]
