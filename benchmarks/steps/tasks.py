"""What each reference model is asked for: the calls, and how their pictures are judged."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REFERENCE = Path(__file__).resolve().parents[2] / "examples" / "reference_models"
if str(REFERENCE) not in sys.path:
    sys.path.insert(0, str(REFERENCE))

import evaluate  # noqa: E402
from reference_digits import data  # noqa: E402
from reference_digits.measures import (  # noqa: E402
    classify,
    frechet_distance,
    held_out_features,
    load_classifier,
)

MODELS = ("dit", "pixart", "animatediff", "svd")
VIDEO = ("animatediff", "svd")


@dataclass(frozen=True)
class Batch:
    """One call of the pipeline.

    Args:
        call: its keywords, without the number of steps, generator and output type.
        seed: of its generator.
        size: pictures or videos it makes.
    """

    call: dict[str, Any]
    seed: int
    size: int


@dataclass(frozen=True)
class Task:
    """All calls for one model.

    Args:
        model: its name.
        batches: of equal size.
        wanted: digit of every picture or video, ``[samples]``.
        denoiser: attribute of the pipeline that runs once per step.
    """

    model: str
    batches: tuple[Batch, ...]
    wanted: Tensor
    denoiser: str

    @property
    def video(self) -> bool:
        """Whether it makes videos."""
        return self.model in VIDEO


@dataclass(frozen=True)
class Judgement:
    """What the classifier says.

    Args:
        accuracy: share of pictures (frames) that show the digit asked for.
        frechet: distance of the classifier's features to those of held-out digits.
    """

    accuracy: float
    frechet: float


def default_samples(model: str) -> int:
    """200 pictures, or 40 videos."""
    return 40 if model in VIDEO else 200


def default_batch(model: str) -> int:
    """50 pictures, or 10 videos."""
    return 10 if model in VIDEO else 50


def load(model: str) -> Any:
    """The stock pipeline in fp32.

    Raises:
        ValueError: there is no such model.
    """
    _check_model(model)
    pipe = evaluate.load_pipeline(model)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe


def make(model: str, samples: int, batch: int | None = None, seed: int = 0) -> Task:
    """The calls for ``samples`` pictures or videos; the same as those of ``evaluate.py``.

    Args:
        model: one of ``MODELS``.
        samples: how many in all, at least 1.
        batch: how many a call; default: :func:`default_batch`, or all if they are fewer.
        seed: of prompts, first frames and noise.

    Raises:
        ValueError: an argument is out of range, or ``batch`` does not divide ``samples``.
    """
    _check_model(model)
    if samples < 1:
        raise ValueError(f"samples is {samples}; allowed: at least 1")
    batch = min(default_batch(model), samples) if batch is None else batch
    if batch < 1 or samples % batch:
        raise ValueError(
            f"batch is {batch}; allowed: divisors of samples ({samples}), so that all calls "
            "can be timed alike"
        )
    calls, wanted = _MAKERS[model](samples, seed)
    batches = []
    for i, part in enumerate(torch.arange(samples).split(batch)):
        first = int(part[0])
        own_seed = seed + (first if model in VIDEO else i)
        batches.append(Batch(calls(part.tolist()), own_seed, batch))
    denoiser = "unet" if model in VIDEO else "transformer"
    return Task(model, tuple(batches), wanted, denoiser)


def call(pipe: Any, batch: Batch, steps: int) -> Any:
    """One call of the pipeline, from the batch's seed, with ``steps`` denoising steps."""
    generator = torch.Generator().manual_seed(batch.seed)
    return pipe(**batch.call, num_inference_steps=steps, generator=generator, output_type="np")


@functools.cache
def _judged_by(kind: str) -> tuple[Any, Tensor]:
    """The classifier, and its features of held-out digits: many to render."""
    classifier = load_classifier()
    return classifier, held_out_features(kind, classifier)


class Judge:
    """Reads pictures with the digit classifier.

    Args:
        model: whose pictures they are: images and video frames have references of their own.
    """

    def __init__(self, model: str) -> None:
        self.classifier, self.reference = _judged_by("frames" if model in VIDEO else "images")

    def __call__(self, pictures: Tensor, wanted: Tensor) -> Judgement:
        """Judge ``pictures`` ``[N, F, 3, H, W]`` in [0, 1] of the digits ``wanted`` ``[N]``."""
        hits, features = self.read(pictures, wanted)
        # A covariance needs two pictures.
        enough = len(features) > 1
        distance = frechet_distance(features, self.reference) if enough else float("nan")
        return Judgement(hits.float().mean().item(), distance)

    def read(self, pictures: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Which show the digit ``[N, F]``, and the classifier's features of them ``[N * F, D]``."""
        frames = pictures.shape[1]
        digits, features = classify(pictures.flatten(0, 1) * 2 - 1, self.classifier)
        return digits.view(-1, frames) == wanted[:, None], features


Calls = Callable[[list[int]], dict[str, Any]]


def _dit(samples: int, seed: int) -> tuple[Calls, Tensor]:
    wanted = torch.arange(samples) % data.NUM_CLASSES
    return lambda part: {
        "class_labels": wanted[part].tolist(),
        "guidance_scale": 4.0,
    }, wanted


def _pixart(samples: int, seed: int) -> tuple[Calls, Tensor]:
    wanted = torch.arange(samples) % data.NUM_CLASSES
    prompts = data.random_still_prompts(wanted, torch.Generator().manual_seed(seed))
    return lambda part: {
        "prompt": [prompts[i] for i in part],
        "guidance_scale": 4.5,
        **evaluate.PIXART_CALL,
    }, wanted


def _animatediff(samples: int, seed: int) -> tuple[Calls, Tensor]:
    prompts, wanted = evaluate.evaluation_prompts(samples, seed)
    return lambda part: {
        "prompt": [prompts[i] for i in part],
        "num_frames": data.NUM_FRAMES,
        "guidance_scale": 7.5,
    }, wanted


def _svd(samples: int, seed: int) -> tuple[Calls, Tensor]:
    images, wanted = evaluate.first_frames(samples, seed)
    return lambda part: {
        "image": [images[i] for i in part],
        "num_frames": data.CLIP_FRAMES,
        "max_guidance_scale": 3.0,
        **evaluate.SVD_CALL,
    }, wanted


_MAKERS: dict[str, Callable[[int, int], tuple[Calls, Tensor]]] = {
    "dit": _dit,
    "pixart": _pixart,
    "animatediff": _animatediff,
    "svd": _svd,
}


def _check_model(model: str) -> None:
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; allowed: {', '.join(MODELS)}")
