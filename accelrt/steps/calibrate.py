"""What a few fully computed requests say of a model: which steps resemble which."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.files import read_json, write_text

from .boundary import Boundary
from .policies import Schedule, walk
from .predictors import LearnedLinear, Predictor, Reuse
from .rehash import FEATURES, TIMES, Origin, Rehash
from .search import (
    KeySearch,
    Matrix,
    Problem,
    check_points,
    errors,
    fitted,
    learn,
    outcome,
    rule_of,
)

FORMAT, VERSION = "accelrt-calibration", 1
#: Of the penalty on learned weights.
RIDGE = 1e-3
# Thresholds that are tried for a number of key steps.
_MOST_GAMMAS = 5000


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the features of the steps of a request resemble each other.

    Made by :func:`accelrt.calibrate`. All that it says of errors is an estimate: it takes
    the features of fully computed requests, and a request with predicted steps has slightly
    others. Search results that matter are measured: :func:`accelrt.quality.search`.

    Args:
        gram: ``[K, K]``, inner products of the features of the steps, each sample's in units
            of its mean norm, averaged over samples and runs. float64.
        similarity: ``[K, K]``, their cosine similarity, averaged alike.
        timesteps: of the scheduler; ``K``.
        boundary: by the names of the model.
        feature, time: as for :class:`Rehash`.
        origin: model, scheduler and steps.
        samples: rows of the batch times runs.
        importance: ``[K]``, how far the pictures change (root mean square, of a range of 1)
            per relative error of the features at a step; ``None``: not known, all steps
            alike.

    Raises:
        ValueError: the sizes differ, or a value is not finite.
    """

    gram: Matrix
    similarity: Matrix
    timesteps: tuple[float, ...]
    boundary: Boundary
    feature: str
    time: str
    origin: Origin
    samples: int
    importance: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("feature", FEATURES), ("time", TIMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        if self.importance is not None:
            object.__setattr__(self, "importance", tuple(map(float, self.importance)))
        known = None if self.importance is None else np.array(self.importance)
        problem = Problem(self.gram, self._times(), known)
        similarity = np.asarray(self.similarity, dtype=np.float64)
        if similarity.shape != problem.gram.shape or not np.isfinite(similarity).all():
            raise ValueError(f"similarity is {similarity.shape}, for {problem.steps} steps")
        object.__setattr__(self, "gram", problem.gram)
        object.__setattr__(self, "similarity", similarity)
        object.__setattr__(self, "_problem", problem)
        object.__setattr__(self, "_searches", {})

    def _times(self) -> tuple[float, ...]:
        by_step = self.time == "step"
        return tuple(map(float, range(len(self.timesteps)))) if by_step else self.timesteps

    @property
    def steps(self) -> int:
        """``K``, of a request."""
        return len(self.timesteps)

    @property
    def problem(self) -> Problem:
        """The numbers that searches work on."""
        found: Problem = self.__dict__["_problem"]
        return found

    # Step Rehash

    def keys(self, gamma: float) -> tuple[int, ...]:
        """The key steps of Step Rehash for a similarity that is enough.

        Raises:
            ValueError: ``gamma`` is not a similarity.
        """
        if not isinstance(gamma, (int, float)) or isinstance(gamma, bool) or not -1 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma!r}; allowed: a number from -1 to 1")
        return walk(self.similarity.tolist(), gamma)

    def schedule(self, gamma: float) -> Rehash:
        """Step Rehash: the greedy key steps, and reuse in between.

        Args:
            gamma: the similarity that is enough, from -1 to 1.

        Raises:
            ValueError: ``gamma`` is not a similarity.

        Source: Step Rehash of Streamlined Inference (arXiv 2411.01171, section 3.3); its
        boundary is ``accelrt.calibrate(..., boundary="published")``, where a model has it.
        """
        return self.rehash(self.keys(gamma), Reuse())

    def gamma_for(self, computed: int) -> float:
        """The similarity that makes so many key steps, or a number close to it.

        Args:
            computed: from 1 to ``K``; 13 of 25 in the paper.

        Raises:
            ValueError: out of range.
        """
        self._check_computed(computed, 1)
        rows = self.similarity.tolist()
        below = self.similarity[np.tril_indices(self.steps, -1)]
        # A value of the map itself is still enough; above the last of them, all steps are keys.
        values = np.unique(np.concatenate([[-1.0], below[(below > -1) & (below < 1)], [1.0]]))
        if len(values) > _MOST_GAMMAS:
            values = values[np.linspace(0, len(values) - 1, _MOST_GAMMAS).astype(int)]
        return float(min(values[::-1], key=lambda gamma: abs(len(walk(rows, gamma)) - computed)))

    # Estimates

    def errors(self, keys: Sequence[int], predictor: Predictor) -> Matrix:
        """Estimated relative error of the features at every step, ``[K]``; 0 at key steps.

        Args:
            keys: computed steps, ascending from 0.
            predictor: of the others.

        Raises:
            ValueError: for wrong ``keys``.
        """
        found: Matrix = np.sqrt(errors(self.problem, keys, rule_of(predictor), predictor.points))
        return found

    def estimate(self, keys: Sequence[int], predictor: Predictor) -> float:
        """Estimated error of the pictures, root mean square, of a range of 1.

        Errors between two key steps add up; those of different stretches do too, or are
        independent, whichever is worse. Without :attr:`importance` the value has no unit; it
        ranks schedules of one calibration all the same.

        Raises:
            ValueError: for wrong ``keys``.
        """
        return math.sqrt(outcome(self.problem, keys, rule_of(predictor), predictor.points))

    # Searches

    def best_keys(
        self, computed: int, predictor: Predictor, *, compute_last: bool = True
    ) -> tuple[int, ...]:
        """The key steps with the least estimated error, each stretch between two by itself.

        Exact up to 50 steps for predictors that stand on three features, and further for
        others; beyond that keys are moved one by one while that helps.

        Args:
            computed: how many; at least 2 with ``compute_last``.
            predictor: of the steps in between.
            compute_last: the last step is one of them.

        Raises:
            ValueError: ``computed`` is out of range, or the predictor has learned weights,
                which hold for keys that are known.
        """
        if isinstance(predictor, LearnedLinear):
            raise ValueError("best_keys: the predictor is learned; use best_learned")
        search = self._search(predictor, rule_of(predictor), predictor.points, compute_last)
        return search.best(computed)

    def learned(self, keys: Sequence[int], points: int = 3, ridge: float = RIDGE) -> LearnedLinear:
        """Weights of each predicted step by least squares.

        Args:
            keys: computed steps, ascending from 0.
            points: features that a prediction stands on, 1 to 4.
            ridge: relative penalty on how far weights are from a first-order Taylor series,
                so that noise in nearly equal features is not blown up.

        Raises:
            ValueError: for a wrong argument, or if every step is a key.

        Source: learned linear predictors of past features (L2P), here in closed form from
        inner products.
        """
        return learn(self.problem, keys, points, ridge)

    def best_learned(
        self,
        computed: int,
        points: int = 3,
        *,
        ridge: float = RIDGE,
        compute_last: bool = True,
    ) -> tuple[tuple[int, ...], LearnedLinear]:
        """The key steps with the least estimated error under learned weights, and those.

        Args:
            computed: how many, fewer than all.
            points, ridge: as for :meth:`learned`.
            compute_last: the last step is one of them.

        Raises:
            ValueError: for a wrong argument.
        """
        check_points(points)
        self._check_computed(computed, 1, self.steps - 1)
        keys = self._search(("learned", ridge), fitted(ridge), points, compute_last).best(computed)
        return keys, self.learned(keys, points, ridge)

    def _search(self, name: Any, rule: Any, points: int, compute_last: bool) -> KeySearch:
        """Kept: it knows the best keys for every number of them."""
        searches: dict[Any, KeySearch] = self.__dict__["_searches"]
        key = (name, points, compute_last)
        if key not in searches:
            searches[key] = KeySearch(self.problem, rule, points, compute_last=compute_last)
        return searches[key]

    def rehash(self, keys: Sequence[int], predictor: Predictor) -> Rehash:
        """Settings with these key steps, for the model and scheduler of the calibration.

        Raises:
            ValueError: for wrong ``keys``.
        """
        return Rehash(
            policy=Schedule(tuple(keys), steps=self.steps),
            predictor=predictor,
            boundary=self.boundary,
            feature=self.feature,
            time=self.time,
            origin=self.origin,
        )

    def _check_computed(self, computed: int, least: int, most: int | None = None) -> None:
        most = self.steps if most is None else most
        number = isinstance(computed, int) and not isinstance(computed, bool)
        if not number or not least <= computed <= most:
            raise ValueError(
                f"computed is {computed!r}; allowed: an integer from {least} to {most}"
            )

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of :meth:`from_dict`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "gram": self.gram.tolist(),
            "similarity": self.similarity.tolist(),
            "timesteps": list(self.timesteps),
            "boundary": dataclasses.asdict(self.boundary),
            "feature": self.feature,
            "time": self.time,
            "origin": dataclasses.asdict(self.origin),
            "samples": self.samples,
            "importance": None if self.importance is None else list(self.importance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Build from plain values.

        Raises:
            ValueError: another format or version, an unknown or missing key, or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a calibration is a mapping; got {type(values).__name__}")
        given = dict(values)
        form, version = given.pop("format", None), given.pop("version", None)
        if form != FORMAT or version != VERSION:
            raise ValueError(
                f"format is {form!r}, version {version!r}; this is for {FORMAT!r}, {VERSION}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if set(given) != known:
            odd = ", ".join(sorted(map(str, set(given) ^ known)))
            raise ValueError(f"calibration: unknown or missing {odd}")
        try:
            given["boundary"] = Boundary(**given["boundary"])
            given["origin"] = Origin(**given["origin"])
            for name in ("gram", "similarity"):
                given[name] = np.array(given[name], dtype=np.float64)
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"calibration: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a JSON file.

        Raises:
            ValueError: it does not parse, or holds something else; the message names the file.
            OSError: it cannot be read.
        """
        return read_json(path, cls.from_dict)

    def plot(self, path: str | Path, keys: Sequence[int] = ()) -> None:
        """Write the similarity map as a picture, with key steps marked.

        Args:
            path: a ``.png`` or ``.svg`` file.
            keys: steps to mark.

        Raises:
            ImportError: matplotlib is missing.
            OSError: it cannot be written.
        """
        from accelrt.reporting.steps_plot import draw_similarity

        draw_similarity(self, Path(path), keys)
