"""Operators, allocations and kernels of a run, as torch's profiler sees them.

The profiler takes a few microseconds per operator, so operators are recorded at some steps
only. Allocations and, on a GPU, kernels are recorded all the time: they cost next to nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .cost import Shape, cost_of

_autograd: Any = torch.autograd  # not all of it is in its type stubs
_ANCHOR = "accelrt.anchor"
#: The profiler's clock is compared with ours so often; the tightest comparison counts.
ANCHORS = 8
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
        self._anchors: list[int] = []

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
        for _ in range(ANCHORS):
            with torch.profiler.record_function(_ANCHOR):
                self._anchors.append(time.perf_counter_ns())
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
        with _quiet():
            self._profiler.__exit__(None, None, None)
        events = self._profiler.profiler.kineto_results.events()
        self._profiler = None
        return read(events, self._anchors)

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


def read(events: Sequence[Any], anchors: Sequence[int]) -> Recorded:
    """Operators, allocations and kernels out of the events of torch's profiler.

    Args:
        events: as the profiler has them.
        anchors: the profile's clock, read within each of the events that mark it.
    """
    marks = sorted(
        (event for event in events if event.name() == _ANCHOR), key=lambda event: event.start_ns()
    )
    if not marks:
        return Recorded()
    thread = marks[0].start_thread_id()
    mark, clock = min(
        zip(marks, anchors, strict=False), key=lambda pair: int(pair[0].duration_ns())
    )
    shift = clock - mark.end_ns()  # read last thing in it
    found = Recorded()
    host, launches, device, memory = [], {}, [], []
    for event in events:
        if event.name() == _MEMORY:
            memory.append(event)
        elif event.device_type() != _autograd.DeviceType.CPU:
            if not event.is_user_annotation():
                device.append(event)
        elif event.name().startswith("cuda"):
            launches[event.correlation_id()] = event.start_ns() + shift
        elif event.start_thread_id() == thread and "::" in event.name():
            host.append(event)
    host.sort(key=lambda event: (event.start_ns(), -event.end_ns()))
    places = _read_ops(host, shift, found)
    _read_memory(memory, shift, found)
    for event in device:
        begin = event.start_ns() + shift
        op = places.get(event.linked_correlation_id(), -1)
        launched = launches.get(event.correlation_id(), 0)
        end = begin + event.duration_ns()
        found.kernels.append(Kernel(event.name(), begin, end, launched, op))
        if op >= 0:
            found.ops[op].device_ns += event.duration_ns()
    return found


def _read_ops(events: Sequence[Any], shift: int, found: Recorded) -> dict[int, int]:
    """The operators with what they cost; their indices by correlation."""
    stack: list[tuple[int, int, bool, bool]] = []  # end, index, and what is counted above
    places: dict[int, int] = {}
    for event in events:
        begin, end, name = event.start_ns() + shift, event.end_ns() + shift, event.name()
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


def _read_memory(events: Sequence[Any], shift: int, found: Recorded) -> None:
    live = [0, 0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live[event.device_type() != _autograd.DeviceType.CPU] += event.nbytes()
        found.memory.append((event.start_ns() + shift, live[0], live[1]))
