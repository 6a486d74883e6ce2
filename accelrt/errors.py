"""Errors of the public API. Bad arguments raise :class:`ValueError`."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The object given to :func:`accelrt.wrap` has no family description."""
