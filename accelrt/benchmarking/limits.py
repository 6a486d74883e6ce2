"""A time limit for what cannot be asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 5.0  # seconds until the next try, where something swallowed the exception


class OutOfTime(BaseException):
    """The limit is over; no ``Exception``, so that a compiler does not catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block between two steps of the interpreter when its time is over.

    Args:
        seconds: more than 0. Only on POSIX, in the main thread.

    Raises:
        OutOfTime: the block took longer.
        ValueError: for seconds that are not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; allowed: more than 0")

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
