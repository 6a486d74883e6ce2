"""Where a step is cut: the stages that a predicted step leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Boundaries that a family names itself.
DEFAULT, PUBLISHED = "default", "published"


@dataclass(frozen=True)
class Boundary:
    """The run of stages that is left out at predicted steps, and whose output is predicted.

    Stages and groups are called by their names in :func:`accelrt.summary`. What comes before
    ``first`` runs at every step, and so does what comes after ``last``.

    Args:
        last: stage or group whose output is predicted; ``"out"`` for that of the model.
        first: stage or group that begins the run; ``None`` for the earliest that leaves the
            later stages the skips that they need. An earlier one still, such as the first
            convolution of a UNet, makes those skips part of what is predicted.
    """

    last: str
    first: str | None = None

    def __post_init__(self) -> None:
        for name in ("last", "first"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "first" and value is None):
                raise ValueError(f"Boundary: {name} is {value!r}; allowed: the name of a stage")


@dataclass(frozen=True)
class Place:
    """A group in its stage.

    Args:
        stage, group: the objects.
    """

    stage: Any
    group: Any


def flat(stages: Sequence[Any]) -> tuple[Place, ...]:
    """All groups in order."""
    return tuple(Place(stage, group) for stage in stages for group in stage.groups)


def find(places: Sequence[Place], name: str) -> tuple[int, int]:
    """Index of the first group of a stage or group called ``name``, and of the one after it.

    Raises:
        ValueError: there is none; it names the stages.
    """
    for names in ([p.stage.name for p in places], [p.group.name for p in places]):
        found = [i for i, known in enumerate(names) if known == name]
        if found:
            return found[0], found[-1] + 1
    stages = dict.fromkeys(place.stage.name for place in places)
    raise ValueError(
        f"Boundary: no stage or group is called {name!r}; stages: {', '.join(stages)}; "
        f"groups: see accelrt.summary"
    )


@dataclass(frozen=True)
class Region:
    """A boundary as indices of groups: ``[begin, end)`` is left out.

    Args:
        begin: ``None`` until a computed step has shown how deep the stack of skips is.
        end: index of the first group after the run.
        least: the smallest ``begin``.
        check: index after the stage that follows, which verifies predictions.
    """

    begin: int | None
    end: int
    least: int
    check: int


def resolve(
    places: Sequence[Place], boundary: Boundary, *, watched: bool, features_from: int
) -> Region:
    """The indices of a boundary.

    Args:
        places: of the model.
        boundary: to be found there.
        watched: the output of what comes before is looked at, so there must be something:
            besides the embeddings, the first stage of an image transformer.
        features_from: stages after which there are hidden states.

    Raises:
        ValueError: a name that there is not, or a run without groups.
    """
    _, end = find(places, boundary.last)
    check = end
    while check < len(places) and places[check].stage is places[min(end, len(places) - 1)].stage:
        check += 1
    if boundary.first is not None:
        begin, _ = find(places, boundary.first)
        if begin >= end:
            raise ValueError(
                f"Boundary: {boundary.first!r} does not come before the end of {boundary.last!r}"
            )
        if watched and any(places[begin].stage is s for s in _first(places, features_from)):
            raise ValueError(
                f"Boundary: the policy watches the features before {boundary.first!r}, "
                f"and there are none"
            )
        return Region(begin, end, begin, check)
    if end == len(places) and not watched:
        return Region(0, end, 0, check)  # the whole model: nothing needs its embeddings
    least = 1 + max(i for i, p in enumerate(places) if p.stage is places[0].stage)
    if watched:
        # A stage besides the embeddings: the first convolution, or the first block.
        stage = places[least].stage
        least = 1 + max(i for i, p in enumerate(places) if p.stage is stage)
    if least >= end:
        raise ValueError(f"Boundary: nothing is left out before the end of {boundary.last!r}")
    return Region(None, end, least, check)


def _first(places: Sequence[Place], count: int) -> list[Any]:
    """The first stages."""
    stages: list[Any] = []
    for place in places:
        if not any(place.stage is stage for stage in stages):
            stages.append(place.stage)
    return stages[:count]


def begin_of(depths: Sequence[int], region: Region) -> int:
    """Where the run begins: from there to its end, no skip is touched that comes after it.

    Args:
        depths: of the stack of skips in front of each group, and after the last.
        region: whose ``begin`` is not known.
    """
    needed = depths[region.end]
    begin = region.end
    while begin > region.least and depths[begin - 1] >= needed:
        begin -= 1
    return begin
