"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class GroupPlan:
    """How one group is cut.

    Args:
        name, stage: of the group.
        slice_mib: MiB of scratch that its slices aim at; ``None`` for the fastest.
        bands: single images are cut where that is not enough.
        recompute: intermediates are computed twice.
        entry_bytes, peak_bytes: live activations when it begins, and at its worst.
        own_bytes: the worst of those that are not in the arena.
        seconds: the estimate of its time.
    """

    name: str
    stage: str
    slice_mib: float | None
    bands: bool
    recompute: bool
    entry_bytes: int
    peak_bytes: int
    own_bytes: int
    seconds: float


@dataclass(frozen=True)
class ComponentPlan:
    """How one model of a pipeline runs.

    Args:
        path: of the model in the pipeline.
        samples_per_pass: guidance halves and images that run together; ``None`` for all.
        recompute_skips: skips that are cheap to compute are computed again.
        groups: in order.
        limit_bytes: what its activations may take.
        peak_bytes: live activations at the peak, weights and inputs apart.
        own_bytes: the peak of those that are not in the arena.
        slab_bytes: of the arena.
        bound_bytes: the most that is alive at once in the arena; what the slab has above
            it is fragmentation.
        offsets: of the arena's buffers, in the order of their making.
        seconds, fastest_seconds: estimates for this plan, and for the fastest one.
        timeline: live bytes at the worst of each group, with the group's name.
        resident_bytes: weights that are on the device while it runs.
        reserve_bytes: for what the library needs inside of its operators, and for the
            call's arguments.
        graphs_bytes: of the pool of its CUDA graphs, estimated: what a pass needs beside the
            arena. It is held between passes, and a pass without a graph needs its own.
    """

    path: str
    samples_per_pass: int | None
    recompute_skips: bool
    groups: tuple[GroupPlan, ...]
    limit_bytes: int
    peak_bytes: int
    own_bytes: int
    slab_bytes: int
    bound_bytes: int
    offsets: tuple[int, ...]
    seconds: float
    fastest_seconds: float
    timeline: tuple[tuple[str, int], ...]
    resident_bytes: int = 0
    reserve_bytes: int = 0
    graphs_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that is there while it runs."""
        return self.needed_bytes + self.resident_bytes + self.reserve_bytes

    @property
    def needed_bytes(self) -> int:
        """:attr:`reserved_bytes` with the pool of the graphs: what a limit is for."""
        return self.reserved_bytes + self.graphs_bytes

    @property
    def reserved_bytes(self) -> int:
        """The arena and what comes beside it: what the process must have."""
        return self.slab_bytes + self.own_bytes

    @property
    def fragmentation(self) -> float:
        """The share of the slab above what is ever alive in it."""
        return self.slab_bytes / self.bound_bytes - 1.0 if self.bound_bytes else 0.0

    @property
    def binding(self) -> str:
        """The group that needs most beside the arena."""
        return max(self.groups, key=lambda g: g.own_bytes).name if self.groups else ""


@dataclass(frozen=True)
class Plan:
    """How a pipeline keeps a budget.

    Args:
        budget_bytes: what the call may take; ``None`` if it is free.
        weights: bytes of the weights by component.
        components: the models that run, one after the other.
        unplanned: models that run too, but of whose calls nothing is known ahead.
        stock: of the stock models by component, where they were looked at: live bytes over
            time, as :attr:`ComponentPlan.timeline`.
    """

    budget_bytes: int | None
    weights: dict[str, int]
    components: tuple[ComponentPlan, ...]
    unplanned: tuple[str, ...]
    stock: dict[str, tuple[tuple[str, int], ...]]

    @property
    def largest(self) -> ComponentPlan:
        """The model that needs most."""
        return max(self.components, key=lambda part: part.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """What the call needs."""
        return self.largest.total_bytes

    @property
    def binding(self) -> str:
        """What decides the peak: a component and its group."""
        return f"{self.largest.path or 'model'}: {self.largest.binding}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "peak_bytes": self.peak_bytes, "binding": self.binding}

    def __rich__(self) -> Text:
        """The same for ``rich.print``, which would show the attributes."""
        from rich.text import Text

        return Text(str(self))

    def __str__(self) -> str:
        from .render import plan_text

        return plan_text(self)
