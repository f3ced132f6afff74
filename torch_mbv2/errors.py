"""The exceptions that bad user input raises: one clear sentence each."""

from __future__ import annotations

import torch


class Error(RuntimeError):
    """Something the user gave or asked for cannot be used; the message says what to do."""


class ModelError(Error):
    """A model file or graph cannot be loaded, or does not fit the request."""


class UnavailableError(Error):
    """An optional package or device that the request needs is missing."""


def first_line(error: Exception) -> str:
    """Of its message, or its type if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, on a GPU or for PyTorch on a CPU."""
    # What PyTorch cannot allocate on a CPU, or for an op of the library, has no type of its own.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("DefaultCPUAllocator", "CUDA out of memory")
    return known or any(word in str(error) for word in words)
