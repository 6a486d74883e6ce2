"""Stages, and the executor that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from accelrt.groups import Group, State


@dataclass(frozen=True)
class Stage:
    """A named run of groups between two well-defined states.

    Args:
        name: such as ``"down_blocks.0"``.
        groups: run in order.
    """

    name: str
    groups: tuple[Group, ...]

    def __call__(self, state: State) -> State:
        """Run the groups on ``state`` in place and return it."""
        for group in self.groups:
            group(state)
        return state


class Observer(Protocol):
    """Is told what runs: profilers, tracers, memory tracking."""

    def enter(self, stage: Stage, group: Group, state: State) -> None:
        """``group`` of ``stage`` is about to run on ``state``."""

    def leave(self, stage: Stage, group: Group, state: State) -> None:
        """``group`` has run; ``state.hidden`` is its output."""


class Watcher(Protocol):
    """Is told of the calls of a model: profilers."""

    def begin(self) -> None:
        """A call of the model begins."""

    def end(self) -> None:
        """The call has ended, also by an exception."""


def execute(stages: Sequence[Stage], state: State, observer: Observer | None = None) -> State:
    """Run ``stages`` in order. Without an observer this is a plain loop.

    An observer that keeps ``state.hidden`` must call ``state.hold`` on it.
    """
    if observer is None:
        for stage in stages:
            stage(state)
        return state
    for stage in stages:
        for group in stage.groups:
            observer.enter(stage, group, state)
            group(state)
            observer.leave(stage, group, state)
    return state
