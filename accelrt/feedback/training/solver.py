"""What training asks of a scheduler: its outer steps, finer ones, and which outputs it needs."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelrt.feedback.schedule import FeedbackSchedule

DEFAULT = "DPMSolverMultistepScheduler"
_HINT = f"; set `scheduler: {DEFAULT}`"
#: Of the state at the probes: an affine step is reproduced up to rounding.
_TOLERANCE = 1e-3

Predict = Callable[[Tensor, int], Tensor]


def solver_of(pipeline_scheduler: Any, name: str | None, options: dict[str, Any]) -> Any:
    """The scheduler whose steps a module is trained for.

    Args:
        pipeline_scheduler: of the pipeline.
        name: class in diffusers; ``None`` for the pipeline's own if it takes timesteps, else
            :data:`DEFAULT`.
        options: changes of the configuration.

    Raises:
        ValueError: there is no such class, or an option it does not know.
    """
    import diffusers

    cls: Any = type(pipeline_scheduler)
    if name is not None:
        cls = getattr(diffusers, name, None)
        if not inspect.isclass(cls) or not hasattr(cls, "set_timesteps"):
            raise ValueError(f"scheduler is {name!r}; allowed: a scheduler of diffusers")
    elif not _takes_timesteps(cls):
        cls = getattr(diffusers, DEFAULT)
    if not _takes_timesteps(cls):
        raise ValueError(f"{cls.__name__} does not take timesteps{_HINT}")
    known = inspect.signature(cls.__init__).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} has no option {unknown[0]!r}; known: {', '.join(known)}")
    return cls.from_config(pipeline_scheduler.config, **options)


def _takes_timesteps(cls: Any) -> bool:
    return "timesteps" in inspect.signature(cls.set_timesteps).parameters


@dataclass(frozen=True)
class Outer:
    """The outer steps on a scheduler.

    Args:
        scheduler: its configuration is used, its state left alone.
        schedule: says which the steps are.
        times: the timesteps, ``[outer]``.
    """

    scheduler: Any
    schedule: FeedbackSchedule
    times: tuple[int, ...]

    @classmethod
    def of(cls, scheduler: Any, schedule: FeedbackSchedule) -> Outer:
        """The steps of a schedule.

        Raises:
            ValueError: the scheduler is of a kind that cannot be trained for, or the
                timesteps do not fit it.
        """
        name = type(scheduler).__name__
        if getattr(scheduler, "order", 1) != 1:
            raise ValueError(f"{name} evaluates the model more than once a step{_HINT}")
        if float(scheduler.init_noise_sigma) != 1 or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{name} does not keep the variance of what it denoises{_HINT}")
        limit = scheduler.config.num_train_timesteps
        if schedule.timesteps is not None and schedule.timesteps[0] >= limit:
            raise ValueError(
                f"timesteps begin at {schedule.timesteps[0]}; allowed: up to {limit - 1}"
            )
        started = _started(scheduler, schedule.outer, schedule.timesteps)
        times = [float(t) for t in started.timesteps]
        whole = tuple(round(t) for t in times)
        if any(a != b for a, b in zip(times, whole, strict=True)) or len(times) != schedule.outer:
            raise ValueError(
                f"{name} makes the timesteps {times}; allowed: {schedule.outer} integers"
            )
        given = _started(scheduler, None, whole)
        if any(a <= b for a, b in itertools.pairwise((*whole, 0))):
            raise ValueError(f"{name} makes the timesteps {list(whole)}; allowed: falling, above 0")
        if hasattr(given, "sigmas") and not torch.allclose(given.sigmas, started.sigmas, rtol=1e-4):
            raise ValueError(
                f"{name} has other noise at the same timesteps when they are given{_HINT}"
            )
        return cls(scheduler, schedule, whole)

    @property
    def fed(self) -> tuple[int, ...]:
        """Indices of the steps with feedback."""
        return tuple(k for k, on in enumerate(self.schedule.feedback) if on)

    def started(self) -> Any:
        """A scheduler before the first outer step."""
        return _started(self.scheduler, len(self.times), self.schedule.timesteps)

    def started_at(self, times: Sequence[int]) -> Any:
        """A scheduler before the first of other timesteps."""
        return _started(self.scheduler, None, times)

    def started_with(self, count: int) -> Any:
        """A scheduler before the first of ``count`` steps of its own spacing."""
        return _started(self.scheduler, count, None)

    def ahead(self) -> tuple[int, ...]:
        """Timesteps that the outputs with feedback stand for, rounded, ``[outer]``."""
        return tuple(round(self.schedule.stands_at(self.times, k)) for k in range(len(self.times)))

    def second(self, conditioning: str) -> tuple[int, ...]:
        """Timesteps of the passes with feedback, rounded, ``[outer]``."""
        count = range(len(self.times))
        return tuple(round(self.schedule.runs_at(self.times, k, conditioning)) for k in count)

    def fine(self, substeps: int) -> tuple[int, ...]:
        """Timesteps of ``substeps`` even steps in each outer interval, the last one down to 0.

        Raises:
            ValueError: an interval is too short.
        """
        fine: list[int] = []
        for a, b in zip(self.times, (*self.times[1:], 0), strict=True):
            if a - b < substeps:
                raise ValueError(
                    f"substeps is {substeps}; allowed: up to {a - b}, the timesteps from {a} to {b}"
                )
            part = [a - (a - b) * i // substeps for i in range(substeps)]
            fine += part
        return tuple(fine)


def _started(scheduler: Any, count: int | None, times: Sequence[int] | None) -> Any:
    started = copy.deepcopy(scheduler)
    if times is None:
        started.set_timesteps(count)
    else:
        started.set_timesteps(timesteps=list(times))
    if hasattr(started, "set_begin_index"):
        started.set_begin_index(0)
    return started


def _step(scheduler: Any, output: Tensor, t: Any, x: Tensor) -> Tensor:
    stepped: Tensor = scheduler.step(output, t, x, return_dict=False)[0]
    return stepped


def states(scheduler: Any, x: Tensor, predict: Predict) -> Iterator[Tensor]:
    """The state before each step and after the last.

    Args:
        scheduler: before its first step.
        x: noise ``[B, C, H, W]``.
        predict: the model's output from the state and the index of the step.
    """
    for k, t in enumerate(scheduler.timesteps):
        yield x
        x = _step(scheduler, predict(x, k), t, x)
    yield x


def final_state(scheduler: Any, x: Tensor, predict: Predict) -> Tensor:
    """The state after the last step; arguments as of :func:`states`."""
    *_, last = states(scheduler, x, predict)
    return last


def landing_outputs(outer: Outer, trajectory: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """The outputs with which the outer steps land on given states.

    A step is affine in the model's output, ``x' = A + B m``: two probes give both.

    Args:
        outer: the steps.
        trajectory: states before each step and after the last, ``[B, C, H, W]`` each.

    Returns:
        Output ``m`` of each step, and ``B`` of each step.

    Raises:
        ValueError: a step does not depend on the output.
    """
    scheduler = outer.started()
    outputs, gains = [], []
    for k, (x, wanted) in enumerate(itertools.pairwise(trajectory)):
        t = scheduler.timesteps[k]

        def probe(m: Tensor, t: Any = t, x: Tensor = x) -> Tensor:
            return _step(copy.deepcopy(scheduler), m, t, x)

        at_zero = probe(torch.zeros_like(x))
        gain = float((probe(torch.ones_like(x)) - at_zero).cpu().double().mean())
        if abs(gain) < 1e-9:
            raise ValueError(f"step {k} at timestep {int(t)} does not depend on the model's output")
        m = (wanted - at_zero) / gain
        _step(scheduler, m, t, x)
        outputs.append(m)
        gains.append(gain)
    return outputs, gains


def check_affine(outer: Outer, shape: Sequence[int]) -> None:
    """Refuse a scheduler whose steps are random, or not affine in the model's output.

    Args:
        outer: the steps.
        shape: of one sample's latents, ``[C, H, W]``.

    Raises:
        ValueError: naming the scheduler.
    """
    name = type(outer.scheduler).__name__
    rng = torch.Generator().manual_seed(0)
    scheduler = outer.started()
    x = torch.randn(2, *shape, generator=rng)
    with torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps:
            m = 2 * torch.randn(x.shape, generator=rng)
            stepped = [
                _step(copy.deepcopy(scheduler), output, t, x)
                for output in (torch.zeros_like(m), torch.ones_like(m), m, m)
            ]
            if not torch.equal(stepped[2], stepped[3]):
                raise ValueError(f"the steps of {name} are random{_HINT}")
            gain = (stepped[1] - stepped[0]).double().mean()
            error = (stepped[0] + gain * m - stepped[2]).abs().max()
            if error > _TOLERANCE * stepped[2].abs().max():
                raise ValueError(f"the steps of {name} are not affine in the model's output{_HINT}")
            x = _step(scheduler, torch.randn(x.shape, generator=rng), t, x)
