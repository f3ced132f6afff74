"""Good arguments of every op, as the dispatcher takes them, and changes to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class T(NamedTuple):
    """A tensor to be made, on the device of the input or `elsewhere`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    elsewhere: bool = False


GOOD: dict[str, dict[str, Any]] = {
    "conv2d": {
        "input": T((2, 6, 8, 9)),
        "weight": T((4, 3, 3, 3)),
        "bias": T((4,)),
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "groups": 2,
        "act_min": None,
        "act_max": None,
    },
    "conv2d_winograd": {
        "input": T((2, 6, 8, 9)),
        "weight": T((4, 6, 3, 3)),
        "bias": T((4,)),
        "padding": [1, 1, 1, 1],
        "act_min": None,
        "act_max": None,
    },
    "linear": {
        "input": T((2, 6)),
        "weight": T((4, 6)),
        "bias": T((4,)),
        "act_min": None,
        "act_max": None,
    },
    "avg_pool2d": {
        "input": T((2, 6, 8, 9)),
        "kernel_size": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0],
        "ceil_mode": False,
        "count_include_pad": True,
        "divisor_override": None,
    },
    "global_avg_pool2d": {"input": T((2, 6, 8, 9)), "keepdim": False},
    "add": {"input": T((2, 6)), "other": T((2, 6)), "act_min": None, "act_max": None},
    "im2col": {
        "input": T((2, 6, 8, 9)),
        "kernel_size": [2, 2],
        "dilation": [1, 1],
        "padding": [0, 0],
        "stride": [1, 1],
    },
    "inverted_residual": {
        "input": T((2, 6, 8, 9)),
        "expand_weight": T((12, 6, 1, 1)),
        "expand_bias": T((12,)),
        "depthwise_weight": T((12, 1, 3, 5)),
        "depthwise_bias": T((12,)),
        "project_weight": T((6, 12, 1, 1)),
        "project_bias": T((6,)),
        "packed": T((5,)),
        "stride": [1, 1],
        "padding": [2, 2, 1, 1],
        "residual": True,
        "act_min": None,
        "act_max": None,
    },
    "stem_block": {
        "input": T((2, 3, 8, 9)),
        "stem_weight": T((12, 3, 3, 5)),
        "stem_bias": T((12,)),
        "depthwise_weight": T((12, 1, 3, 3)),
        "depthwise_bias": T((12,)),
        "project_weight": T((6, 12, 1, 1)),
        "project_bias": T((6,)),
        "packed": T((5,)),
        "stem_stride": [2, 2],
        "stem_padding": [2, 2, 1, 1],
        "padding": [1, 1, 1, 1],
        "act_min": None,
        "act_max": None,
    },
    "conv_pool": {
        "input": T((2, 6, 8, 9)),
        "weight": T((4, 6, 1, 1)),
        "bias": T((4,)),
        "act_min": None,
        "act_max": None,
    },
}
TENSORS = [(op, name) for op, good in GOOD.items() for name in good if isinstance(good[name], T)]


def arguments(op: str, change: dict[str, Any], device: str, elsewhere: str) -> list[Any]:
    def make(value: Any) -> Any:
        if not isinstance(value, T):
            return value
        where = elsewhere if value.elsewhere else device
        if max(value.shape, default=0) > 2**15:  # without the memory
            return torch.ones(1, dtype=value.dtype, device=where).expand(value.shape)
        return torch.ones(value.shape, dtype=value.dtype, device=where)

    return [make(value) for value in (GOOD[op] | change).values()]
