"""Pictures of a profile: the timeline, memory, steps and stages, the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from accelrt.files import write_figure

from .analysis import MEMORY, OVERHEAD, PRODUCTS, Row
from .spans import CALL, COMPONENT, GROUP, PART, STAGE, STEP, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .capture import Profile

MIB = 2**20
_COLOURS = {PRODUCTS: "tab:blue", MEMORY: "tab:orange", OVERHEAD: "tab:red", "": "tab:gray"}
#: Names in a picture, at most.
LABELLED = 12
#: Ranges narrower than this share of the picture are not drawn.
NARROWEST = 4e-4


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_timeline(profile: Profile, path: Path | IO[bytes], step: int | None = None) -> None:
    """The ranges of all calls, or of one step, beneath each other, as Perfetto shows them.

    Args:
        profile: to be drawn.
        path: a ``.png`` or ``.svg`` file.
        step: index of the step to look into.

    Raises:
        ValueError: there is no such step, or nothing ran.
    """
    spans, paths = profile.analysis.spans, profile.analysis.paths
    chosen = [i for i, span in enumerate(spans) if step is None or span.step == step]
    if not chosen:
        what = "nothing ran in the block" if not spans else f"there are {profile.steps} steps"
        raise ValueError(f"step is {step}; {what}")
    begin = min(spans[i].begin for i in chosen)
    end = max(spans[i].end for i in chosen)
    depths = _depths(spans)
    ops = [
        (op.begin, op.end, op.name, depths[op.span] + 1)
        for op in profile.analysis.recorded.ops
        if op.parent < 0 and op.span >= 0 and begin <= op.begin < end
    ]
    bars = [
        (spans[i].begin, spans[i].end, paths[i].rsplit("/", 1)[-1] or spans[i].name, depths[i])
        for i in chosen
    ]
    lowest = min(depth for *_, depth in bars)
    rows = max((depth for *_, depth in (*bars, *ops)), default=0) - lowest + 1
    figure = _figure(12, 0.7 + 0.42 * rows)
    axis = figure.add_subplot()
    palette = _palette()
    for first, last, name, depth in (*bars, *ops):
        share = (last - first) / (end - begin)
        if share < NARROWEST:
            continue
        left, width = (first - begin) / 1e6, (last - first) / 1e6
        row = depth - lowest
        axis.barh(
            row, width, left=left, height=0.92, linewidth=0.3, edgecolor="white",
            color=palette[hash_of(name) % len(palette)],
        )  # fmt: skip
        room = int(share * 190)
        if room > 3:
            text = name if len(name) <= room else f"{name[: room - 1]}…"
            axis.text(left + width / 2, row, text, ha="center", va="center", fontsize=6.5)
    axis.set_ylim(rows - 0.4, -0.6)
    axis.set_yticks([])
    axis.set_xlim(0, (end - begin) / 1e6)
    axis.set_xlabel("ms")
    what = "all calls" if step is None else f"step {step}"
    axis.set_title(f"{profile.title}, {what}", fontsize=9, loc="left")
    _write(figure, path)


def hash_of(name: str) -> int:
    """The same number for a name in every process."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(name.rstrip("0123456789")))


def _palette() -> list[Any]:
    import matplotlib

    colours: Any = matplotlib.colormaps["Pastel1"]
    return list(colours.colors[:8])


def _depths(spans: Sequence[Span]) -> list[int]:
    depths: list[int] = []
    for span in spans:
        depths.append(0 if span.parent < 0 else depths[span.parent] + 1)
    return depths


def draw_memory(profile: Profile, path: Path | IO[bytes]) -> None:
    """Live tensors over time; and, with an arena, what lies where in it during one call of a model.

    Args:
        profile: to be drawn.
        path: a ``.png`` or ``.svg`` file.
    """
    blocks = _blocks(profile)
    figure = _figure(10, 6.4 if blocks else 3.4)
    axes = figure.subplots(2 if blocks else 1, 1, squeeze=False)[:, 0]
    origin = profile.analysis.spans[0].begin if profile.analysis.spans else 0
    memory = profile.analysis.recorded.memory
    axis = axes[0]
    for index, label, colour in ((1, "tensors, CPU", "tab:blue"), (2, "tensors, GPU", "tab:green")):
        if any(point[index] for point in memory):
            times = [(point[0] - origin) / 1e9 for point in memory]
            sizes = [point[index] / MIB for point in memory]
            axis.plot(
                times, sizes, drawstyle="steps-post", linewidth=0.8, label=label, color=colour
            )
            axis.fill_between(times, sizes, step="post", alpha=0.2, color=colour)
    if profile.arena:
        times = [(moment - origin) / 1e9 for moment, _, _ in profile.arena]
        live = [size / MIB for _, size, _ in profile.arena]
        axis.plot(times, live, linewidth=0.8, label="alive in the arena", color="tab:orange")
    for span in profile.analysis.spans:
        if span.kind == STEP:
            axis.axvline((span.begin - origin) / 1e9, color="black", linewidth=0.3, alpha=0.4)
    axis.set_ylabel("MiB")
    axis.set_xlabel("s; lines: steps begin")
    axis.set_ylim(bottom=0)
    axis.set_title("tensors made in the block", fontsize=9, loc="left")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="upper right")
    if blocks:
        _layout(axes[1], blocks, origin)
    _write(figure, path)


def _blocks(profile: Profile) -> list[list[int]]:
    """What the arena gave during one call of a model: the call with the most of it."""
    calls = [
        [block for block in profile.blocks if span.begin <= block[2] < span.end]
        for span in profile.analysis.spans
        if span.kind == COMPONENT
    ]
    return max(calls, key=len, default=[])


def _layout(axis: Axes, blocks: list[list[int]], origin: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    last = max(max(block[2:]) for block in blocks)
    patches = [
        Rectangle(((born - origin) / 1e9, offset / MIB), ((died or last) - born) / 1e9, size / MIB)
        for offset, size, born, died in blocks
    ]
    axis.add_collection(
        PatchCollection(
            patches, facecolor="tab:orange", edgecolor="black", linewidth=0.3, alpha=0.6
        )
    )
    axis.set_xlim((blocks[0][2] - origin) / 1e9, (last - origin) / 1e9)
    axis.set_ylim(0, 1.05 * max(offset + size for offset, size, _, _ in blocks) / MIB)
    axis.set_xlabel("s")
    axis.set_ylabel("offset in the slab, MiB")
    axis.set_title("the arena's layout during one call of a model", fontsize=9, loc="left")


def draw_steps(profile: Profile, path: Path | IO[bytes]) -> None:
    """Time of every stage, in every step and in the other parts of the call.

    Args:
        profile: to be drawn.
        path: a ``.png`` or ``.svg`` file.
    """
    columns, parts = _stacks(profile)
    totals = {name: sum(values.values()) for name, values in parts.items()}
    shown = sorted(totals, key=lambda name: -totals[name])[:LABELLED]
    figure = _figure(10, 3.8)
    axis = figure.add_subplot()
    bottom = [0.0] * len(columns)
    for index, name in enumerate((*shown, "the rest")):
        if name == "the rest":
            heights = [
                sum(values.get(c, 0.0) for n, values in parts.items() if n not in shown)
                for c in range(len(columns))
            ]
        else:
            heights = [parts[name].get(c, 0.0) for c in range(len(columns))]
        colour = f"C{index}" if index < 10 else ("black", "silver", "gold")[index % 3]
        axis.bar(range(len(columns)), heights, bottom=bottom, label=name, color=colour, width=0.85)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("ms")
    axis.set_title("time per step, by stage", fontsize=9, loc="left")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _write(figure, path)


def _stacks(profile: Profile) -> tuple[list[str], dict[str, dict[int, float]]]:
    """Steps and parts of the calls; and the milliseconds of each stage in each."""
    spans, paths = profile.analysis.spans, profile.analysis.paths
    columns: list[str] = []
    column_of: dict[int, int] = {}
    parts: dict[str, dict[int, float]] = {}
    least = 0.002 * profile.seconds * 1e9
    for index, span in enumerate(spans):
        if span.parent < 0 or spans[span.parent].kind == CALL:
            if span.kind != CALL and span.end - span.begin >= least:
                column_of[index] = len(columns)
                columns.append(span.name)
        elif span.parent in column_of:
            column_of[index] = column_of[span.parent]
        column = column_of.get(index)
        if column is None:
            continue
        if span.kind == STAGE or (span.kind in (COMPONENT, PART) and not _has_stages(spans, index)):
            values = parts.setdefault(paths[index].rsplit("/", 1)[-1], {})
            values[column] = values.get(column, 0.0) + (span.end - span.begin) / 1e6
    return columns, parts


def _has_stages(spans: Sequence[Span], index: int) -> bool:
    """Whether stages or models are among what is inside a range."""
    for following in range(index + 1, len(spans)):
        if spans[following].begin >= spans[index].end:
            return False
        if spans[following].kind in (STAGE, COMPONENT):
            return True
    return False


def draw_roofline(profile: Profile, path: Path | IO[bytes]) -> None:
    """FLOP/s over FLOPs per byte of every group, under the rates of this machine.

    Args:
        profile: to be drawn.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        ValueError: the rates were not measured, or no operators were recorded.
    """
    ceilings = profile.ceilings
    rows = [row for row in profile.rows(GROUP) if row.flops > 0 and row.bytes > 0]
    if ceilings is None or not rows:
        raise ValueError(
            "the roofline needs the rates of the machine and operators; allowed: a profile with "
            "ceilings=True and ops_every > 0 of a model that computes products"
        )
    figure = _figure(9, 4.8)
    axis = figure.add_subplot()
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    intensities = [row.flops / row.bytes for row in rows]
    left, right = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    axis.plot(
        [left, ridge, right],
        [left * ceilings.bytes_per_second / 1e9, *[ceilings.flops_per_second / 1e9] * 2],
        color="black", linewidth=1.2,
    )  # fmt: skip
    axis.text(right, ceilings.flops_per_second / 1e9, f"{ceilings.rows}^3 product ", ha="right",
              va="bottom", fontsize=7)  # fmt: skip
    axis.text(left, left * ceilings.bytes_per_second / 1e9, "  copy", ha="left", va="bottom",
              fontsize=7)  # fmt: skip
    longest = max(row.seconds for row in rows)
    for kind in (PRODUCTS, MEMORY, OVERHEAD):
        chosen = [row for row in rows if _limit(profile, row) == kind]
        if not chosen:
            continue
        axis.scatter(
            [row.flops / row.bytes for row in chosen],
            [row.flops / (row.device_seconds or row.seconds) / 1e9 for row in chosen],
            s=[10 + 250 * row.seconds / longest for row in chosen],
            color=_COLOURS[kind], alpha=0.6, label=f"limited by {kind}",
        )  # fmt: skip
    labelled: list[tuple[float, float]] = []
    for row in rows[:LABELLED]:
        x, y = row.flops / row.bytes, row.flops / (row.device_seconds or row.seconds) / 1e9
        near = any(abs(math.log(x / a)) < 0.7 and abs(math.log(y / b)) < 0.12 for a, b in labelled)
        if near:
            continue
        labelled.append((x, y))
        axis.annotate(row.name.rsplit("/", 1)[-1], (x, y), fontsize=6.5, xytext=(5, 3),
                      textcoords="offset points")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs per byte that operators read and write")
    axis.set_ylabel("GFLOP/s")
    axis.set_title("groups under the roofline; size: time", fontsize=9, loc="left")
    axis.legend(fontsize=7, loc="lower right")
    _write(figure, path)


def _limit(profile: Profile, row: Row) -> str:
    found = row.limit(profile.ceilings)
    return "" if found is None else found[0]


def _write(figure: Figure, path: Path | IO[bytes]) -> None:
    if isinstance(path, Path):
        write_figure(figure, path, dpi=110)
    else:
        figure.savefig(path, dpi=110, format="png")
