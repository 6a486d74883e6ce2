"""Ranges for Nsight Systems."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cuda: Any = torch.cuda
_profiler: Any = torch.autograd.profiler


def under_nsight() -> bool:
    """Whether Nsight Systems started the process."""
    return "NSYS_PROFILING_SESSION_ID" in os.environ


def wanted(asked: bool | None) -> bool:
    """Whether ranges are pushed: on CUDA, unless they were not asked for.

    Raises:
        ValueError: they were asked for, and there is no CUDA.
    """
    available = bool(_cuda.is_available())
    if asked and not available:
        raise ValueError("nvtx is True; allowed only where torch has a CUDA device")
    return available and asked is not False


def operators_wanted(asked: bool | None) -> bool:
    """Whether operators are ranges too. Torch's own profiler is off then: one reader at a time."""
    return wanted(asked) and (bool(asked) or under_nsight())


def push(name: str) -> None:
    """Begin a range."""
    _cuda.nvtx.range_push(name)


def pop() -> None:
    """End the innermost one."""
    _cuda.nvtx.range_pop()


@contextmanager
def captured() -> Iterator[None]:
    """Operators are NVTX ranges, and a capture range of Nsight Systems lasts from here to the end.

    For ``nsys profile --capture-range=cudaProfilerApi``.
    """
    runtime = _cuda.cudart()
    runtime.cudaProfilerStart()
    try:
        with _profiler.emit_nvtx():
            yield
    finally:
        runtime.cudaProfilerStop()
