"""When to compute: which denoising steps run whole, and which are predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Policy(ABC):
    """Decides for each step whether the stages before a boundary are computed.

    A policy has no state: what it must remember of a request is kept in its session.
    """

    @property
    def watches(self) -> bool:
        """It looks at the change of the head's output, which the host must then wait for."""
        return False

    @property
    def verifies(self) -> bool:
        """It checks predictions, which the host must then wait for."""
        return False

    @abstractmethod
    def fixed(self, step: int, steps: int | None) -> bool | None:
        """Whether a step is computed; ``None`` if that depends on the samples.

        Args:
            step: index of the step in the request.
            steps: of the request; ``None`` if not known.
        """

    def check(self, steps: int) -> None:
        """Refuse a request of ``steps`` steps, if the policy is not for it.

        Raises:
            ValueError: naming both numbers.
        """
        if steps < 1:
            raise ValueError(f"{type(self).__name__}: a request of {steps} steps")


def _integer(owner: object, name: str, least: int) -> None:
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(owner).__name__}: {name} is {value!r}; allowed: an integer >= {least}"
        )


def _fraction(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; allowed: a number above 0")


def _is_last(step: int, steps: int | None) -> bool:
    return steps is not None and step >= steps - 1


@dataclass(frozen=True)
class Schedule(Policy):
    """Computes the steps of a list: the key steps of Step Rehash (arXiv 2411.01171, 3.3).

    Args:
        computed: indices of the computed steps, ascending, from 0.
        steps: of the request that the list is for; ``None`` for any.

    Raises:
        ValueError: for an empty or unordered list, one without step 0, or a step that the
            request does not have.
    """

    computed: tuple[int, ...]
    steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(self.computed))
        listed = self.computed
        if not listed or any(not isinstance(i, int) or isinstance(i, bool) for i in listed):
            raise ValueError(f"Schedule: computed is {listed!r}; allowed: a list of step indices")
        if listed[0] != 0:
            raise ValueError(f"Schedule: the first computed step is {listed[0]}; it must be 0")
        if any(b <= a for a, b in pairwise(listed)):
            raise ValueError(f"Schedule: computed is {listed!r}; the indices must ascend")
        if self.steps is not None:
            _integer(self, "steps", 1)
            self.check(self.steps)

    def fixed(self, step: int, steps: int | None) -> bool:
        """Whether the step is in the list."""
        return step in self.computed

    def check(self, steps: int) -> None:
        """Refuse another number of steps."""
        if self.steps is not None and steps != self.steps:
            raise ValueError(f"Schedule: made for {self.steps} steps, not for {steps}")
        if self.computed[-1] >= steps:
            raise ValueError(f"Schedule: step {self.computed[-1]} is none of {steps} steps")


@dataclass(frozen=True)
class Interval(Policy):
    """Computes every ``interval``-th step (FORA, arXiv 2407.01425; DeepCache, 2312.00858).

    Args:
        interval: 1 computes all.
        warmup_steps: first steps that are all computed.
        compute_last: the last step is computed too, where the number of steps is known.
    """

    interval: int = 2
    warmup_steps: int = 2
    compute_last: bool = True

    def __post_init__(self) -> None:
        _integer(self, "interval", 1)
        _integer(self, "warmup_steps", 1)

    def fixed(self, step: int, steps: int | None) -> bool:
        """Whether the step is computed."""
        after = step - self.warmup_steps + 1
        return after <= 0 or after % self.interval == 0 or (
            self.compute_last and _is_last(step, steps)
        )  # fmt: skip


@dataclass(frozen=True)
class Adaptive(Policy):
    """What the policies have in common that decide for each sample.

    Args:
        threshold: above it a sample is computed.
        warmup_steps: first steps that are all computed.
        max_consecutive: predicted steps in a row, of one sample, at most.
        compute_last: the last step is computed, where the number of steps is known.
    """

    threshold: float
    warmup_steps: int = 2
    max_consecutive: int = 4
    compute_last: bool = True

    def __post_init__(self) -> None:
        _fraction(self, "threshold")
        _integer(self, "warmup_steps", 1)
        _integer(self, "max_consecutive", 1)

    def fixed(self, step: int, steps: int | None) -> bool | None:
        """Computed at the ends; else it depends."""
        last = self.compute_last and _is_last(step, steps)
        return True if step < self.warmup_steps or last else None


@dataclass(frozen=True)
class Threshold(Adaptive):
    """Computes a sample when a cheap indicator has drifted since it was last computed.

    The indicator is the relative L1 change of the hidden states in front of the skipped
    stages, from one step to the next, added up over the predicted steps (TeaCache, arXiv
    2411.19108; FirstBlockCache looks at the same place).

    Args:
        threshold: of the sum; smaller is more exact.
        warmup_steps, max_consecutive, compute_last: as for :class:`Interval`; and predicted
            steps in a row, of one sample, at most.
    """

    @property
    def watches(self) -> bool:
        """The change of the hidden states."""
        return True


@dataclass(frozen=True)
class Verified(Adaptive):
    """Predicts a sample, runs one stage on the prediction, and computes it if they disagree.

    The stage after the boundary is run on the predicted features; its output is compared
    with a prediction of the same output from that stage's own past (SpeCa, arXiv
    2509.11628). A rejected sample costs that stage once more.

    Args:
        threshold: of the relative L1 distance; smaller is more exact.
        warmup_steps, max_consecutive, compute_last: as for :class:`Threshold`.
    """

    @property
    def verifies(self) -> bool:
        """Every prediction."""
        return True


def walk(similarity: Sequence[Sequence[float]], gamma: float) -> tuple[int, ...]:
    """The greedy key steps of Step Rehash (arXiv 2411.01171, section 3.3).

    A step stays with the last key as long as their features are similar; the first that is
    not becomes the next key. The last step is a key.

    Args:
        similarity: ``S[i][j]`` of the features of steps ``i`` and ``j``, ``[K, K]``.
        gamma: the similarity that is enough.

    Raises:
        ValueError: the map is empty or not square, or gamma is above 1.
    """
    if gamma > 1:
        raise ValueError(f"walk: gamma is {gamma!r}; allowed: at most 1")
    steps = len(similarity)
    if not steps or any(len(row) != steps for row in similarity):
        raise ValueError("walk: the similarity map must be square and not empty")
    keys = [0]
    for i in range(steps):
        if similarity[i][keys[-1]] < gamma:
            keys.append(i)
    if keys[-1] != steps - 1:
        keys.append(steps - 1)
    return tuple(keys)
