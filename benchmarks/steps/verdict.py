"""Is a configuration better than simply running fewer steps in the same time?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from measure import Result


class Measured(Protocol):
    """What a verdict needs of a row; see :class:`measure.Result`."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def speedup(self) -> float: ...
    @property
    def psnr_db(self) -> float: ...
    @property
    def frechet(self) -> float: ...


@dataclass(frozen=True)
class Verdict:
    """A configuration against plain runs of its baseline.

    Args:
        nearest: name of the plain row whose time is nearest, the reference itself left out.
        psnr_db, frechet: of a plain run in the same time, interpolated between rows.
        psnr_gain_db, frechet_gain: how much better the configuration is than that; positive
            is better.
        text: ``"better"``, ``"PSNR only"``, ``"Frechet only"`` or ``"worse"``: where it beats
            both the interpolated run and the nearest row.
    """

    nearest: str
    psnr_db: float
    frechet: float
    psnr_gain_db: float
    frechet_gain: float
    text: str


def judge(row: Measured, plain: Sequence[Measured]) -> Verdict:
    """The verdict on ``row``.

    Times are relative to the baseline's in the same batches, which cancels drift of the
    machine. Errors are interpolated linearly in time: the PSNR as an amplitude,
    ``10^(-PSNR / 20)``, which is 0 where the run is the reference itself. In less time than
    the fastest plain row needs, that row is what to beat; in more than the slowest, the slowest.

    Args:
        row: of a configuration.
        plain: rows of its baseline at several numbers of steps.

    Raises:
        ValueError: there is no plain row.
    """
    if not plain:
        raise ValueError("no plain rows to compare with; at least one is needed")
    most = max(p.steps for p in plain)
    fewer = [p for p in plain if p.steps < most] or list(plain)
    nearest = min(fewer, key=lambda p: abs(1 / p.speedup - 1 / row.speedup))
    curve = sorted(plain, key=lambda p: 1 / p.speedup)
    amplitude = _interpolated(
        1 / row.speedup, [(1 / p.speedup, 10.0 ** (-p.psnr_db / 20.0)) for p in curve]
    )
    psnr = -20.0 * math.log10(amplitude)
    frechet = _interpolated(1 / row.speedup, [(1 / p.speedup, p.frechet) for p in curve])
    by_psnr = row.psnr_db > max(psnr, nearest.psnr_db)
    by_frechet = row.frechet < min(frechet, nearest.frechet)
    text = {
        (True, True): "better",
        (True, False): "PSNR only",
        (False, True): "Frechet only",
        (False, False): "worse",
    }[by_psnr, by_frechet]
    return Verdict(nearest.name, psnr, frechet, row.psnr_db - psnr, frechet - row.frechet, text)


def plain_for(row: Result, results: Sequence[Result]) -> list[Result]:
    """The plain rows that a row competes with: stock ones for rivals, exact ones for ours."""
    kind = {"rival": "stock", "ours": "exact"}.get(row.kind)
    return [result for result in results if result.kind == kind]


def _interpolated(x: float, points: Sequence[tuple[float, float]]) -> float:
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
