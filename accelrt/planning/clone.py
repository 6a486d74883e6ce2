"""A model's double on the meta device: its modules without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

# What offloading leaves on an instance: it moves weights, which a double has none of.
_PLACING = ("_hf_hook", "_old_forward", "_diffusers_hook")


def meta_clone(module: nn.Module) -> Any:
    """A copy of ``module`` whose parameters and buffers are meta tensors.

    Adapters, processors and hooks are copied with the modules; hooks that only move
    weights are left out. A forward of ours becomes one of the copy. Costs the time of
    copying some Python objects, and no memory.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = _on_meta(tensor)
    for part in module.modules():
        for name in _PLACING:
            value = part.__dict__.get(name)
            if value is not None and name != "_old_forward":
                memo[id(value)] = None
    clone = copy.deepcopy(module, memo)
    for part in clone.modules():
        for name in _PLACING:
            part.__dict__.pop(name, None)
    return clone


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def inputs_on_meta(value: Any) -> Any:
    """The arguments of a call with meta tensors in place of tensors."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: inputs_on_meta(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(inputs_on_meta(item) for item in value)
    return value
