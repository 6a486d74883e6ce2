"""Whether a model is as it was when a graph was captured, and whether one may be captured at all.

A graph holds addresses and Python values of the time of its capture. The guard writes down
everything about the modules that can change either: it is read at every call, so it looks
things up in dictionaries that it keeps, and builds nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from diffusers.models import attention_processor as processors
from torch import Tensor, nn

# Libraries whose modules compute with their weights and attributes alone.
_KNOWN = ("torch.nn.modules.", "torch.nn.parameter", "diffusers.models.", "accelrt.")
# Among them, those that hold values elsewhere: scales of adapters, weights of other forms.
_FOREIGN = ("diffusers.models.lora",)
# Processors without values of their own.
_STATELESS = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.FusedAttnProcessor2_0,
)
_PLAIN = (nn.Parameter, Tensor)
_SCALARS = (bool, int, float, str, type(None))
_OFFLOADING = ("_hf_hook", "_diffusers_hook")
_MISSING = object()


class ModelGuard:
    """What is known of some models.

    Args:
        roots: the models whose forwards a graph may hold. Their own forward is ours, and
            hooks around it stay outside of the graph.

    Attributes:
        reason: why they cannot be part of a graph; empty if they can.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.reason = ""
        # The models hold their forwards, which hold this: no way back from here.
        self._roots: list[tuple[weakref.ref[nn.Module], int, list[tuple[str, Any]]]] = []
        self._attributes: list[tuple[dict[str, Any], int]] = []
        self._values: list[tuple[dict[str, Any], str, Any]] = []
        self._children: list[tuple[dict[str, Any], tuple[int, ...]]] = []
        self._hooks: list[tuple[dict[int, Any], int]] = []
        self._weights: list[tuple[dict[str, Any], str, tuple[Any, ...]]] = []
        for root in roots:
            for name, module in root.named_modules():
                self._add(name, module)

    def _add(self, name: str, module: nn.Module) -> None:
        own = module.__dict__
        if not self.reason:
            self.reason = _unknown(name, module)
        values = [(k, v) for k, v in own.items() if _is_value(v) or k == "processor"]
        if name:
            self._attributes.append((own, len(own)))
            self._values += [(own, key, value) for key, value in values]
        else:
            self._roots.append((weakref.ref(module), len(own), values))
        if module._modules:
            self._children.append((module._modules, tuple(map(id, module._modules.values()))))
        if name:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                self._hooks.append((hooks, len(hooks)))
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                self._weights.append((tensors, key, _identity(tensor)))

    def changed(self) -> str:
        """What is not as it was; empty if everything is."""
        for reference, count, values in self._roots:
            root = reference()
            if root is None or len(root.__dict__) != count:
                return "attributes of the model"
            for key, value in values:
                found = root.__dict__.get(key, _MISSING)
                if found is not value and found != value:
                    return key
        for own, count in self._attributes:
            if len(own) != count:
                return "attributes of a module"
        for own, key, value in self._values:
            found = own.get(key, _MISSING)
            if found is not value and found != value:
                return key
        for modules, children in self._children:
            if tuple(map(id, modules.values())) != children:
                return "modules"
        for hooks, count in self._hooks:
            if len(hooks) != count:
                return "hooks"
        for tensors, key, identity in self._weights:
            if _identity(tensors.get(key)) != identity:
                return "weights"
        return ""


def _is_value(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(item) in _SCALARS for item in value)
    return type(value) in _SCALARS


def _identity(tensor: Tensor | None) -> tuple[Any, ...]:
    """Changes with the place, the type and, as far as torch counts them, the values."""
    if tensor is None:
        return ()
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()


def _unknown(name: str, module: nn.Module) -> str:
    """Why a module cannot be part of a graph; empty if it can."""
    kind = type(module)
    what = f"{name}: {kind.__name__}" if name else kind.__name__
    if any(key in module.__dict__ for key in _OFFLOADING):
        return f"{what} has hooks that move or cast weights"
    if name and "forward" in module.__dict__:
        return f"{what} has a forward of its own"
    if name and (module._forward_hooks or module._forward_pre_hooks):
        return f"{what} has forward hooks"
    if not kind.__module__.startswith(_KNOWN) or kind.__module__.startswith(_FOREIGN):
        return f"{what} of {kind.__module__.partition('.')[0]} may hold values elsewhere"
    processor = module.__dict__.get("processor")
    if processor is not None and type(processor) not in _STATELESS:
        return f"{what} has a {type(processor).__name__}, which may hold values of its own"
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and type(tensor) not in _PLAIN:
            return f"{what} has weights of type {type(tensor).__name__}"
    return ""
