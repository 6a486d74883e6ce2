"""What a GPU takes for a forward, by its driver: memory in use, power, clocks, energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accelrt.benchmarking.timing import synchronise
from accelrt.profiling.sampler import Sampler, Use

# The driver's power is a mean over tens of milliseconds, and its energy counter moves as slowly:
# a form runs again and again until both have seen many such intervals.
SECONDS = 2.0


@dataclass(frozen=True)
class FormUse:
    """What one form of a model took.

    Args:
        run: name of the form.
        forwards: number of them that were watched, one after the other.
        seconds: of all of them.
        use: of one of them.
    """

    run: str
    forwards: int
    seconds: float
    use: Use


@dataclass(frozen=True)
class GpuUse:
    """What the driver said.

    Args:
        note: why it said nothing; empty if it did.
        device: its name.
        forms: one per form of the model.
    """

    note: str
    device: str = ""
    forms: tuple[FormUse, ...] = ()


def gpu_use(
    forms: Mapping[str, Callable[[], Any]], device: str, seconds: float = SECONDS
) -> GpuUse:
    """Run every form under the eyes of the driver.

    Args:
        forms: warm ones, by name; each call is a forward.
        device: ``"cpu"`` or ``"cuda"``; on the CPU nothing runs, and the note says so.
        seconds: that each runs at least.
    """
    index = torch.cuda.current_device() if device == "cuda" else None
    found: list[FormUse] = []
    name = ""
    for run, forward in forms.items():
        sampler = Sampler(index)
        if sampler.found.gpu.note:
            return GpuUse(sampler.stop().gpu.note)
        name = sampler.found.gpu.name
        synchronise(device)
        sampler.start()
        began, count = time.perf_counter(), 0
        try:
            while not count or time.perf_counter() - began < seconds:
                forward()
                synchronise(device)
                count += 1
        finally:
            seen = sampler.stop()
        found.append(FormUse(run, count, time.perf_counter() - began, seen.use(count)))
    return GpuUse("", name, tuple(found))
