"""What the tests fill memory with, so that what nobody writes shows."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICES, DTYPES, poisoned


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("device", DEVICES)
def test_the_poison_works(device, dtype):
    with poisoned():
        memory = torch.empty(64, dtype=dtype, device=device)
    assert memory.view(torch.float32 if dtype == torch.uint8 else dtype).isnan().all()
