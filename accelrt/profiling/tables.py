"""A profile as tables: for the terminal, for the page, as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Column, Table

from accelrt.memory.sizes import bytes_text
from accelrt.reporting.tables import seconds_text

from .analysis import KINDS, Row

if TYPE_CHECKING:
    from .capture import Profile

COLUMNS = (
    "total s", "share", "self s", "calls", "GFLOP", "moved", "utilisation", "slices", "limit"
)  # fmt: skip


# What a narrow terminal does without, the first of them first, and what names get instead.
_LEFT_OUT = ("self s", "calls", "moved", "share", "slices", "GFLOP")
_NAMES = 26


class _Fitting(Table):
    """Leaves columns out rather than cut names and numbers to a few letters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        chosen = {str(column.header): column for column in self.columns}
        widths = dict(zip(chosen, map(_width, self.columns), strict=True))
        name = next(iter(widths))
        widths[name] = min(widths[name], _NAMES)
        left_out: list[str] = []
        for head in _LEFT_OUT:
            # Three between two columns, one at each end.
            if sum(widths.values()) + 3 * len(widths) - 1 <= options.max_width:
                break
            left_out.append(head)
            del widths[head], chosen[head]
        if not left_out:
            yield from super().__rich_console__(console, options)
            return
        # A table of its own: rich counts on every column's place in the one that made it.
        shown = Table(
            box=self.box, pad_edge=self.pad_edge, title=self.title, caption_justify="left",
            title_justify="left",
            caption=f"{self.caption} Not shown in this width: {', '.join(left_out)}.",
        )  # fmt: skip
        for column in chosen.values():
            shown.add_column(
                column.header, justify=column.justify, overflow=column.overflow,
                no_wrap=column.no_wrap,
            )  # fmt: skip
        for row in zip(*(column.cells for column in chosen.values()), strict=True):
            shown.add_row(*row)
        yield shown


def _width(column: Column) -> int:
    return max(cell_len(str(cell)) for cell in (column.header, *column.cells))


def cells(profile: Profile, row: Row) -> tuple[str, ...]:
    """A row's cells: its name, then :data:`COLUMNS`; with the GPU's time where there is one."""
    utilisation, limit = row.utilisation(profile.ceilings), row.limit(profile.ceilings)
    return (
        row.name,
        *((seconds_text(row.device_seconds),) if profile.device == "cuda" else ()),
        seconds_text(row.seconds),
        f"{100 * row.seconds / profile.seconds:.1f} %" if profile.seconds else "-",
        seconds_text(row.self_seconds),
        str(row.calls),
        f"{row.flops / 1e9:.3g}" if row.recorded else "-",
        bytes_text(row.bytes) if row.recorded else "-",
        "-" if utilisation is None else f"{utilisation:.2f}",
        f"{row.slices / row.calls:.3g}" if row.slices else "",
        "-" if limit is None else f"{limit[0]} {100 * min(limit[1], 1):.0f} %",
    )


def heads(profile: Profile, by: str) -> tuple[str, ...]:
    """The headings of :func:`cells`."""
    return (by, *(("GPU s",) if profile.device == "cuda" else ()), *COLUMNS)


def table(profile: Profile, by: str, top: int) -> Table:
    """The longest rows."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top is {top!r}; allowed: an integer >= 1")
    rows = profile.rows(by)
    found = _Fitting(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{profile.title}, by {by}",
        title_justify="left",
        caption=" ".join(sentences(profile)),
        caption_justify="left",
    )
    for i, head in enumerate(heads(profile, by)):
        found.add_column(head, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for row in rows[:top]:
        found.add_row(*map(escape, cells(profile, row)))
    if len(rows) > top:
        rest = sum(row.seconds for row in rows[top:])
        found.add_row(f"{len(rows) - top} more", *[""] * (len(found.columns) - len(COLUMNS) - 1),
                      seconds_text(rest))  # fmt: skip
    return found


def sentences(profile: Profile) -> list[str]:
    """What the tables do not hold."""
    found = [
        f"{profile.calls} call{'s' * (profile.calls != 1)}, {profile.steps} steps, "
        f"{profile.seconds:.3f} s; {100 * profile.coverage:.1f} % of it has a name."
    ]
    if not profile.analysis.spans:
        found = [f"Nothing of {profile.title} ran in the block and in the thread that opened it."]
    chosen = profile.analysis.chosen
    steps = sorted({span.step for span in profile.analysis.spans if span.step >= 0})
    known = [step for step in steps if chosen(step)]
    if not profile.analysis.recorded.ops:
        found.append("Operators were not recorded.")
    elif steps:
        found.append(
            f"Operators were recorded at {_steps_text(known)}; their times, FLOPs and bytes stand "
            "for all steps."
        )
    if profile.ceilings is not None:
        found.append(
            f"Utilisation is against a {profile.ceilings.rows}^3 product in "
            f"{profile.ceilings.dtype}, {profile.ceilings.flops_per_second / 1e9:.4g} GFLOP/s; "
            f"a copy moves {profile.ceilings.bytes_per_second / 1e9:.3g} GB/s."
        )
    found.append(f"Tensors made in the block: at most {bytes_text(profile.peak_bytes)} at once.")
    joules = profile.joules_per_image
    if joules is not None:
        found.append(f"{profile.samples.gpu.name}: {joules:.3g} J per image.")
    elif profile.samples.gpu.note:
        found.append(f"GPU: {profile.samples.gpu.note}.")
    return found


def _steps_text(steps: list[int]) -> str:
    """In words."""
    if not steps:
        return "no step"
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


def as_dict(profile: Profile, top: int) -> dict[str, Any]:
    """A profile for JSON."""
    gpu = profile.samples.gpu
    return {
        "target": profile.title,
        "device": profile.device,
        "dtype": str(profile.dtype).removeprefix("torch."),
        "threads": profile.threads,
        "seconds": profile.seconds,
        "calls": profile.calls,
        "steps": profile.steps,
        "images": profile.images,
        "coverage": profile.coverage,
        "peak_bytes": profile.peak_bytes,
        "ceilings": None if profile.ceilings is None else dataclasses.asdict(profile.ceilings),
        "gpu": {**dataclasses.asdict(gpu), "joules_per_image": profile.joules_per_image},
        "rows": {by: [_row(profile, row) for row in profile.rows(by)[:top]] for by in KINDS},
    }


def _row(profile: Profile, row: Row) -> dict[str, Any]:
    limit = row.limit(profile.ceilings)
    return {
        **dataclasses.asdict(row),
        "utilisation": row.utilisation(profile.ceilings),
        "limit": None if limit is None else limit[0],
        "limit_share": None if limit is None else limit[1],
    }
