"""Outer steps of Inner Loop Feedback: what a scheduler is asked, and told, in place of more."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .ahead import AheadOutputs, check_ahead
from .origin import settings_of
from .session import Session, Step, Tracker

if TYPE_CHECKING:
    from accelrt.feedback.module import FeedbackModule
    from accelrt.feedback.schedule import FeedbackSchedule


@dataclass(frozen=True)
class Fed:
    """Times of a step with feedback.

    Args:
        stands_at: timestep that its output stands for.
        runs_at: timestep of the passes with feedback.
    """

    stands_at: float
    runs_at: float


class OuterSteps(Tracker):
    """Follows requests, and has a scheduler take the outer steps that stand for those asked for.

    Args:
        module: has the schedules.
        pipe: the pipeline, kept by weak reference; ``None`` for a model by itself.
    """

    def __init__(self, module: FeedbackModule, pipe: Any = None) -> None:
        self.module = module
        self._ahead: weakref.WeakKeyDictionary[Session, AheadOutputs] = weakref.WeakKeyDictionary()
        super().__init__(None, pipe)

    def asked(
        self, scheduler: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Another number of steps, or timesteps; outputs at the times that they stand for."""
        if not self.enabled or scheduler not in self._hooked:
            return args, kwargs
        if name == "set_timesteps":
            return self._outer(scheduler, args, kwargs)
        if name == "step":
            return self._output(scheduler, args, kwargs)
        return args, kwargs

    def _outer(
        self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``set_timesteps``."""
        signature = inspect.signature(type(scheduler).set_timesteps)
        given = signature.bind(scheduler, *args, **kwargs).arguments
        schedule = self.check_steps(scheduler, given.get("num_inference_steps"))
        given = {k: v for k, v in given.items() if k not in ("self", "num_inference_steps")}
        if schedule.timesteps is None:
            return (schedule.outer,), given
        return (), {**given, "timesteps": list(schedule.timesteps)}

    def check_steps(self, scheduler: Any, steps: Any) -> FeedbackSchedule:
        """The schedule that stands for a number of steps.

        Raises:
            ValueError: there is none, or the scheduler cannot take it.
        """
        schedules = self.module.schedules
        if steps not in schedules:
            raise ValueError(
                f"num_inference_steps is {steps}; allowed with this feedback module: "
                f"{', '.join(map(str, sorted(schedules))) or 'none: it has no schedule'}"
            )
        schedule = schedules[steps]
        self._check_scheduler(scheduler, schedule)
        parameters = inspect.signature(type(scheduler).set_timesteps).parameters
        if schedule.timesteps is not None and "timesteps" not in parameters:
            raise ValueError(
                f"the feedback module has timesteps of its own, which "
                f"{type(scheduler).__name__}.set_timesteps does not take; allowed: for example "
                f"DPMSolverMultistepScheduler"
            )
        return schedule

    def _check_scheduler(self, scheduler: Any, schedule: FeedbackSchedule) -> None:
        config: Any = self.module.config
        name = type(scheduler).__name__
        if config.scheduler_class and name != config.scheduler_class:
            raise ValueError(
                f"the feedback module was trained for {config.scheduler_class}, not {name}"
            )
        theirs = settings_of(scheduler)
        for key, value in (config.scheduler_config or {}).items():
            if key in theirs and theirs[key] != value:
                raise ValueError(
                    f"the feedback module was trained for {name} with {key} {value!r}, not "
                    f"{theirs[key]!r}"
                )
        if schedule.ahead:
            check_ahead(scheduler)

    def check_request(self, scheduler: Any, steps: int) -> None:
        """Nothing: :meth:`asked` has refused what does not fit."""

    def schedule(self, session: Session) -> FeedbackSchedule | None:
        """That of a request; ``None`` if its steps are nobody's outer steps."""
        if session.times is None:
            return None
        for schedule in self.module.schedules.values():
            if schedule.outer != len(session.times):
                continue
            if schedule.timesteps is None or session.times == tuple(map(float, schedule.timesteps)):
                return schedule
        return None

    def feedback_at(self, step: Step) -> Fed | None:
        """The times of a step with feedback; ``None`` for one without."""
        times = step.session.times
        schedule = self.schedule(step.session)
        index = step.index
        if schedule is None:
            found = self._alone(step.time)
            if found is None:
                return None
            schedule, index = found
            assert schedule.timesteps is not None
            times = tuple(map(float, schedule.timesteps))
        assert times is not None
        if index >= schedule.outer or not schedule.feedback[index]:
            return None
        return Fed(
            schedule.stands_at(times, index),
            schedule.runs_at(times, index, self.module.conditioning),
        )

    def _alone(self, time: float) -> tuple[FeedbackSchedule, int] | None:
        """The step of the only schedule that has a timestep, for calls without a scheduler."""
        found = [
            (schedule, schedule.timesteps.index(int(time)))
            for schedule in self.module.schedules.values()
            if schedule.timesteps is not None and time in schedule.timesteps
        ]
        if len(found) == 1:
            return found[0]
        self.tell(
            f"timestep {time:g} is of no outer step, or of several: the model runs without feedback"
        )
        return None

    def _output(
        self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``step``, with an output that stands for a later time made to fit."""
        session = self._sessions.get(scheduler)
        schedule = None if session is None else self.schedule(session)
        if session is None or schedule is None or not schedule.ahead or session.times is None:
            return args, kwargs
        index = (session.offset or 0) + session.done
        if index >= len(session.times):
            return args, kwargs
        signature = inspect.signature(type(scheduler).step)
        given = dict(signature.bind(scheduler, *args, **kwargs).arguments)
        given.pop("self")
        past = self._ahead.setdefault(session, AheadOutputs())
        fed = self.feedback_at(Step(session, index, session.times[index], (0, 0)))
        time = session.times[index] if fed is None else fed.stands_at
        output: Tensor = given["model_output"]
        given["model_output"] = past.fitted(scheduler, index, time, output, given["sample"])
        return (), given
