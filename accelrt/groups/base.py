"""A group: consecutive operators through which one slice travels whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn

from accelrt.config import Config
from accelrt.memory.arena import keep_to_plan

from .recognise import is_plain
from .state import State

FUSED, SLICED, UNTOUCHED = "fused", "sliced", "untouched"


@dataclass
class Status:
    """How a group runs.

    Args:
        kind: ``"fused"`` (fused operators on slices), ``"sliced"`` (the model's own
            modules on slices, at least in part) or ``"untouched"`` (as it came).
        reason: why it is not fused, or a remark; may be empty.
        axis: what is sliced: ``"frames"``, ``"pixels"``, ``"samples"``, ``"images"`` or
            ``""``.
        length: items per slice; ``None`` if it is chosen at the first call.
        total: items in all, once the group has run.
    """

    kind: str
    reason: str = ""
    axis: str = ""
    length: int | None = None
    total: int | None = None


class Group(ABC):
    """One operator group of a stage, on one module of the model.

    Args:
        name: path of the module in the model.
        module: the stock module whose computation the group performs.
        config: slice lengths and switches.
    """

    axis = ""
    classes: tuple[type, ...] = ()
    #: ``recompute`` decides whether its skip is kept, which later groups feel.
    makes_skip = False
    #: It decides by the values of a call, see :meth:`decided`.
    decides = False

    def __init__(self, name: str, module: nn.Module, config: Config) -> None:
        self.name = name
        self.module = module
        self.config = config
        self.length: int | None = None
        self.total: int | None = None
        self.left_alone = ""

    def configure(self, config: Config) -> None:
        """Set the slice lengths and switches anew."""
        self.config = config

    @abstractmethod
    def run(self, state: State) -> None:
        """Replace ``state.hidden`` by the group's output."""

    def __call__(self, state: State) -> None:
        """Run the group and forget why an earlier call was left alone."""
        self.left_alone = ""
        self.run(state)
        keep_to_plan()

    def unrecognised(self) -> str:
        """Why the whole module must run as it came; empty if it need not."""
        if self.classes and not is_plain(self.module, *self.classes):
            return container_reason(self.module, self.classes)
        return ""

    def decided(self, inputs: dict[str, Any], frames: int) -> Hashable:
        """What the group decides by the values of a call's arguments. May wait for the device.

        A captured graph holds for calls of which this is the same.
        """
        return None

    def decide_alike(self, inputs: dict[str, Any], copies: dict[str, Any], frames: int) -> None:
        """Decide for copies of a call's arguments as for ``inputs``, without looking at them."""
        return None

    @abstractmethod
    def unfused(self) -> list[str]:
        """Parts that run through their own modules although a fused operator exists."""

    def configured_length(self) -> int | None:
        """The length that the config asks for."""
        return None

    def status(self) -> Status:
        """The present status, judged from the modules as they are now."""
        reason = self.left_alone or self.unrecognised()
        if reason:
            return Status(UNTOUCHED, reason)
        length = self.configured_length() if self.length is None else self.length
        if not self.config.fuse:
            return Status(SLICED, "fuse is False", self.axis, length, self.total)
        parts = self.unfused()
        kind = SLICED if parts else FUSED
        return Status(kind, "; ".join(parts), self.axis, length, self.total)

    def measured(self, length: int, total: int) -> int:
        """Remember the slice length of this call for the summary."""
        self.length, self.total = length, total
        return length


def by_name(module: nn.Module, known: type, **arguments: Any) -> Any:
    """Call a module as it came: of the ``known`` class by position, else by name.

    By position is what most stock blocks do and hooks expect; wrappers, such as those of
    FreeNoise's split inference, tell the arguments apart by their names.
    """
    if type(module) is known:
        return module(*arguments.values())
    return module(**arguments)


def container_reason(module: nn.Module, classes: tuple[type, ...]) -> str:
    """Why a container is not recognised: another class, or something attached to it."""
    if type(module) not in classes:
        return f"{type(module).__name__} is not a known class"
    if "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward of its own (a hook)"
    return f"{type(module).__name__} has forward hooks"


class StockGroup(Group):
    """Base of groups that always run the module as it came."""

    why = ""

    def unfused(self) -> list[str]:
        """Nothing is fused here by design."""
        return []

    def status(self) -> Status:
        """Always untouched."""
        return Status(UNTOUCHED, self.left_alone or self.why)
