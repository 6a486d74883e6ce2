"""Pictures of the cut along time: the similarity map, and what speed costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelrt.files import write_figure

if TYPE_CHECKING:
    from accelrt.quality.search import SearchResult
    from accelrt.steps.calibrate import Calibration


def draw_similarity(calibration: Calibration, path: Path, keys: Sequence[int] = ()) -> None:
    """Write the similarity map, with key steps as points on its diagonal.

    Args:
        calibration: whose map it is.
        path: a ``.png`` or ``.svg`` file.
        keys: steps to mark.

    Raises:
        ImportError: matplotlib is missing.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(calibration.similarity, cmap="viridis", vmax=1.0, interpolation="nearest")
    figure.colorbar(image, ax=axis, label="cosine similarity of features")
    for key in keys:
        for line in (axis.axvline, axis.axhline):
            line(key, color="white", linewidth=0.4, alpha=0.6)
    if keys:
        axis.plot(
            keys, keys, "o", color="white", markeredgecolor="black", markersize=5,
            label=f"{len(keys)} computed of {calibration.steps} steps",
        )  # fmt: skip
        axis.legend(loc="lower left", fontsize=8)
    axis.set_xlabel("step")
    axis.set_ylabel("step")
    place = calibration.boundary.last
    axis.set_title(
        f"{calibration.origin.model}, features after {place}, {calibration.samples} samples",
        fontsize=9,
        loc="left",
    )
    write_figure(figure, path, dpi=120)


def draw_front(result: SearchResult, path: Path) -> None:
    """Write the measured points, speed against PSNR, and their front.

    Args:
        result: of a search.
        path: a ``.png`` or ``.svg`` file.

    Raises:
        ImportError: matplotlib is missing.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axis = figure.add_subplot()
    for boundary in dict.fromkeys(point.boundary for point in result.points):
        chosen = [point for point in result.points if point.boundary == boundary]
        axis.plot(
            [point.speedup for point in chosen],
            [point.psnr_db for point in chosen],
            "x" if chosen[0].rehash is None else "o",
            markersize=5,
            label=boundary,
        )
    front = result.front
    axis.plot(
        [point.speedup for point in front],
        [point.psnr_db for point in front],
        color="black",
        linewidth=0.8,
        label="front",
    )
    for point in front:
        axis.annotate(
            point.label, (point.speedup, point.psnr_db), fontsize=6, xytext=(3, 3),
            textcoords="offset points",
        )  # fmt: skip
    if result.psnr_db is not None:
        axis.axhline(result.psnr_db, color="tab:red", linewidth=0.8, linestyle=":")
    if result.speedup is not None:
        axis.axvline(result.speedup, color="tab:red", linewidth=0.8, linestyle=":")
    axis.margins(x=0.12)  # room for the labels
    axis.set_xlabel("seconds of every step computed / seconds")
    axis.set_ylabel("PSNR, dB")
    axis.set_title(f"{result.pipeline}, {result.steps} steps", fontsize=9, loc="left")
    axis.legend(fontsize=7)
    write_figure(figure, path, dpi=120)
