"""Finds the schedule that is fast enough or good enough: by estimates first, then by runs."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from accelrt.config import Config
from accelrt.quality.calibrate import Caller, Progress, calibrate
from accelrt.quality.metrics import psnr
from accelrt.quality.observe import pictures
from accelrt.steps.boundary import DEFAULT, Boundary
from accelrt.steps.calibrate import Calibration
from accelrt.steps.policies import Interval, Schedule, Threshold, Verified
from accelrt.steps.predictors import AdamsBashforth, Hermite, Predictor, Reuse, Taylor
from accelrt.steps.rehash import Rehash
from accelrt.steps.stepper import Stepper
from accelrt.wrap import forwards, unwrap, wrap

if TYPE_CHECKING:
    from rich.table import Table

PREDICTORS: tuple[Predictor, ...] = (
    Reuse(), Taylor(1), Taylor(2), Hermite(2), AdamsBashforth(2),
)  # fmt: skip
THRESHOLDS = {Threshold: (0.05, 0.15, 0.4), Verified: (0.02, 0.08)}
#: Shares of the steps that are computed, where the numbers are not given.
SHARES = (0.68, 0.52, 0.4, 0.32, 0.24)
#: Seeds of measured runs begin so far from those of the calibration.
APART = 1000
#: Steps of a request that warms up.
WARM_UP = 2
#: Candidates that are measured against one run of every step, before the next such run.
PLAIN_EVERY = 4
COLUMNS = ("settings", "boundary", "computed", "estimate", "ratio", "PSNR", "runs")


@dataclass(frozen=True)
class Point:
    """Settings that were measured.

    Args:
        label: in a few words.
        boundary: name of the last stage that is left out; ``"fewer steps"`` for requests of
            fewer steps, all of them computed.
        rehash: the settings; ``None`` for fewer steps.
        computed: of the steps, averaged over samples and runs.
        estimate_db: PSNR that the calibration estimates; ``None`` if it says nothing.
        ratios: seconds with every step computed, over seconds, by seed; interleaved runs.
        psnrs: dB by seed, of the pictures against those with every step computed.
    """

    label: str
    boundary: str
    rehash: Rehash | None
    computed: float
    estimate_db: float | None
    ratios: tuple[float, ...]
    psnrs: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def psnr_db(self) -> float:
        """Mean over the seeds; pictures with NaN are as bad as can be."""
        return statistics.fmean(-math.inf if math.isnan(db) else db for db in self.psnrs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite decibels become ``"inf"``."""
        finite = math.isfinite(self.psnr_db)
        return {
            "label": self.label,
            "boundary": self.boundary,
            "computed": self.computed,
            "estimate_db": self.estimate_db,
            "speedup": self.speedup,
            "psnr_db": self.psnr_db if finite else str(self.psnr_db),
            "runs": len(self.psnrs),
            "rehash": None if self.rehash is None else self.rehash.to_dict(),
        }


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search` measured.

    Args:
        pipeline: class name.
        steps: of the scheduler.
        psnr_db, speedup: the target: one of them, or none.
        points: everything measured.
        calibrations: by boundary.
        skipped: candidates that the model does not take, with the reason.
    """

    pipeline: str
    steps: int
    psnr_db: float | None
    speedup: float | None
    points: tuple[Point, ...]
    calibrations: tuple[Calibration, ...]
    skipped: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Point, ...]:
        """Points that no other beats in both, the slowest first."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (-p.speedup, -p.psnr_db)):
            if not found or point.psnr_db > found[-1].psnr_db:
                found.append(point)
        return tuple(found[::-1])

    @property
    def best(self) -> Point:
        """The fastest of enough PSNR, or the best of enough speed.

        If none reaches the target, the one that comes closest to it.
        """
        ours = [point for point in self.points if point.rehash is not None]
        # What left nothing out in these runs is identical, and no faster.
        ours = [point for point in ours if point.computed < self.steps] or ours
        if self.psnr_db is not None:
            enough = [point for point in ours if point.psnr_db >= self.psnr_db]
            if enough:
                return max(enough, key=lambda point: point.speedup)
            return max(ours, key=lambda point: point.psnr_db)
        enough = [point for point in ours if point.speedup >= (self.speedup or 0.0)]
        if enough:
            return max(enough, key=lambda point: point.psnr_db)
        return max(ours, key=lambda point: point.speedup)

    @property
    def reached(self) -> bool:
        """Whether :attr:`best` reaches the target."""
        best = self.best
        if self.psnr_db is not None:
            return best.psnr_db >= self.psnr_db
        return best.speedup >= (self.speedup or 0.0)

    def rows(self) -> list[tuple[str, ...]]:
        """All points under :data:`COLUMNS`, the slowest first; ``*`` are on the front."""
        front, best = self.front, self.best
        rows: list[tuple[str, ...]] = []
        for point in sorted(self.points, key=lambda point: point.speedup):
            mark = ">" if point is best else "*" if point in front else " "
            rows.append(
                (
                    f"{mark} {point.label}",
                    point.boundary,
                    f"{point.computed:.3g}",
                    "" if point.estimate_db is None else f"{point.estimate_db:.1f} dB",
                    f"{point.speedup:.2f}x",
                    f"{point.psnr_db:.1f} dB",
                    str(len(point.psnrs)),
                )
            )
        return rows

    def table(self) -> Table:
        """For the terminal: ``>`` is the best, ``*`` the rest of the front."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
        for row in self.rows():
            table.add_row(*row)
        return table

    def plot(self, path: str | Path) -> None:
        """Write the points and their front as a picture.

        Args:
            path: a ``.png`` or ``.svg`` file.

        Raises:
            ImportError: matplotlib is missing.
            OSError: it cannot be written.
        """
        from accelrt.reporting.steps_plot import draw_front

        draw_front(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pipeline": self.pipeline,
            "steps": self.steps,
            "target": {"psnr_db": self.psnr_db, "speedup": self.speedup},
            "reached": self.reached,
            "best": self.best.to_dict(),
            "points": [point.to_dict() for point in self.points],
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class _Candidate:
    """What is to be measured; ``fewer`` steps where there are no settings."""

    label: str
    boundary: str
    rehash: Rehash | None
    estimate: float | None = None
    fewer: int | None = None


def search(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    psnr_db: float | None = None,
    speedup: float | None = None,
    boundaries: Sequence[Boundary | str] | None = None,
    counts: Sequence[int] | None = None,
    runs: int = 3,
    seed: int = 0,
    seeds: int = 3,
    max_runs: int = 80,
    calibrations: Sequence[Calibration] = (),
    config: Config | None = None,
    on_progress: Progress | None = None,
) -> SearchResult:
    """Find settings of the cut along time that reach a target.

    Each boundary is calibrated. For each number of computed steps the predictors, each with
    the key steps that suit it and with evenly spread ones, are ranked by the estimate, and
    the first of each boundary run from one seed; so do policies that decide by themselves,
    and, for comparison, requests of fewer steps. What is on the front then runs from the
    other seeds, until all of it has. Runs are interleaved with ones that compute every step.

    Args:
        pipe: an unwrapped diffusers pipeline.
        call: keywords of its call, without ``generator`` and ``output_type``.
        psnr_db: dB of the pictures, against those of every step computed, that must be
            reached as fast as possible.
        speedup: against every step computed, that must be reached as well as possible. One
            of the two must be given.
        boundaries: ``None`` for the family's, the output, and one in between.
        counts: numbers of computed steps; ``None`` for some from a quarter to two thirds.
        runs, seed: of the calibration.
        seeds: of the measured runs; others than those of the calibration.
        max_runs: requests in all, those of the calibrations apart; short warm-ups not counted.
        calibrations: of this pipeline and call, where they exist already.
        config: settings of the wrap.
        on_progress: called as ``on_progress(what, steps_done, steps)``.

    Returns:
        A :class:`SearchResult`. The pipeline is left unwrapped.

    Raises:
        UnsupportedModelError: nothing in the pipeline can be wrapped.
        ValueError: for a wrong argument.

    Source: searched schedules (ECAD) and learned weights (L2P), over the policies and
    predictors of this package.
    """
    if (psnr_db is None) == (speedup is None):
        raise ValueError("search: give one target, psnr_db or speedup")
    _check(psnr_db, speedup, seeds, max_runs, counts)
    caller = Caller("search", pipe, call, on_progress)
    known = list(calibrations)
    wanted = _boundaries(pipe, config) if boundaries is None else list(boundaries)
    known.extend(
        calibrate(
            pipe, call, runs=runs, seed=seed, boundary=boundary, config=config,
            on_progress=on_progress,
        )
        for boundary in ([] if known and boundaries is None else wanted)
    )  # fmt: skip
    candidates = [c for known_one in known for c in _scheduled(known_one, counts)]
    adaptive, skipped = _adaptive(pipe, known[0], config)
    fewer = [_fewer(count) for count in (_counts(known[0], counts) if caller.takes_steps else ())]
    every = [*candidates, *adaptive, *fewer]
    if _cost(every) > max_runs:
        raise ValueError(
            f"search: max_runs is {max_runs}; {len(every)} candidates need {_cost(every)}: give "
            f"that, or fewer counts or boundaries"
        )
    bench = _Bench(caller, config, seed + APART)
    points = bench.round(every, 0, "screening")
    result = SearchResult(
        type(pipe).__name__, known[0].steps, psnr_db, speedup,
        tuple(points.values()), tuple(known), tuple(skipped),
    )  # fmt: skip
    left = max_runs - _cost(every)
    while chosen := _unsure(result, points, seeds):
        left -= _cost(chosen)
        if left < 0:
            break
        index = len(points[chosen[0]].psnrs)
        for candidate, point in bench.round(chosen, index, "measuring").items():
            points[candidate] = _joined(points[candidate], point)
        result = replace(result, points=tuple(points.values()))
    return result


def measure(
    pipe: Any,
    call: Mapping[str, Any],
    settings: Mapping[str, Rehash],
    *,
    calibration: Calibration,
    fewer: Sequence[int] = (),
    seed: int = 0,
    seeds: int = 1,
    config: Config | None = None,
    on_progress: Progress | None = None,
) -> SearchResult:
    """Run settings, and requests of fewer steps, beside ones that compute every step.

    Args:
        pipe: an unwrapped diffusers pipeline.
        call: keywords of its call, without ``generator`` and ``output_type``.
        settings: by their labels, at least one.
        calibration: that they come from.
        fewer: numbers of steps of requests to compare with.
        seed, seeds: of the calibration's first request, and number of measured ones; as for
            :func:`search` these are others.
        config: settings of the wrap.
        on_progress: called as ``on_progress(what, steps_done, steps)``.

    Returns:
        A :class:`SearchResult` without a target. The pipeline is left unwrapped.

    Raises:
        ValueError: for a wrong argument.
    """
    if not settings:
        raise ValueError("measure: no settings are given")
    _check(None, None, seeds, 1, None)
    caller = Caller("measure", pipe, call, on_progress)
    candidates = [
        _Candidate(label, _place(rehash), rehash, _estimate(calibration, rehash))
        for label, rehash in settings.items()
    ]
    if caller.takes_steps:
        candidates += [_fewer(count) for count in fewer]
    bench = _Bench(caller, config, seed + APART)
    points = bench.round(candidates, 0, "measuring")
    for index in range(1, seeds):
        for candidate, point in bench.round(candidates, index, "measuring").items():
            points[candidate] = _joined(points[candidate], point)
    return SearchResult(
        type(pipe).__name__, calibration.steps, None, None, tuple(points.values()),
        (calibration,),
    )  # fmt: skip


def _place(rehash: Rehash) -> str:
    return rehash.boundary if isinstance(rehash.boundary, str) else rehash.boundary.last


def _estimate(calibration: Calibration, rehash: Rehash) -> float | None:
    """PSNR by the calibration, where that is of these settings and knows what steps matter."""
    known = calibration.importance is not None and rehash.boundary == calibration.boundary
    if not known or not isinstance(rehash.policy, Schedule):
        return None
    return _decibels(calibration.estimate(rehash.policy.computed, rehash.predictor))


def _fewer(count: int) -> _Candidate:
    return _Candidate(f"{count} steps", "fewer steps", None, fewer=count)


def _cost(candidates: Sequence[_Candidate]) -> int:
    """Requests of a round."""
    return len(candidates) + -(-len(candidates) // PLAIN_EVERY)


def _check(
    psnr_db: float | None,
    speedup: float | None,
    seeds: int,
    max_runs: int,
    counts: Sequence[int] | None,
) -> None:
    for name, value, above in (("psnr_db", psnr_db, 0.0), ("speedup", speedup, 1.0)):
        if value is not None and not (isinstance(value, (int, float)) and above < value < 1e6):
            raise ValueError(f"search: {name} is {value!r}; allowed: a number above {above:g}")
    for name, number in (("seeds", seeds), ("max_runs", max_runs)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"search: {name} is {number!r}; allowed: an integer >= 1")
    if counts is not None and (not counts or any(c < 2 for c in counts)):
        raise ValueError(f"search: counts is {list(counts)}; allowed: numbers from 2")


def _boundaries(pipe: Any, config: Config | None) -> list[Boundary | str]:
    """The family's own, the output, and the stage halfway between, if there is one."""
    wrap(pipe, config=config, rehash=Rehash(Interval(1), Reuse()))
    try:
        forward = next(f for _, f in forwards(pipe) if f.stepper is not None)
        assert isinstance(forward.stepper, Stepper)
        own = forward.stepper.boundary(forward)
        stages = forward.stages()
    finally:
        unwrap(pipe)
    last = next(
        i
        for i, stage in enumerate(stages)
        if own.last == stage.name or any(group.name == own.last for group in stage.groups)
    )
    between = [stage.name for stage in stages[last + 1 : -1]]
    middle: list[Boundary | str] = [Boundary(between[len(between) // 2])] if between else []
    return [DEFAULT, *middle, "out"]


def _counts(calibration: Calibration, given: Sequence[int] | None) -> list[int]:
    steps = calibration.steps
    counts = [round(share * steps) for share in SHARES] if given is None else list(given)
    if given is not None and max(counts) >= steps:
        raise ValueError(f"search: counts has {max(counts)}; allowed: from 2 to {steps - 1}")
    return sorted({count for count in counts if 2 <= count < steps}, reverse=True)


def _scheduled(calibration: Calibration, given: Sequence[int] | None) -> list[_Candidate]:
    """For each number of computed steps the predictor and keys of the least estimate.

    The best of evenly spread keys is kept too: estimates favour what they were fitted to.
    """
    found: list[_Candidate] = []
    for count in _counts(calibration, given):
        even = _even(calibration.steps, count)
        ranked: dict[str, list[tuple[float, str, Rehash]]] = {"searched": [], "even": []}
        for predictor in PREDICTORS:
            for kind, keys in (
                ("searched", calibration.best_keys(count, predictor)),
                ("even", even),
            ):
                error = calibration.estimate(keys, predictor)
                ranked[kind].append((error, _name(predictor), calibration.rehash(keys, predictor)))
        for points in (2, 3):
            keys, learned = calibration.best_learned(count, points)
            spread = calibration.learned(even, points)
            for kind, chosen, predictor in (
                ("searched", keys, learned),
                ("even", even, spread),
            ):
                error = calibration.estimate(chosen, predictor)
                settings = calibration.rehash(chosen, predictor)
                ranked[kind].append((error, f"learned {points}", settings))
        for kind, rows in ranked.items():
            error, name, settings = min(rows, key=lambda row: row[0])
            decibels = None if calibration.importance is None else _decibels(error)
            label = f"{name}, {count} {kind}"
            found.append(_Candidate(label, calibration.boundary.last, settings, decibels))
    return found


def _even(steps: int, count: int) -> tuple[int, ...]:
    """Spread evenly, the first two and the last among them, as an interval spreads them."""
    if count < 3:
        return (0, steps - 1)
    inner = [round(1 + (steps - 2) * i / (count - 2)) for i in range(count - 1)]
    return tuple(sorted({0, *inner}))


def _adaptive(
    pipe: Any, calibration: Calibration, config: Config | None
) -> tuple[list[_Candidate], list[str]]:
    """Policies that decide by themselves, and why some do not fit the model."""
    found: list[_Candidate] = []
    skipped: list[str] = []
    for kind, thresholds in THRESHOLDS.items():
        for threshold in thresholds:
            settings = Rehash(
                policy=kind(threshold), predictor=Taylor(1), boundary=calibration.boundary,
                feature=calibration.feature, time=calibration.time,
            )  # fmt: skip
            label = f"{kind.__name__} {threshold:g}, Taylor 1"
            try:
                wrap(pipe, config=config, rehash=settings)
            except ValueError as error:
                skipped.append(f"{label}: {error}")
                continue
            unwrap(pipe)
            found.append(_Candidate(label, calibration.boundary.last, settings))
    return found, skipped


def _name(predictor: Predictor) -> str:
    order = getattr(predictor, "order", None)
    return type(predictor).__name__ + ("" if order is None else f" {order}")


def _decibels(error: float) -> float:
    return -20.0 * math.log10(max(error, 1e-12))


def _unsure(
    result: SearchResult, points: Mapping[_Candidate, Point], seeds: int
) -> list[_Candidate]:
    """Of the front and the best those that were run least, if that is less than ``seeds``."""
    front = [*result.front, result.best]
    least = min(len(point.psnrs) for point in front)
    if least >= seeds:
        return []
    found = [c for c, p in points.items() if any(p is other for other in front)]
    return [candidate for candidate in found if len(points[candidate].psnrs) == least]


def _joined(first: Point, second: Point) -> Point:
    runs = len(first.ratios), len(second.ratios)
    computed = (first.computed * runs[0] + second.computed * runs[1]) / sum(runs)
    return replace(
        first, computed=computed, ratios=first.ratios + second.ratios,
        psnrs=first.psnrs + second.psnrs,
    )  # fmt: skip


class _Bench:
    """Measures candidates against every step computed, one seed at a time."""

    def __init__(self, caller: Caller, config: Config | None, seed: int) -> None:
        self.caller = caller
        self.config = config
        self.seed = seed

    def round(
        self, candidates: Sequence[_Candidate], index: int, what: str
    ) -> dict[_Candidate, Point]:
        """Run each candidate from one seed, and every step computed before some of them."""
        seed = self.seed + index
        found: dict[_Candidate, Point] = {}
        whole: Tensor | None = None
        for number, candidate in enumerate(candidates):
            title = f"{what}: {number + 1} of {len(candidates)}"
            if number % PLAIN_EVERY == 0:
                plain, images, _ = self._run(None, None, seed, title)
                whole = images if whole is None else whole
            seconds, images, computed = self._run(candidate.rehash, candidate.fewer, seed, title)
            found[candidate] = Point(
                candidate.label, candidate.boundary, candidate.rehash, computed,
                candidate.estimate, (plain / seconds,), (psnr(images, whole),),
            )  # fmt: skip
        return found

    def _run(
        self, rehash: Rehash | None, fewer: int | None, seed: int, what: str
    ) -> tuple[float, Tensor, float]:
        """Seconds, pictures, and computed steps."""
        pipe = self.caller.pipe
        changed = {} if fewer is None else {"num_inference_steps": fewer}
        wrap(pipe, config=self.config, rehash=rehash)
        try:
            stepper = next((f.stepper for _, f in forwards(pipe) if f.stepper is not None), None)
            tracker = None if stepper is None else stepper.tracker
            if self.caller.takes_steps:
                # What only the first call after a wrap does is no part of the time.
                if tracker is not None:
                    tracker.enabled = False
                self.caller(seed, num_inference_steps=WARM_UP)
                if tracker is not None:
                    tracker.enabled = True
            gc.collect()
            began = time.perf_counter()
            output = self.caller(seed, what, **changed)
            seconds = time.perf_counter() - began
            latest = None if tracker is None else tracker.latest
            records = [] if latest is None else list(latest.records.values())
        finally:
            unwrap(pipe)
        samples = sum(len(call) for record in records for call in record.samples)
        whole = sum(record.count(kind) for record in records for kind in ("computed", "rejected"))
        computed = whole / samples * len(records) if samples else float(fewer or 0)
        return seconds, pictures(output)[0], computed
