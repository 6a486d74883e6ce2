"""What is kept of computed steps: features at a boundary, in slots that are used in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelrt import ops

from .predictors import Predictor


def rows_of(x: Tensor, batch: int) -> Tensor:
    """``[B, M]`` of hidden states ``[N, C, H, W]`` (channels-last) or ``[B, S, D]``.

    A view, unless the layout is another.
    """
    if x.dim() == 4:
        x = x.permute(0, 2, 3, 1)
    return x.reshape(batch, -1)


def shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`rows_of`, as a view."""
    if len(shape) != 4:
        return rows.view(shape)
    images, channels, height, width = shape
    return rows.view(images, height, width, channels).permute(0, 3, 1, 2)


@dataclass
class Unit:
    """Samples that are decided together: one sample, with its guidance half if it has one.

    Args:
        rows: of the batch.
        times: of the steps whose features are kept, with their slots, the latest last.
        drift: changes of the indicator since the last computed step, added up.
        consecutive: predicted steps since then.
    """

    rows: tuple[int, ...]
    times: list[tuple[float, int]] = field(default_factory=list)
    drift: float = 0.0
    consecutive: int = 0

    def slot(self, time: float, points: int) -> int:
        """The slot for features of ``time``: a free one, or that of the oldest.

        A step at the time of the latest (some solvers evaluate it twice) takes its place:
        no slope could be drawn between them.
        """
        for index, (old, slot) in enumerate(self.times):
            if old == time:
                del self.times[index:]
                return slot
        if len(self.times) >= points:
            return self.times[0][1]
        taken = {slot for _, slot in self.times}
        return next(slot for slot in range(points) if slot not in taken)

    def keep(self, time: float, slot: int) -> None:
        """Features of ``time`` are in ``slot`` now."""
        self.times = [(t, s) for t, s in self.times if s != slot]
        self.times.append((time, slot))
        self.drift, self.consecutive = 0.0, 0


class Slots:
    """Tensors of one kind of feature: ``[points, B, M]``, memory of its own.

    Args:
        like: the feature ``[N, C, H, W]`` or ``[B, S, D]``.
        batch: ``B``.
        points: slots.
    """

    def __init__(self, like: Tensor, batch: int, points: int) -> None:
        self.shape = like.shape
        self.batch = batch
        self.data = like.new_empty((points, batch, like.numel() // batch))

    @property
    def bytes(self) -> int:
        """Of all slots."""
        return self.data.numel() * self.data.element_size()

    def put(self, slot: int, x: Tensor, minus: Tensor | None = None) -> None:
        """Keep ``[B, M]``, or how much it is above ``minus``."""
        if minus is None:
            self.data[slot].copy_(x)
        else:
            torch.sub(x, minus, out=self.data[slot])

    def put_rows(self, slot: int, x: Tensor, rows: Sequence[int]) -> None:
        """Keep ``[len(rows), M]`` in some rows."""
        self.data[slot].index_copy_(0, torch.tensor(rows, device=x.device), x)

    def alone(self, slot: int) -> Tensor:
        """One slot as a feature, without a copy: whoever takes it must not write to it."""
        return shaped(self.data[slot], self.shape)

    def sum(self, weights: Tensor, base: Tensor | None = None) -> Tensor:
        """``base + sum_k w[b, k] f_k`` as a new feature, or written over ``base``.

        Args:
            weights: float32 ``[B, points]``; a slot of weight 0 is not read.
            base: ``[B, M]``, contiguous.
        """
        out = ops.weighted_sum(self.data, weights, base=base, out=base)
        return shaped(out, self.shape)


def weight_rows(
    units: Sequence[Unit], per_unit: Sequence[Sequence[float] | None], batch: int, points: int
) -> tuple[tuple[float, ...], ...]:
    """Weights by slot for each row of the batch; zeros for units that have none."""
    zeros = (0.0,) * points
    rows = [zeros] * batch
    for unit, weights in zip(units, per_unit, strict=True):
        if weights is None:
            continue
        line = [0.0] * points
        for (_, slot), weight in zip(unit.times, weights, strict=True):
            line[slot] = weight
        for row in unit.rows:
            rows[row] = tuple(line)
    return tuple(rows)


def single_slot(rows: tuple[tuple[float, ...], ...]) -> int | None:
    """The slot that every row takes as it is, if there is one."""
    first = rows[0]
    if any(row != first for row in rows) or sorted(first) != [0.0] * (len(first) - 1) + [1.0]:
        return None
    return first.index(1.0)


def shapes_of(value: Any) -> Any:
    """What of the arguments of a call must not change from step to step."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, shapes_of(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(shapes_of, value))
    return None


@dataclass
class Store:
    """What one call of a model keeps from step to step.

    Args:
        batch: rows.
        units: samples that are decided together.
        predictor: that of the settings, or the one that fits under the cap.

    Attributes:
        slots: of the hidden states at the boundary, then of the skips that are predicted.
        shared: skips that the earlier stages supply at every step.
        marks: what the left-out stages noted for later ones.
        head: ``[B, M]`` in front of the left-out stages, at the step before.
        checks: slots of the output of the stage that verifies.
        inputs: shapes of the call that all this is for.
        reuse: is given the memory when the request is over; ``None`` to free it.
    """

    batch: int
    units: list[Unit]
    predictor: Predictor
    slots: list[Slots] = field(default_factory=list)
    shared: int = 0
    marks: dict[str, bool] = field(default_factory=dict)
    head: Tensor | None = None
    checks: Slots | None = None
    inputs: Any = None
    reuse: Callable[[Memory], None] | None = None

    def released(self) -> None:
        """The request is over."""
        if self.reuse is not None and self.slots:
            kept = Memory(
                self.slots, self.shared, self.marks, self.head, self.checks, self.predictor
            )
            self.reuse(kept)
        self.reuse = None

    def take(self, memory: Memory) -> None:
        """Use the memory of a store for calls of the same form."""
        self.slots, self.shared, self.marks = memory.slots, memory.shared, memory.marks
        self.head, self.checks, self.predictor = memory.head, memory.checks, memory.predictor

    @property
    def addresses(self) -> tuple[Any, ...]:
        """Where everything is kept."""
        kept = [s.data for s in self.slots]
        kept += [] if self.checks is None else [self.checks.data]
        kept += [] if self.head is None else [self.head]
        return tuple((t.data_ptr(), t.shape, t.dtype) for t in kept)

    @property
    def points(self) -> int:
        """Steps that are kept."""
        return self.predictor.points

    @property
    def bytes(self) -> int:
        """Of everything that is kept."""
        slots = [*self.slots, *([] if self.checks is None else [self.checks])]
        head = 0 if self.head is None else self.head.numel() * self.head.element_size()
        return sum(s.bytes for s in slots) + head


@dataclass
class Memory:
    """Of a store whose request is over: for the next one of the same form.

    Args:
        slots, shared, marks, head, checks, predictor: of the store.
    """

    slots: list[Slots]
    shared: int
    marks: dict[str, bool]
    head: Tensor | None
    checks: Slots | None
    predictor: Predictor

    @property
    def is_lasting(self) -> bool:
        """It may be written to by any later request, also outside of inference mode."""
        return not any(slots.data.is_inference() for slots in self.slots)


class Memories:
    """Memory of requests that are over, for the next ones: graphs were captured in it.

    Args:
        most: kept at a time; the oldest goes first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: list[tuple[Any, Any, Memory]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def lend(self, store: Store, key: Any, stages: Any) -> None:
        """Let a new store have the memory of an earlier one, and leave it to a later one.

        Args:
            store: of a request that begins.
            key: tells the forms of stores apart.
            stages: that fill it; told apart by identity.
        """
        for index, (known, of, memory) in enumerate(self._waiting):
            if known == key and of is stages:
                del self._waiting[index]
                store.take(memory)
                break

        def reuse(memory: Memory) -> None:
            if memory.is_lasting:
                self._waiting.append((key, stages, memory))
                del self._waiting[: -self.most]

        store.reuse = reuse
