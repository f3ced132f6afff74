"""The ops with the arguments of their schemas, and without the refusal of what requires grad: for
modules, which prepare the arguments once."""

from __future__ import annotations

from .add import raw as add
from .avg_pool2d import raw as avg_pool2d
from .conv2d import raw as conv2d
from .conv2d_winograd import raw as conv2d_winograd
from .conv_pool import raw as conv_pool
from .global_avg_pool2d import raw as global_avg_pool2d
from .im2col import raw as im2col
from .inverted_residual import raw as inverted_residual
from .linear import raw as linear
from .network import raw as network
from .stem_block import raw as stem_block

__all__ = [
    "add",
    "avg_pool2d",
    "conv2d",
    "conv2d_winograd",
    "conv_pool",
    "global_avg_pool2d",
    "im2col",
    "inverted_residual",
    "linear",
    "network",
    "stem_block",
]
