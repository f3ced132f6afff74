"""csrc/plan/convolution.h, compiled and run here: which kernel a convolution runs on."""

from __future__ import annotations

import pytest

DENSE_1X1 = {"kernel": 1, "padded": 0}
FLOAT16, BFLOAT16 = 1, 2


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        (DENSE_1X1, "gemm"),
        ({**DENSE_1X1, "in": 3, "dtype": FLOAT16}, "gemm"),
        ({**DENSE_1X1, "dilation_h": 2}, "gemm"),
        ({**DENSE_1X1, "padded": 1}, "implicit_gemm"),
        ({**DENSE_1X1, "stride_w": 2}, "implicit_gemm"),
        ({**DENSE_1X1, "groups": 64}, "depthwise"),
        ({"groups": 64}, "depthwise"),
        ({"groups": 64, "kernel": 7, "stride": 3, "dtype": BFLOAT16}, "depthwise"),
        ({"groups": 64, "out": 128}, "implicit_gemm"),
        ({"groups": 2}, "implicit_gemm"),
        ({}, "winograd"),
        ({"padded": 0}, "winograd"),
        ({"in": 2**31 - 1}, "winograd"),
        ({"in": 63}, "implicit_gemm"),
        ({"out": 63}, "implicit_gemm"),
        ({"stride_w": 2}, "implicit_gemm"),
        ({"dilation_h": 2}, "implicit_gemm"),
        ({"kernel_w": 1}, "implicit_gemm"),
        ({"kernel": 5}, "implicit_gemm"),
        ({"dtype": FLOAT16}, "implicit_gemm"),
    ],
    ids=str,
)
def test_runs_on(build, settings, kernel):
    arguments = [f"{name}={value}" for name, value in settings.items()]
    assert build("convolution", *arguments) == f"{kernel}\n"


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"stride": 2, "span": 1000}, "in place"),
        ({"stride": 2, "apart": 1}, "copied"),
        ({"stride": 2, "apart": 1, "in": 7}, "in place"),
        ({"stride": 2, "apart": 1, "groups": 16}, "in place"),
        ({"stride": 2, "span": 2**31 - 1}, "copied"),  # beyond the kernel's offsets
        ({"stride": 2, "span": 2**31 - 1, "in": 3}, "copied"),
        ({"span": 1000}, "copied"),  # winograd takes dense input
        ({**DENSE_1X1, "span": 1000}, "copied"),
    ],
    ids=str,
)
def test_reads_in_place(build, settings, how):
    arguments = [f"{name}={value}" for name, value in settings.items()]
    assert build("convolution", *arguments).splitlines()[1] == how
