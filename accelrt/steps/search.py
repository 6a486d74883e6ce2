"""Which steps to compute: estimated from the inner products of features alone.

All predictors are linear, so the squared error of a prediction is ``v^T G v``, where ``G`` holds
the inner products of the features of all steps, and ``v`` is one at the predicted step, less
the weights at the steps it is made of. Between two computed steps errors point the same way:
there the ``v`` are added up, each by how much its step matters. No model runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .predictors import LearnedLinear, Predictor, Weights

Matrix = NDArray[np.float64]
State = tuple[int, ...]

#: Errors that an exact search may look at; beyond that keys are improved one by one.
MOST_EXACT = 400_000
#: Features that a fit may stand on: with more, steps hardly differ from their own mixture.
MOST_POINTS = 4


@dataclass(frozen=True)
class Problem:
    """What is known of the features of a request.

    Args:
        gram: their inner products ``[K, K]``, float64.
        times: of the steps, as predictors take them; ``K``.
        importance: how much a relative error of the features matters at each step, ``[K]``,
            above 0; ``None``: alike.

    Raises:
        ValueError: the matrix is not square, not finite, or of another number of steps.
    """

    gram: Matrix
    times: tuple[float, ...]
    importance: Matrix | None = None

    def __post_init__(self) -> None:
        gram = np.asarray(self.gram, dtype=np.float64)
        object.__setattr__(self, "gram", gram)
        if gram.shape != (len(self.times),) * 2 or not len(self.times):
            raise ValueError(f"gram is {gram.shape}, for {len(self.times)} steps")
        if not np.isfinite(gram).all():
            raise ValueError("gram has values that are not finite")
        ones = np.ones(len(gram))
        weigh = ones if self.importance is None else np.asarray(self.importance, np.float64)
        if weigh.shape != ones.shape or not (np.isfinite(weigh).all() and (weigh > 0).all()):
            raise ValueError(f"importance is {weigh}; allowed: {len(gram)} numbers above 0")
        object.__setattr__(self, "importance", weigh)

    @property
    def steps(self) -> int:
        """``K``."""
        return len(self.times)

    def advance(self, state: State, key: int, points: int) -> State:
        """The steps whose features are kept after ``key`` was computed.

        Of steps at one time (some solvers evaluate it twice) the later takes the place of
        the earlier, as in a session.
        """
        for index, old in enumerate(state):
            if self.times[old] == self.times[key]:
                state = state[:index]
                break
        return (*state, key)[-points:]

    def pasts(self, keys: Sequence[int], points: int) -> dict[int, State]:
        """Of each step that is not computed: the steps that its prediction stands on."""
        found: dict[int, State] = {}
        computed = set(keys)
        state: State = ()
        for step in range(self.steps):
            if step in computed:
                state = self.advance(state, step, points)
            else:
                found[step] = state
        return found

    def check_keys(self, keys: Sequence[int]) -> tuple[int, ...]:
        """``keys`` as a tuple.

        Raises:
            ValueError: they do not ascend from 0 to at most the last step.
        """
        listed = tuple(keys)
        if not listed or listed[0] != 0 or listed[-1] >= self.steps:
            raise ValueError(f"keys are {listed}; allowed: ascending from 0, below {self.steps}")
        if any(b <= a for a, b in itertools.pairwise(listed)):
            raise ValueError(f"keys are {listed}; they must ascend")
        return listed


Rule = Callable[[Problem, NDArray[np.int64], NDArray[np.int64]], Matrix]


def rule_of(predictor: Predictor) -> Rule:
    """The weights of a predictor, for many steps at once."""

    def weights(problem: Problem, pasts: NDArray[np.int64], steps: NDArray[np.int64]) -> Matrix:
        times = problem.times
        rows = [
            predictor.weights([times[i] for i in past], times[step], step)
            for past, step in zip(pasts.tolist(), steps.tolist(), strict=True)
        ]
        return np.array(rows, dtype=np.float64).reshape(pasts.shape)

    return weights


def fitted(ridge: float) -> Rule:
    """Weights by least squares, for many steps at once.

    They are sought over the divided differences of the features, each in units of its norm,
    with a penalty on how far they are from a first-order Taylor series: directions in which
    the features hardly differ stay as they were.

    Args:
        ridge: of the penalty, relative; 0 for none.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge!r}; allowed: a number >= 0")

    def weights(problem: Problem, pasts: NDArray[np.int64], steps: NDArray[np.int64]) -> Matrix:
        gram, times = problem.gram, np.array(problem.times)
        count = pasts.shape[1]
        # Row n of a basis: f[t_0, .., t_n] h^n from the latest step backwards.
        latest = pasts[:, ::-1]
        at = times[latest]
        ahead = times[steps] - at[:, 0]
        unit = at[:, 0] - at[:, 1] if count > 1 else np.ones(len(steps))
        basis = np.zeros((len(steps), count, count))
        for n in range(count):
            for j in range(n + 1):
                gaps = [at[:, j] - at[:, k] for k in range(n + 1) if k != j]
                basis[:, n, j] = unit**n / np.prod(gaps, axis=0) if gaps else 1.0
        inner = basis @ gram[latest[:, :, None], latest[:, None, :]] @ basis.transpose(0, 2, 1)
        target = np.einsum("bnj,bj->bn", basis, gram[latest, steps[:, None]])
        norms = np.sqrt(np.maximum(np.einsum("bnn->bn", inner), 1e-300))
        inner /= norms[:, :, None] * norms[:, None, :]
        towards = np.zeros((len(steps), count))
        towards[:, 0] = norms[:, 0]
        if count > 1:
            towards[:, 1] = norms[:, 1] * ahead / unit
        penalty = max(ridge, 1e-12) * np.eye(count)
        right = target / norms + max(ridge, 1e-12) * towards
        found = np.linalg.solve(inner + penalty, right[:, :, None])[:, :, 0] / norms
        # numpy's types do not know what slicing leaves.
        result: Matrix = np.einsum("bn,bnj->bj", found, basis)[:, ::-1]
        return result

    return weights


def deviations(
    problem: Problem, pasts: NDArray[np.int64], steps: NDArray[np.int64], weights: Matrix
) -> Matrix:
    """``(f_i - sum_j w_j f_j) / ||f_i||`` as weights over the features of all steps.

    Args:
        problem: of the request.
        pasts: ``[N, points]``, steps that the predictions are made of.
        steps: ``[N]``, the predicted ones.
        weights: ``[N, points]``.

    Returns:
        ``[N, K]``.
    """
    found = np.zeros((len(steps), problem.steps))
    rows = np.arange(len(steps))
    found[rows, steps] = 1.0
    found[rows[:, None], pasts] -= weights
    found /= np.sqrt(np.maximum(np.diagonal(problem.gram)[steps], 1e-300))[:, None]
    return found


def squares(problem: Problem, vectors: Matrix) -> Matrix:
    """``v^T G v`` of each row of ``[N, K]``."""
    found: Matrix = np.einsum("ij,ij->i", vectors @ problem.gram, vectors)
    return np.maximum(found, 0.0)  # rounding may leave a little less than nothing


def errors(problem: Problem, keys: Sequence[int], rule: Rule, points: int) -> Matrix:
    """Estimated squared relative errors ``[K]``; 0 at the keys.

    Raises:
        ValueError: for wrong ``keys``.
    """
    found = np.zeros(problem.steps)
    for past, steps in _by_length(problem.pasts(problem.check_keys(keys), points)):
        vectors = deviations(problem, past, steps, rule(problem, past, steps))
        found[steps] = squares(problem, vectors)
    return found


def stretches(problem: Problem, keys: Sequence[int], rule: Rule, points: int) -> Matrix:
    """Errors of the outcome that the steps after each key make, as weights over features.

    Returns:
        ``[len(keys), K]``.

    Raises:
        ValueError: for wrong ``keys``.
    """
    keys = problem.check_keys(keys)
    total = np.zeros((len(keys), problem.steps))
    stretch = np.searchsorted(np.array(keys), np.arange(problem.steps), side="right") - 1
    assert problem.importance is not None
    for past, steps in _by_length(problem.pasts(keys, points)):
        vectors = deviations(problem, past, steps, rule(problem, past, steps))
        np.add.at(total, stretch[steps], vectors * problem.importance[steps][:, None])
    return total


def cost(problem: Problem, keys: Sequence[int], rule: Rule, points: int) -> float:
    """What a :class:`KeySearch` makes small: squared errors, of each stretch by itself.

    Raises:
        ValueError: for wrong ``keys``.
    """
    return float(squares(problem, stretches(problem, keys, rule, points)).sum())


def outcome(problem: Problem, keys: Sequence[int], rule: Rule, points: int) -> float:
    """Estimated squared error of the outcome.

    The errors of stretches are independent, or they add up, as those of reuse do, which lags
    behind all along: the worse of the two.

    Raises:
        ValueError: for wrong ``keys``.
    """
    found = stretches(problem, keys, rule, points)
    together = squares(problem, found.sum(axis=0, keepdims=True))
    return max(float(squares(problem, found).sum()), float(together[0]))


def learn(problem: Problem, keys: Sequence[int], points: int, ridge: float) -> LearnedLinear:
    """Fitted weights for the steps between keys.

    Raises:
        ValueError: for a wrong argument, or if all steps are computed.
    """
    check_points(points)
    keys = problem.check_keys(keys)
    rule, table = fitted(ridge), dict[int, Weights]()
    for past, steps in _by_length(problem.pasts(keys, points)):
        rows = rule(problem, past, steps).tolist()
        table.update(zip(steps.tolist(), map(tuple, rows), strict=True))
    if not table:
        raise ValueError(f"all {problem.steps} steps are computed: there is nothing to learn")
    return LearnedLinear(table)


def check_points(points: int) -> None:
    """Refuse a number of features.

    Raises:
        ValueError: naming the allowed range.
    """
    if not isinstance(points, int) or isinstance(points, bool) or not 1 <= points <= MOST_POINTS:
        raise ValueError(f"points is {points!r}; allowed: an integer from 1 to {MOST_POINTS}")


class KeySearch:
    """Key steps with the least :func:`cost`.

    Exact dynamic programming over the steps whose features are kept, for every number of
    keys at once. Where that were too much, keys are moved one by one while that helps.

    Args:
        problem: of the request.
        rule: gives the weights.
        points: features that predictions stand on.
        compute_last: the last step is a key.
        exact: ``None`` decides by the work.
    """

    def __init__(
        self,
        problem: Problem,
        rule: Rule,
        points: int,
        *,
        compute_last: bool = True,
        exact: bool | None = None,
    ) -> None:
        check_points(points)
        self.problem = problem
        self.rule = rule
        self.points = points
        self.compute_last = compute_last
        work = math.comb(problem.steps, points + 1)
        self.exact = work <= MOST_EXACT if exact is None else exact
        self._graph: _Graph | None = None

    def best(self, computed: int) -> tuple[int, ...]:
        """The best ``computed`` key steps.

        Raises:
            ValueError: fewer than 1 or, with ``compute_last``, 2, or more than there are.
        """
        steps = self.problem.steps
        least = 2 if self.compute_last and steps > 1 else 1
        if not isinstance(computed, int) or not least <= computed <= steps:
            raise ValueError(
                f"computed is {computed!r}; allowed: an integer from {least} to {steps}"
            )
        if not self.exact:
            return self._moved(computed)
        if self._graph is None:
            self._graph = _Graph(self)
        return self._graph.best(computed)

    def _moved(self, computed: int) -> tuple[int, ...]:
        """Improve evenly spread keys: nudge each, and take the least missed to better places."""
        steps = self.problem.steps
        last = steps - 1 if self.compute_last else steps - steps // computed
        keys = [round(k) for k in np.linspace(0, last, computed)]
        least, improved = self._cost(keys), True
        while improved:
            improved = False
            for index in range(1, computed - self.compute_last):
                above = keys[index + 1] if index + 1 < computed else steps
                for to in _near(keys[index], keys[index - 1], above):
                    candidate = [*keys[:index], to, *keys[index + 1 :]]
                    found = self._cost(candidate)
                    if found < least * (1 - 1e-9):
                        keys, least, improved = candidate, found, True
            candidate, found = self._relocated(keys)
            if found < least * (1 - 1e-9):
                keys, least, improved = candidate, found, True
        return tuple(keys)

    def _relocated(self, keys: list[int]) -> tuple[list[int], float]:
        """Without the key that is missed least, and with one more in the middle of a stretch."""
        inner = range(1, len(keys) - self.compute_last)
        fewer = [[*keys[:i], *keys[i + 1 :]] for i in inner]
        if not fewer:
            return keys, math.inf
        rest = min(fewer, key=self._cost)
        ends = [*rest, *([] if self.compute_last else [self.problem.steps])]
        middles = [(a + b) // 2 for a, b in itertools.pairwise(ends) if b - a > 1]
        choices = [sorted([*rest, middle]) for middle in middles]
        best = min(choices, key=self._cost, default=keys)
        return best, self._cost(best)

    def _cost(self, keys: list[int]) -> float:
        return cost(self.problem, keys, self.rule, self.points)


class _Graph:
    """States (the steps that are kept) and the errors on the way from one to the next."""

    def __init__(self, search: KeySearch) -> None:
        problem, points = search.problem, search.points
        self.steps = problem.steps
        states: dict[State, int] = {(0,): 0}
        queue: list[State] = [(0,)]
        source: list[int] = []
        target: list[int] = []
        reached: list[int] = []  # the key that leads on; K for the end
        for state in queue:  # grows while it is walked
            number = states[state]
            for key in range(state[-1] + 1, self.steps):
                onward = problem.advance(state, key, points)
                if onward not in states:
                    states[onward] = len(queue)
                    queue.append(onward)
                source.append(number)
                target.append(states[onward])
                reached.append(key)
        self.states = queue
        self.last = np.array([state[-1] for state in queue])
        sums = self._sums(search, queue)
        self.source, self.target = np.array(source, int), np.array(target, int)
        self.weight = sums[self.source, np.array(reached, int)]
        # What comes after the last key, if that is not the last step.
        self.rest = sums[:, self.steps]
        if search.compute_last:
            self.rest = np.where(self.last == self.steps - 1, 0.0, np.inf)
        self.layers = [np.full(len(queue), np.inf)]
        self.layers[0][0] = 0.0

    def _sums(self, search: KeySearch, states: list[State]) -> Matrix:
        """``[states, K + 1]``: errors of the steps after a state's last, before the column."""
        problem, steps = search.problem, self.steps
        assert problem.importance is not None
        sums = np.zeros((len(states), steps + 1))
        by_length: dict[int, list[int]] = {}
        for number, state in enumerate(states):
            if state[-1] + 1 < steps:
                by_length.setdefault(len(state), []).append(number)
        for numbers in by_length.values():
            runs = [np.arange(states[n][-1] + 1, steps) for n in numbers]
            ends = np.cumsum([len(run) for run in runs])
            past = np.array([states[n] for n in numbers]).repeat(np.diff(ends, prepend=0), axis=0)
            columns = np.concatenate(runs)
            weights = search.rule(problem, past, columns)
            for number, run, end in zip(numbers, runs, ends.tolist(), strict=True):
                part = slice(end - len(run), end)
                vectors = deviations(problem, past[part], run, weights[part])
                added = np.cumsum(vectors * problem.importance[run][:, None], axis=0)
                sums[number, run + 1] = squares(problem, added)
        return sums

    def best(self, computed: int) -> tuple[int, ...]:
        while len(self.layers) < computed:
            layer = np.full(len(self.states), np.inf)
            np.minimum.at(layer, self.target, self.layers[-1][self.source] + self.weight)
            self.layers.append(layer)
        state = int(np.argmin(self.layers[computed - 1] + self.rest))
        keys = [int(self.last[state])]
        for layer in self.layers[computed - 2 :: -1] if computed > 1 else ():
            into = np.flatnonzero(self.target == state)
            costs = layer[self.source[into]] + self.weight[into]
            state = int(self.source[into[np.argmin(costs)]])
            keys.append(int(self.last[state]))
        return tuple(keys[::-1])


def _near(key: int, below: int, above: int) -> list[int]:
    """Places between two others, at distances 1, 2, 4, .. of ``key``."""
    leaps = [2**n for n in range((above - below).bit_length())]
    return [to for leap in leaps for to in (key - leap, key + leap) if below < to < above]


def _by_length(
    pasts: dict[int, State],
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Steps that stand on equally many others, with those."""
    found: dict[int, list[int]] = {}
    for step, past in pasts.items():
        found.setdefault(len(past), []).append(step)
    return [
        (np.array([pasts[step] for step in steps]), np.array(steps)) for steps in found.values()
    ]
