"""What every measurement shares: the settings that it runs under, and how its JSON starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch

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


@contextmanager
def exact_settings() -> Iterator[None]:
    """Stock at its best that is still exact: cuDNN tries its algorithms, and TF32 is off."""
    wanted = (
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


def noise(spreads: Iterable[float]) -> dict[str, Any]:
    """How many of the spreads are over `NOISE`: {"limit", "over", "of", "worst"}."""
    spreads = list(spreads)
    return {
        "limit": NOISE,
        "over": sum(spread > NOISE for spread in spreads),
        "of": len(spreads),
        "worst": max(spreads, default=None),
    }
