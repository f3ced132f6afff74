"""How far two tensors are apart, and how far they may be.

An element is over tolerance where not |a - b| <= atol + rtol * |b|, with a of the patched model
and b of its rival; NaN is close to NaN only, an infinity to the same one only.

By default rtol and atol follow from the dtype's unit roundoff u (2^-24 in float32, 2^-11 in
float16, 2^-8 in bfloat16): rtol is 2 u, as both sides round the element once, and atol is
c u layers^(2/3) times the RMS of b. c is 384 in float32, where a sum in another order is off by
many roundings, most in Winograd's convolution (`testing.BOUNDS`), and 48 in half precision, where
the roundings between stock's layers lead. The errors of layers add up like a random walk,
layers^(1/2), and untrained weights amplify them. For the logits of MobileNetV2 and its 53 layers
that makes 3e-4, 0.3 and 2.6 of the RMS; the worst of two right models with untrained weights were
apart by 2.4e-5, 0.07 and 0.46 of it. Its maps, which no pooling has averaged yet, are several times
farther apart: there, where errors of all layers before have accumulated, atol has layers^1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mbv2 import testing

_ROUNDOFFS = {torch.float32: 384, torch.float16: 48, torch.bfloat16: 48}


@dataclass(frozen=True)
class Tolerance:
    """How far off an element may be: as given, else by the rule at the head of this file.

    Attributes:
        dtype: of the patched model.
        given: (rtol, atol), or None.
    """

    dtype: torch.dtype
    given: tuple[float, float] | None = None

    def bounds(self, expected: Tensor, layers: int, growth: float = 2 / 3) -> tuple[float, float]:
        """(rtol, atol) for a tensor that so many layers made, one after the other, if errors grow
        with this power of their number."""
        if self.given is not None:
            return self.given
        unit = testing.unit_roundoff(self.dtype)
        finite = expected[expected.isfinite()].double()
        rms = float(finite.square().mean().sqrt()) if len(finite) else 0.0
        return 2 * unit, _ROUNDOFFS[self.dtype] * unit * max(layers, 1) ** growth * rms


def differences(found: Tensor, expected: Tensor, rtol: float, atol: float) -> dict[str, Any]:
    """How far `found` is from `expected`, of the same shape and any float dtypes and devices: what
    this file's docstring calls differences."""
    a, b = found.detach().double(), expected.detach().to(found.device).double()
    finite = a.isfinite() & b.isfinite()
    over = int((~torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)).sum())
    x, y = a[finite], b[finite]
    return {
        "max_abs": testing.max_abs(x, y),
        "mean_abs": float((x - y).abs().mean()),
        "relative_l2": testing.relative_l2(x, y),
        "cosine": float(x @ y / (x.norm() * y.norm())),
        "nan": [int(t.isnan().sum()) for t in (a, b)],
        "inf": [int(t.isinf().sum()) for t in (a, b)],
        "elements": a.numel(),
        "over": over,
        "rtol": rtol,
        "atol": atol,
        # Two outputs of NaN alone are alike, but nothing to go by.
        "agrees": over == 0 and (a.numel() == 0 or bool(finite.any())),
    }


def count_layers(*stock: nn.Module) -> int:
    """How many layers with weights there are inside."""
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for top in stock for m in top.modules())
