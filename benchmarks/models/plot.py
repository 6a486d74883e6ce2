"""The roofline of a model as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Operators with less of the time have no mark; groups have, but smaller ones.
LEAST_SHARE = 0.005
LARGEST = 900.0  # area of the mark of all of the time, in square points
SMALLEST = 12.0
MARKERS = "osD^"  # the next when the ten colours are used up


def plot(path: Path, model: Mapping[str, Any]) -> None:
    """Groups on the left, operators on the right, under the same roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    found = model["roofline"]
    for axis, points, what in (
        (left, found["groups"], "operator groups"),
        (right, found["operators"], "operators"),
    ):
        _panel(axis, points, found)
        axis.set_title(f"{model['title']}, {model['detail']}: {what}", fontsize=10, loc="left")
    left.set_ylabel("GFLOP/s")
    figure.savefig(path)


def _panel(axis: Any, points: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    bandwidth, peak = found["copy_bytes_per_second"], found["product_flops_per_second"]
    whole = sum(p["seconds"] for p in points)
    shown = [p for p in points if p["flops"] and p["bytes"] and p["seconds"] > LEAST_SHARE * whole]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for point in sorted(shown, key=lambda p: -p["seconds"]):
        kinds.setdefault(point["kind"], []).append(point)
    axis.plot(
        *roof([p["flops"] / p["bytes"] for p in shown], bandwidth, peak),
        color="black",
        linewidth=1,
        label=f"copy {bandwidth / 1e9:.3g} GB/s, product {peak / 1e12:.3g} TFLOP/s",
    )
    for i, (kind, members) in enumerate(kinds.items()):
        share = sum(p["seconds"] for p in members) / whole
        axis.scatter(
            [p["flops"] / p["bytes"] for p in members],
            [p["flops"] / p["seconds"] / 1e9 for p in members],
            s=[max(SMALLEST, LARGEST * p["seconds"] / whole) for p in members],
            color=f"C{i % 10}",
            marker=MARKERS[i // 10 % len(MARKERS)],
            alpha=0.6,
            linewidths=0.5,
            edgecolors="black",
            label=f"{kind}: {100 * share:.0f} %",
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte that must be moved")
    axis.grid(which="major", linewidth=0.3)
    legend = axis.legend(fontsize=7, loc="lower right", title="share of the time", title_fontsize=7)
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([30.0])


def roof(
    intensities: Sequence[float], bandwidth: float, peak: float
) -> tuple[list[float], list[float]]:
    """The roof over points of these FLOPs per byte: where it begins, its corner, its end.

    Args:
        intensities: of the points; may be empty.
        bandwidth: bytes/s.
        peak: FLOP/s.

    Returns:
        FLOPs per byte, rising, and GFLOP/s.
    """
    corner = peak / bandwidth
    low, high = min(*intensities, corner, corner) / 3, max(*intensities, corner, corner) * 3
    return [low, corner, high], [low * bandwidth / 1e9, peak / 1e9, peak / 1e9]
