"""The conditions of a measurement: its settings, where it runs, how noisy it is there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_mbv2.errors import Error
from torch_mbv2.measure.environment import environment, kernels

NOISE = 0.05
"""The spread, (90 % - 10 %) / median, that the samples of a quiet machine stay within."""


def header(verb: str, command: str, device: torch.device) -> dict[str, Any]:
    """How the JSON of a measurement starts: what ran, where and when."""
    return {
        "verb": verb,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "environment": environment(),
        "kernels": kernels(),
    }


def check_target(flag: str, path: str | Path) -> None:
    """Raise Error now, before any work is done, if the file that a flag asks for could not be
    written; leaves no trace."""
    target = Path(path)
    try:
        if target.is_dir():
            raise Error(f"{flag} {path}: is a directory")
        if not target.absolute().parent.is_dir():
            raise Error(f"{flag} {path}: there is no directory {target.parent}")
        if not target.exists():
            with tempfile.TemporaryFile(dir=target.parent):
                return
    except OSError as error:
        raise Error(f"{flag} {path}: cannot be written: {error.strerror}") from None
    if not os.access(target, os.W_OK):
        raise Error(f"{flag} {path}: cannot be written")


@contextmanager
def exact_settings() -> Iterator[None]:
    """Stock at its best that is still exact: cuDNN tries its algorithms, and TF32 is off."""
    wanted: tuple[tuple[object, str, bool], ...] = (
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
    )
    before = [getattr(owner, name) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(wanted, before, strict=True):
            setattr(owner, name, value)


def dtype_of(model: nn.Module, otherwise: Tensor) -> str:
    """The name of the dtype that a model is measured in: that of its weights, as it may cast what
    it takes and returns, or without weights that of a tensor."""
    weights = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(weights, otherwise.dtype)).removeprefix("torch.")


def noise(spreads: Iterable[float]) -> dict[str, Any]:
    """How many of the spreads are over `NOISE`: {"limit", "over", "of", "worst"}."""
    spreads = list(spreads)
    return {
        "limit": NOISE,
        "over": sum(spread > NOISE for spread in spreads),
        "of": len(spreads),
        "worst": max(spreads, default=None),
    }


def where(result: Mapping[str, Any]) -> str:
    """The machine, its clocks, the versions, the commit and the day, in one line."""
    found = result["environment"]
    if result["device"] == "cuda":
        clock = (result.get("clocks") or {}).get("sm_mhz")
        at = "" if clock is None else f" at {clock:.0f} MHz"
        parts = [
            f"{found['gpus'][0]['name']}{at}, driver {found['driver'] or 'unknown'}",
            f"torch {found['torch']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}",
        ]
    else:
        parts = [f"{found['cpu']}, {found['threads']} threads", f"torch {found['torch']}"]
    return "; ".join([*parts, f"commit {_short(found['commit'])}, {result['date'][:10]}"])


def _short(commit: str | None) -> str:
    """The first digits; "+", for files that differ from the commit, stays."""
    return "unknown" if commit is None else commit[:9] + "+" * commit.endswith("+")
