"""What a step policy did in the last request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from accelrt.memory.sizes import bytes_text

from .session import COMPUTED, PREDICTED, REJECTED, Tracker

_LETTERS = {COMPUTED: "C", PREDICTED: ".", REJECTED: "R"}


@dataclass(frozen=True)
class StepRow:
    """One step.

    Args:
        step, timestep: of the scheduler.
        samples: what became of each: ``"computed"``, ``"predicted"`` or ``"rejected"``.
    """

    step: int
    timestep: float
    samples: tuple[str, ...]


@dataclass(frozen=True)
class StepsReport:
    """The last request of a wrapped pipeline or model.

    Args:
        rows: its steps so far.
        settings: of the cut, as :meth:`accelrt.Rehash.described`.
        cache_bytes: most that the kept features took.
        gate: what the quality floor found, or ``""``.
    """

    rows: tuple[StepRow, ...]
    settings: dict[str, Any]
    cache_bytes: int
    gate: str = ""

    def _count(self, kind: str) -> int:
        return sum(row.samples.count(kind) for row in self.rows)

    @property
    def computed(self) -> int:
        """Samples computed, over all steps and calls."""
        return self._count(COMPUTED)

    @property
    def predicted(self) -> int:
        """Samples predicted."""
        return self._count(PREDICTED)

    @property
    def rejected(self) -> int:
        """Samples predicted, found wanting, and computed."""
        return self._count(REJECTED)

    @property
    def computed_share(self) -> float:
        """Share of the left-out stages that ran all the same; 1 without any step."""
        total = self.computed + self.predicted + self.rejected
        return (self.computed + self.rejected) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = {name: getattr(self, name) for name in ("computed", "predicted", "rejected")}
        return {**asdict(self), **counts, "computed_share": self.computed_share}

    def __str__(self) -> str:
        policy, predictor = self.settings["policy"], self.settings["predictor"]
        boundary = self.settings["boundary"]
        where = boundary if isinstance(boundary, str) else boundary["last"]
        lines = [f"steps: {_text(policy)}, {_text(predictor)}, boundary {where}"]
        if self.gate:
            lines.append(f"quality: {self.gate}")
        if not self.rows:
            return "\n".join([*lines, "no step has run"])
        lines.append(
            f"last request: {self.computed} computed, {self.predicted} predicted, "
            f"{self.rejected} rejected and computed; cache {bytes_text(self.cache_bytes)}"
        )
        alike = all(len(set(row.samples)) == 1 for row in self.rows)
        return "\n".join([*lines, *(f"  {text}" for text in _lines(self.rows, alike))])


def _text(part: dict[str, Any]) -> str:
    shown = {k: v for k, v in part.items() if k not in ("kind", "table")}
    inside = ", ".join(f"{key}={value}" for key, value in shown.items())
    return f"{part['kind']}({inside})"


def _lines(rows: tuple[StepRow, ...], alike: bool) -> list[str]:
    """One letter a step, or one line of them for each sample."""
    if alike:
        letters = "".join(_LETTERS[row.samples[0]] for row in rows)
        return [f"{letters}  (C computed, . predicted, R rejected and computed)"]
    most = max(len(row.samples) for row in rows)
    lines = [
        f"sample {i}: "
        + "".join(_LETTERS[row.samples[i]] if i < len(row.samples) else " " for row in rows)
        for i in range(most)
    ]
    return [*lines, "(C computed, . predicted, R rejected and computed)"]


def steps_report(tracker: Tracker) -> StepsReport:
    """Of the request that began last."""
    session = tracker.latest
    records = {} if session is None else session.records
    rows = tuple(
        StepRow(record.step, record.timestep, tuple(s for call in record.samples for s in call))
        for _, record in sorted(records.items())
    )
    cache = 0 if session is None else session.cache_bytes
    return StepsReport(rows, tracker.rehash.described(), cache, tracker.gate)
