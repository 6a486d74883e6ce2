"""The heap of a process under a memory budget: freed pages go back when a run holds too many."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")
#: Looks are this many seconds apart: reading the resident size takes some microseconds.
_PAUSE = 0.005
#: What has to come back since the last time for another attempt to be worth it.
_STEP = 4 * 2**20


class HeapKeeper:
    """Returns free pages of the heap to the system when the process exceeds its budget.

    An allocator keeps what is freed and takes new memory from other holes, so that a process
    comes to hold all the holes that its weights have left, whatever is alive at once. Work that
    other threads do meanwhile counts as well; it makes for more attempts, not for errors.

    Args:
        besides: gives back what else is free.
    """

    def __init__(self, besides: Callable[[], Any] | None = None) -> None:
        self._besides = besides
        self._base: int | None = None
        self._limit: int | None = None
        self._floor = 0
        self._product = 0
        self._looked = 0.0

    def rest(self) -> None:
        """What is resident now is there without any run."""
        self._give_back()
        self._base = resident_bytes()

    def begin(self, run_bytes: int, product_bytes: int = 0, slab_bytes: int = 0) -> None:
        """A run begins.

        Nothing of it is alive yet but its slab: what is resident beyond its limit now, and cannot
        be given back, others have taken since the last rest, and it stays out of the account.

        Args:
            run_bytes: that it may hold at once, the slab among them, weights apart.
            product_bytes: that each of its products takes besides, and frees. They are free in
                the heap whenever somebody looks; given back, they come again page by page.
            slab_bytes: of its arena.
        """
        self._product = product_bytes
        if self._base is None:
            self.rest()
        self._floor = 0
        held = resident_bytes()
        if self._base is None or held is None:
            self._limit = None
            return
        if held > self._base + run_bytes + product_bytes + _STEP:
            self._give_back()
            self._base = max(self._base, (resident_bytes() or held) - slab_bytes)
        self._limit = self._base + run_bytes

    def keep(self) -> None:
        """Between two slices: give back, if too much is resident."""
        now = time.monotonic()
        if self._limit is None or now - self._looked < _PAUSE:
            return
        self._looked = now
        held = resident_bytes()
        if held is not None and held > max(self._limit, self._floor) + self._product + _STEP:
            self._give_back()
            self._floor = resident_bytes() or held

    def _give_back(self) -> None:
        return_free_memory()
        if self._besides is not None:
            self._besides()


def resident_bytes() -> int | None:
    """Resident size of this process; ``None`` where the system does not tell (only Linux does)."""
    try:
        return int(_STATM.read_bytes().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return None


def return_free_memory() -> None:
    """Give freed heap memory back to the system; glibc keeps it for later otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
