"""What a step policy, or Inner Loop Feedback, did in the last request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from accelrt.memory.sizes import bytes_text

from .inner_loop import InnerLoop
from .session import COMPUTED, FEEDBACK, PREDICTED, REJECTED, Session, Tracker

if TYPE_CHECKING:
    from accelrt.models.forward import Forward

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
    rows = _rows(session)
    cache = 0 if session is None else session.cache_bytes
    return StepsReport(rows, tracker.rehash.described(), cache, tracker.gate)


def _rows(session: Session | None) -> tuple[StepRow, ...]:
    records = {} if session is None else session.records
    return tuple(
        StepRow(record.step, record.timestep, tuple(s for call in record.samples for s in call))
        for _, record in sorted(records.items())
    )


@dataclass(frozen=True)
class FeedbackReport:
    """The last request of a pipeline or model that runs with Inner Loop Feedback.

    Args:
        rows: its passes so far; the samples are ``"feedback"`` or ``"plain"``.
        stands_for: steps that it stands for; ``None`` where nothing has run, or no scheduler
            told of it.
        blocks: of the model.
        loop: first block of the loop, and the one after its last.
        passes: how often the loop runs again.
        cache_bytes: what was made once for the request.
        gate: what the quality floor found, or ``""``.
    """

    rows: tuple[StepRow, ...]
    stands_for: int | None
    blocks: int
    loop: tuple[int, int]
    passes: int
    cache_bytes: int
    gate: str = ""

    @property
    def feedback_steps(self) -> int:
        """Passes with feedback."""
        return sum(row.samples[0] == FEEDBACK for row in self.rows)

    @property
    def blocks_run(self) -> int:
        """Blocks that ran in all passes, the feedback's among them."""
        again = self.passes * (self.loop[1] - self.loop[0] + 1)
        return len(self.rows) * self.blocks + self.feedback_steps * again

    @property
    def settings(self) -> dict[str, Any]:
        """Where the loop is, and what the passes stand for."""
        return {
            "loop": list(self.loop), "passes": self.passes, "stands_for": self.stands_for,
            "outer_steps": len(self.rows), "feedback_steps": self.feedback_steps,
        }  # fmt: skip

    @property
    def computed_share(self) -> float:
        """Blocks that ran over those stood for; 1 where that is not known."""
        stood = self.blocks_stood_for
        return self.blocks_run / stood if stood else 1.0

    @property
    def blocks_stood_for(self) -> int | None:
        """Blocks of the steps that it stands for."""
        return None if self.stands_for is None else self.stands_for * self.blocks

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        counts = ("feedback_steps", "blocks_run", "blocks_stood_for")
        return {**asdict(self), **{name: getattr(self, name) for name in counts}}

    def __str__(self) -> str:
        lines = [f"feedback: loop of blocks {self.loop[0]} to {self.loop[1] - 1} of {self.blocks}"]
        if self.passes > 1:
            lines[0] += f", run again {self.passes} times"
        if self.gate:
            lines.append(f"quality: {self.gate}")
        if not self.rows:
            return "\n".join([*lines, "no step has run"])
        stood = "" if self.stands_for is None else f" for {self.stands_for}"
        of = "" if self.blocks_stood_for is None else f" for {self.blocks_stood_for}"
        lines.append(
            f"last request: {len(self.rows)} steps{stood}, {self.feedback_steps} with feedback; "
            f"{self.blocks_run} blocks{of}; kept {bytes_text(self.cache_bytes)}"
        )
        letters = "".join("F" if row.samples[0] == FEEDBACK else "C" for row in self.rows)
        return "\n".join([*lines, f"  {letters}  (F with feedback, C without)"])


def feedback_report(forward: Forward, loop: InnerLoop) -> FeedbackReport:
    """Of the request that began last."""
    tracker = loop.tracker
    session = tracker.latest
    schedule = None if session is None else tracker.schedule(session)
    return FeedbackReport(
        rows=_rows(session),
        stands_for=None if schedule is None else schedule.stands_for,
        blocks=len(forward.family.like_blocks(forward.module)),
        loop=(loop.module.loop.start, loop.module.loop.stop),
        passes=loop.module.passes,
        cache_bytes=0 if session is None else session.cache_bytes,
        gate=tracker.gate,
    )


def report_of(forward: Forward) -> StepsReport | FeedbackReport | None:
    """What was done along time in the last request of a wrapped model."""
    stepper = forward.stepper
    if stepper is None:
        return None
    if isinstance(stepper, InnerLoop):
        return feedback_report(forward, stepper)
    return steps_report(stepper.tracker)
