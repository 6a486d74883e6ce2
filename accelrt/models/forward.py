"""The callable that stands in for a model's forward while it is wrapped."""

from __future__ import annotations

import inspect
import pickle
import weakref
from typing import Any

import torch
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from accelrt.config import Config

from .family import Family, random_modules
from .stages import Observer, Stage, execute


class Forward:
    """Runs a module by its family description; set as the instance's ``forward``.

    The stock forward runs instead, unchanged, where the description does not apply:
    when gradients are needed, when dropout is active, under autocast, for dtypes and
    devices without kernels. ``stock_reason`` says why, for the summary.

    Args:
        module: the module whose forward this is; kept by weak reference.
        family: how to run it.
        config: slice lengths and switches.
        path: of the module in the model, ``""`` for the model itself.
    """

    def __init__(self, module: nn.Module, family: Family, config: Config, path: str) -> None:
        self._module = weakref.ref(module)
        self.family = family
        self.config = config
        self.path = path
        self.observer: Observer | None = None
        self.stock_reason = ""
        self.replaced: Any = None
        self._structure: tuple[Any, ...] | None = None
        self._stages: tuple[Stage, ...] = ()
        self._random: list[nn.Module] = []
        self._signature = inspect.signature(type(module).forward)
        self.__name__ = "forward"
        self.__doc__ = type(module).forward.__doc__

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        module = self._module()
        if module is None:
            raise RuntimeError("the wrapped module no longer exists")
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(self._signature.parameters.values())[1:]
        return self._signature.replace(parameters=parameters)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """A forward for the copy of the module, which is being made."""
        copied = memo.get(id(self.module))
        if copied is None:
            raise RuntimeError("copy the wrapped module, not its forward")
        return Forward(copied, self.family, self.config, self.path)

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            f"a wrapped {type(self.module).__name__} cannot be pickled; call accelrt.unwrap first"
        )

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the module as it is now; the same objects until it changes."""
        module = self.module
        structure = self.family.structure(module)
        if structure != self._structure:
            self._stages = self.family.stages(module, self.config)
            self._random = random_modules(module)
            self._structure = structure
        return self._stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with its signature and return type."""
        module = self.module
        stock = type(module).forward
        try:
            bound = self._signature.bind(module, *args, **kwargs)
        except TypeError:
            return stock(module, *args, **kwargs)  # raises what the stock model raises
        bound.apply_defaults()
        inputs = dict(bound.arguments)
        inputs.pop("self")
        stages = self.stages()
        self.stock_reason = self._declines(module, inputs)
        if self.stock_reason:
            return stock(module, *args, **kwargs)
        run = _run if self.family.lora_scale_kwargs is None else _scaled(self.family)
        return run(module, self, stages, **inputs)

    def _declines(self, module: nn.Module, inputs: dict[str, Any]) -> str:
        reason = self.family.declines(module, inputs)
        if not reason and any(m.training for m in self._random):
            reason = "dropout is active"
        if not reason and torch.is_grad_enabled() and _needs_grad(module, inputs):
            reason = "gradients are needed"
        return reason

    def run(self, stages: tuple[Stage, ...], inputs: dict[str, Any]) -> Any:
        """Run all stages on ``inputs``, part by part if the family says so."""
        module, family = self.module, self.family
        parts = family.parts(inputs, self.config)
        if len(parts) == 1:
            state = execute(stages, family.begin(module, inputs), self.observer)
            return family.finish(module, state)
        out: Tensor | None = None
        start = 0
        total = inputs[family.input_name].shape[0]
        for part in parts:
            state = execute(stages, family.begin(module, part), self.observer)
            y = family.finish(module, state)
            if out is None:
                out = y.new_empty((total, *y.shape[1:]))
            out[start : start + y.shape[0]] = y
            start += y.shape[0]
        return out


def _run(module: nn.Module, forward: Forward, stages: tuple[Stage, ...], **inputs: Any) -> Any:
    with torch.no_grad():
        return forward.run(stages, inputs)


def _scaled(family: Family) -> Any:
    """``_run`` with LoRA layers scaled as diffusers does for the stock forward."""
    assert family.lora_scale_kwargs is not None
    return apply_lora_scale(family.lora_scale_kwargs)(_run)


def _needs_grad(module: nn.Module, inputs: dict[str, Any]) -> bool:
    values = inputs.values()
    return any(isinstance(v, Tensor) and v.requires_grad for v in values) or any(
        p.requires_grad for p in module.parameters()
    )
