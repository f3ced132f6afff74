"""Inference mode for all tests of ops, and for those of `op_tests` the cases of their file."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("op_cases", "op_tests")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def pytest_generate_tests(metafunc):
    of_file = getattr(metafunc.function, "of_file", None)
    if of_file is not None:
        names, choose = of_file
        metafunc.parametrize(names, choose(metafunc.module), ids=str)
