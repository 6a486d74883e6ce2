"""The entry point of training: what is checked and made before the first step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accelrt.feedback.module import FeedbackModule
from accelrt.steps.origin import model_hash, weight_norms

from .config import DistillConfig
from .data import LatentData, load_data
from .denoiser import default_guidance, denoiser_class, frozen, latent_shape
from .loop import Loop
from .objectives import Training
from .result import DistillResult
from .solver import Outer, check_affine, solver_of


def distill(
    pipe: Any,
    config: DistillConfig,
    out: str | Path,
    data: LatentData | Callable[[Any], LatentData] | str | Path | None = None,
    *,
    cpu: bool = False,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> DistillResult:
    """Train a feedback module for a pipeline and write it to a folder.

    The backbone stays frozen. A training that was interrupted goes on from its last
    checkpoint in ``out``; on one CPU process the weights are the same bit for bit. Under
    ``accelerate launch`` every process calls this.

    Args:
        pipe: a DiT or PixArt pipeline, not wrapped; its transformer and VAE are moved to the
            device of the training.
        config: the settings.
        out: folder of the weights, ``training.json``, ``losses.json``, event files and
            checkpoints.
        data: samples, a function that makes them from the pipeline, or a path for
            :func:`~accelrt.feedback.training.data.load_data`; ``None`` for noise alone.
        cpu: do not use an accelerator.
        progress: show a bar.
        on_step: called after each optimizer step with its number, from 1.

    Raises:
        ValueError: a setting does not fit the pipeline or the data, ``out`` holds a training
            with other settings, or the loss is not finite.
        ImportError: accelerate or tensorboard is missing; with the command.
        OSError: files cannot be read or written.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, a file; allowed: a folder")
    _check_packages(config)
    chosen = denoiser_class(pipe)
    model = pipe.transformer
    if model.dtype != torch.float32 and config.mixed_precision == "no":
        raise ValueError(
            f"the model is {model.dtype}, but mixed_precision is 'no'; allowed: bf16, fp16, or a "
            f"model in float32"
        )
    scheduler = solver_of(pipe.scheduler, config.scheduler, config.scheduler_options)
    outer = Outer.of(scheduler, config.schedule)
    shape = latent_shape(pipe)
    check_affine(outer, shape)
    outer.fine(config.substeps)
    guidance = _guidance(pipe, config)
    module = _new_module(model, config, scheduler, guidance)

    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=str(out),
    )
    device = accelerator.device
    model.to(device)
    pipe.vae.to(device)
    rank, world = accelerator.process_index, accelerator.num_processes
    samples = _samples(data, pipe)
    denoiser = chosen(
        pipe, samples, config.classes, config.prompts, config.max_sequence_length, device
    )
    latents, index = None if samples is None else samples.latents, denoiser.index
    if latents is not None and len(latents) >= world:
        latents, index = latents[rank::world], index[rank::world]
    training = Training(
        config, denoiser, outer, latents, index, rank, world, device, accelerator.autocast,
        guidance, shape,
    )  # fmt: skip
    about = {
        "config": config.to_dict(),
        "backbone": [model_hash(model), *weight_norms(model)],
        "data": None if samples is None else samples.fingerprint(),
        "processes": world,
    }
    with frozen(model):
        return Loop(training, module.to(device), accelerator, out, about).run(progress, on_step)


def _samples(data: Any, pipe: Any) -> LatentData | None:
    if data is None or isinstance(data, LatentData):
        return data
    if callable(data):
        made: LatentData = data(pipe)
        return made
    return load_data(data, pipe)


def _check_packages(config: DistillConfig) -> None:
    wanted = ["accelerate", *(["tensorboard"] if config.tensorboard else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        without = "; or set tensorboard to false" if missing == ["tensorboard"] else ""
        raise ImportError(
            f"training needs {' and '.join(missing)}: pip install {' '.join(missing)}{without}"
        )


def _guidance(pipe: Any, config: DistillConfig) -> tuple[float, float]:
    given = config.guidance_scale
    if given is None:
        given = default_guidance(pipe)
    if isinstance(given, tuple):
        return float(given[0]), float(given[-1])
    return float(given), float(given)


def _new_module(
    model: Any, config: DistillConfig, scheduler: Any, guidance: tuple[float, float]
) -> FeedbackModule:
    """In fp32; the seed decides its weights, and the state of torch's generator does not change."""
    kept = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module: FeedbackModule = FeedbackModule.from_backbone(
            model,
            start=config.start,
            length=config.length,
            copy_block=config.copy_block,
            passes=config.passes,
            enters=config.enters,
            scale_shape=config.scale_shape,
            learned_scale=config.learned_scale,
            conditioning=config.conditioning,
            schedules={str(config.stands_for): config.schedule.to_dict()},
            guidance_scale=sorted({*guidance}),
            scheduler_class=type(scheduler).__name__,
            scheduler_config=kept,
        )
    # In evaluation mode: the block's own dropout of classes would draw from torch's generator.
    # ModelMixin.to() warns of modules kept in fp32, though there are none.
    nn.Module.float(module)
    module.eval()
    return module
