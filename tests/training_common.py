"""What the tests of training share: small settings, data, and the objects inside a training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import model_zoo as zoo
import torch
from diffusers import DPMSolverMultistepScheduler

from accelrt.feedback.training import DistillConfig, LatentData
from accelrt.feedback.training.api import _new_module
from accelrt.feedback.training.denoiser import DiTDenoiser, latent_shape
from accelrt.feedback.training.objectives import Training
from accelrt.feedback.training.solver import Outer

REFERENCE = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
SMALL: dict[str, Any] = {
    "outer": 3, "stands_for": 6, "substeps": 2, "pool": 4, "rollout_batch": 3, "batch": 4,
    "steps": 4, "warmup": 1, "validation_samples": 2, "log_every": 1, "tensorboard": False,
    "guidance_scale": 2.0, "classes": [1, 7, 300],
}  # fmt: skip


def settings(**changed: Any) -> DistillConfig:
    return DistillConfig.from_dict({**SMALL, **changed})


def latents(count: int = 7, **conditions: Any) -> LatentData:
    """Random latents; with classes if no conditions are given."""
    if not conditions:
        conditions = {"labels": torch.arange(count) * 3}
    return LatentData(zoo.normal(count, 4, 8, 8, seed=5), **conditions)


def solver(**changed: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**{"beta_schedule": "linear", **changed})


def training_of(
    config: DistillConfig, pipe: Any = None, data: LatentData | None = None
) -> tuple[Training, Any]:
    """What objectives share, without accelerate, and an untrained module."""
    pipe = pipe or zoo.dit_pipeline()
    scheduler = solver()
    cpu = torch.device("cpu")
    denoiser = DiTDenoiser(pipe, data, config.classes, None, None, cpu)
    given = config.guidance_scale
    guidance = given if isinstance(given, tuple) else (given, given)
    training = Training(
        config=config,
        denoiser=denoiser,
        outer=Outer.of(scheduler, config.schedule),
        latents=None if data is None else data.latents,
        index=denoiser.index,
        rank=0,
        world=1,
        device=cpu,
        autocast=nullcontext,
        guidance=guidance,
        shape=latent_shape(pipe),
    )
    return training, _new_module(pipe.transformer, config, scheduler, guidance)
