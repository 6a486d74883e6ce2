"""What the operating system and the GPU say of one call: memory and page faults."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import torch

from accelrt.memory.heap import return_free_memory

_SELF = Path("/proc/self")


class ProcessWatch:
    """Peak growth of the resident set, and page faults, between two points.

    Growth counts what tensors do not show, such as workspaces of the libraries. It is
    small where the allocator keeps freed memory, as with tuned malloc thresholds.

    Attributes:
        growth: bytes, or ``None`` where the system does not tell (only Linux does).
        page_faults: minor and major faults.
    """

    def __init__(self) -> None:
        self.growth: int | None = None
        self.page_faults = 0

    def __enter__(self) -> ProcessWatch:
        self._before = _reset_peak()
        self._faults = _faults()
        return self

    def __exit__(self, *_: object) -> None:
        self.page_faults = _faults() - self._faults
        if self._before is not None:
            self.growth = max(0, _status("VmHWM") - self._before)


def _reset_peak() -> int | None:
    """Make the peak resident size the present one, and return it."""
    try:
        (_SELF / "clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


class GpuWatch:
    """Peak growth of the CUDA allocator between two points; nothing on other devices.

    Attributes:
        allocated: bytes in tensors.
        reserved: bytes that the allocator took from the device; both ``None`` without CUDA.
    """

    def __init__(self, device: str) -> None:
        self.allocated: int | None = None
        self.reserved: int | None = None
        self._active = device == "cuda"

    def __enter__(self) -> GpuWatch:
        if self._active:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
            self._reserved = torch.cuda.memory_reserved()
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            torch.cuda.synchronize()
            self.allocated = torch.cuda.max_memory_allocated() - self._allocated
            self.reserved = torch.cuda.max_memory_reserved() - self._reserved


def release_memory() -> None:
    """Give freed memory back to the system, so that the next model begins as the first did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_free_memory()
