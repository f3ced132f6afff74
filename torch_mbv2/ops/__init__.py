"""The operators `torch.ops.torch_mbv2.*`, a file for each: its schema, argument checks and
documented wrapper. `define` makes of these, and of the op's meaning in `reference.py`, the fake
(shapes and strides without data) and the implementation in stock PyTorch.

The wrappers take what the `torch.nn.functional` namesakes take, plus `activation`: None, "relu",
"relu6", or (min, max) with None for an open side. Every op takes float32, float16 and bfloat16,
accumulates in float32 or better, rounds once (a fused block at most once a layer), and is for
inference only. The stock implementation serves every device; the compiled library replaces it on
CUDA. Both, and the fake, refuse bad arguments with the same sentence.
"""

from __future__ import annotations

from .. import flops
from . import raw
from ._checks import DTYPES, Activation, bounds, pair, refuse_grad
from ._define import SCHEMAS
from .add import add
from .avg_pool2d import avg_pool2d
from .conv2d import conv2d
from .conv2d_winograd import conv2d_winograd
from .conv_pool import conv_pool
from .global_avg_pool2d import global_avg_pool2d
from .im2col import im2col
from .inverted_residual import inverted_residual
from .linear import linear
from .network import Program, forget_replays, network, replays
from .plan import Plan, plan
from .stem_block import stem_block

flops.register()

__all__ = [
    "DTYPES",
    "SCHEMAS",
    "Activation",
    "Plan",
    "Program",
    "add",
    "avg_pool2d",
    "bounds",
    "conv2d",
    "conv2d_winograd",
    "conv_pool",
    "forget_replays",
    "global_avg_pool2d",
    "im2col",
    "inverted_residual",
    "linear",
    "network",
    "pair",
    "plan",
    "raw",
    "refuse_grad",
    "replays",
    "stem_block",
]
