"""Runs a pipeline whole, and looks at the features that cross a boundary."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelrt.config import Config
from accelrt.quality.observe import pictures, silent_steps
from accelrt.steps.boundary import DEFAULT, Boundary
from accelrt.steps.calibrate import Calibration
from accelrt.steps.origin import origin_of
from accelrt.steps.policies import Interval
from accelrt.steps.predictors import Reuse
from accelrt.steps.rehash import Rehash
from accelrt.steps.search import Matrix
from accelrt.steps.session import Step
from accelrt.steps.stepper import Stepper
from accelrt.wrap import forwards, is_wrapped, unwrap, wrap

#: Coordinates of a sample's features that are looked at, and bytes of them per run.
COORDINATES, MOST_BYTES = 65536, 512 * 2**20

# What is running, denoising steps done, and steps of this run.
Progress = Callable[[str, int, int], None]


class Caller:
    """Calls a pipeline from seeds.

    Args:
        who: for messages.
        pipe: an unwrapped diffusers pipeline.
        call: keywords of its call.
        on_progress: called as ``on_progress(what, steps_done, steps)``.

    Raises:
        ValueError: it is wrapped, or takes none of the keywords that are needed.
    """

    def __init__(
        self, who: str, pipe: Any, call: Mapping[str, Any], on_progress: Progress | None = None
    ) -> None:
        if is_wrapped(pipe):
            raise ValueError(f"{who}: the pipeline is wrapped; call accelrt.unwrap first")
        kind = type(pipe).__name__
        if not callable(pipe) or not hasattr(pipe, "scheduler"):
            raise ValueError(f"{who}: {kind} is no pipeline with a scheduler")
        known = inspect.signature(type(pipe).__call__).parameters
        for name in ("generator", "output_type"):
            if name not in known:
                raise ValueError(f"{who}: {kind} takes no {name}")
            if name in call:
                raise ValueError(f"{who} sets {name} itself; leave it out of the call")
        unknown = sorted(set(call) - set(known))
        if unknown:
            raise ValueError(
                f"{who}: {kind} takes no {', '.join(unknown)}; "
                f"known: {', '.join(name for name in known if name != 'self')}"
            )
        self.pipe = pipe
        self.call = dict(call)
        self.on_progress = on_progress
        self.device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
        self.takes_steps = "num_inference_steps" in known

    def __call__(self, seed: int, what: str = "", **changed: Any) -> Any:
        """One call from a seed of the CPU generator; waits for the device."""
        report = self.on_progress

        def step(done: int, total: int) -> None:
            if report is not None and what:
                report(what, done, total)

        generator = torch.Generator().manual_seed(seed)
        with silent_steps(self.pipe, step):
            output = self.pipe(**{**self.call, **changed}, generator=generator, output_type="np")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output


class _Recorder:
    """Features of one run, a fixed part of their coordinates."""

    def __init__(self) -> None:
        self.times: tuple[float, ...] = ()
        self.found: dict[int, list[Tensor]] = {}
        self._chosen: Tensor | None = None

    def __call__(self, step: Step, rows: tuple[int, ...], features: Tensor) -> None:
        """Keep the features ``[rows, M]`` of a computed step.

        Further calls at a step, be they guidance halves or parts of a batch, bring further
        samples.
        """
        if not self.times:
            self.times = step.session.times or ()
        if self._chosen is None:
            self._chosen = self._choose(features, max(1, len(self.times)))
        part = features.index_select(1, self._chosen.to(features.device))
        self.found.setdefault(step.index, []).append(part.detach().to("cpu", torch.float32))

    @staticmethod
    def _choose(features: Tensor, steps: int) -> Tensor:
        rows, width = features.shape
        count = min(width, COORDINATES, max(1, MOST_BYTES // (4 * rows * steps)))
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(width, generator=generator)[:count].sort().values

    def products(self, who: str) -> tuple[Matrix, Matrix, int]:
        """Inner products and cosines ``[K, K]``, summed over samples; and how many those are.

        Raises:
            ValueError: some step is missing, or has other samples than the rest.
        """
        missing = [index for index in range(len(self.times)) if index not in self.found]
        if missing:
            raise ValueError(
                f"calibrate: step {missing[0]} of {len(self.times)} did not call the {who}, so "
                f"there is nothing to compare"
            )
        # [K, samples, M]
        steps = [torch.cat(self.found[index]) for index in range(len(self.times))]
        counts = sorted({len(step) for step in steps})
        if len(counts) > 1:
            raise ValueError(
                f"calibrate: steps have {counts[0]} or {counts[-1]} samples: guidance is switched "
                f"on or off on the way; calibrate with a call that keeps it"
            )
        gram = np.zeros((len(steps), len(steps)))
        cosines = np.zeros_like(gram)
        for sample in range(counts[0]):
            x = torch.stack([step[sample] for step in steps]).double()
            inner: Matrix = (x @ x.T).numpy()
            norms = np.sqrt(np.diagonal(inner))
            gram += inner / max(float(norms.mean()) ** 2, 1e-300)
            cosines += inner / np.maximum(np.outer(norms, norms), 1e-300)
        return gram, cosines, counts[0]


def calibrate(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    runs: int = 3,
    probes: int = 8,
    seed: int = 0,
    boundary: Boundary | str = DEFAULT,
    feature: str = "auto",
    time: str = "timestep",
    config: Config | None = None,
    on_progress: Progress | None = None,
) -> Calibration:
    """Compare the features of all steps of a few requests, every step of them computed.

    How much a step matters is then measured: with the last step's features in its place, and
    all others computed, the pictures change by so much. It differs by orders of magnitude
    from step to step, and :meth:`~accelrt.steps.Calibration.best_keys` rests on it.

    The pipeline is wrapped meanwhile, and left unwrapped. Of each sample at most 65536
    coordinates are kept, the same at every step, on the CPU.

    Args:
        pipe: an unwrapped diffusers pipeline of one supported denoiser.
        call: keywords of its call, without ``generator`` and ``output_type``; its number of
            steps is that of the schedules to be made.
        runs: requests, from the seeds ``seed``, ``seed + 1``, ..; at least 1.
        probes: requests more, which measure how much a step matters; the steps between
            those that are measured are interpolated. 0: all steps are taken to matter alike.
        seed: of the first one's CPU generator.
        boundary, feature, time: as for :class:`accelrt.Rehash`.
        config: settings of the wrap.
        on_progress: called as ``on_progress(what, steps_done, steps)``.

    Returns:
        A :class:`~accelrt.steps.Calibration`: the similarity map, and the searches on it.

    Raises:
        UnsupportedModelError: nothing in the pipeline can be wrapped.
        ValueError: for a wrong argument, or a call whose steps cannot be followed.

    Source: the similarity map of Step Rehash (arXiv 2411.01171, section 3.3).
    """
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise ValueError(f"calibrate: runs is {runs!r}; allowed: an integer >= 1")
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 0:
        raise ValueError(f"calibrate: probes is {probes!r}; allowed: an integer >= 0")
    caller = Caller("calibrate", pipe, call, on_progress)
    settings = Rehash(
        policy=Interval(1), predictor=Reuse(), boundary=boundary, feature=feature, time=time
    )
    wrap(pipe, config=config, rehash=settings)
    try:
        followed = [forward for _, forward in forwards(pipe) if forward.stepper is not None]
        if len(followed) != 1:
            names = ", ".join(type(forward.module).__name__ for forward in followed)
            raise ValueError(f"calibrate: the pipeline has several denoisers ({names}), not one")
        forward = followed[0]
        stepper = forward.stepper
        assert isinstance(stepper, Stepper)
        name = type(forward.module).__name__
        resolved = stepper.boundary(forward)
        total: tuple[Matrix, Matrix, int] | None = None
        times: tuple[float, ...] = ()
        for run in range(runs):
            recorder = stepper.recorder = _Recorder()
            output = caller(seed + run, f"calibrate: run {run + 1} of {runs}")
            if run == 0:
                whole, _ = pictures(output)
            del output
            if not recorder.times:
                reason = forward.stock_reason or "its scheduler does not tell of its timesteps"
                raise ValueError(f"calibrate: the steps of {name} cannot be followed: {reason}")
            times = recorder.times
            gram, cosines, samples = recorder.products(name)
            if total is not None:
                gram, cosines, samples = gram + total[0], cosines + total[1], samples + total[2]
            total = gram, cosines, samples
        origin = origin_of(forward.module, pipe.scheduler, len(times))
    finally:
        unwrap(pipe)
    assert total is not None
    gram, cosines, samples = total
    found = Calibration(
        gram=(gram + gram.T) / (2 * samples),
        similarity=_similarity(cosines / samples),
        timesteps=times,
        boundary=resolved,
        feature=feature,
        time=time,
        origin=origin,
        samples=samples,
    )
    if not probes or found.steps < 3:
        return found
    importance = _importance(caller, found, probes, seed, whole, config)
    return dataclasses.replace(found, importance=importance)


def _importance(
    caller: Caller,
    calibration: Calibration,
    probes: int,
    seed: int,
    whole: Tensor,
    config: Config | None,
) -> tuple[float, ...] | None:
    """Change of the pictures per relative error, by step; ``None`` if nothing changes them."""
    steps = calibration.steps
    places = sorted({round(place) for place in np.linspace(1, steps - 1, probes)})
    measured: dict[int, float] = {}
    for number, step in enumerate(places):
        keys = tuple(key for key in range(steps) if key != step)
        error = float(calibration.errors(keys, Reuse())[step])
        wrap(caller.pipe, config=config, rehash=calibration.rehash(keys, Reuse()))
        try:
            output = caller(seed, f"calibrate: probe {number + 1} of {len(places)}")
        finally:
            unwrap(caller.pipe)
        change = float((pictures(output)[0] - whole).double().square().mean().sqrt())
        if error > 0 and change > 0 and math.isfinite(change):
            measured[step] = change / error
    if not measured:
        return None
    logs = np.log(list(measured.values()))
    return tuple(np.exp(np.interp(np.arange(steps), list(measured), logs)).tolist())


def _similarity(cosines: Matrix) -> Matrix:
    """Symmetric, with a diagonal of 1, whatever the rounding was."""
    found = np.clip((cosines + cosines.T) / 2, -1.0, 1.0)
    np.fill_diagonal(found, 1.0)
    return found
