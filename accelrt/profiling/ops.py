"""Operators, allocations and kernels of a run, as torch's profiler sees them.

The profiler takes a few microseconds per operator, so operators are recorded at some steps
only. Allocations and, on a GPU, kernels are recorded all the time: they cost next to nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .cost import Shape, cost_of

_autograd: Any = torch.autograd  # not all of it is in its type stubs
#: The profiler's clock is compared with ours so often at the beginning and at the end of a
#: profile; the tightest comparison of each counts.
ANCHORS = 8
_numbers = itertools.count()  # no two marks of a process have the same name
_MEMORY = "[memory]"
#: Above torch's own levels: its profiler reports its start on the error output otherwise.
_QUIET = ("KINETO_LOG_LEVEL", "9")


@dataclass(slots=True)
class Op:
    """One operator call of the profiled thread.

    Args:
        name: such as ``"aten::mm"`` or ``"accelrt::group_norm_apply"``.
        begin, end: nanoseconds of the profile's clock.
        parent: index of the operator around it, -1 for none.
        flops: floating-point operations of its products; 0 inside a counted operator.
        bytes: that it reads and writes; 0 of operators that leave that to others inside.
        span: index of the innermost range around it.
        device_ns: of the kernels that it launched.
    """

    name: str
    begin: int
    end: int
    parent: int = -1
    flops: int = 0
    bytes: int = 0
    span: int = -1
    device_ns: int = 0


@dataclass(slots=True)
class Kernel:
    """One kernel or copy on a GPU.

    Args:
        name: of the kernel.
        begin, end: nanoseconds of the profile's clock, on the device.
        launched: when the host launched it; 0 if that is not known.
        op: index of the operator that launched it, -1 for none.
        span: index of the range that it was launched in.
    """

    name: str
    begin: int
    end: int
    launched: int = 0
    op: int = -1
    span: int = -1


@dataclass
class Recorded:
    """What the profiler saw.

    Args:
        ops: of the profiled thread, by their beginnings.
        memory: time, bytes of tensors alive on the CPU and on GPUs since the start.
        kernels: on GPUs.
    """

    ops: list[Op] = field(default_factory=list)
    memory: list[tuple[int, int, int]] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


class OpRecorder:
    """Runs torch's profiler for the length of a profile.

    Args:
        every: one step of so many has its operators recorded; 0: none, and none outside.
        cuda: record kernels.

    Raises:
        ValueError: at :meth:`start`, if torch's profiler runs already.
    """

    def __init__(self, every: int, cuda: bool) -> None:
        self.every = every
        self._cuda = cuda
        self._profiler: Any = None
        self._begin: dict[str, int] = {}

    def start(self) -> None:
        """Begin."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        if _autograd._profiler_enabled():
            raise ValueError("torch's profiler runs already; leave it before accelrt.profile")
        with _quiet():
            self._profiler = torch.profiler.profile(
                activities=kinds, record_shapes=self.every > 0, profile_memory=True
            )
            self._profiler.__enter__()
        self._begin = _compare_clocks()
        self._switch(self.every > 0)

    def on_step(self, index: int) -> None:
        """A step begins; -1: the steps are over."""
        if self.every > 0:
            self._switch(index < 0 or self.chosen(index))

    def chosen(self, step: int) -> bool:
        """Whether the operators of a step are recorded: of the second, not the first."""
        return self.every > 0 and step % self.every == min(1, self.every - 1)

    def stop(self) -> Recorded:
        """End, and read what was recorded."""
        self._switch(True)
        if self._profiler is None:
            return Recorded()
        end = _compare_clocks()
        with _quiet():
            self._profiler.__exit__(None, None, None)
        events = self._profiler.profiler.kineto_results.events()
        self._profiler = None
        return read(events, self._begin, end)

    def _switch(self, on: bool) -> None:
        _autograd._enable_record_function(on)


@contextmanager
def _quiet() -> Iterator[None]:
    name, value = _QUIET
    known = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if known is None:
            del os.environ[name]


def _compare_clocks() -> dict[str, int]:
    """Read the profile's clock last thing in each of some events; by their names."""
    anchors = {}
    for _ in range(ANCHORS):
        name = f"accelrt.anchor {next(_numbers)}"
        with torch.profiler.record_function(name):
            anchors[name] = time.perf_counter_ns()
    return anchors


class _Clock:
    """The profile's clock at moments of the profiler's, in proportion between two comparisons.

    Args:
        begin, end: a moment of both clocks, the profiler's first.
    """

    def __init__(self, begin: tuple[int, int], end: tuple[int, int]) -> None:
        self._origin, self._offset = begin
        self._length, self._passed = end[0] - begin[0], end[1] - begin[1]

    def __call__(self, moment: int) -> int:
        since = moment - self._origin
        if self._length > 0:
            since = since * self._passed // self._length
        return self._offset + since


def _tightest(marks: Sequence[Any], anchors: Mapping[str, int]) -> tuple[int, int] | None:
    """The end of the shortest of the marks that ``anchors`` has, on both clocks."""
    own = (mark for mark in marks if mark.name() in anchors)
    mark = min(own, key=lambda mark: int(mark.duration_ns()), default=None)
    return None if mark is None else (mark.end_ns(), anchors[mark.name()])


def read(events: Sequence[Any], begin: Mapping[str, int], end: Mapping[str, int]) -> Recorded:
    """Operators, allocations and kernels out of the events of torch's profiler.

    Args:
        events: as the profiler has them.
        begin, end: the profile's clock, read last thing in each of the events of these names.
    """
    known = {*begin, *end}
    marks = [event for event in events if event.name() in known]
    first, last = _tightest(marks, begin), _tightest(marks, end)
    if first is None:
        return Recorded()
    thread = marks[0].start_thread_id()
    clock = _Clock(first, last or first)
    found = Recorded()
    host, launches, device, memory = [], {}, [], []
    for event in events:
        if event.name() == _MEMORY:
            memory.append(event)
        elif event.device_type() != _autograd.DeviceType.CPU:
            if not event.is_user_annotation():
                device.append(event)
        elif event.name().startswith("cuda"):
            launches[event.correlation_id()] = clock(event.start_ns())
        elif event.start_thread_id() == thread and "::" in event.name():
            host.append(event)
    host.sort(key=lambda event: (event.start_ns(), -event.end_ns()))
    places = _read_ops(host, clock, found)
    _read_memory(memory, clock, found)
    for event in device:
        start = clock(event.start_ns())
        op = places.get(event.linked_correlation_id(), -1)
        launched = launches.get(event.correlation_id(), 0)
        stop = start + event.duration_ns()
        found.kernels.append(Kernel(event.name(), start, stop, launched, op))
        if op >= 0:
            found.ops[op].device_ns += event.duration_ns()
    return found


def _read_ops(events: Sequence[Any], clock: _Clock, found: Recorded) -> dict[int, int]:
    """The operators with what they cost; their indices by correlation."""
    stack: list[tuple[int, int, bool, bool]] = []  # end, index, and what is counted above
    places: dict[int, int] = {}
    for event in events:
        begin, end, name = clock(event.start_ns()), clock(event.end_ns()), event.name()
        while stack and stack[-1][0] <= begin:
            stack.pop()
        parent, has_flops, has_bytes = stack[-1][1:] if stack else (-1, False, False)
        cost = cost_of(name, _arguments(event))
        flops, moved = (0 if has_flops else cost.flops), (0 if has_bytes else cost.bytes)
        places[event.correlation_id()] = index = len(found.ops)
        found.ops.append(Op(name, begin, end, parent, flops, moved))
        ours = name.startswith("accelrt::")  # counted as a whole, whatever it calls
        stack.append((end, index, has_flops or (ours and flops > 0), has_bytes or ours))
    _innermost_only(found.ops)
    return places


def _innermost_only(ops: list[Op]) -> None:
    """Leave FLOPs and bytes to the operator that does the work, not to those that call it.

    A product that copies an operand first moves its own bytes besides those of the copy.
    """
    flops, moved = [False] * len(ops), [False] * len(ops)  # something inside has some
    for index in range(len(ops) - 1, -1, -1):
        op = ops[index]
        if op.parent >= 0:
            flops[op.parent] |= flops[index] or op.flops > 0
            moved[op.parent] |= moved[index] or op.bytes > 0
        if flops[index]:
            op.flops = 0
        if moved[index] and not op.flops:
            op.bytes = 0


def _arguments(event: Any) -> tuple[tuple[Shape, str, Any], ...]:
    """Shape, dtype and value of every argument."""
    values, found = event.concrete_inputs(), []
    for i, (shape, dtype) in enumerate(zip(event.shapes(), event.dtypes(), strict=False)):
        value = values[i] if i < len(values) else None
        if dtype == "TensorList":
            value = tuple(map(tuple, event.structured_input_shapes()[i]))
        found.append((tuple(shape), dtype, tuple(value) if isinstance(value, list) else value))
    return tuple(found)


def _read_memory(events: Sequence[Any], clock: _Clock, found: Recorded) -> None:
    live = [0, 0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live[event.device_type() != _autograd.DeviceType.CPU] += event.nbytes()
        found.memory.append((clock(event.start_ns()), live[0], live[1]))
