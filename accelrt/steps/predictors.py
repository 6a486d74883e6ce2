"""What to use instead of computed features: weights over those of past steps.

All predictors are linear, ``sum_i w_i f_i``, so that one kernel serves them
(:func:`accelrt.ops.weighted_sum`); they differ in the weights alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Predictor(ABC):
    """Weights over the features of the steps that were computed last."""

    @property
    @abstractmethod
    def points(self) -> int:
        """Features that are kept: the cache has room for so many."""

    @abstractmethod
    def weights(self, past: Sequence[float], now: float, step: int) -> Weights:
        """Weights of past features, in the order of ``past``.

        Args:
            past: times of 1 to ``points`` computed steps, the latest last, all different.
            now: time of the step that is predicted.
            step: its index.
        """

    def fewer(self, points: int) -> Predictor:
        """The same with a smaller cache, for a cap on memory.

        Raises:
            ValueError: it cannot do with ``points``.
        """
        if points >= self.points:
            return self
        raise ValueError(f"{type(self).__name__} needs {self.points} features; room for {points}")


def _order(owner: object, order: int, most: int) -> None:
    if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order <= most:
        raise ValueError(
            f"{type(owner).__name__}: order is {order!r}; allowed: an integer from 1 to {most}"
        )


def _divided_differences(past: Sequence[float]) -> list[list[float]]:
    """Row ``n``: weights of ``f[t_0, .., t_n]``, from the latest time backwards."""
    times = list(past)[::-1]
    rows = []
    for n in range(len(times)):
        row = [0.0] * len(times)
        for j in range(n + 1):
            row[j] = 1.0 / math.prod(times[j] - times[k] for k in range(n + 1) if k != j)
        rows.append(row)
    return rows


def _combine(rows: Sequence[Sequence[float]], factors: Sequence[float]) -> Weights:
    """The sum of rows, each by its factor, with the latest last."""
    width = len(rows[0])
    total = [sum(f * row[j] for f, row in zip(factors, rows, strict=True)) for j in range(width)]
    return tuple(total[::-1])


@dataclass(frozen=True)
class Reuse(Predictor):
    """The features of the last computed step (DeepCache, FORA, Step Rehash)."""

    @property
    def points(self) -> int:
        """One."""
        return 1

    def weights(self, past: Sequence[float], now: float, step: int) -> Weights:
        """All on the latest."""
        return (*[0.0] * (len(past) - 1), 1.0)


@dataclass(frozen=True)
class Taylor(Predictor):
    """A Taylor series, its derivatives from divided differences (TaylorSeer, arXiv 2503.06923).

    Args:
        order: of the series, 1 to 4; less while fewer steps are computed.
    """

    order: int = 1

    def __post_init__(self) -> None:
        _order(self, self.order, 4)

    @property
    def points(self) -> int:
        """One more than the order."""
        return self.order + 1

    def weights(self, past: Sequence[float], now: float, step: int) -> Weights:
        """``sum_n f[t_0, .., t_n] (t - t_0)^n``."""
        x = now - past[-1]
        return _combine(_divided_differences(past), [x**n for n in range(len(past))])

    def fewer(self, points: int) -> Predictor:
        """A lower order, down to reuse."""
        if points < 1:
            return super().fewer(points)
        return self if points >= self.points else (Taylor(points - 1) if points > 1 else Reuse())


@dataclass(frozen=True)
class Hermite(Predictor):
    """The same with Hermite polynomials, which grow more slowly (HiCache, arXiv 2508.16984).

    ``H_n(s x) s^n`` takes the place of ``x^n``, where ``x`` is in units of the last interval.

    Args:
        order: 1 to 4.
        scale: ``s``, above 0 and at most 1; ``sqrt(1/2)`` leaves the first order as it is.
    """

    order: int = 2
    scale: float = 0.7

    def __post_init__(self) -> None:
        _order(self, self.order, 4)
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale <= 1:
            raise ValueError(f"Hermite: scale is {self.scale!r}; allowed: above 0, at most 1")

    @property
    def points(self) -> int:
        """One more than the order."""
        return self.order + 1

    def weights(self, past: Sequence[float], now: float, step: int) -> Weights:
        """``sum_n f[t_0, .., t_n] u^n s^n H_n(s (t - t_0) / u)``."""
        if len(past) == 1:
            return (1.0,)
        unit = past[-1] - past[-2]
        x = self.scale * (now - past[-1]) / unit
        values = [1.0, 2.0 * x]
        for n in range(1, len(past) - 1):
            values.append(2.0 * x * values[n] - 2.0 * n * values[n - 1])
        factors = [values[n] * (self.scale * unit) ** n for n in range(len(past))]
        return _combine(_divided_differences(past), factors)

    def fewer(self, points: int) -> Predictor:
        """A lower order, down to reuse."""
        if points < 1:
            return super().fewer(points)
        if points >= self.points:
            return self
        return Hermite(points - 1, self.scale) if points > 1 else Reuse()


@dataclass(frozen=True)
class AdamsBashforth(Predictor):
    """Integrates the change of the features by the two-step Adams-Bashforth rule.

    The slopes are those between computed steps; the step widths may differ. This is the
    multistep view of feature caching (FoCa, arXiv 2508.16211).

    Args:
        order: 1 (Euler) or 2.
    """

    order: int = 2

    def __post_init__(self) -> None:
        _order(self, self.order, 2)

    @property
    def points(self) -> int:
        """One more than the order."""
        return self.order + 1

    def weights(self, past: Sequence[float], now: float, step: int) -> Weights:
        """``f + h ((1 + r / 2) f'_0 - (r / 2) f'_1)`` with ``r = h / h_0``."""
        if len(past) == 1:
            return (1.0,)
        h, h0 = now - past[-1], past[-1] - past[-2]
        first = h / h0
        if len(past) == 2:
            return (-first, 1.0 + first)
        h1 = past[-2] - past[-3]
        r = h / h0
        new, old = h * (1.0 + r / 2.0) / h0, -h * (r / 2.0) / h1
        return (*[0.0] * (len(past) - 3), -old, old - new, 1.0 + new)

    def fewer(self, points: int) -> Predictor:
        """A lower order, down to reuse."""
        if points < 1:
            return super().fewer(points)
        if points >= self.points:
            return self
        return AdamsBashforth(points - 1) if points > 1 else Reuse()


@dataclass(frozen=True)
class LearnedLinear(Predictor):
    """Weights that were fitted for each step to the features of a few runs (L2P).

    They hold for one schedule: which steps are computed decides what they stand on. Made by
    :func:`accelrt.calibrate`.

    Args:
        table: of each predicted step the weights over the features of the steps computed
            before it, the latest last.

    Raises:
        ValueError: for an empty table, or a step without weights.
    """

    table: Mapping[int, Weights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = {int(step): tuple(map(float, row)) for step, row in self.table.items()}
        object.__setattr__(self, "table", table)
        if not table or not all(table.values()):
            raise ValueError("LearnedLinear: table is empty or has a step without weights")
        if not all(math.isfinite(w) for row in table.values() for w in row):
            raise ValueError("LearnedLinear: table has a weight that is not finite")

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.table.items())))

    @property
    def points(self) -> int:
        """Of the longest row."""
        return max(map(len, self.table.values()))

    def weights(self, past: Sequence[float], now: float, step: int) -> Weights:
        """The row of the step; reuse of the latest for a step that has none."""
        row = self.table.get(step)
        if row is None or len(row) > len(past):
            return (*[0.0] * (len(past) - 1), 1.0)
        return (*[0.0] * (len(past) - len(row)), *row)
