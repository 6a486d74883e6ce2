"""Rows of accelrt, as data, and the plain rows that they compete with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Baselines, Row
from tasks import VIDEO

import accelrt
from accelrt.steps import (
    AdamsBashforth,
    Boundary,
    Hermite,
    Interval,
    Rehash,
    Reuse,
    Taylor,
    Threshold,
    Verified,
)

# Parts of all steps that plain rows run.
FRACTIONS = ((1, 1), (3, 4), (1, 2), (1, 3), (1, 4), (1, 5))

# As published: the last layer's features are reused. 13 of 25 steps are computed; the list is
# not known, every other step makes 13.
_EVERY_OTHER = Interval(2, warmup_steps=1, compute_last=True)
_PUBLISHED_ON = {
    model: Rehash(_EVERY_OTHER, Reuse(), "published" if model in VIDEO else "default")
    for model in ("dit", "pixart", "animatediff", "svd")
}

_COMMON: dict[str, Rehash] = {
    "reuse, every 2nd": Rehash(Interval(2), Reuse()),
    "Taylor 1, every 2nd": Rehash(Interval(2), Taylor(1)),
    "Taylor 2, every 2nd": Rehash(Interval(2), Taylor(2)),
    "Taylor 1, every 3rd": Rehash(Interval(3), Taylor(1)),
    "Taylor 2, every 3rd": Rehash(Interval(3), Taylor(2)),
    "Hermite 2, every 3rd": Rehash(Interval(3), Hermite(2)),
    "Adams-Bashforth 2, every 2nd": Rehash(Interval(2), AdamsBashforth(2)),
    "Adams-Bashforth 2, every 3rd": Rehash(Interval(3), AdamsBashforth(2)),
    "Taylor 1 of the output, every 2nd": Rehash(Interval(2), Taylor(1), Boundary("out")),
    "Taylor 2 of the output, every 2nd": Rehash(Interval(2), Taylor(2), Boundary("out")),
    "Taylor 2 of the output, every 3rd": Rehash(Interval(3), Taylor(2), Boundary("out")),
    "Taylor 1 of the output, every 3rd": Rehash(Interval(3), Taylor(1), Boundary("out")),
    "Taylor 2 of the output, every 4th": Rehash(Interval(4), Taylor(2), Boundary("out")),
    "Taylor 1, threshold 0.1": Rehash(Threshold(0.1), Taylor(1)),
    "Taylor 1, threshold 0.3": Rehash(Threshold(0.3), Taylor(1)),
    "Taylor 1, verified 0.05": Rehash(Verified(0.05), Taylor(1)),
    "Taylor 2, verified 0.1": Rehash(Verified(0.1), Taylor(2)),
}


def configurations(model: str) -> dict[str, Rehash]:
    """Named configurations for a model."""
    return {"Step Rehash (published)": _PUBLISHED_ON[model], **_COMMON}


def rows_of(found: dict[str, Rehash], steps: int) -> list[Row]:
    """A row for each configuration."""

    def switch_of(rehash: Rehash) -> Any:
        return lambda pipe: wrapped(pipe, rehash)

    return [Row(name, "ours", steps, switch_of(rehash)) for name, rehash in found.items()]


def from_files(paths: list[Path]) -> dict[str, Rehash]:
    """Calibrated configurations, called by the names of their files.

    Raises:
        ValueError: a file holds something else; the message names it.
        OSError: a file cannot be read.
    """
    return {path.stem: Rehash.load(path) for path in paths}


def plain_rows(steps: int) -> tuple[list[Row], Baselines]:
    """Plain runs of ``steps`` steps and of fewer, stock and exact.

    Raises:
        ValueError: ``steps`` is below 2.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; allowed: at least 2")
    counts = dict.fromkeys(max(1, round(steps * a / b)) for a, b in FRACTIONS)
    # Stock itself is here to be compared with; fewer steps are the exact path's, which is faster.
    stock = [Row(f"stock, {n} steps", "stock", n) for n in dict.fromkeys((steps, -(-steps // 2)))]
    exact = [Row(f"accelrt exact, {n} steps", "exact", n, lambda p: wrapped(p)) for n in counts]
    return [*stock, *exact], Baselines(stock[0].name, exact[0].name)


@contextmanager
def wrapped(pipe: Any, rehash: Rehash | None = None, feedback: Any = None) -> Iterator[None]:
    """The pipeline with accelrt; afterwards it is stock again."""
    accelrt.wrap(pipe, rehash=rehash, feedback=feedback)
    try:
        yield
    finally:
        accelrt.unwrap(pipe)
