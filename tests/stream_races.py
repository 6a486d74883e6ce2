"""Streams on the CPU that only note their order, and a finder of accesses without an order.

Every operator is put on the stream that is current when it is called. It is ordered after what was
launched on that stream before, and by events after what other streams had launched. Two accesses
of the same bytes, at least one of them a write, must be ordered; so must all accesses of memory
that a stream's allocator has got back before those of what it gives out next.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from accelrt.groups import pipelining
from accelrt.memory import arena as arenas

# They give memory, or a name for it, and touch none.
_NO_ACCESS = {
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
    "aten::new_empty_strided", "aten::detach", "aten::alias", "aten::lift_fresh",
    "aten::_unsafe_view",
}  # fmt: skip

MAIN, SIDE = 0, 1


class RecordingStreams:
    """A :class:`accelrt.groups.pipelining.SliceStreams` on the CPU: two streams.

    Attributes:
        stream: the current one.
        clocks: for each stream, how much of every stream its next operator comes after.
        loops: how many there were.
        slices: how many were launched on each stream.
    """

    device_type = "cpu"

    def __init__(self) -> None:
        self.stream = MAIN
        self.clocks = [[0, 0], [0, 0]]
        self.loops = 0
        self.slices = [0, 0]

    def current(self, device: torch.device) -> int:
        assert self.stream == MAIN, "a loop that overlaps inside of another"
        self.loops += 1
        return MAIN

    def beside(self, main: int) -> int:
        return SIDE

    def enter(self, stream: int) -> None:
        self.stream = stream
        self.slices[stream] += 1

    def record(self, stream: int) -> list[int]:
        return list(self.clocks[stream])

    def wait(self, stream: int, event: list[int]) -> None:
        self.clocks[stream] = list(map(max, self.clocks[stream], event))

    @property
    def joined(self) -> bool:
        """The first stream is current and comes after all of the second."""
        return self.stream == MAIN and self.clocks[MAIN][SIDE] == self.clocks[SIDE][SIDE]


class _Memory:
    """When each byte of a region was last written and read, on either stream.

    Args:
        size: bytes.
        before: what an access must come after, as the region's memory had other uses.
        born: the stream whose allocator gave it; ``None`` if it was there before.
    """

    def __init__(self, size: int, before: list[int], born: int | None) -> None:
        self.writes = np.zeros((2, size), np.int32)
        self.reads = np.zeros((2, size), np.int32)
        self.before = before
        self.born = born
        self.last = [0, 0]


class Races(TorchDispatchMode):
    """Finds accesses without an order while it is open.

    Args:
        streams: tell the order.

    Attributes:
        found: how many, by operator and kind.
        operators: that were looked at, on each stream.
    """

    def __init__(self, streams: RecordingStreams) -> None:
        super().__init__()
        self.streams = streams
        self.found: Counter[str] = Counter()
        self.operators = [0, 0]
        self._memory: dict[int, _Memory] = {}
        self._alive: dict[int, Any] = {}
        self._slabs: dict[tuple[int, int], _Memory] = {}
        # What each stream's allocator has got back was used until then.
        self._returned = [[0, 0], [0, 0]]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        result = func(*args, **kwargs)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        made = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for tensor in given:
            self._region(tensor, existed=True)
        for tensor in made:
            self._region(tensor, existed=False)
        view = any(
            one.alias_info is not None and not one.alias_info.is_write
            for one in func._schema.returns
        )
        if view or name in _NO_ACCESS:
            return result
        stream, clock = self.streams.stream, self.streams.clocks[self.streams.stream]
        self.operators[stream] += 1
        written = self._written(func, args, kwargs)
        known = {id(t) for t in written}
        for tensor in given:
            if id(tensor) not in known:
                self._access(name, tensor, write=False)
        for tensor in [*written, *(t for t in made if not any(t is g for g in given))]:
            self._access(name, tensor, write=True)
        clock[stream] += 1
        # Workspaces inside of an operator go back to its stream's allocator.
        self._returned[stream] = list(map(max, self._returned[stream], clock))
        return result

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        found = []
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [t for t in values if isinstance(t, Tensor)]
        return found

    def _region(self, tensor: Tensor, *, existed: bool) -> tuple[_Memory, int]:
        """The region of a tensor, and its first byte in it."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        first = tensor.storage_offset() * tensor.element_size()
        place = arenas.current()
        if place is not None and place.address <= address < place.address + place.reserved_bytes:
            slab = (place.address, place.reserved_bytes)
            if slab not in self._slabs:
                self._slabs[slab] = _Memory(place.reserved_bytes, [0, 0], None)
            return self._slabs[slab], address - place.address + first
        key = storage._cdata
        alive = self._alive.get(key)
        if alive is None or alive() is not storage:
            born = None if existed else self.streams.stream
            before = [0, 0] if born is None else list(self._returned[born])
            memory = self._memory[key] = _Memory(storage.nbytes(), before, born)
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key, memory))
        return self._memory[key], first

    def _freed(self, key: int, memory: _Memory) -> None:
        if memory.born is not None:
            returned = self._returned[memory.born]
            self._returned[memory.born] = list(map(max, returned, memory.last))
        if self._memory.get(key) is memory:
            del self._memory[key], self._alive[key]

    def _access(self, name: str, tensor: Tensor, *, write: bool) -> None:
        if tensor.numel() == 0:
            return
        memory, first = self._region(tensor, existed=True)
        stream, size = self.streams.stream, tensor.element_size()
        clock = self.streams.clocks[stream]
        shape = (*tensor.shape, size)
        each = memory.writes.itemsize  # of the time of one byte
        strides = (*(step * size * each for step in tensor.stride()), each)

        def bytes_of(times: Any) -> Any:
            return as_strided(times[first:], shape, strides)

        other = 1 - stream  # on its own stream it comes after all
        if memory.before[other] > clock[other]:
            self.found[f"{name} in memory that the other stream may still use"] += 1
        if bytes_of(memory.writes[other]).max() > clock[other]:
            what = "writes" if write else "reads"
            self.found[f"{name} {what} what the other stream may still write"] += 1
        if write and bytes_of(memory.reads[other]).max() > clock[other]:
            self.found[f"{name} writes what the other stream may still read"] += 1
        now = clock[stream] + 1
        bytes_of((memory.writes if write else memory.reads)[stream])[...] = now
        memory.last[stream] = now


@contextmanager
def watching() -> Iterator[tuple[RecordingStreams, Races]]:
    """Slices on the CPU overlap on recording streams, whose accesses are watched."""
    streams = RecordingStreams()
    before = pipelining.use_streams(streams)
    try:
        with Races(streams) as races:
            yield streams, races
    finally:
        pipelining.use_streams(before)
