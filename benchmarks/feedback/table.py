"""The table: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lines import EqualTime, Line, gain
from modules import Made
from picture import plot
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from accelrt.benchmarking.gpu_use import GpuUse
from accelrt.benchmarking.tables import driver_markdown

HEAD = (
    "row", "outer steps", "blocks", "s/batch", "vs accelrt", "vs diffusers", "Frechet", "to base",
    "accuracy", "PSNR", "latent error", "PSNR over plain",
)  # fmt: skip
ABLATION_HEAD = (
    "module", "b", "L", "passes", "enters", "scales", "time of 2nd pass", "ahead", "objective",
    "outer steps", "blocks", "vs accelrt", "PSNR", "latent error", "Frechet", "to base",
)  # fmt: skip
# Title, head and rows.
Part = tuple[str, Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Table:
    """All that one run found.

    Args:
        model: its name.
        settings: of the run, by name.
        machine: that it was measured on.
        lines: of all rows; those of ablations have the kind ``"ablation"``.
        made: how the module of the table and those of the ablations were made.
        equal_time: what else there is in the time of feedback.
        tried: seconds over those of feedback of the rivals' settings that were tried.
        left_out: rivals that there are not, with their reasons.
        gpu: what its driver said of a picture of each row.
    """

    model: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    lines: Sequence[Line]
    made: Sequence[Made]
    equal_time: EqualTime
    tried: dict[str, float]
    left_out: dict[str, str]
    gpu: GpuUse

    @property
    def rows(self) -> list[Line]:
        """The table's, without ablations."""
        return [line for line in self.lines if line.kind != "ablation"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = []
        for line in self.lines:
            found = gain(line, self.lines)
            values = dataclasses.asdict(line)
            values["verdict"] = None if found is None else dataclasses.asdict(found)
            rows.append(values)
        values = {
            "model": self.model,
            "settings": self.settings,
            "machine": self.machine,
            "rows": rows,
            "modules": [dataclasses.asdict(made) for made in self.made],
            "equal_time": dataclasses.asdict(self.equal_time),
            "tried": self.tried,
            "left_out": self.left_out,
            "gpu": self.gpu.to_dict(),
        }
        return {key: _finite(value) for key, value in values.items()}

    def cells(self, line: Line) -> list[str]:
        """Of a row under ``HEAD``."""
        found = gain(line, self.lines)
        return [
            line.name + self._mark(line.name),
            str(line.outer),
            str(line.blocks),
            f"{line.seconds:.3g}",
            f"{line.speedup:.2f}x",
            f"{line.of_stock:.2f}x",
            str(line.distance),
            line.gap.signed,
            f"{100 * line.accuracy:.1f} %",
            f"{line.psnr_db:.1f}",
            f"{line.latent_error:.3f}",
            "" if found is None else f"{found.psnr_gain_db:+.1f}",
        ]

    def _mark(self, name: str) -> str:
        return " *" if name in dataclasses.asdict(self.equal_time).values() else ""

    def ablation_cells(self) -> list[list[str]]:
        """Under ``ABLATION_HEAD``; none where only the table's own module ran."""
        by_name = {line.name: line for line in self.lines}
        if len(self.made) < 2:
            return []
        rows = []
        for made in self.made:
            line = by_name[made.name]
            rows.append(
                [
                    made.name,
                    str(made.start),
                    str(made.length),
                    str(made.passes),
                    made.enters,
                    made.scales,
                    made.conditioning,
                    f"{made.ahead:g}",
                    made.objective or "unknown",
                    f"{line.outer} ({made.feedback_steps})",
                    str(line.blocks),
                    f"{line.speedup:.2f}x",
                    f"{line.psnr_db:.1f}",
                    f"{line.latent_error:.3f}",
                    str(line.distance),
                    line.gap.signed,
                ]
            )
        return rows

    def notes(self) -> list[str]:
        """What the columns mean, and what is missing."""
        own = self.settings
        lines = [
            f"Error (PSNR, latent error): against {own['reference_steps']} steps of diffusers from "
            f"the same seeds. vs: medians of the ratios of seconds to {own['steps']} steps, batch "
            f"by batch. [..]: 90 % of {own['resamples']} resamples of the pictures; to base: "
            f"Frechet distance less that of diffusers' {own['steps']} steps, pictures paired. "
            f"PSNR over plain: than fewer plain steps of accelrt in the same time.",
            "\\*: nearest in time to ILF (plain steps); best PSNR in its time (caching, rehash).",
        ]
        if self.left_out:
            lines += [f"Left out: {name}: {why}." for name, why in self.left_out.items()]
        return lines

    def markdown(self) -> str:
        """The tables, and what the columns mean."""
        parts = [_markdown(HEAD, [self.cells(line) for line in self.rows])]
        parts += [f"- {note}" for note in self.notes()]
        ablations = self.ablation_cells()
        if ablations:
            parts += ["", "## Modules", "", _markdown(ABLATION_HEAD, ablations)]
        parts += ["", driver_markdown(self.gpu, "picture")]
        return "\n".join(parts).rstrip() + "\n"

    def show(self, console: Console | None = None) -> None:
        """Print the tables."""
        console = console or Console()
        parts: list[Part] = [(self.model, HEAD, [self.cells(line) for line in self.rows])]
        ablations = self.ablation_cells()
        if ablations:
            parts.append(("modules", ABLATION_HEAD, ablations))
        tables = [_rich(*part, whole=True) for part in parts]
        unlimited = Console(width=10_000)
        needed = max(unlimited.measure(table).maximum for table in tables)
        if not console.is_terminal:
            console = Console(file=console.file, width=max(needed, console.width))
        elif console.width < needed:
            tables = [_rich(*part, whole=False) for part in parts]
        console.print(tables[0])
        for note in self.notes():
            console.print(note.replace("\\", ""), markup=False)
        for table in tables[1:]:
            console.print(table)
        console.print(driver_markdown(self.gpu, "picture"), markup=False)


def write(folder: Path, table: Table) -> list[Path]:
    """Write a table to ``feedback-MODEL.json``, ``.md`` and ``.png``.

    Args:
        folder: is made if it does not exist.
        table: takes the place of an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"feedback-{table.model}.json"
    path.write_text(json.dumps(table.to_dict(), indent=1) + "\n", encoding="utf-8")
    where = ", ".join(f"{k} {v}" for k, v in {**table.machine, **table.settings}.items())
    text = path.with_suffix(".md")
    text.write_text(f"# {table.model}\n\n{where}\n\n{table.markdown()}", encoding="utf-8")
    picture = path.with_suffix(".png")
    plot(picture, f"{table.model}: what one batch costs", table.rows)
    return [path, text, picture]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _rich(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], whole: bool) -> RichTable:
    """A table for the terminal; ``whole``: no cell is folded."""
    table = RichTable(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for i, name in enumerate(head):
        widest = max((len(row[i]) for row in rows), default=0)
        justify: Literal["left", "right"] = "left" if i == 0 else "right"
        table.add_column(name, justify=justify, min_width=widest if whole else None)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _finite(values: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
