"""bench.schema.json says what a result of `bench` is, and refuses what is none."""

from __future__ import annotations

import bench_results
import pytest

jsonschema = pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")

VALIDATOR = jsonschema.Draft202012Validator(bench_results.SCHEMA)


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(bench_results.SCHEMA)


def objects(schema, where="$"):
    """Every schema of an object inside a schema, by the place where it is."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield where, schema
        for name, inner in schema.items():
            yield from objects(inner, f"{where}.{name}")
    elif isinstance(schema, list):
        for i, inner in enumerate(schema):
            yield from objects(inner, f"{where}[{i}]")


@pytest.mark.parametrize(
    "schema", [pytest.param(schema, id=name) for name, schema in objects(bench_results.SCHEMA)]
)
def test_what_is_required_is_described(schema):
    """A misspelt name in "required" would refuse every result, or be allowed to be anything."""
    free = schema.get("additionalProperties") is not False
    assert free or set(schema["required"]) <= set(schema["properties"])


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(bench_results.result(), id="GPU"),
        pytest.param(bench_results.result(layers=False), id="no layers"),
        pytest.param(bench_results.result(batches=(1,), dtypes=("bfloat16",)), id="one case"),
        pytest.param(
            bench_results.result(
                rows=[
                    bench_results.row("eager"),
                    bench_results.skipped("compile", "no compiler"),
                    bench_results.row("patched", peak_mib=None, over_patched_cudagraph=None),
                ]
            ),
            id="skipped and null",
        ),
        pytest.param(
            bench_results.result(layers=False, device="cpu", clocks=None, dtypes=("float32",)),
            id="CPU",
        ),
        pytest.param(
            bench_results.result(
                layer_totals=[
                    bench_results.total(heuristic_us=None, heuristic_geometric_mean=None)
                ],
            )
            | {
                "layers": [
                    bench_results.layer(
                        "pool",
                        heuristic_us=None,
                        heuristic_p10_us=None,
                        heuristic_p90_us=None,
                        heuristic_ratio=None,
                        heuristic_relative_l2=None,
                        flops=0,
                        tflop_per_s=0.0,
                    )
                ]
            },
            id="no heuristic",
        ),
    ],
)
def test_results_are_valid(result):
    VALIDATOR.validate(result)


@pytest.mark.parametrize("missing", bench_results.result())
def test_missing_key_is_refused(missing):
    result = bench_results.result()
    del result[missing]
    assert not VALIDATOR.is_valid(result)


@pytest.mark.parametrize("missing", bench_results.row("patched"))
def test_missing_key_of_a_row_is_refused(missing):
    row = bench_results.row("patched")
    del row[missing]
    assert not VALIDATOR.is_valid(bench_results.result(rows=[row]))


@pytest.mark.parametrize("missing", bench_results.layer("features.2"))
def test_missing_key_of_a_layer_is_refused(missing):
    layer = bench_results.layer("features.2")
    del layer[missing]
    assert not VALIDATOR.is_valid(bench_results.result() | {"layers": [layer]})


@pytest.mark.parametrize("missing", bench_results.total())
def test_missing_key_of_a_total_is_refused(missing):
    total = bench_results.total()
    del total[missing]
    assert not VALIDATOR.is_valid(bench_results.result(layer_totals=[total]))


@pytest.mark.parametrize(
    "others",
    [
        {"median_ms": -1.0},
        {"median_ms": 0.0},
        {"median_ms": None},
        {"median_ms": "1.0"},
        {"contender": "stock"},
        {"dtype": "float64"},
        {"batch": 0},
        {"batch": 1.5},
        {"calls": 0},
        {"agrees": "yes"},
        {"skipped": "and timed"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_wrong_row_is_refused(others):
    row = bench_results.row("patched") | others
    assert not VALIDATOR.is_valid(bench_results.result(rows=[row]))


@pytest.mark.parametrize(
    "others",
    [
        {"us": -1.0},
        {"us": None},
        {"level": "model"},
        {"caches": "lukewarm"},
        {"input": "1x24x56x56"},
        {"agrees": None},
        {"ratio": 0.0},
        {"surprise": 1},
    ],
    ids=str,
)
def test_wrong_layer_is_refused(others):
    layer = bench_results.layer("features.2") | others
    assert not VALIDATOR.is_valid(bench_results.result() | {"layers": [layer]})


@pytest.mark.parametrize(
    "others",
    [
        {"schema": 1},
        {"verb": "profile"},
        {"device": "tpu"},
        {"environment": {}},
        {"clocks": {"sm_mhz": 1980.0}},
        {"settings": bench_results.result()["settings"] | {"tf32": True}},
        {"settings": bench_results.result()["settings"] | {"rounds": 0}},
        {"ceilings": {"bytes_per_s": 0.0, "flops_per_s": {}}},
        {"model": bench_results.result()["model"] | {"input": [224]}},
        {"rivals": [{"name": "stock", "title": "stock", "missing": None}]},
        {"noise": {"limit": 0.05}},
        {"rows": None},
        {"baseline": {}},
        {"surprise": 1},
    ],
    ids=lambda others: next(iter(others)),
)
def test_wrong_result_is_refused(others):
    assert not VALIDATOR.is_valid(bench_results.result() | others)
