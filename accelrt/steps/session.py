"""One request: which step it is at, and what it keeps. Nothing of it outlives the request.

A request begins when the scheduler of a wrapped pipeline sets its timesteps; its steps are
counted by the scheduler's ``step``. Requests are told apart by scheduler, so that two of
them may interleave in one thread, and run in several. A model that is called without such
a scheduler is followed by its timesteps.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .origin import check_origin

if TYPE_CHECKING:
    from .rehash import Rehash

COMPUTED, PREDICTED, REJECTED = "computed", "predicted", "rejected"
#: Of passes with and without Inner Loop Feedback.
FEEDBACK, PLAIN = "feedback", "plain"
#: Calls of a model at one step, at most: guidance halves, one after the other, and some more.
MOST_CALLS = 4
_METHODS = ("set_timesteps", "scale_model_input", "step")
# Schedulers whose step adds noise, by their names.
_NOISY = ("Ancestral", "SDE", "LCM", "TCD", "DDPM")


@dataclass
class StepRecord:
    """What happened at one step.

    Args:
        step: index in the request.
        timestep: of the scheduler.
        samples: per call of the model, what became of each sample (guidance halves that are
            decided together are one): ``"computed"``, ``"predicted"`` or ``"rejected"``
            (predicted, found wanting, and computed); with Inner Loop Feedback ``"feedback"`` or
            ``"plain"``.
    """

    step: int
    timestep: float
    samples: list[tuple[str, ...]] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Samples of that kind, of all calls."""
        return sum(sample == kind for call in self.samples for sample in call)


class Session:
    """The state of one request.

    Args:
        times: of the steps; ``None`` where they are not known ahead.

    Attributes:
        done: steps that the scheduler has taken.
        calls: of the model since then.
        stores: what is kept, by model, call and rows.
        records: what happened, by step.
        cache_bytes: most that ``stores`` took.
    """

    def __init__(self, times: tuple[float, ...] | None = None) -> None:
        self.times = times
        self.offset: int | None = None
        self.done = 0
        self.calls: dict[int, int] = {}
        self.stores: dict[Any, Any] = {}
        self.records: dict[int, StepRecord] = {}
        self.cache_bytes = 0
        self.last: float | None = None
        self.direction = 0.0

    @property
    def steps(self) -> int | None:
        """How many there are, if that is known."""
        return None if self.times is None else len(self.times)

    def forget(self) -> None:
        """Let go of what is kept. A pass may be using it, in another thread."""
        self.stores.clear()

    def end(self) -> None:
        """Let go of what is kept: no pass uses it any more."""
        for store in self.stores.values():
            store.released()
        self.stores.clear()


@dataclass
class Step:
    """One call of a model in its request.

    Args:
        session: of the request.
        index: of the step.
        time: timestep.
        key: tells the calls of one step apart: model, and number of the call.
    """

    session: Session
    index: int
    time: float
    key: tuple[int, int]

    def note(self, samples: tuple[str, ...]) -> None:
        """Write down what became of the samples of a call."""
        record = self.session.records.setdefault(self.index, StepRecord(self.index, self.time))
        record.samples.append(samples)


class _Hook:
    """Stands in for a method of one scheduler, and tells the tracker of its calls."""

    def __init__(self, tracker: Tracker, scheduler: Any, name: str, inner: Any) -> None:
        self._tracker = weakref.ref(tracker)
        self._scheduler = weakref.ref(scheduler)
        self._kind = type(scheduler)
        self.name = name
        self.inner = inner  # another library's, on the instance; None for the class's own
        self.__name__ = name
        self.__doc__ = getattr(self._kind, name).__doc__

    @property
    def released(self) -> bool:
        """Nobody is told any more: it may go, whoever holds it."""
        tracker, scheduler = self._tracker(), self._scheduler()
        return tracker is None or scheduler not in tracker._hooked

    @property
    def __signature__(self) -> inspect.Signature:
        # Pipelines ask which arguments a scheduler takes.
        if self.inner is not None:
            return inspect.signature(self.inner)
        signature = inspect.signature(getattr(self._kind, self.name))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scheduler, tracker = self._scheduler(), self._tracker()
        if tracker is not None and scheduler is not None:
            args, kwargs = tracker.asked(scheduler, self.name, args, kwargs)
        if self.inner is not None:
            result = self.inner(*args, **kwargs)
        else:
            result = getattr(self._kind, self.name)(scheduler, *args, **kwargs)
        if tracker is not None and scheduler is not None:
            tracker.told(scheduler, self.name, kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of a copied scheduler: its own method, without a tracker."""
        copied = memo.get(id(self._scheduler()))
        return self if copied is None else getattr(self._kind, self.name).__get__(copied)

    def __reduce__(self) -> Any:
        return getattr, (self._scheduler(), self.name)


class Tracker:
    """Follows the requests of one wrapped pipeline or model.

    Args:
        rehash: of the wrap; ``None`` where nothing is predicted.
        pipe: the pipeline, kept by weak reference; ``None`` for a model by itself.

    Attributes:
        enabled: ``False`` runs every step whole.
        gate: what the quality floor found, for the summary.
        model: gives the denoiser, for schedules that were made for one.
    """

    def __init__(self, rehash: Rehash | None, pipe: Any = None) -> None:
        self._rehash = rehash
        self.enabled = True
        self.gate = ""
        self._pipe = weakref.ref(pipe) if hasattr(pipe, "scheduler") else None
        self._hooked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sessions: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._latest: Session | None = None
        self._epoch = 0
        self.model: Callable[[], Any] = lambda: None
        self.follow()

    @property
    def rehash(self) -> Rehash:
        """The settings of the wrap."""
        assert self._rehash is not None
        return self._rehash

    # Schedulers

    def asked(
        self, scheduler: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which a method of a scheduler is to run."""
        return args, kwargs

    def check_request(self, scheduler: Any, steps: int) -> None:
        """Refuse a request that begins.

        Raises:
            ValueError: the schedule is for another model, scheduler or number of steps.
        """
        if self.rehash.origin is not None:
            check_origin(self.rehash.origin, self.model(), scheduler, steps)
        self.rehash.policy.check(steps)

    def follow(self) -> Any:
        """Hook the pipeline's present scheduler; returns it if it is a new one."""
        pipe = None if self._pipe is None else self._pipe()
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or scheduler in self._hooked:
            return None
        if not all(callable(getattr(type(scheduler), name, None)) for name in _METHODS[::2]):
            return None
        with self._lock:
            if scheduler in self._hooked:
                return None
            for name in _METHODS:
                if hasattr(type(scheduler), name):
                    inner = scheduler.__dict__.get(name)
                    scheduler.__dict__[name] = _Hook(self, scheduler, name, inner)
            self._hooked.add(scheduler)
        return scheduler

    def release(self) -> None:
        """Take all hooks away, and forget everything."""
        for scheduler in list(self._hooked):
            for name in _METHODS:
                hook = scheduler.__dict__.get(name)
                if isinstance(hook, _Hook) and hook._tracker() is self:
                    if hook.inner is None:
                        del scheduler.__dict__[name]
                    else:
                        scheduler.__dict__[name] = hook.inner
        self._hooked.clear()
        self.reset()
        self._latest = None

    def told(self, scheduler: Any, name: str, arguments: dict[str, Any]) -> None:
        """A method of a scheduler has run."""
        if scheduler not in self._hooked:
            return
        if name == "set_timesteps":
            self.begin(scheduler)
            return
        session = self._sessions.get(scheduler)
        self._local.current = None if session is None else weakref.ref(scheduler)
        if session is None or name != "step":
            return
        session.done += 1
        session.calls.clear()
        if arguments.get("eta"):
            self._warn_of_noise(f"{type(scheduler).__name__} with eta {arguments['eta']}")
        if session.steps is not None and (session.offset or 0) + session.done >= session.steps:
            session.end()

    def begin(self, scheduler: Any) -> Session | None:
        """A request begins: the scheduler has its timesteps.

        Raises:
            ValueError: the schedule is for another model, scheduler or number of steps.
        """
        found = getattr(scheduler, "timesteps", None)
        if found is None:
            return None
        times = tuple(float(t) for t in (found.tolist() if hasattr(found, "tolist") else found))
        before = self._sessions.pop(scheduler, None)
        if before is not None:
            before.end()  # also of a request that was broken off
        self._local.current = None
        if not times:
            return None
        if self.enabled:
            self.check_request(scheduler, len(times))
            if _is_noisy(scheduler):
                self._warn_of_noise(type(scheduler).__name__)
        session = Session(times)
        self._sessions[scheduler] = session
        self._local.current = weakref.ref(scheduler)
        self._latest = session
        return session

    # Calls of the model

    def enter(self, model: int, timestep: Any) -> Step | None:
        """The step that a call of a model belongs to; ``None`` to run it whole, unfollowed.

        Args:
            model: tells the models of a pipeline apart.
            timestep: as the model was given it.
        """
        if not self.enabled:
            return None
        session = self._followed(timestep)
        if session is None:
            return self._by_time(model, timestep)
        index = (session.offset or 0) + session.done
        if session.times is None or index >= len(session.times):
            return self._by_time(model, timestep)
        call = session.calls.get(model, 0)
        session.calls[model] = call + 1
        return Step(session, index, session.times[index], (model, call))

    def _followed(self, timestep: Any) -> Session | None:
        """The session of the scheduler that this thread used last, if the timestep is its."""
        scheduler = self.follow()
        if scheduler is not None:
            # The pipeline was given it after the wrap, and has set its timesteps.
            self.begin(scheduler)
        else:
            reference = getattr(self._local, "current", None)
            scheduler = None if reference is None else reference()
        session = None if scheduler is None else self._sessions.get(scheduler)
        if session is None or session.times is None:
            return None
        if max(session.calls.values(), default=0) >= MOST_CALLS:
            return None  # its scheduler does not step: these are calls of somebody else
        if session.offset is None:
            # Once per request: where in the scheduler's list the pipeline begins.
            at = _find(session.times, _number(timestep))
            if at is None:
                del self._sessions[scheduler]
                return None
            session.offset = at
        elif not (isinstance(timestep, Tensor) and timestep.device.type != "cpu"):
            index = session.offset + session.done
            known = session.times[index] if index < len(session.times) else None
            if known is None or not _close(known, _number(timestep)):
                return None
        return session

    def _by_time(self, model: int, timestep: Any) -> Step | None:
        """A request that no scheduler tells of: it ends when the timesteps turn back."""
        table: dict[int, Session] = self._local.__dict__.setdefault("bare", {})
        if getattr(self._local, "epoch", None) != self._epoch:
            table.clear()
            self._local.epoch = self._epoch
        time = _number(timestep)
        session = table.get(model)
        if session is not None and session.last is not None:
            gap = time - session.last
            if gap == 0.0:
                call = session.calls.get(model, 0)
                if call < 2:  # guidance halves, one after the other
                    session.calls[model] = call + 1
                    return Step(session, session.done, time, (model, call))
                session = None
            elif session.direction == 0.0 or (gap > 0) == (session.direction > 0):
                session.direction = gap
                session.done += 1
                session.calls.clear()
            else:
                session = None
        if session is None:
            session = table[model] = self._latest = Session()
        session.last = time
        session.calls[model] = 1
        return Step(session, session.done, time, (model, 0))

    def reset(self) -> None:
        """Forget all requests; the one that runs is computed anew from its next step."""
        for session in list(self._sessions.values()):
            session.forget()
        self._epoch += 1

    @property
    def latest(self) -> Session | None:
        """Of the request that began last."""
        return self._latest

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run every step whole meanwhile; :attr:`latest` stays what it was."""
        latest, enabled = self._latest, self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self._latest, self.enabled = latest, enabled

    def tell(self, message: str) -> None:
        """Warn, once for each message."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=3)

    def _warn_of_noise(self, who: str) -> None:
        self.tell(
            f"{who} adds noise at every step: features of past steps say less about those of the "
            f"next, and the pictures change more than with a scheduler without noise; measure "
            f"with accelrt.quality.compare"
        )


def _is_noisy(scheduler: Any) -> bool:
    name = type(scheduler).__name__
    kind = getattr(getattr(scheduler, "config", None), "algorithm_type", None)
    return any(part in name for part in _NOISY) or str(kind).startswith("sde")


def _number(timestep: Any) -> float:
    """The timestep of a call: one number, or the first of a batch. Waits for a GPU."""
    if isinstance(timestep, Tensor):
        return float(timestep.reshape(-1)[0]) if timestep.device.type != "meta" else 0.0
    return float(timestep)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-3 * max(1.0, abs(a))  # timesteps may come in half precision


def _find(times: tuple[float, ...], time: float) -> int | None:
    found = [i for i, t in enumerate(times) if t == time]
    found = found or [i for i, t in enumerate(times) if _close(t, time)]
    return found[0] if found else None


def weights_on(device: torch.device, rows: Any) -> Tensor:
    """Weights as a tensor on a device."""
    return torch.tensor(rows, dtype=torch.float32).to(device, non_blocking=True)
