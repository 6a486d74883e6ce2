"""What a model computes from its conditioning alone, made once per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelrt.models.family import Family


#: Rows from which on products of float32 matrices do not depend on how many there are.
ENOUGH_ROWS = 6


@dataclass
class Conditions:
    """Of one part of a call: valid while its conditioning is the same.

    Args:
        key: tells whether it is.
        kept: the conditioning's tensors, so that their addresses are not given away.
        times: that are known ahead.
        made: what the family made for each of them, by name of the group.
        keys: the projected caption, and keys and values of the cross-attention layers, by name
            of the group.
        passes: that have run; the first one makes ``keys``.
    """

    key: Any
    kept: list[Tensor]
    times: dict[float, int] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    passes: int = 0

    @property
    def bytes(self) -> int:
        """What it takes."""
        found = [*self.made.values(), *(t for pair in self.keys.values() for t in pair)]
        return sum(t.numel() * t.element_size() for t in found)

    def released(self) -> None:
        """The request is over: nothing of it is of use to another."""

    def at(self, time: float, rows: int) -> dict[str, Tensor]:
        """What was made for a timestep, ``[rows, ...]`` by name of the group; or nothing."""
        index = self.times.get(time)
        if index is None:
            return {}
        return {name: t[index * rows : (index + 1) * rows] for name, t in self.made.items()}


def identity(family: Family, inputs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A key of the conditioning of a call, and its tensors.

    Two calls with the same key have the same conditioning, if the tensors of the first still
    live. Of inference tensors, whose changes nobody counts, the key is never the same.
    """
    found: list[Tensor] = []
    parts: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
            version = object() if value.is_inference() else value._version
            parts.append((value.data_ptr(), tuple(value.shape), value.stride(), version))
        elif isinstance(value, dict):
            for item in value.values():
                add(item)
        else:
            parts.append(None)

    for name in family.conditioning:
        add(inputs.get(name))
    x: Tensor = inputs[family.input_name]
    parts.append((x.shape, x.dtype, x.device))
    return tuple(parts), found


def times_together(times: Sequence[float], batch: int, dtype: torch.dtype) -> int:
    """For how many timesteps to compute at once what is to equal one call for each.

    Products of float32 matrices with few rows are summed in another order than those of many.
    """
    return 1 if dtype == torch.float32 and batch < ENOUGH_ROWS else len(times)


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, one after the other along the first axis."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def tiled(inputs: dict[str, Any], names: Sequence[str], batch: int, times: int) -> dict[str, Any]:
    """The arguments ``names`` of a call, ``times`` times one after the other along the batch."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
            return value.repeat(times, *[1] * (value.dim() - 1))
        if isinstance(value, dict):
            return {key: repeat(item) for key, item in value.items()}
        return value

    return {name: repeat(inputs.get(name)) for name in names}


def rows_of_times(times: Sequence[float], batch: int, like: Any) -> Tensor:
    """Each of ``times`` for all samples of a batch, ``[len(times) * B]``, as ``like`` is.

    Of integers the nearest, as in training.
    """
    given = like if isinstance(like, Tensor) else torch.tensor(like)
    rows = torch.tensor(times, dtype=torch.float64).repeat_interleave(batch)
    return (rows if given.is_floating_point() else rows.round()).to(given)
