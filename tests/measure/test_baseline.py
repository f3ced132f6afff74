"""Two runs against each other: what is slower, what counts, and which files are refused."""

from __future__ import annotations

import copy
import json
import sys

import bench_results
import pytest

from torch_mbv2.errors import Error, UnavailableError
from torch_mbv2.measure import baseline


def run(rows=(), layers=()):
    """A result with these rows and layers alone."""
    return bench_results.result(rows=list(rows)) | {"layers": list(layers)}


def network(ms, contender="patched_cudagraph", spread=0.01, **others):
    """A row of which 10 % and 90 % quantiles are `spread` times the median away."""
    quantiles = {"p10_ms": (1 - spread) * ms, "p90_ms": (1 + spread) * ms}
    return bench_results.row(contender, ms=ms, **quantiles | others)


def layer(us, spread=0.01, **others):
    quantiles = {"p10_us": (1 - spread) * us, "p90_us": (1 + spread) * us}
    return bench_results.layer("features.2", us=us, **quantiles | others)


def lines(comparison):
    """The cells of the table, by the names of its columns."""
    columns, rows, numbers = baseline.table(comparison)
    assert set(numbers) < set(columns)
    return [dict(zip(columns, row, strict=True)) for row in rows]


# ------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("ms", "spread", "slower", "faster", "verdict"),
    [
        pytest.param(1.2, 0.01, True, False, "SLOWER", id="beyond noise"),
        pytest.param(1.2, 0.2, False, False, "", id="slower within noise"),
        pytest.param(1.04, 0.001, False, False, "", id="beyond noise, but by little"),
        pytest.param(1.0, 0.01, False, False, "", id="same"),
        pytest.param(0.97, 0.001, False, False, "", id="a little faster"),
        pytest.param(0.8, 0.01, False, True, "faster", id="faster beyond noise"),
        pytest.param(0.8, 0.3, False, False, "", id="faster within noise"),
    ],
)
def test_patched_row(ms, spread, slower, faster, verdict):
    found = baseline.compare(run([network(ms, spread=spread)]), run([network(1.0)]))
    (row,) = found["rows"]
    assert (row["ms"], row["old_ms"], row["ratio"]) == (ms, 1.0, ms)
    assert (row["slower"], row["faster"], row["counts"]) == (slower, faster, True)
    assert found["slower"] == int(slower)
    assert lines(found) == [
        {
            "dtype": "float16",
            "batch": "1",
            "row": "patched_cudagraph",
            "old": "1.000 ms",
            "now": f"{ms:.3f} ms",
            "ratio": f"{ms:.2f}x",
            "verdict": verdict,
        }
    ]


def test_noise_of_the_old_run_matters_too():
    found = baseline.compare(run([network(1.2)]), run([network(1.0, spread=0.25)]))
    assert found["slower"] == 0


@pytest.mark.parametrize("contender", ["eager", "cudagraph", "compile", "onnxruntime"])
def test_slower_rival_is_shown_and_does_not_count(contender):
    found = baseline.compare(run([network(2.0, contender)]), run([network(1.0, contender)]))
    (row,) = found["rows"]
    assert (row["slower"], row["counts"], found["slower"]) == (True, False, 0)
    assert lines(found)[0]["verdict"] == "slower, not counted"


@pytest.mark.parametrize(
    ("us", "slower", "shown"),
    [(6.0, 1, ["SLOWER"]), (5.0, 0, []), (4.0, 0, ["faster"])],
)
def test_layer_counts_and_is_shown_if_it_changed(us, slower, shown):
    found = baseline.compare(run(layers=[layer(us)]), run(layers=[layer(5.0)]))
    (row,) = found["rows"]
    assert (row["us"], row["old_us"], row["counts"]) == (us, 5.0, True)
    assert row["ratio"] == pytest.approx(us / 5.0)
    assert found["slower"] == slower
    assert [line["verdict"] for line in lines(found)] == shown
    assert all(line["row"] == "features.2 (block)" for line in lines(found))


@pytest.mark.parametrize(
    ("us", "slower", "faster"),
    [(2.0, False, False), (2.25, False, False), (2.35, True, False), (1.65, False, True)],
)
def test_small_kernels_differ_from_run_to_run(us, slower, faster):
    """By 0.2 us with the same code, far beyond the noise within a run."""
    found = baseline.compare(run(layers=[layer(us)]), run(layers=[layer(2.0)]))
    (row,) = found["rows"]
    assert (row["slower"], row["faster"]) == (slower, faster)


@pytest.mark.parametrize(
    ("eager", "patched", "counts"),
    [
        pytest.param({"ms": 1.5}, {"ms": 1.52}, False, id="the host is slower"),
        pytest.param({"ms": 0.6}, {"ms": 0.6}, False, id="the host is faster"),
        pytest.param({"ms": 1.5}, {"ms": 1.7}, True, id="slower than that"),
        pytest.param({"ms": 1.5, "spread": 0.2}, {"ms": 1.7}, False, id="as far as noise can tell"),
        pytest.param({"ms": 1.0}, {"ms": 1.5}, True, id="the host is the same"),
        pytest.param({"ms": 1.3, "spread": 0.4}, {"ms": 1.3}, True, id="eager is noisy"),
        pytest.param({"ms": 0.6}, {"ms": 1.5}, True, id="the host is faster, patched slower"),
        pytest.param(None, {"ms": 1.5}, True, id="no eager"),
        pytest.param({"ms": 1.5}, {"ms": 1.0}, True, id="only eager is slower"),
    ],
)
def test_slower_host(eager, patched, counts):
    """What is called from Python counts beyond the change of eager, which is none of our code."""

    def rows(eager, patched):
        return [network(**patched, contender="patched")] + (
            [] if eager is None else [network(**eager, contender="eager")]
        )

    old = run(rows({"ms": 1.0}, {"ms": 1.0}))
    found = baseline.compare(run(rows(eager, patched)), old)
    row = found["rows"][0]
    assert (row["contender"], row["counts"]) == ("patched", counts)
    assert found["slower"] == int(counts and patched["ms"] > 1)
    if counts:
        assert found["comparable"] == []
    else:
        (sentence,) = found["comparable"]
        word = "slower" if patched["ms"] > 1 else "faster"
        assert sentence == (
            "patched does not count for float16 at batch 1: eager, called from Python like it, is "
            f"{word}, too"
        )
        assert lines(found)[0]["verdict"] == ("slower, not counted" if word == "slower" else word)


def test_slower_host_excuses_no_cuda_graph_and_no_other_case():
    new = [network(1.5), network(1.5, "eager"), network(1.5, "patched", batch=8)]
    old = [network(1.0), network(1.0, "eager"), network(1.0, "patched", batch=8)]
    assert baseline.compare(run(new), run(old))["slower"] == 2


def test_stock_side_of_a_layer_does_not_count():
    slow = layer(5.0, stock_us=50.0, stock_p10_us=49.0, stock_p90_us=51.0, ratio=10.0)
    assert baseline.compare(run(layers=[slow]), run(layers=[layer(5.0)]))["slower"] == 0


def test_layers_of_another_level_are_others():
    both = [layer(5.0), layer(5.0, level="op")]
    found = baseline.compare(run(layers=both), run(layers=both[:1]))
    assert found["only_new"] == ["float16, batch 1, op, features.2"]


@pytest.mark.parametrize(
    ("contender", "failed", "verdict"),
    [
        ("patched_cudagraph", 1, "NO LONGER RUNS: no memory"),
        ("compile", 0, "skipped now: no memory"),
    ],
)
def test_skipped_now(contender, failed, verdict):
    skipped = bench_results.skipped(contender, "no memory")
    found = baseline.compare(run([skipped]), run([network(1.0, contender)]))
    (row,) = found["rows"]
    assert (row["ms"], row["ratio"], row["skipped"]) == (None, None, "no memory")
    assert found["slower"] == failed
    (line,) = lines(found)
    assert (line["old"], line["now"], line["ratio"]) == ("1.000 ms", "skipped", "")
    assert line["verdict"] == verdict


def test_skipped_in_the_old_run():
    skipped = bench_results.skipped("patched_cudagraph", "no memory")
    found = baseline.compare(run([network(1.0)]), run([skipped]))
    assert found["slower"] == 0
    (line,) = lines(found)
    assert (line["old"], line["verdict"]) == ("skipped", "skipped in the old run: no memory")


def test_rows_of_one_run_only():
    new = run([network(1.0), network(1.0, batch=8)])
    old = run([network(1.0), network(1.0, "eager"), network(1.0, dtype="float32")])
    found = baseline.compare(new, old)
    assert len(found["rows"]) == 1
    assert found["only_new"] == ["float16, batch 8, patched_cudagraph"]
    assert found["only_old"] == ["float16, batch 1, eager", "float32, batch 1, patched_cudagraph"]


@pytest.mark.parametrize(
    "old",
    [
        run([network(1.0, dtype="float32", batch=batch) for batch in (8, 32)]),
        run([bench_results.skipped("patched_cudagraph", "no memory")]),
    ],
    ids=["other dtype", "skipped twice"],
)
def test_nothing_in_common(old):
    rows = [bench_results.skipped("patched_cudagraph", "no memory"), network(1.0, "eager")]
    with pytest.raises(Error, match=r"^the runs have nothing in common .*") as raised:
        baseline.compare(run(rows), old, "old.json")
    message = str(raised.value)
    assert "this one timed float16 at batch 1" in message
    timed = "nothing" if len(old["rows"]) == 1 else "float32 at batch 8, 32"
    assert message.endswith(f"old.json {timed}")


def changed(*path, value):
    """A result that differs from `result()` in one place."""
    result = bench_results.result()
    where = result
    for name in path[:-1]:
        where = where[name]
    assert where[path[-1]] != value
    where[path[-1]] = value
    return result


@pytest.mark.parametrize(
    ("old", "sentence"),
    [
        (
            changed("environment", "gpus", value=[{"name": "GPU 8000"}]),
            "GPU: GPU 9000 now, GPU 8000 in the old run",
        ),
        (
            changed("environment", "driver", value="500.1"),
            "driver: 600.1 now, 500.1 in the old run",
        ),
        (changed("environment", "cuda", value="12.8"), "CUDA: 13.9 now, 12.8 in the old run"),
        (changed("environment", "cudnn", value="9.1"), "cuDNN: 9.99 now, 9.1 in the old run"),
        (changed("environment", "torch", value="2.98"), "torch: 2.99 now, 2.98 in the old run"),
        (changed("environment", "threads", value=8), "threads: 2 now, 8 in the old run"),
        (changed("environment", "cpu", value="CPU 2"), "CPU: CPU 1 now, CPU 2 in the old run"),
        (changed("kernels", "available", value=False), "kernels can run: True now, False in"),
        (changed("settings", "rounds", value=5), "rounds: 20 now, 5 in the old run"),
        (changed("settings", "min_time_s", value=0.0), "seconds of a sample: 0.02 now, 0.0 in"),
        (changed("settings", "caches", value="cold"), "caches: warm: every call reads the same"),
        (changed("clocks", "sm_mhz", value=1000.0), "SM clock in MHz: 1980.0 now, 1000.0 in"),
        (
            changed("layers", 0, "caches", value="warm"),
            "caches: cold in one run and warm in the other for 1 layers",
        ),
    ],
)
def test_what_differs_is_said(old, sentence):
    (said,) = baseline.compare(bench_results.result(), old)["comparable"]
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    "old",
    [
        changed("clocks", "sm_mhz", value=1950.0),
        changed("clocks", "sm_mhz", value=None),
        changed("clocks", value=None),
        changed("environment", "commit", value=None),
        changed("date", value="2029-01-02T03:04:05+00:00"),
    ],
    ids=["clock", "no clock", "no clocks", "commit", "date"],
)
def test_what_does_not_matter_is_not_said(old):
    assert baseline.compare(bench_results.result(), old)["comparable"] == []


def test_gpu_of_a_run_on_the_cpu_does_not_matter():
    new, old = (bench_results.result(layers=False, device="cpu", clocks=None) for _ in range(2))
    old["environment"] = old["environment"] | {"gpus": [], "driver": None, "cuda": None}
    assert baseline.compare(new, old)["comparable"] == []


@pytest.mark.parametrize(
    ("old", "sentence"),
    [
        (changed("model", "name", value="net2"), "model is some_net now and net2 in old.json"),
        (changed("model", "input", value=[96, 64]), "input is 224x192 now and 96x64 in old.json"),
        (changed("device", value="cpu"), "device is cuda now and cpu in old.json"),
    ],
)
def test_runs_of_different_things_are_not_compared(old, sentence):
    with pytest.raises(Error, match=f"^the runs cannot be compared: {sentence}$"):
        baseline.compare(bench_results.result(), old, "old.json")


def test_summary():
    new = run(
        [network(2.0), network(0.5, "patched"), network(2.0, "eager"), network(1.0, batch=8)],
        [layer(5.0), layer(9.0, batch=8)],
    )
    old = run(
        [network(1.0), network(1.0, "patched"), network(1.0, "eager")],
        [layer(5.0), layer(5.0, batch=8), layer(5.0, level="op"), layer(5.0, dtype="float32")],
    )
    found = baseline.compare(new, old, "old.json")
    assert found["slower"] == 2
    assert baseline.summary(found) == (
        "against old.json (2030-01-02, commit 012345678): of 4 patched rows and layers 2 slower, "
        "1 faster, by over 5% and beyond noise; 1 only in this run; 2 only in the old run"
    )


def test_summary_of_what_no_longer_runs():
    found = baseline.compare(
        run([bench_results.skipped("patched", "no memory"), network(1.0)]),
        run([network(1.0, "patched"), network(1.0)]),
    )
    assert found["slower"] == 1
    assert baseline.summary(found).endswith(
        "of 2 patched rows and layers 0 slower, 0 faster, by over 5% and beyond noise; "
        "1 no longer run"
    )


def test_comparison_follows_the_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")
    new = bench_results.result()
    old = copy.deepcopy(new)
    old["rows"][0] = bench_results.skipped("eager", "why")
    found = baseline.compare(new, old, "old.json")
    assert len(found["rows"]) == len(new["rows"]) + len(new["layers"])
    jsonschema.validate(new | {"baseline": found}, bench_results.SCHEMA)
    jsonschema.validate(new | {"baseline": None}, bench_results.SCHEMA)
    del found["rows"][0]["counts"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(new | {"baseline": found}, bench_results.SCHEMA)


# --------------------------------------------------------------------------------------- reading


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")
    return tmp_path / "old.json"


def test_load(path):
    result = bench_results.result()
    path.write_text(json.dumps(result))
    assert baseline.load(path) == result
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(result).encode())  # as some editors save it
    assert baseline.load(str(path)) == result


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "is not JSON: Expecting value", id="empty"),
        pytest.param(b"[1, 2", "is not JSON: Expecting ',' delimiter", id="truncated"),
        pytest.param(b"\xff\xfe\x00", "is no text in UTF-8", id="not UTF-8"),
        pytest.param(b'{"verb": NaN}', "NaN is no JSON number", id="NaN"),
        pytest.param(b"[1e999]", "is not JSON: 1e999... is too large a number", id="infinite"),
        pytest.param(b"[%d]" % 10**400, "... is too large a number", id="large"),
        pytest.param(b"[" * 100_000, "is not JSON: ", id="deep"),
        pytest.param(b"[]", "was not written by bench --json", id="list"),
        pytest.param(b"{}", "was not written by bench --json", id="other object"),
        pytest.param(
            b'{"verb": "info", "schema": 1}',
            "must be written by bench --json, and is by 'info'",
            id="other verb",
        ),
        pytest.param(
            b'{"verb": "bench", "schema": 1}',
            "was written by an older torch_mbv2, in schema 1 instead of 2: run bench again",
            id="older",
        ),
        pytest.param(
            b'{"verb": "bench", "schema": 3}',
            "was written by a newer torch_mbv2, in schema 3 instead of 2: run bench again",
            id="newer",
        ),
        pytest.param(
            b'{"verb": "bench", "schema": "2"}',
            "its schema must be the number 2, got '2'",
            id="schema",
        ),
    ],
)
def test_what_is_no_result_is_refused(path, content, why):
    path.write_bytes(content)
    with pytest.raises(Error) as raised:
        baseline.load(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("where", "value", "why"),
    [
        (("rows",), {}, "rows is not as bench.schema.json wants it: {} is not of type 'array'"),
        (("rows", 3, "median_ms"), -1, "rows[3].median_ms is not as .*: -1 is less than"),
        (("rows", 3, "agrees"), "y", "rows[3].agrees is not as .*: 'y' is not of type 'boolean'"),
        (("rows", 3, "contender"), "me", r"rows[3].contender is not as .*: 'me' is not one of \["),
        (("rows", 3), {"dtype": "float16"}, "rows[3] is not as .*: 'batch' is a required"),
        (("layers", 1, "us"), "5", "layers[1].us is not as .*: '5' is not of type 'number'"),
        (("clocks",), {}, "clocks is not as .*: 'sm_mhz' is a required property"),
        (("surprise",), 1, r"the top level is not as .*: Additional .* \('surprise' was"),
    ],
)
def test_place_and_rule_are_named(path, where, value, why):
    result = bench_results.result()
    target = result
    for name in where[:-1]:
        target = target[name]
    target[where[-1]] = value
    path.write_text(json.dumps(result))
    pattern = why.replace("[3]", r"\[3\]").replace("[1]", r"\[1\]")
    with pytest.raises(Error, match=pattern) as raised:
        baseline.load(path)
    assert len(str(raised.value)) < 300
    assert "under any of the given schemas" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "why"),
    [(lambda path: None, "No such file"), (lambda path: path.mkdir(), "Is a directory")],
)
def test_what_cannot_be_read_is_refused(path, make, why):
    make(path)
    with pytest.raises(Error, match=why):
        baseline.load(path)


def test_without_jsonschema(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(UnavailableError, match=r"--baseline needs .* 'torch-mbv2\[bench\]'"):
        baseline.load(tmp_path / "old.json")
