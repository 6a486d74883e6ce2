"""Tells groups that their run is captured: a graph repeats launches, not decisions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_local = threading.local()


class NotCapturable(RuntimeError):
    """The forward reached something that cannot be part of a graph."""


@contextmanager
def capturing() -> Iterator[None]:
    """What this thread runs meanwhile is captured."""
    _local.active = True
    try:
        yield
    finally:
        _local.active = False


def is_capturing() -> bool:
    """This thread captures a graph of ours: nothing may be decided from values."""
    return bool(getattr(_local, "active", False))
