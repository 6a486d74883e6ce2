"""Named ranges of time: what a profile writes down while a pipeline runs.

A range costs about a microsecond: a list entry at its start, a number at its end. Everything
else, paths and totals among it, is worked out after the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

CALL, PART, STEP = "call", "part", "step"
COMPONENT, STAGE, GROUP = "component", "stage", "group"

#: Parts of a pipeline that come after its steps.
_AFTER_STEPS = ("decode", "vae.decode", "postprocess", "maybe_free", "run_safety", "numpy_to_pil")
_BEFORE_STEPS = ("scheduler.set_timesteps", "scheduler.add_noise")
#: Components that run outside of the steps.
_NOT_DENOISERS = ("vae", "text_encoder", "image_encoder", "safety", "vqvae", "movq", "feature")


@dataclass(slots=True)
class Span:
    """One range of time of the profiled thread.

    Args:
        kind: ``"call"`` (of the pipeline), ``"part"`` (a method of it), ``"step"``,
            ``"component"`` (a model), ``"stage"`` or ``"group"``.
        name: of itself alone; of a group its path in the model.
        parent: index of the range around it, -1 for none.
        begin, end: nanoseconds of the profile's clock.
        step: index of the denoising step that it is of, -1 for none.
    """

    kind: str
    name: str
    parent: int
    begin: int
    end: int = 0
    step: int = -1


class Recorder:
    """Writes ranges, slices and steps of one thread.

    Args:
        on_step: called with the index of a step that begins, and with -1 where the steps end.
        push, pop: called with the path of every range that begins, and at its end; for NVTX.

    Attributes:
        spans: in the order in which they began.
        slices: time and index of every slice's start, with the span that it is of.
        arena: time, bytes alive in the active arena and its slab, where that changed.
        blocks: what an arena gave: offset, bytes, and times of birth and death (0: lives).
        dropped: spans that turned out not to be any.
    """

    def __init__(
        self,
        on_step: Callable[[int], None] | None = None,
        push: Callable[[str], None] | None = None,
        pop: Callable[[], None] | None = None,
    ) -> None:
        self.thread = threading.get_ident()
        self.spans: list[Span] = []
        self.slices: list[tuple[int, int, int]] = []
        self.arena: list[tuple[int, int, int]] = []
        self.blocks: list[list[int]] = []
        self.dropped: set[int] = set()
        self.active = True
        self._stack: list[int] = []
        self._on_step = on_step or (lambda index: None)
        self._push, self._pop = push, pop
        self._next_step = 0
        self._total: int | None = None
        self._requested = self._looping = False
        self._step = -1  # the open step's span
        self._worked = False  # a model or the scheduler ran in it

    def mine(self) -> bool:
        """The profile is open, and this is its thread."""
        return self.active and threading.get_ident() == self.thread

    def open(self, kind: str, name: str) -> int:
        """Begin a range; returns what :meth:`close` wants."""
        stack = self._stack
        if kind in (PART, COMPONENT):
            self._place(kind, name)
        parent = stack[-1] if stack else -1
        step = self.spans[self._step].step if self._step >= 0 else -1
        index = len(self.spans)
        self.spans.append(Span(kind, name, parent, time.perf_counter_ns(), 0, step))
        stack.append(index)
        if self._push is not None:
            self._push(path_of(self.spans, index))
        return index

    def close(self, index: int) -> None:
        """End a range, and those within it that an exception left open."""
        stack = self._stack
        if index not in stack:
            return
        now = time.perf_counter_ns()
        while stack:
            top = stack.pop()
            if self._pop is not None:
                self._pop()
            self.spans[top].end = now
            if top == self._step:
                self._step = -1
            if top == index:
                return

    def close_all(self) -> None:
        """End what is open."""
        if self._stack:
            self.close(self._stack[0])

    def current(self) -> int:
        """Index of the innermost open range, or -1."""
        return self._stack[-1] if self._stack else -1

    # Steps

    def begin_request(self, steps: int | None) -> None:
        """The scheduler has its timesteps; the loop follows.

        Args:
            steps: how many, if that is known.
        """
        self._end_step()
        self._next_step, self._total = 0, steps
        self._requested, self._looping = True, False

    def begin_loop(self) -> None:
        """The loop over the steps begins, as the pipeline's progress bar tells."""
        self._end_step()
        self._looping = True
        self._begin_step()

    def stepped(self) -> None:
        """The scheduler has taken a step: what follows is of the next one."""
        if self._step < 0:
            return
        self.close(self._step)
        self._next_step += 1
        if self._total is None or self._next_step < self._total:
            self._begin_step()
        else:
            self.end_loop()

    def end_loop(self) -> None:
        """No step follows."""
        self._end_step()
        self._requested = self._looping = False
        self._on_step(-1)

    def _begin_step(self) -> None:
        self._on_step(self._next_step)
        self._step = self.open(STEP, f"step {self._next_step}")
        self.spans[self._step].step = self._next_step
        self._worked = False

    def _end_step(self) -> None:
        """Close the open step; if nothing ran in it, there was none."""
        index = self._step
        if index < 0:
            return
        self.close(index)
        if not self._worked:
            self.dropped.add(index)

    def _place(self, kind: str, name: str) -> None:
        """Open or close a step where what begins tells that one has begun or is over."""
        if not (self._looping or self._requested):
            return
        outermost = not self._stack or self.spans[self._stack[-1]].kind in (CALL, STEP)
        if not outermost:
            return
        if name.startswith(_AFTER_STEPS):
            if not self._worked:
                self._end_step()
                self._on_step(-1)
            return
        if name.startswith(_NOT_DENOISERS):
            return
        if kind == COMPONENT and name not in _BEFORE_STEPS:
            self._looping = True  # a pipeline without a progress bar
            if self._step < 0:
                self._begin_step()
            self._worked = True


def path_of(spans: list[Span], index: int) -> str:
    """Names from the step down, such as ``step 3/unet.mid_block/mid_block.resnets.0``."""
    names: list[str] = []
    stage = ""
    while index >= 0:
        span = spans[index]
        if span.kind == STAGE:
            stage = span.name
        elif span.kind == COMPONENT and stage:
            names.append(f"{span.name.removesuffix('.decode').removesuffix('.encode')}.{stage}")
            stage = ""
        elif span.kind != CALL:
            names.append(span.name)
        index = span.parent
    if stage:
        names.append(stage)
    return "/".join(reversed(names))
