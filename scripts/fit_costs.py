"""Fits the constants of the cost models, by which the kernels' tiles are chosen, to this GPU.

Builds a program that times the candidates of the layers of MobileNetV2 at 224 x 224 pixels, runs
it, fits the constants of csrc/plan/architecture.h to the times, and prints how much slower the
chosen candidates are than the fastest, before and after. Needs a CUDA toolkit, a C++ compiler and
nothing else; to run what --build-only has built, not even those.

The exit status is 0, or 2 if something is missing or has failed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/fit_costs"
HEADER = ROOT / "csrc/plan/architecture.h"
RESULTS = ROOT / "scripts/results"

MODELS = ("block", "product", "conv_pool")
BATCHES, QUICK_BATCHES = (1, 8, 32, 128, 256), (1, 32, 256)
# Of the program: candidates that are expected to be far slower than the cheapest teach little.
SETTINGS = ("--repeats", "9", "--within", "4")
QUICK_SETTINGS = ("--repeats", "5", "--within", "2", "--most", "16")

# The kernels that are timed and what they need; flags as in setup.py.
SOURCES = ("launch.cu", "block/*.cu", "conv_pool/*.cu", "product/gemm.cu")
NVCC_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr")

# What the fit minimises: the mean loss of the choices, and this much of the error of the expected
# times of candidates not slower than LIKELY times the best, which leads it where no choice changes.
ERROR_WEIGHT = 0.05
LIKELY = 2.0
# Logarithms of the first and the last factor by which it changes a constant.
FIRST_STEP, LAST_STEP = 0.5, 0.02

_EXAMPLE = """examples:
  python3 scripts/fit_costs.py                     time, fit and print; changes nothing
  python3 scripts/fit_costs.py --write             also replace this GPU's constants
  python3 scripts/fit_costs.py --measurements FILE.json     fit to times that were taken earlier
  python3 scripts/fit_costs.py --arch 9.0a --build-only     build here what runs elsewhere"""


class Error(Exception):
    """Something is missing or has failed: one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Time, fit and print; the exit status. argv: by default that of the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", help="to build for, such as 9.0a; default: that of the GPU")
    parser.add_argument("--quick", action="store_true", help="fewer batches, candidates, repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the times")
    parser.add_argument(
        "--measurements", type=Path, metavar="FILE", help="times that --json wrote: take no others"
    )
    parser.add_argument("--build-only", action="store_true", help="only build the two programs")
    parser.add_argument(
        "--write",
        action="store_true",
        help="replace the constants of the architecture in csrc/plan/architecture.h, and write the "
        "times to scripts/results/costs-smNN.json",
    )
    args = parser.parse_args(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        print(f"fit_costs: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.build_only:
        for program in (build_model(), build_timer(args.arch or _arch_of(_visible_gpu()))):
            print(f"{_shown(program)}: {program.stat().st_size / 1e6:.1f} MB")
        return
    if args.measurements is not None:
        measurements = load(args.measurements)
    else:
        capability = _visible_gpu()
        if capability is None:
            raise Error("no CUDA GPU is visible; --measurements takes times from elsewhere")
        build_model()  # what cannot be built is found before minutes of measuring
        timer = build_timer(args.arch or _arch_of(capability))
        measurements = measure(
            timer, problems(QUICK_BATCHES if args.quick else BATCHES), args.quick
        )
    if args.json is not None:
        args.json.write_text(dump(measurements))
    with CostModel(build_model(), measurements["gpu"]) as model:
        print(f"{measurements['gpu']['name']}: before the fit, {model.about}")
        timed = gather(model, measurements)
        before = model.constants
        after = fit(model, timed)
        print(report(model, timed, before, after))
    if args.write:
        _write(measurements, after)


# ------------------------------------------------------------------------------------------- build


def _visible_gpu() -> tuple[int, int] | None:
    """The compute capability of the first GPU that the driver shows; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    values = [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(values[0])) != 0:
        return None
    if values[0].value == 0:
        return None
    for value, attribute in zip(values, (75, 76), strict=True):  # of the capability: major, minor
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
            return None
    return values[0].value, values[1].value


def _arch_of(capability: tuple[int, int] | None) -> str:
    if capability is None:
        raise Error("no CUDA GPU is visible, so --arch must say what to build for, such as 9.0a")
    major, minor = capability
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def build_timer(arch: str) -> Path:
    """The program that times, for an architecture such as 9.0a; built if it is not there."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)", arch)
    if match is None:
        raise Error(f"--arch must be an architecture such as 8.0 or 9.0a, got {arch!r}")
    number = "".join(match.groups())
    flags = [*NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "-Icsrc"]
    sources = [path for pattern in SOURCES for path in sorted((ROOT / "csrc").glob(pattern))]
    sources.append(ROOT / "scripts/fit_costs.cu")
    program = BUILD / f"bin/fit_costs-sm_{number}-{_digest(flags, sources)}"
    if program.is_file():
        return program
    nvcc = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin/nvcc"
    if not nvcc.is_file():
        raise Error(
            f"there is no {_shown(program)}, and no {nvcc} to build it with (CUDA_HOME names the "
            "toolkit's folder)"
        )
    objects = []
    for source in sources:
        key = f"{source.stem}-sm_{number}-{_digest(flags, [source])}"
        made = BUILD / f"objects/{key}.o"
        if not made.is_file():
            _compile([str(nvcc), *flags, "-c", str(source)], made)
        objects.append(str(made))
    static = ["-cudart=static", "-Xcompiler=-static-libstdc++,-static-libgcc"]
    _compile([str(nvcc), *flags, *static, *objects], program)
    return program


def build_model() -> Path:
    """The program that answers what the models expect; built if it is not there."""
    flags = ["-std=c++20", "-O2", "-Icsrc", "-static-libstdc++", "-static-libgcc"]
    source = ROOT / "scripts/fit_costs_model.cpp"
    digest = _digest([*flags, platform.system(), platform.machine()], [source])
    program = BUILD / f"bin/fit_costs_model-{digest}"
    if not program.is_file():
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
        if compiler is None:
            raise Error(f"there is no {_shown(program)}, and no C++ compiler c++ to build it with")
        _compile([compiler, *flags, str(source)], program)
    return program


def _digest(flags: Iterable[str], sources: Iterable[Path]) -> str:
    """Of the sources and flags that a program is made from: its name says whether it is up to date.
    (Not of the compiler: the program also runs where there is none.)"""
    digest = hashlib.sha256("\0".join(flags).encode())
    for file in sorted(_included(sources)):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _included(sources: Iterable[Path]) -> set[Path]:
    """Sources, and what of this project they include."""
    found: set[Path] = set()
    waiting = list(sources)
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            places = [(folder / name).resolve() for folder in (file.parent, ROOT / "csrc")]
            waiting += [place for place in places if place.is_file()][:1]
    return found


def _compile(command: Sequence[str], made: Path) -> None:
    print(f"building {_shown(made)}", file=sys.stderr, flush=True)
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_suffix(".partial")
    done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise Error(f"{Path(command[0]).name} could not build {_shown(made)}: see above")
    partial.replace(made)


def _shown(path: Path) -> str:
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


# ----------------------------------------------------------------------------------------- measure


def problems(batches: Iterable[int]) -> list[str]:
    """What MobileNetV2 1.0 runs at 224 x 224 pixels: each kind of layer once, as fit_costs.h reads
    them. Blocks have kernels in 16-bit types alone."""
    blocks = ["stem {} map=112 source=3 expanded=32 out=16 stride=1"]
    products = [(112 * 112, 16, 32)]  # (pixels, n, k); the projection of the first block
    size, source = 112, 16
    settings = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    for out, count, first_stride in settings:
        for stride in (first_stride, *[1] * (count - 1)):
            expanded, out_size = 6 * source, size // stride
            blocks.append(
                f"block {{}} map={size} source={source} expanded={expanded} out={out} "
                f"stride={stride}"
            )
            products += [(size * size, expanded, source), (out_size * out_size, out, expanded)]
            size, source = out_size, out
    products += [(size * size, 1280, source), (1, 1000, 1280)]
    texts = []
    for batch in batches:
        for dtype in ("float16", "float32"):
            words = f"dtype={dtype} batch={batch}"
            if dtype == "float16":
                texts += [block.format(words) for block in blocks]
            texts += [
                f"product {words} m={batch * pixels} n={n} k={k}" for pixels, n, k in products
            ]
            texts.append(f"conv_pool {words} pixels={size * size} k={source} n=1280")
    return list(dict.fromkeys(texts))


def measure(timer: Path, texts: Sequence[str], quick: bool) -> dict[str, Any]:
    """Time the candidates of problems on the GPU: {"gpu", "quick", "times": {problem: {candidate:
    {"clocks", "microseconds", "megahertz"}}}}."""
    print(f"timing the candidates of {len(texts)} problems", file=sys.stderr, flush=True)
    start = time.monotonic()
    settings = QUICK_SETTINGS if quick else SETTINGS
    done = subprocess.run(
        [str(timer), *settings],
        input="\n".join(texts) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Error(f"{timer.name} ended with status {done.returncode}: see above")
    gpu, *lines = map(json.loads, done.stdout.splitlines())
    times: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "error" in line:
            name = f"{line['problem']} {line.get('candidate', '')}".rstrip()
            print(f"not timed: {name}: {line['error']}", file=sys.stderr)
        else:
            values = {key: line[key] for key in ("clocks", "microseconds", "megahertz")}
            times.setdefault(line["problem"], {})[line["candidate"]] = values
    if not times:
        raise Error("no candidate of any problem could be timed")
    count = sum(map(len, times.values()))
    passed = time.monotonic() - start
    print(f"timed {count} candidates of {len(times)} problems in {passed:.0f} s", file=sys.stderr)
    return {"gpu": gpu, "quick": quick, "times": times}


def dump(measurements: dict[str, Any]) -> str:
    """As JSON, with a line for each problem."""
    times = ",\n".join(
        f"  {json.dumps(problem)}: {json.dumps(candidates)}"
        for problem, candidates in measurements["times"].items()
    )
    others = {key: value for key, value in measurements.items() if key != "times"}
    return json.dumps(others)[:-1] + f', "times": {{\n{times}\n}}}}\n'


def load(path: Path) -> dict[str, Any]:
    """What `measure` gave and `dump` wrote."""
    try:
        measurements: dict[str, Any] = json.loads(path.read_text())
        gpu = measurements["gpu"]
        known = {key: gpu[key] for key in ("name", *CostModel.DEVICE)}
        valid = all(
            values["microseconds"] > 0 and values["megahertz"] > 0
            for candidates in measurements["times"].values()
            for values in candidates.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Error(f"{path} holds no measurements as --json writes them: {error!r}") from None
    if not known or not measurements["times"] or not valid:
        raise Error(f"{path} holds no measurements as --json writes them: no times above 0")
    return measurements


# --------------------------------------------------------------------------------------------- fit

Constants = dict[str, float]


class CostModel:
    """The cost models of csrc/plan for one GPU, which a program evaluates."""

    DEVICE = ("arch", "multiprocessors", "shared_per_block", "shared_per_multiprocessor")

    def __init__(self, program: Path, gpu: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._ask(f"device {' '.join(str(gpu[name]) for name in self.DEVICE)}")
        words = self._ask("constants").split()
        rows = [words[i : i + 4] for i in range(0, len(words), 4)]
        self.constants: Constants = {name: float(value) for name, value, _, _ in rows}
        self.bounds = {name: (float(least), float(most)) for name, _, least, most in rows}

    def __enter__(self) -> CostModel:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def candidates(self, problem: str) -> list[str]:
        """The names of a problem's candidates; from now on `clocks` also answers for it."""
        return self._ask(f"problem {problem}").split()

    def clocks(self, model: str, constants: Constants) -> list[float]:
        """What all candidates of all problems of a model are expected to take."""
        values = " ".join(f"{name} {value!r}" for name, value in constants.items())
        self._ask(f"set {values}")
        return [float(word) for word in self._ask(f"clocks {model}").split()]

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Error(f"the program of the cost models gave no answer to '{line[:80]}'")
        return answer.strip()


@dataclass
class Timed:
    """The times of a problem's candidates."""

    model: str
    dtype: str
    batch: int
    count: int  # of all candidates
    indices: list[int]  # of those with a time, among all
    microseconds: list[float]
    clocks: list[float]  # that they took

    def choice(self, expected: Sequence[float]) -> int:
        """Which of those with a time is chosen, where all are expected to take so many clocks."""
        return min(range(len(self.indices)), key=lambda i: expected[self.indices[i]])

    def loss(self, expected: Sequence[float]) -> float:
        """How much slower the choice is than the best: 0.1 for 10 %."""
        return self.microseconds[self.choice(expected)] / min(self.microseconds) - 1

    def errors(self, expected: Sequence[float]) -> list[float]:
        """Logarithms of what is expected over what was measured, of the likely candidates."""
        most = LIKELY * min(self.microseconds)
        return [
            math.log(expected[index] / clocks)
            for index, clocks, passed in zip(
                self.indices, self.clocks, self.microseconds, strict=True
            )
            if passed <= most
        ]


def gather(model: CostModel, measurements: dict[str, Any]) -> list[Timed]:
    """The times, by problem."""
    timed = []
    for problem, times in measurements["times"].items():
        words = problem.split()
        fields = dict(word.split("=", 1) for word in words[1:])
        names = model.candidates(problem)
        unknown = sorted(set(times) - set(names))
        if unknown:
            raise Error(
                f"csrc/plan has no candidate {unknown[0]} of {problem}: the times are of other "
                "kernels, so measure again"
            )
        indices = [i for i, name in enumerate(names) if name in times]
        values = [times[names[i]] for i in indices]
        timed.append(
            Timed(
                model="block" if words[0] == "stem" else words[0],
                dtype=fields["dtype"],
                batch=int(fields["batch"]),
                count=len(names),
                indices=indices,
                microseconds=[v["microseconds"] for v in values],
                clocks=[v["microseconds"] * v["megahertz"] for v in values],
            )
        )
    return timed


def expectations(
    model: CostModel, timed: Sequence[Timed], name: str, constants: Constants
) -> list[tuple[Timed, list[float]]]:
    """The problems of one model, each with what its candidates are expected to take."""
    clocks = iter(model.clocks(name, constants))
    return [
        (problem, [next(clocks) for _ in range(problem.count)])
        for problem in timed
        if problem.model == name
    ]


def fit(model: CostModel, timed: Sequence[Timed]) -> Constants:
    """The constants with which the choices lose least; those of a model whose choices lose no less
    than before stay as they are."""
    fitted = dict(model.constants)
    for name in MODELS:
        if not any(problem.model == name for problem in timed):
            continue

        def measure_of(error_weight: float, loss_weight: float, name: str = name) -> Objective:
            def objective(constants: Constants) -> float:
                pairs = expectations(model, timed, name, constants)
                errors = [error for p, clocks in pairs for error in p.errors(clocks)]
                loss = sum(p.loss(clocks) for p, clocks in pairs) / len(pairs)
                root = math.sqrt(sum(e * e for e in errors) / len(errors))
                return loss_weight * loss + error_weight * root

            return objective

        own = {key: value for key, value in fitted.items() if key.startswith(f"{name}.")}
        loss = measure_of(0, 1)
        both = measure_of(ERROR_WEIGHT, 1)
        # The loss changes in steps, so where it starts decides where it ends: also start from where
        # the expected times are best.
        starts = [own, descend(measure_of(1, 0), own, model.bounds)]
        found = [rounded(descend(both, start, model.bounds)) for start in starts]
        best = min(found, key=both)
        if loss(best) <= loss(own):
            fitted.update(best)
    return fitted


Objective = Callable[[Constants], float]


def descend(
    objective: Objective, start: Constants, bounds: dict[str, tuple[float, float]]
) -> Constants:
    """Coordinate descent on the logarithms, by steps that shrink where none of them helps."""
    best, value = dict(start), objective(start)
    step = FIRST_STEP
    while step >= LAST_STEP:
        improved = False
        for name in start:
            for factor in (math.exp(step), math.exp(-step)):
                least, most = bounds[name]
                changed = {**best, name: min(max(best[name] * factor, least), most)}
                found = objective(changed)
                # Less by so little is chance, and steps to it would not end.
                if found < value * (1 - 1e-4):
                    best, value, improved = changed, found, True
                    break
        if not improved:
            step /= 2
    return best


def rounded(constants: Constants) -> Constants:
    """To three digits: more is not known."""
    return {name: float(f"{value:.3g}") for name, value in constants.items()}


# ------------------------------------------------------------------------------------------ report


def report(model: CostModel, timed: Sequence[Timed], before: Constants, after: Constants) -> str:
    """How much slower the choices are than the best that was timed, for each model, dtype and
    batch: the mean and the worst, before and after a fit."""
    losses: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    untimed = 0
    for name in MODELS:
        old = expectations(model, timed, name, before)
        new = expectations(model, timed, name, after)
        for (problem, old_clocks), (_, new_clocks) in zip(old, new, strict=True):
            key = (name, problem.dtype, problem.batch)
            losses.setdefault(key, []).append((problem.loss(old_clocks), problem.loss(new_clocks)))
            untimed += new_clocks.index(min(new_clocks)) not in problem.indices
    lines = [
        "slower than the fastest candidate:    before            after",
        "model      dtype    batch  problems     mean    worst     mean    worst",
    ]
    totals: dict[str, list[tuple[float, float]]] = {}
    for (name, dtype, batch), pairs in sorted(
        losses.items(), key=lambda item: (MODELS.index(item[0][0]), item[0][1:])
    ):
        lines.append(_line(name, dtype, str(batch), pairs))
        totals.setdefault(name, []).extend(pairs)
    lines += [_line(name, "all", "all", pairs) for name, pairs in totals.items()]
    if untimed:
        lines.append(
            f"{untimed} choices after the fit are candidates without a time: the cheapest that has "
            "one stands for them"
        )
    return "\n".join(lines)


def _line(name: str, dtype: str, batch: str, pairs: Sequence[tuple[float, float]]) -> str:
    columns = "".join(
        f" {100 * sum(values) / len(values):6.1f} % {100 * max(values):6.1f} %"
        for values in zip(*pairs, strict=True)
    )
    return f"{name:<10} {dtype:<8} {batch:>5} {len(pairs):>9}{columns}"


# ------------------------------------------------------------------------------------------- write


def replaced(header: str, gpu: dict[str, Any], constants: Constants) -> str:
    """The text of csrc/plan/architecture.h with other constants for the GPU's architecture."""
    sm = f"sm_{gpu['arch'] // 10}"
    begin, end = f"  // fit_costs: begin {sm}\n", f"  // fit_costs: end {sm}\n"
    if header.count(begin) != 1 or header.count(end) != 1:
        raise Error(f"csrc/plan/architecture.h must have '{begin.strip()}' and its end, once")
    name = re.sub(r"[^\w .()-]", "", gpu["name"])
    lines = [f'  Architecture a = measured({gpu["arch"]}, "{name}");\n']
    lines += [f"  a.{key} = {value:g};\n" for key, value in constants.items()]
    start = header.index(begin) + len(begin)
    return header[:start] + "".join(lines) + header[header.index(end) :]


def _write(measurements: dict[str, Any], constants: Constants) -> None:
    gpu = measurements["gpu"]
    text = replaced(HEADER.read_text(), gpu, constants)
    times = RESULTS / f"costs-sm{gpu['arch'] // 10}.json"
    times.write_text(dump(measurements))
    HEADER.write_text(text)
    print(f"wrote {_shown(HEADER)} and {_shown(times)}")


if __name__ == "__main__":
    raise SystemExit(main())
