"""One pass through the groups of a denoiser, in pieces and for some rows of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelrt.groups import State
from accelrt.groups.state import channels_last
from accelrt.memory import arena

from .boundary import Place, Region
from .features import Unit

if TYPE_CHECKING:
    from accelrt.models.forward import Cut, Forward


class Passage:
    """One pass through the groups of a model, for all rows of a part or for some.

    Args:
        forward: of the model.
        places: its groups.
        region: of them that may be left out.
        inputs: of the pass.
        batch: its rows.
        rows: which of the part's they are, as a tensor; ``None`` for all.
        numbers: the same as numbers.
        cut: of the call, where the pass may be a graph.
    """

    def __init__(
        self,
        forward: Forward,
        places: tuple[Place, ...],
        region: Region,
        inputs: dict[str, Any],
        batch: int,
        rows: Tensor | None = None,
        numbers: tuple[int, ...] | None = None,
        cut: Cut | None = None,
    ) -> None:
        self.forward = forward
        self.places = places
        self.region = region
        self.inputs = inputs
        self.batch = batch
        self.rows = rows
        self.numbers = tuple(range(batch)) if numbers is None else numbers
        self.cut = cut

    def on(self, inputs: dict[str, Any]) -> Passage:
        """The same with copies of its arguments."""
        return Passage(
            self.forward, self.places, self.region, inputs, self.batch, self.rows, self.numbers
        )

    def at(self, region: Region) -> Passage:
        """The same with another region."""
        return Passage(
            self.forward, self.places, region, self.inputs, self.batch, self.rows, self.numbers
        )

    def part(self, rows: tuple[int, ...]) -> Passage | None:
        """The same for some rows of it; ``None`` if its arguments cannot be told apart by rows."""
        from accelrt.models.passes import some_rows

        family = self.forward.family
        inputs = some_rows(self.inputs, self.batch, rows, frames=family.frames_of(self.inputs))
        if isinstance(inputs, str):
            return None
        leave_schedule()
        index = torch.tensor(rows, device=self.inputs[family.input_name].device)
        return Passage(self.forward, self.places, self.region, inputs, len(rows), index, rows)

    def positions(self, units: list[Unit]) -> Tensor | None:
        """Where the rows of some units are among those of this run; ``None`` for all in order."""
        wanted = rows_in(units)
        if wanted == self.numbers:
            return None
        at = {row: i for i, row in enumerate(self.numbers)}
        device = self.inputs[self.forward.family.input_name].device
        return torch.tensor([at[row] for row in wanted], device=device)

    def head(self) -> State:
        """The state in front of the left-out stages; at the start where they are not known."""
        # Lists are for the stages to empty (T2I-Adapter), and may be needed again.
        inputs = {k: list(v) if type(v) is list else v for k, v in self.inputs.items()}
        state = self.forward.family.begin(self.forward.module, inputs)
        if self.region.begin is not None:
            self.stages(state, 0, self.region.begin)
        return state

    def stages(self, state: State, start: int, stop: int) -> int:
        """Run groups; returns the least depth of the stack of skips on the way."""
        observer = self.forward.observer
        lowest = len(state.skips)
        for place in self.places[start:stop]:
            if observer is None:
                place.group(state)
            else:
                observer.enter(place.stage, place.group, state)
                place.group(state)
                observer.leave(place.stage, place.group, state)
            lowest = min(lowest, len(state.skips))
        return lowest

    def finish(self, state: State, start: int) -> Tensor:
        """Run the rest; the output."""
        self.stages(state, start, len(self.places))
        family = self.forward.family
        if start >= len(self.places) and state.hidden is not None and state.hidden.dim() == 4:
            state.hidden = channels_last(state.hidden)
        return family.finish(self.forward.module, state)


def leave_schedule() -> None:
    """From here on the run makes other buffers than its plan: they go where they fit."""
    place = arena.current()
    if place is not None:
        place.schedule(None)


def rows_in(units: Sequence[Unit]) -> tuple[int, ...]:
    """Rows of some units, in order."""
    return tuple(sorted(row for unit in units for row in unit.rows))


def spread(out: Tensor | None, some: Tensor, rows: tuple[int, ...], batch: int) -> Tensor:
    """Write the output of some rows into that of all."""
    if out is None:
        out = some.new_empty((batch, *some.shape[1:]))
    out[torch.tensor(rows, device=out.device)] = some
    return out
