"""What a GPU takes for a forward, by its driver: memory in use, power, clocks, energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from accelrt.benchmarking.timing import synchronise
from accelrt.profiling.sampler import Sampler, Use, mean_use

# The driver's power is a mean over tens of milliseconds, and its energy counter moves as slowly:
# a form runs again and again until both have seen many such intervals.
SECONDS = 2.0
# Of one operator, of which there are dozens in a report.
OPERATOR_SECONDS = 0.3


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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GpuUse:
        """The inverse of :meth:`to_dict`."""
        forms = [FormUse(**{**form, "use": Use(**form["use"])}) for form in values["forms"]]
        return cls(values["note"], values["device"], tuple(forms))


@dataclass
class Watched:
    """What goes on under a :class:`DriverWatch`.

    Args:
        forwards: how many, pictures or operator calls; may be counted up on the way.
    """

    forwards: int = 0


class DriverWatch:
    """Asks the driver of a GPU while parts of a benchmark run.

    Where there is nothing to ask (work on the CPU, no driver), everything runs as without it and
    :attr:`found` says why.

    Args:
        device: that the work runs on, e.g. ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; of any other
            kind than ``"cuda"`` no GPU is looked at.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._index: int | None = None
        if self._device.type == "cuda":
            index = self._device.index
            self._index = torch.cuda.current_device() if index is None else index
        gpu = Sampler(self._index).stop().gpu
        self.note = gpu.note
        self._name = gpu.name
        self._seen: dict[str, list[FormUse]] = {}

    @contextmanager
    def watch(self, run: str, forwards: int = 0) -> Iterator[Watched]:
        """Ask while the block runs; blocks with one name are put together.

        Args:
            run: name in the report.
            forwards: that the block makes, if that is known before.
        """
        watched = Watched(forwards)
        if self.note:
            yield watched
            return
        synchronise(self._device.type)
        sampler = Sampler(self._index)
        sampler.start()
        began = time.perf_counter()
        try:
            yield watched
            synchronise(self._device.type)
        finally:
            seen = sampler.stop()
        took = time.perf_counter() - began
        use = FormUse(run, watched.forwards, took, seen.use(watched.forwards))
        self._seen.setdefault(run, []).append(use)

    def repeat(
        self, run: str, forward: Callable[[], Any], seconds: float = SECONDS, forwards: int = 1
    ) -> None:
        """Ask while a warm form runs again and again; it does not run if nothing can be asked.

        Args:
            run: name in the report.
            forward: makes ``forwards`` of them.
            seconds: that it runs at least.
            forwards: of one call.
        """
        if self.note:
            return
        with self.watch(run) as watched:
            end = time.perf_counter() + seconds
            while not watched.forwards or time.perf_counter() < end:
                forward()
                synchronise(self._device.type)
                watched.forwards += forwards

    @property
    def found(self) -> GpuUse:
        """All that the driver said so far."""
        return GpuUse(self.note, self._name, tuple(map(_together, self._seen.values())))


def _together(parts: Sequence[FormUse]) -> FormUse:
    return FormUse(
        parts[0].run,
        sum(part.forwards for part in parts),
        sum(part.seconds for part in parts),
        mean_use([part.use for part in parts]),
    )


def gpu_use(
    forms: Mapping[str, Callable[[], Any]], device: str, seconds: float = SECONDS
) -> GpuUse:
    """Run every form under the eyes of the driver.

    Args:
        forms: warm ones, by name; each call is a forward.
        device: ``"cpu"`` or ``"cuda"``; on the CPU nothing runs, and the note says so.
        seconds: that each runs at least.
    """
    watch = DriverWatch(device)
    for run, forward in forms.items():
        watch.repeat(run, forward, seconds)
    return watch.found
