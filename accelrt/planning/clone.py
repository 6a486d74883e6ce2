"""A model's double on the meta device: its modules without its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.models.family import Family
from accelrt.models.forward import Forward

# What offloading and casting leave on an instance, beside a forward of their own.
_PLACING = ("_hf_hook", "_old_forward", "_diffusers_hook")


@dataclass(frozen=True)
class Double:
    """A forward on a double.

    Args:
        forward: it holds the module weakly.
        module: its weights are meta tensors.
    """

    forward: Forward
    module: nn.Module


def double_of(module: nn.Module, family: Family, config: Config, path: str) -> Double:
    """What a plan looks at in place of ``module``, which may be wrapped."""
    clone = meta_clone(module)
    clone.__dict__.pop("forward", None)
    return Double(Forward(clone, family, config, path), clone)


def meta_clone(module: nn.Module) -> Any:
    """A copy of ``module`` whose parameters and buffers are meta tensors.

    Adapters and processors are copied with the modules. Hooks are there, since a module
    with hooks runs as it came, but do nothing: they would meet meta tensors. So it is with
    what moves or casts weights: the stock forward runs in its place. Costs the time of
    copying some Python objects, and no memory.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = _on_meta(tensor)
    for part in module.modules():
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            memo[id(hook)] = _no_hook
        forward = part.__dict__.get("forward")
        for value in (forward, *(part.__dict__.get(name) for name in _PLACING)):
            if isinstance(value, Forward) or (value is not None and _is_placed(part)):
                memo[id(value)] = value  # by reference; replaced below
    clone = copy.deepcopy(module, memo)
    for part, double in zip(module.modules(), clone.modules(), strict=True):
        if isinstance(double.__dict__.get("forward"), Forward):
            del double.__dict__["forward"]
        elif _is_placed(part) and "forward" in double.__dict__:
            double.__dict__["forward"] = type(double).forward.__get__(double)
        double.__dict__.pop("_old_forward", None)
        dtype = _computes_in(part)
        if dtype is not None:
            nn.Module.to(double, dtype=dtype)
    return clone


def _no_hook(*_: Any, **__: Any) -> None:
    return None


def _is_placed(part: nn.Module) -> bool:
    return any(name in part.__dict__ for name in _PLACING)


def _computes_in(part: nn.Module) -> torch.dtype | None:
    """The dtype to which layerwise casting brings the weights of a module when it runs."""
    registry = part.__dict__.get("_diffusers_hook")
    for hook in registry.hooks.values() if registry is not None else ():
        dtype = getattr(hook, "compute_dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


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


def fingerprint(module: nn.Module) -> int:
    """Changes with what a plan depends on: modules, processors, hooks, forwards of instances."""
    return hash(
        tuple(
            (
                id(part),
                type(getattr(part, "processor", None)),
                "forward" in part.__dict__,
                bool(part._forward_hooks or part._forward_pre_hooks),
            )
            for part in module.modules()
        )
    )
