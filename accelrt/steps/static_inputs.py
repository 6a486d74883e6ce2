"""Arguments of a call in memory that stays, from which a graph reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from accelrt.groups.capture import NotCapturable

_VALUES = (type(None), bool, int, float, str, torch.dtype)
#: Arguments that change from step to step, and so are tensors for a graph where they are numbers.
_MOVING = ("timestep",)


def described(value: Any, name: str = "") -> Any:
    """What a graph takes for granted of the arguments of a call, to be compared and hashed.

    Of tensors their form, of other values the values; of a timestep that is a number, its type.

    Args:
        value: an argument, or a nest of dictionaries, lists and tuples of them.
        name: of it, for the error.

    Raises:
        NotCapturable: something in it is neither a tensor nor a plain value.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise NotCapturable(f"{name} is a {type(value).__name__}")
        return tuple(value.shape), value.stride(), value.dtype
    if _is_moving(value, name):
        return type(value)
    if isinstance(value, _VALUES):
        return type(value), value
    if type(value) is dict:
        return tuple((key, described(item, str(key))) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(described(item, name) for item in value)
    raise NotCapturable(f"{name} is a {type(value).__name__}")


def _is_moving(value: Any, name: str) -> bool:
    return name in _MOVING and type(value) in (int, float)


class StaticInputs:
    """Buffers in the form of the arguments of a call.

    Args:
        given: the arguments.
        device: of the call; tensors of other devices (a timestep on the CPU) come here.
        fixed: names of arguments that nobody writes to: they are copied only when another
            object takes their place.

    Attributes:
        bytes: of the buffers.
    """

    def __init__(
        self, given: dict[str, Any], device: torch.device, fixed: tuple[str, ...] = ()
    ) -> None:
        self._fixed: dict[str, Any] = {}
        self._names = fixed
        # Buffers live longer than a caller's inference mode, and are written to outside of it.
        with torch.inference_mode(False):
            self._buffers = {name: _buffer(item, name, device) for name, item in given.items()}
        tensors = list(_tensors(self._buffers))
        self.bytes = sum(t.numel() * t.element_size() for t in tensors)

    def fill(self, given: dict[str, Any]) -> None:
        """Copy the arguments of a call of the same form."""
        for name, item in given.items():
            if name in self._names:
                if self._fixed.get(name) is item:
                    continue
                self._fixed[name] = item  # held, so that no other takes its identity
            _copy(self._buffers[name], item)

    def given(self) -> dict[str, Any]:
        """The buffers as arguments, in containers that may be emptied."""
        return {name: _renewed(item) for name, item in self._buffers.items()}


def _buffer(value: Any, name: str, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        repeats = any(
            stride == 0 and size > 1
            for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        if repeats:
            return torch.empty(value.shape, dtype=value.dtype, device=device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if _is_moving(value, name):
        # As the models do it with a number.
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        return torch.empty((), dtype=dtype, device=device)
    if isinstance(value, dict):
        return {key: _buffer(item, str(key), device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_buffer(item, name, device) for item in value])
    return value


def _copy(buffer: Any, value: Any) -> None:
    if isinstance(buffer, Tensor):
        if isinstance(value, Tensor):
            buffer.copy_(value)
        else:
            buffer.fill_(value)
    elif isinstance(buffer, dict):
        for key, item in buffer.items():
            _copy(item, value[key])
    elif isinstance(buffer, (list, tuple)):
        for item, source in zip(buffer, value, strict=True):
            _copy(item, source)


def _renewed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _renewed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_renewed(item) for item in value])
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
