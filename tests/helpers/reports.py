"""What tests count in a report."""

from __future__ import annotations

from collections import Counter

from torch import nn

import torch_mbv2
from torch_mbv2.patch import Row


def takes(row: Row) -> str | None:
    """What takes a layer: a fused block, whatever kernels run it in the model's dtype, or else the
    kernel."""
    blocks = ("inverted_residual", "stem_block")
    return row.kind if row.kind in blocks and row.kernel is not None else row.kernel


def counts(model: nn.Module) -> Counter[str | None]:
    """How many layers each of them takes."""
    return Counter(takes(row) for row in torch_mbv2.report(model).patched)
