"""Who is told what a measurement is doing, and how long its phases take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Is told what runs; does nothing.

    A phase begins with ``begin``, may have calls, and ends with ``end``.
    """

    def begin(self, phase: str) -> None:
        """A phase begins."""

    def call(self, what: str) -> None:
        """Something inside the phase begins."""

    def end(self, phase: str, seconds: float) -> None:
        """A phase is done."""


class Phases:
    """Times the phases of a measurement, and tells a :class:`Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The phase ``name``."""
        self.progress.begin(name)
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.progress.end(name, self.seconds[name])
