"""A plan as text and as a picture."""

from __future__ import annotations

from pathlib import Path

from accelrt.files import write_figure
from accelrt.memory.sizes import bytes_text

from .plan import ComponentPlan, GroupPlan, Plan


def summary_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row per model, under :data:`COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for part in plan.components:
        stock = plan.stock.get(part.path)
        rows.append(
            (
                part.path or "model",
                "" if stock is None else bytes_text(max(size for _, size in stock)),
                bytes_text(part.peak_bytes),
                bytes_text(part.reserved_bytes),
                f"{100 * part.fragmentation:.1f} %",
                "all" if part.samples_per_pass is None else str(part.samples_per_pass),
                "yes" if part.recompute_skips else "no",
                _tightened(part),
                f"{part.seconds / part.fastest_seconds:.2f}x" if part.fastest_seconds else "",
                part.binding,
            )
        )
    return rows


COLUMNS = (
    "model", "stock", "live", "reserved", "gaps", "samples a pass", "recompute", "groups cut finer",
    "time", "at the peak",
)  # fmt: skip


def _tightened(part: ComponentPlan) -> str:
    changed = sum(group.slice_mib is not None for group in part.groups)
    return f"{changed} of {len(part.groups)}"


def plan_text(plan: Plan) -> str:
    """The plan as an aligned table."""
    rows = [COLUMNS, *summary_rows(plan)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), total_text(plan)])


def total_text(plan: Plan) -> str:
    """The peak of the call, what it is made of, and what binds."""
    total = f"peak {bytes_text(plan.peak_bytes)}"
    if plan.budget_bytes is not None:
        total += f" of {bytes_text(plan.budget_bytes)}"
    beside = "weights apart"
    part = plan.largest
    if part.resident_bytes or part.reserve_bytes:
        weights, workspace = map(bytes_text, (part.resident_bytes, part.reserve_bytes))
        beside = f"weights {weights}, workspace {workspace}"
    pools = [p for p in plan.components if p.graphs_bytes]
    for pool in pools:
        beside += f", CUDA graphs of {pool.path or 'the model'} {bytes_text(pool.graphs_bytes)}"
    if plan.unplanned:
        beside += f", without {', '.join(plan.unplanned)}"
    return f"{total}: {beside}; {plan.binding} binds"


def group_rows(part: ComponentPlan) -> list[tuple[str, ...]]:
    """One row per group of a model: name, scratch, how, live at entry and at its worst."""
    return [
        (
            group.name,
            "fastest" if group.slice_mib is None else f"{group.slice_mib:g} MiB",
            _how(group),
            bytes_text(group.entry_bytes),
            bytes_text(group.peak_bytes),
            f"{1e3 * group.seconds:.3g} ms",
        )
        for group in part.groups
    ]


GROUP_COLUMNS = ("group", "slices", "how", "at entry", "peak", "estimate")


def _how(group: GroupPlan) -> str:
    parts = [name for name in ("bands", "recompute") if getattr(group, name)]
    return ", ".join(parts)


# A limit is drawn up to so many times the highest curve.
ROOM = 1.5


def draw(plan: Plan, path: Path) -> None:
    """Write a picture of memory over time: stock against planned, one panel per model.

    Args:
        plan: the plan.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        OSError: if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(plan.components)
    figure, axes = plt.subplots(count, 1, figsize=(9, 2.6 * count), squeeze=False)
    for axis, part in zip(axes[:, 0], plan.components, strict=True):
        stock = plan.stock.get(part.path, ())
        if stock:
            _line(axis, [size for _, size in stock], "stock", "tab:red")
        _line(axis, [size for _, size in part.timeline], "accelrt", "tab:blue")
        most = max((size for _, size in (*stock, *part.timeline)), default=0)
        title = part.path or "model"
        if part.limit_bytes <= ROOM * most:
            axis.axhline(
                part.limit_bytes / 2**20, color="black", linewidth=0.8, linestyle=":",
                label="budget",
            )  # fmt: skip
        else:  # drawn, it would press the curves to the ground
            title += f"; the budget leaves {bytes_text(part.limit_bytes)}"
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("live MiB")
        axis.set_ylim(bottom=0)
        axis.set_xticks([])
        axis.legend(loc="upper right", fontsize=8, frameon=False)
    axes[-1, 0].set_xlabel("one forward, from first to last operator")
    figure.tight_layout()
    write_figure(figure, path, dpi=120)
    plt.close(figure)


def _line(axis: object, sizes: list[int], label: str, colour: str) -> None:
    steps = max(1, len(sizes) - 1)
    x = [i / steps for i in range(len(sizes))]
    y = [size / 2**20 for size in sizes]
    axis.fill_between(x, y, step="post", alpha=0.2, color=colour)  # type: ignore[attr-defined]
    axis.plot(x, y, drawstyle="steps-post", label=label, color=colour)  # type: ignore[attr-defined]
