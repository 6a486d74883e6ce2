"""What of a wrapped object is fused, sliced or untouched, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from accelrt.groups import pipelining
from accelrt.memory.sizes import bytes_text
from accelrt.models.stages import Stage
from accelrt.steps.graphs import GraphsReport
from accelrt.steps.inner_loop import InnerLoop
from accelrt.steps.report import FeedbackReport, StepsReport, report_of

if TYPE_CHECKING:
    from rich.text import Text

    from accelrt.models.forward import Forward


@dataclass(frozen=True)
class Row:
    """One operator group.

    Args:
        component: name of the wrapped part, ``""`` for a model wrapped by itself.
        stage, group: names.
        status: ``"fused"``, ``"sliced"`` or ``"untouched"``.
        axis: what is sliced, or ``""``.
        length, total: items per slice and in all; ``None`` before the first call if
            the length is automatic.
        reason: why the group is not fused, or a remark.
    """

    component: str
    stage: str
    group: str
    status: str
    axis: str
    length: int | None
    total: int | None
    reason: str


@dataclass(frozen=True)
class Summary:
    """All groups of a wrapped object; prints as a table.

    Args:
        rows: one per group.
        stock: components whose last call ran the stock forward, with the reason.
        unsupported: components that were not wrapped, with their classes.
        planned: with a memory budget, reserved bytes of the last plan of each component.
        exceeded: buffers that found no room in the arena of a plan.
        steps: what the step policy or the feedback did in the last request; ``None`` without
            either.
        graphs: what became of the passes of each component, where CUDA graphs are wanted.
        unpipelined: components whose slices run one by one although ``pipeline_slices`` is
            set, with the device that they are on.
    """

    rows: tuple[Row, ...]
    stock: dict[str, str]
    unsupported: dict[str, str]
    planned: dict[str, int]
    exceeded: int
    steps: StepsReport | FeedbackReport | None = None
    graphs: tuple[GraphsReport, ...] = ()
    unpipelined: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Number of groups per status."""
        result = {"fused": 0, "sliced": 0, "untouched": 0}
        for row in self.rows:
            result[row.status] += 1
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``groups`` (a list of rows), ``counts``, and the attributes."""
        return {
            "groups": [asdict(row) for row in self.rows],
            "counts": self.counts(),
            "stock": dict(self.stock),
            "unsupported": dict(self.unsupported),
            "planned": dict(self.planned),
            "exceeded": self.exceeded,
            "steps": None if self.steps is None else self.steps.to_dict(),
            "graphs": [asdict(report) for report in self.graphs],
            "unpipelined": dict(self.unpipelined),
        }

    def __rich__(self) -> Text:
        """The same for ``rich.print``, which would show the attributes."""
        from rich.text import Text

        return Text(str(self))

    def __str__(self) -> str:
        header = ("component", "stage", "group", "status", "slice", "reason")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        table.insert(1, tuple("-" * width for width in widths))
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.append(", ".join(f"{count} {kind}" for kind, count in self.counts().items()))
        lines += [
            f"last call of {name or 'the model'} ran the stock forward: {reason}"
            for name, reason in self.stock.items()
        ]
        lines += [
            f"planned for {name or 'the model'}: {bytes_text(count)} of activations"
            for name, count in self.planned.items()
        ]
        if self.exceeded:
            lines.append(f"{self.exceeded} buffers found no room in the planned arena")
        if self.steps is not None:
            lines.append(str(self.steps))
        lines += map(str, self.graphs)
        lines += [
            f"pipeline_slices has no effect on {name or 'the model'}: it is on {device}"
            for name, device in self.unpipelined.items()
        ]
        if self.unsupported:
            names = (f"{name} ({cls})" for name, cls in self.unsupported.items())
            lines.append(f"not wrapped: {', '.join(names)}")
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    length = "auto" if row.length is None else str(row.length)
    if row.total is not None:
        length += f"/{row.total}"
    cut = f"{length} {row.axis}" if row.axis else ""
    return (row.component, row.stage, row.group, row.status, cut, row.reason)


def describe(found: list[tuple[str, Forward]], unsupported: dict[str, str]) -> Summary:
    """The summary of some named forwards, and of the components beside them."""
    rows: list[Row] = []
    stock: dict[str, str] = {}
    planned: dict[str, int] = {}
    exceeded: dict[int, int] = {}
    unpipelined: dict[str, str] = {}
    steps: StepsReport | FeedbackReport | None = None
    for component, forward in found:
        if forward.stepper is not None:
            steps = report_of(forward)
        if forward.planner is not None:
            reserved, spills = forward.planner.report(forward)
            exceeded[id(forward.planner)] = spills
            if reserved is not None:
                planned[component] = reserved
        stages = forward.stages()
        if isinstance(forward.stepper, InnerLoop):
            group = forward.stepper.group(forward, stages)
            stages = (*stages, Stage(group.name, (group,)))
        for stage in stages:
            for group in stage.groups:
                status = group.status()
                rows.append(
                    Row(
                        component, stage.name, group.name, status.kind, status.axis,
                        status.length, status.total, status.reason,
                    )
                )  # fmt: skip
        device = next((p.device for p in forward.module.parameters()), torch.device("cpu"))
        if forward.config.pipeline_slices and device.type != pipelining.streams().device_type:
            unpipelined[component] = str(device)
        if forward.stock_reason:
            stock[component] = forward.stock_reason
    graphs = tuple(
        forward.graphs.report(component) for component, forward in found if forward.graphs
    )
    spilled = sum(exceeded.values())
    return Summary(tuple(rows), stock, unsupported, planned, spilled, steps, graphs, unpipelined)
