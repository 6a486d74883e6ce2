"""Two slices at a time: the even ones on the caller's stream, the odd ones on a second stream.

Slices that need nothing of each other may run at once, so that the small kernels of one fill
the gaps that the other leaves (Operator Grouping of Streamlined Inference, arXiv 2411.01171,
section 3.2). What keeps that exact:

- The second stream waits for all that came before the loop, and the caller's stream for the
  second one at its end, whatever ends it.
- What a slice makes and frees lies in its stream's own memory, as torch's allocator has it.
- What outlives a slice (:func:`accelrt.memory.arena.empty`) is told here. In an arena, whose
  memory knows no streams, it stays alive until the second slice after its own begins, and the
  other stream waits for its slice before it may get that memory. Elsewhere it may lie where the
  same stream has just freed something: the other stream waits for what was launched so far.
- One loop at a time: loops inside a slice run on its stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from accelrt.memory import arena


class SliceStreams(Protocol):
    """The streams of a device.

    Attributes:
        device_type: of the tensors whose slices may run at once.
    """

    device_type: str

    def current(self, device: torch.device) -> Any:
        """The stream on which this thread launches."""

    def beside(self, main: Any) -> Any:
        """A second stream, always the same for the same first one and for no other."""

    def enter(self, stream: Any) -> None:
        """This thread launches on ``stream`` from now on."""

    def record(self, stream: Any) -> Any:
        """An event: all that was launched on ``stream`` so far."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is launched on ``stream`` from now on runs after ``event``."""


class CudaStreams:
    """Streams of torch. Forks and joins by events, which a capture into a graph records too.

    A second stream belongs to one first stream: what libraries keep by stream (cuBLAS its
    workspace, whose address a graph remembers) is then never used by two at once.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._beside: dict[tuple[int, int], torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def current(self, device: torch.device) -> Any:
        """That of the device."""
        return torch.cuda.current_stream(device)

    def beside(self, main: Any) -> Any:
        """Made at its first use, outside of torch's default stream."""
        key = (main.device_index, main.cuda_stream)
        with self._lock:
            if key not in self._beside:
                made: Any = torch.cuda.Stream(main.device)  # type: ignore[no-untyped-call]
                if made == main:  # torch hands the same few out in turn
                    made = torch.cuda.Stream(main.device)  # type: ignore[no-untyped-call]
                self._beside[key] = made
            return self._beside[key]

    def enter(self, stream: Any) -> None:
        """Of its device; the current device stays."""
        with torch.cuda.device(stream.device):
            torch.cuda.set_stream(stream)

    def record(self, stream: Any) -> Any:
        """A new event."""
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        """On the device, not here."""
        stream.wait_event(event)


class Ledger(Protocol):
    """Counts the memory of two slices at once in a dry run, which runs them in turn."""

    def slice_begins(self, index: int) -> None:
        """Slice ``index`` of a loop begins, while the one before may still run."""

    def outlives(self, nbytes: int) -> None:
        """A tensor outside of the arena was made that is no slice's own."""

    def slices_end(self) -> None:
        """All slices have run."""


class Dry:
    """No streams: for a dry run, which frees what a run with streams would free.

    Args:
        ledger: is told of the slices.
    """

    device_type = "meta"

    def __init__(self, ledger: Ledger | None) -> None:
        self.ledger = ledger

    def current(self, device: torch.device) -> Any:
        """None."""
        return None

    def beside(self, main: Any) -> Any:
        """None."""
        return None

    def enter(self, stream: Any) -> None:
        """Nothing."""

    def record(self, stream: Any) -> Any:
        """Nothing."""
        return None

    def wait(self, stream: Any, event: Any) -> None:
        """Nothing."""


_streams: SliceStreams = CudaStreams()


class _Local(threading.local):
    active = False


_local = _Local()


def streams() -> SliceStreams:
    """Of the device that slices may overlap on."""
    return _streams


def use_streams(chosen: SliceStreams) -> SliceStreams:
    """Take other streams from now on, in all threads; those that were taken until now."""
    global _streams
    before, _streams = _streams, chosen
    return before


def active() -> bool:
    """This thread is in a slice of a loop whose slices overlap."""
    return _local.active


def overlapped(all_starts: Iterable[int], device: torch.device, on: SliceStreams) -> Iterator[int]:
    """The starts of slices, each to be launched on its stream until the next one is asked for.

    Args:
        all_starts: of slices that need nothing of each other.
        device: where they run.
        on: the streams.
    """
    slots = _Slots(on, device)
    _local.active = True
    arena.watch_births(slots.born)
    try:
        slots.fork()
        for index, start in enumerate(all_starts):
            slots.begin(index)
            yield start
    finally:
        arena.watch_births(None)
        _local.active = False
        slots.join()


class _Slots:
    """The two streams of a loop, and what their last slices have made."""

    def __init__(self, on: SliceStreams, device: torch.device) -> None:
        self.on = on
        self.ledger = on.ledger if isinstance(on, Dry) else None
        main = on.current(device)
        self.pair = (main, on.beside(main))
        self.held: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.slot = 0

    def _other_waits(self) -> None:
        """For all that was launched on the stream of this slot so far."""
        self.on.wait(self.pair[1 - self.slot], self.on.record(self.pair[self.slot]))

    def fork(self) -> None:
        """The second stream begins after what is there."""
        self._other_waits()

    def begin(self, index: int) -> None:
        """Slice ``index`` begins."""
        self.slot = index % 2
        if self.held[self.slot]:
            self._other_waits()  # its next slice may get the memory
            self.held[self.slot].clear()
        if self.ledger is not None:
            self.ledger.slice_begins(index)
        self.on.enter(self.pair[self.slot])

    def born(self, tensor: Tensor, in_arena: bool) -> None:
        """This slice has made a tensor that may outlive it."""
        self.held[self.slot].append(tensor)
        if in_arena:
            return
        if self.ledger is not None:
            self.ledger.outlives(tensor.untyped_storage().nbytes())
        self._other_waits()

    def join(self) -> None:
        """The first stream goes on after the second one."""
        main, side = self.pair
        self.on.enter(main)
        self.on.wait(main, self.on.record(side))
        if self.ledger is not None:
            self.ledger.slices_end()
        for held in self.held:
            held.clear()
