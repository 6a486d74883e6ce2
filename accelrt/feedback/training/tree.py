"""States of trainings as safetensors: nested values as JSON in the header, tensors beside it.

The state of an optimizer is a tree of dicts (some with integers for keys), lists and tensors. What
``torch.save`` makes of it is a pickle; this is data only, and nothing in it names code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

_TENSOR, _TUPLE, _DICT = "$tensor", "$tuple", "$dict"
_HEADER = "state"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values.

    Args:
        path: of the file; it is not complete before the call returns.
        state: keys of dicts are strings or integers.

    Raises:
        TypeError: it holds something else.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    header = json.dumps(_packed(state, tensors))
    save_file(tensors, path, metadata={_HEADER: header})


def load(path: Path) -> dict[str, Any]:
    """The inverse of :func:`save`; tensors are on the CPU.

    Raises:
        ValueError: the file is none of ours.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = _unpacked(header, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"it holds no state of a training: {error}") from error
    if not isinstance(state, dict):
        raise ValueError("it holds no state of a training")
    return state


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy: the format refuses tensors that share memory, as tied weights do.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _packed(item, tensors) for key, item in value.items()}
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"keys of a state are strings or integers; got {[*value]}")
        return {_DICT: [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(item, tensors) for item in value[_TUPLE])
    if _DICT in value:
        return {key: _unpacked(item, tensors) for key, item in value[_DICT]}
    return {key: _unpacked(item, tensors) for key, item in value.items()}
