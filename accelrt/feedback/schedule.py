"""The outer steps of Inner Loop Feedback: which they are, and which of them have feedback."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Smallest jump between outer timesteps that :func:`shrinking` makes.
FLOOR = 10


@dataclass(frozen=True)
class FeedbackSchedule:
    """The steps that are run in place of a larger number.

    Args:
        stands_for: ``num_inference_steps`` of the call that they answer.
        feedback: for each outer step, whether the loop runs again.
        timesteps: of the outer steps, falling; ``None`` for the scheduler's own spacing of
            as many steps.
        ahead: how far on its way to the next timestep a step's output with feedback stands
            for: 0 for the step's own timestep, 0.5 for the middle, below 1.

    Raises:
        ValueError: for a wrong value, naming it and what is allowed.
    """

    stands_for: int
    feedback: tuple[bool, ...]
    timesteps: tuple[int, ...] | None = None
    ahead: float = 0.0

    def __post_init__(self) -> None:
        if not _is_integer(self.stands_for) or self.stands_for < 1:
            raise ValueError(f"stands_for is {self.stands_for!r}; allowed: at least 1")
        if (
            not isinstance(self.feedback, tuple)
            or not self.feedback
            or not all(isinstance(on, bool) for on in self.feedback)
        ):
            raise ValueError(f"feedback is {self.feedback!r}; allowed: true or false for each step")
        ahead = self.ahead
        if not isinstance(ahead, (int, float)) or isinstance(ahead, bool) or not 0 <= ahead < 1:
            raise ValueError(f"ahead is {ahead!r}; allowed: 0 to below 1")
        times = self.timesteps
        if times is None:
            return
        if not isinstance(times, tuple) or not all(map(_is_integer, times)):
            raise ValueError(f"timesteps are {times!r}; allowed: integers")
        if len(times) != len(self.feedback):
            raise ValueError(
                f"{len(times)} timesteps for {len(self.feedback)} values of feedback; allowed: as "
                f"many"
            )
        if any(a <= b for a, b in itertools.pairwise(times)) or times[-1] < 0:
            raise ValueError(f"timesteps are {list(times)}; allowed: falling, none below 0")

    @property
    def outer(self) -> int:
        """Number of passes through the model."""
        return len(self.feedback)

    def stands_at(self, times: Sequence[float], index: int) -> float:
        """The timestep that a step's output with feedback stands for.

        Args:
            times: of the outer steps.
            index: of the step.
        """
        following = times[index + 1] if index + 1 < len(times) else 0.0
        return times[index] - self.ahead * (times[index] - following)

    def runs_at(self, times: Sequence[float], index: int, conditioning: str) -> float:
        """The timestep at which a step's passes with feedback run.

        Args:
            times, index: as of :meth:`stands_at`.
            conditioning: of the module.
        """
        if conditioning == "ahead":
            return self.stands_at(times, index)
        if conditioning == "next":
            return times[index + 1] if index + 1 < len(times) else 0.0
        return times[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` reads them."""
        times = None if self.timesteps is None else list(self.timesteps)
        return {"feedback": list(self.feedback), "timesteps": times, "ahead": self.ahead}

    @classmethod
    def from_dict(cls, stands_for: int, values: dict[str, Any]) -> FeedbackSchedule:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: for an unknown key or a wrong value.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a schedule is a mapping; got {type(values).__name__}")
        unknown = sorted(map(str, set(values) - {"feedback", "timesteps", "ahead"}))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; allowed: ahead, feedback, timesteps")

        def listed(name: str) -> Any:
            value = values.get(name)
            return tuple(value) if isinstance(value, (list, tuple)) else value

        return cls(stands_for, listed("feedback"), listed("timesteps"), values.get("ahead", 0.0))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shrinking(first: int, outer: int, last: int = 0, floor: int = FLOOR) -> tuple[int, ...]:
    """Timesteps whose jumps shrink linearly towards the end.

    Args:
        first: the first timestep.
        outer: how many there are.
        last: where the jump after the last one ends.
        floor: the smallest jump.

    Raises:
        ValueError: there is no room for jumps of at least ``floor``.

    Source: Inner Loop Feedback has jumps that shrink towards 0, of at least 10; the list
    itself is not published.
    """
    room = first - last
    if outer < 1 or floor < 1 or room < outer * floor:
        raise ValueError(
            f"{outer} jumps of at least {floor} from {first} to {last}; allowed: at most {room}"
        )
    weights = [2.0 * (outer - i) / (outer * (outer + 1)) for i in range(outer)]
    spare = room - outer * floor
    jumps = [floor + round(spare * weight) for weight in weights]
    jumps[0] += room - sum(jumps)
    times = [first]
    for jump in jumps[:-1]:
        times.append(times[-1] - jump)
    return tuple(times)
