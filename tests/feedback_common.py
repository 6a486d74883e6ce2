"""Feedback modules for the small pipelines, and a truth that shares nothing with the executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import model_zoo as zoo
import torch
import zoo_pixart
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from zoo_pipelines import FAMILIES

import accelrt
from accelrt.feedback import FeedbackModule, FeedbackSchedule

STANDS_FOR = 8
TIMES = (999, 700, 420, 200, 60)
MASK = (True, True, False, True, True)
NAMES = ("dit", "pixart-alpha", "pixart-sigma")


def schedule(
    times: tuple[int, ...] | None = TIMES, ahead: float = 0.0, mask: tuple[bool, ...] = MASK
) -> dict[str, Any]:
    """Five outer steps for eight, four of them with feedback."""
    return {str(STANDS_FOR): FeedbackSchedule(STANDS_FOR, mask, times, ahead).to_dict()}


def module_for(pipe: Any, scale: float = 0.3, **settings: Any) -> FeedbackModule:
    """A loop of the second block of three, with random weights; ``scale`` 0 as before training."""
    settings = {"start": 1, "length": 1, "schedules": schedule(), **settings}
    module = FeedbackModule.from_backbone(pipe.transformer, **settings)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.block.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        module.scales.copy_(scale * torch.randn(module.scales.shape, generator=generator))
    return module


def model_and_inputs(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    if name == "dit":
        labels = torch.tensor([1, 1000, 7, 3])[:batch]
        times = torch.full((batch,), 420)
        x = zoo.normal(batch, 4, 8, 8, seed=3)
        return zoo.tiny_dit(), {"hidden_states": x, "timestep": times, "class_labels": labels}
    model = zoo_pixart.alpha_1024() if name == "pixart-alpha" else zoo_pixart.tiny_pixart()
    inputs = zoo_pixart.inputs(batch, 8, 8)
    inputs["timestep"] = torch.full((batch,), 420)
    if name == "pixart-alpha":
        inputs["added_cond_kwargs"] = zoo_pixart.conditions(batch)
    return model, inputs


class Box:
    """What :func:`module_for` needs of a pipeline."""

    def __init__(self, model: Any) -> None:
        self.transformer = model


def pipeline(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """One of ``NAMES``, with DPM-Solver++."""
    pipe = FAMILIES[name].build(dtype)
    pipe.scheduler = DPMSolverMultistepScheduler()
    return pipe


def run(name: str, pipe: Any, **arguments: Any) -> Tensor:
    """The latents of a call with ``STANDS_FOR`` steps."""
    return FAMILIES[name].run(pipe, **{"num_inference_steps": STANDS_FOR, **arguments})


def wrapped(name: str, pipe: Any, module: FeedbackModule, **settings: Any) -> Tensor:
    """The latents of a wrapped call; the pipeline is unwrapped again."""
    accelrt.wrap(pipe, feedback=module, **settings)
    try:
        return run(name, pipe)
    finally:
        accelrt.unwrap(pipe)


@contextmanager
def outer_steps(pipe: Any, times: tuple[int, ...] | None = TIMES) -> Iterator[None]:
    """Meanwhile the pipeline's scheduler takes these timesteps, or five of its own."""
    scheduler = pipe.scheduler
    inner = scheduler.set_timesteps

    def set_timesteps(*_: Any, device: Any = None, **__: Any) -> None:
        if times is None:
            inner(len(MASK), device=device)
        else:
            inner(timesteps=list(times), device=device)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def truth(
    name: str, pipe: Any, module: FeedbackModule, times: tuple[int, ...] | None = TIMES
) -> Tensor:
    """The latents of the stock pipeline with hooks on the blocks at the steps with feedback.

    Outputs stand for the time of their step here: ``ahead`` 0.
    """
    model = pipe.transformer
    stock, step = model.forward, [-1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        if not MASK[step[0]]:
            return stock(*args, **kwargs)
        with module.applied(model):
            return stock(*args, **kwargs)

    with outer_steps(pipe, times):
        model.forward = forward
        try:
            return run(name, pipe)
        finally:
            del model.forward
