"""Errors of the public API. Bad arguments raise :class:`ValueError`."""

from __future__ import annotations


class BudgetError(ValueError):
    """A memory budget cannot be met.

    Args:
        message: says by how much, and what binds.
        budget_bytes: what was asked for.
        smallest_bytes: the smallest budget that can be met.
        binding: the component and operator group that need it.
    """

    def __init__(
        self, message: str, *, budget_bytes: int, smallest_bytes: int, binding: str
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.binding = binding


class UnsupportedModelError(ValueError):
    """The object given to :func:`accelrt.wrap` has no family description."""
