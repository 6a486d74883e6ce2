"""Feedback modules for the small pipelines, and a truth that shares nothing with the executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
