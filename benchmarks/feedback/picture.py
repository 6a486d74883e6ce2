"""PSNR against time, with labels that do not lie on each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lines import Line

KINDS = {
    "stock": ("diffusers", "0.55", "s"),
    "exact": ("accelrt, plain steps", "black", "o"),
    "without": ("ILF's steps, no feedback", "tab:green", "o"),
    "ilf": ("ILF", "tab:red", "*"),
    "rehash": ("step rehash", "tab:blue", "o"),
    "caching": ("caching of blocks", "tab:purple", "o"),
    "rival": ("caches of others", "tab:orange", "o"),
}
FONT, MARK, GAP = 7.5, 6, 1.5
ROUNDING_DB = 0.01
# Distances of a label from its point that are tried, in points of the page.
REACH = (8, 14, 24, 38, 56, 80)
DIRECTIONS = 12


def front(lines: Sequence[Line]) -> list[Line]:
    """Those that no other beats in both time and PSNR, fastest first.

    A PSNR higher by ``ROUNDING_DB`` or less is none: exact rows differ by rounding.
    """
    found: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.seconds, -line.psnr_db)):
        if not found or line.psnr_db > found[-1].psnr_db + ROUNDING_DB:
            found.append(line)
    return found


def plot(path: Path, title: str, lines: Sequence[Line]) -> None:
    """Draw the lines; those on the front, and feedback, have labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    for kind, (label, colour, marker) in KINDS.items():
        chosen = sorted((x for x in lines if x.kind == kind), key=lambda line: line.seconds)
        if chosen:
            axis.plot(
                [line.seconds for line in chosen],
                [line.psnr_db for line in chosen],
                f"{marker}-" if kind == "exact" else marker,
                color=colour,
                markersize=size_of(kind),
                linewidth=0.8,
                label=label,
            )
    axis.set_xlabel("seconds per batch")
    axis.set_ylabel("PSNR to the reference (dB)")
    axis.set_title(title, fontsize=10, loc="left")
    axis.margins(x=0.08, y=0.1)
    axis.legend(fontsize=8, loc="lower right")
    named = {line.name: line for line in (*front(lines), *(x for x in lines if x.kind == "ilf"))}
    points = [(x.seconds, x.psnr_db, size_of(x.kind)) for x in lines]
    points += _along([x for x in lines if x.kind == "exact"])
    place(axis, points, {name: (x.seconds, x.psnr_db) for name, x in named.items()})
    figure.savefig(path)


def size_of(kind: str) -> float:
    """Of a marker."""
    return 2 * MARK if kind == "ilf" else MARK


def _along(lines: Sequence[Line]) -> list[tuple[float, float, float]]:
    """Points on the curve through some rows, near enough to keep labels off it."""
    ordered = sorted(lines, key=lambda line: line.seconds)
    shares = [i / 40 for i in range(1, 40)]
    return [
        (a.seconds + t * (b.seconds - a.seconds), a.psnr_db + t * (b.psnr_db - a.psnr_db), 1.0)
        for a, b in itertools.pairwise(ordered)
        for t in shares
    ]


def place(
    axis: Any, points: Sequence[tuple[float, float, float]], labels: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """Write labels beside their points: on no other label, no point, not on the legend.

    Args:
        axis: with its limits and its legend.
        points: all that are drawn: data coordinates, and size in points of the page.
        labels: the point of each.

    Returns:
        The box of each label on the page; one that fits nowhere is not written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(axis.figure)
    canvas.draw()
    axis.figure.set_layout_engine("none")  # it stays as it is now
    renderer = canvas.get_renderer()
    pixel = axis.figure.dpi / 72
    taken = []
    for a, b, size in points:
        x, y = axis.transData.transform((a, b))
        side = size * pixel
        taken.append(Bbox.from_bounds(x - side / 2, y - side / 2, side, side))
    if axis.get_legend() is not None:
        taken.append(axis.get_legend().get_window_extent(renderer))
    whole = axis.get_window_extent(renderer)
    found: dict[str, Any] = {}
    for name, point in labels.items():
        for reach, turn in ((r, t) for r in REACH for t in range(DIRECTIONS)):
            angle = math.pi / 4 + 2 * math.pi * turn / DIRECTIONS
            x, y = math.cos(angle), math.sin(angle)
            text = axis.annotate(
                name,
                point,
                xytext=(reach * x, reach * y),
                textcoords="offset points",
                fontsize=FONT,
                ha="left" if x > 0.3 else "right" if x < -0.3 else "center",
                va="bottom" if y > 0.3 else "top" if y < -0.3 else "center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4} if reach > REACH[1] else None,
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(GAP * pixel)  # no leader line
            inside = whole.x0 < box.x0 and box.x1 < whole.x1 and whole.y0 < box.y0
            if inside and box.y1 < whole.y1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                found[name] = box
                break
            text.remove()
    return found
