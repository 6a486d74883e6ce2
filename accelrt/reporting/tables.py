"""The demo's table, once for the terminal and the HTML page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from accelrt.memory.sizes import bytes_text
from accelrt.profiling.sampler import Use
from accelrt.quality import Comparison

COLUMNS = ("model", "run", "seconds", "ratio", "peak memory", "rel. L2", "PSNR")


@dataclass(frozen=True)
class Exhibit:
    """One model of a demo.

    Args:
        title: what it is, e.g. ``"AnimateDiff"``.
        detail: how it is called, e.g. ``"4 videos of 16 frames"``.
        comparison: what was measured.
        picture: the written GIF or PNG.
    """

    title: str
    detail: str
    comparison: Comparison
    picture: Path


def table_rows(exhibit: Exhibit) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The two rows, stock and accelrt, under :data:`COLUMNS`."""
    result = exhibit.comparison
    stock, ours = result.stock, result.accelrt
    return (
        (
            exhibit.title,
            "stock",
            seconds_text(stock.median_seconds),
            "1.00x",
            bytes_text(stock.peak_bytes),
            "",
            "",
        ),
        (
            exhibit.detail,
            "accelrt",
            seconds_text(ours.median_seconds),
            f"{result.speedup:.2f}x",
            f"{bytes_text(ours.peak_bytes)} ({share_text(ours.peak_bytes, stock.peak_bytes)})",
            error_text(result.latent_error),
            decibel_text(result.psnr_db),
        ),
    )


def restored_text(result: Comparison) -> str:
    """What the runs after an unwrap showed."""
    runs = result.restored_runs
    if result.restored:
        many = f"All {runs} stock runs" if runs > 1 else "The stock run"
        were = "were" if runs > 1 else "was"
        return f"{many} after an unwrap {were} bit-equal to the first stock run."
    return "NOT RESTORED: a stock run after an unwrap differs from the first stock run."


def groups_text(result: Comparison) -> str:
    """How many operator groups are fused, sliced and untouched."""
    return ", ".join(f"{count} {kind}" for kind, count in result.groups.counts().items())


def gpu_text(result: Comparison) -> str:
    """What the GPU took on both sides, by its driver; empty where none was asked."""
    if result.gpu_note:
        return "" if result.device == "cpu" else f"By the driver of the GPU: {result.gpu_note}."
    sides = (("stock", result.stock), ("accelrt", result.accelrt))
    return "; ".join(f"{name} {use_text(side.gpu, 'image')}" for name, side in sides) + "."


def use_text(use: Use, each: str) -> str:
    """Energy, power, clock and memory of a GPU.

    Args:
        use: by the driver.
        each: what ``use.joules`` are of.
    """
    told = (
        (f"J per {each}", use.joules, ".3g"), ("W", use.watts, ".0f"),
        ("MHz", use.megahertz, ".0f"),
    )  # fmt: skip
    facts = [f"{value:{how}} {unit}" for unit, value, how in told if value is not None]
    if use.used_bytes is not None:
        facts.append(f"{bytes_text(use.used_bytes)} in use")
    return ", ".join(facts) or "not told"


def seconds_text(seconds: float) -> str:
    """Three significant digits."""
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def share_text(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def error_text(error: float | None) -> str:
    """A relative error."""
    if error is None:
        return "-"
    return "0" if error == 0 else f"{error:.1e}"


def decibel_text(decibels: float) -> str:
    """A PSNR; infinite for identical pictures."""
    return "identical" if math.isinf(decibels) else f"{decibels:.1f} dB"
