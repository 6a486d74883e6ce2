"""Slice lengths: the rule behind ``None`` in the config; and the starts of slices."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.memory.arena import current, keep_to_plan

from . import pipelining
from .recognise import has_hooks

CPU_SLICE_MIB = 8.0
GPU_SLICE_MIB = 64.0


def default_slice_mib(device: torch.device) -> float:
    """What ``slice_mib=None`` means on a device."""
    return CPU_SLICE_MIB if device.type == "cpu" else GPU_SLICE_MIB


def slice_length(
    total: int, wanted: int | None, bytes_per_item: int, config: Config, device: torch.device
) -> int:
    """How many items of ``total`` one slice takes.

    Args:
        total: items along the sliced axis.
        wanted: the configured length, or ``None`` for the rule of :class:`accelrt.Config`.
        bytes_per_item: size of the group's widest intermediate for one item.
        config: gives ``slice_mib``.
        device: where the group runs.
    """
    if total <= 1:
        return 1
    if wanted is not None:
        return min(wanted, total)
    mib = config.slice_mib
    if mib is None:
        mib = default_slice_mib(device)
    size = max(1, bytes_per_item)
    longest = max(1, int(mib * 2**20) // size)
    pieces = -(-total // longest)
    length = -(-total // pieces)
    probe: Probe | None = getattr(_local, "probe", None)
    if probe is not None and device.type == "meta":
        least = length * size if length > 1 else 0
        probe.decided(least, -(-total // (pieces - 1)) * size if pieces > 1 else math.inf)
    return length


class Probe:
    """A dry run on meta tensors, in which equal slices are run once.

    Args:
        device_type: of the device that the run stands for.

    Attributes:
        repeats: how many slices stand behind what runs now.
        left_out_bytes: live beside all of it, had every pass been run.
        same_from, same_below: bytes between which another ``slice_mib`` makes the same slices.
        ledger: counts slices that would run at once.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self.device_type = device_type
        self.repeats = 1
        self.left_out_bytes = 0
        self.same_from: float = 0
        self.same_below = math.inf
        self.ledger: pipelining.Ledger | None = None

    def decided(self, least: float, below: float) -> None:
        """A length was chosen that ``slice_mib`` of ``least`` bytes to ``below`` gives too."""
        self.same_from = max(self.same_from, least)
        self.same_below = min(self.same_below, below)


_local = threading.local()


@contextmanager
def probing(device_type: str = "cpu") -> Iterator[Probe]:
    """Meta tensors of this thread go through the first two slices and the last only.

    Their memory is that of all slices: the first makes the buffers, those between are
    equal, the last may be shorter.

    Args:
        device_type: of the device that the run stands for: ``"cpu"`` or ``"cuda"``.
    """
    outer = getattr(_local, "probe", None)
    _local.probe = probe = Probe(device_type)
    try:
        yield probe
    finally:
        _local.probe = outer


def current_probe(like: Tensor) -> Probe | None:
    """The probe of this thread, for meta tensors."""
    if like.device.type != "meta":
        return None
    probe: Probe | None = getattr(_local, "probe", None)
    return probe


def starts(total: int, step: int, like: Tensor) -> Iterable[int]:
    """``range(0, total, step)``: where the slices of a group start.

    Args:
        total: items along the sliced axis.
        step: items in a slice.
        like: any tensor of the group; on a meta tensor a probe leaves slices out.
    """
    probe = current_probe(like)
    if probe is not None:
        return _probed(range(0, total, step), probe)
    all_starts = range(0, total, step)
    if _on_slice is not None:
        return _told(all_starts, _on_slice)
    if len(all_starts) > 1 and not torch.compiler.is_compiling() and current() is not None:
        return _kept(all_starts)
    return all_starts


def independent(
    total: int, step: int, like: Tensor, config: Config, *modules: nn.Module | None
) -> Iterable[int]:
    """:func:`starts` of slices that need nothing of each other, and so may run at once.

    No slice reads what another one writes, or writes where another one reads or writes; nothing
    is made in one for the next but by :func:`accelrt.memory.arena.empty`, and nothing made
    before the loop is freed in it. With ``config.pipeline_slices`` two of them are on a GPU at
    a time, unless somebody watches the modules: a hook may carry something along.

    Args:
        total, step, like: as for :func:`starts`.
        config: gives ``pipeline_slices``.
        modules: that run in the slices.
    """
    if not config.pipeline_slices or step >= total or torch.compiler.is_compiling():
        return starts(total, step, like)
    if pipelining.active():
        return starts(total, step, like)
    probe, on = current_probe(like), pipelining.streams()
    kind = like.device.type if probe is None else probe.device_type
    if kind != on.device_type:
        return starts(total, step, like)
    if any(module is not None and has_hooks(module) for module in modules):
        return starts(total, step, like)
    all_starts = starts(total, step, like)
    if probe is not None:
        on = pipelining.Dry(probe.ledger)
    return pipelining.overlapped(all_starts, like.device, on)


SliceWatch = Callable[[int], None]
_on_slice: SliceWatch | None = None


def watch_slices(watch: SliceWatch | None) -> None:
    """Tell ``watch`` the index of every slice that starts, in any thread; ``None``: nobody."""
    global _on_slice
    _on_slice = watch


def _kept(all_starts: range) -> Iterator[int]:
    for start in all_starts:
        yield start
        keep_to_plan()


def _told(all_starts: range, watch: SliceWatch) -> Iterator[int]:
    for index, start in enumerate(all_starts):
        watch(index)
        yield start


def _probed(all_starts: range, probe: Probe) -> Iterator[int]:
    count = len(all_starts)
    outer = probe.repeats
    for index in range(count) if count < 3 else (0, 1, count - 1):
        probe.repeats = outer * (count - 2) if index == 1 and count > 2 else outer
        yield all_starts[index]
    probe.repeats = outer
