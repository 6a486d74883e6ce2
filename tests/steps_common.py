"""Step policies against a truth of their own: stock models whose layers' outputs are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from zoo_pipelines import Family

import accelrt
from accelrt.steps import Rehash
from accelrt.wrap import forwards

STEPS = 7


def stepper_of(pipe: Any) -> Any:
    """The stepper of a wrapped pipeline's denoiser."""
    return next(f.stepper for _, f in forwards(pipe) if f.stepper is not None)


def wrapped_run(family: Family, pipe: Any, rehash: Rehash | None, **arguments: Any) -> Tensor:
    """The output of a wrapped pipeline, which is unwrapped again."""
    accelrt.wrap(pipe, rehash=rehash)
    try:
        return family.run(pipe, **{"num_inference_steps": STEPS, **arguments})
    finally:
        accelrt.unwrap(pipe)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _like(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, dict):  # an output class of diffusers
        return type(output)(**{next(iter(output)): tensor})
    return (tensor, *output[1:])


@contextmanager
def predicted_layers(
    model: nn.Module, last: str, rehash: Rehash, times: list[float], base: str | None = None
) -> Iterator[None]:
    """The stock model, whose module ``last`` gives predictions at steps that are not computed.

    Everything runs at every step, so this is slow, simple, and shares nothing with the
    executor but the weights of the predictor.

    Args:
        model: a stock denoiser.
        last: path of the module whose output is replaced.
        rehash: static policy, and predictor.
        times: of the steps.
        base: path of the module in front of which the residual begins, if one is predicted.
    """
    state: dict[str, Any] = {"step": -1, "kept": [], "base": None}

    def begins(*_: Any) -> None:
        state["step"] += 1

    def keeps_base(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state["base"] = (args[0] if args else kwargs["hidden_states"]).clone()

    def replaces(_module: Any, _args: Any, output: Any) -> Any:
        step, x = state["step"], _tensor(output)
        base = 0.0 if state["base"] is None else state["base"]
        kept: list[tuple[float, Tensor]] = state["kept"]
        if rehash.policy.fixed(step, len(times)):
            kept.append((times[step], x - base))
            del kept[: -rehash.predictor.points]
            return None
        past = [time for time, _ in kept]
        weights = rehash.predictor.weights(past, times[step], step)
        total = sum(w * f for w, (_, f) in zip(weights, kept, strict=True))
        return _like(output, base + total)

    handles = [
        model.register_forward_pre_hook(begins),
        model.get_submodule(last).register_forward_hook(replaces),
    ]
    if base is not None:
        first = model.get_submodule(base)
        handles.append(first.register_forward_pre_hook(keeps_base, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def timesteps(pipe: Any, steps: int = STEPS) -> list[float]:
    """Of the pipeline's scheduler, as its last call set them."""
    assert len(pipe.scheduler.timesteps) == steps
    return [float(t) for t in pipe.scheduler.timesteps]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
