"""The exceptions that bad user input raises: one clear sentence each."""

from __future__ import annotations


class Error(RuntimeError):
    """Something the user gave or asked for cannot be used; the message says what to do."""


class ModelError(Error):
    """A model file or graph cannot be loaded, or does not fit the request."""


class UnavailableError(Error):
    """An optional package or device that the request needs is missing."""
