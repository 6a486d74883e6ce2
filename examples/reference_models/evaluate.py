"""Measure the reference models: do their samples show what was asked for?

    python examples/reference_models/evaluate.py --model dit --n 200
    python examples/reference_models/evaluate.py --model animatediff --n 40
    python examples/reference_models/evaluate.py --model pixart --n 200
    python examples/reference_models/evaluate.py --model svd --n 40

Samples come from the ordinary pipeline calls, with fixed seeds. A classifier that saw only
training digits tells what they show, and its features give a Frechet distance to renderings
of the held-out digits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AnimateDiffPipeline,
    DiTPipeline,
    PixArtSigmaPipeline,
    StableVideoDiffusionPipeline,
)
from PIL import Image  # noqa: E402
from reference_digits import data  # noqa: E402
from reference_digits.measures import (  # noqa: E402
    classify,
    frechet_distance,
    held_out_features,
    load_classifier,
    motion_of,
    to_tensor,
    training_floor,
)
from reference_digits.models import DigitClassifier  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

PIPELINES = {
    "dit": DiTPipeline,
    "animatediff": AnimateDiffPipeline,
    "pixart": PixArtSigmaPipeline,
    "svd": StableVideoDiffusionPipeline,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What the pipelines' calls need for models as small as these: no aspect-ratio bins (they begin
# at 256 pixels), no caption cleaning (it needs two more packages), short prompts, small frames.
PIXART_CALL = {
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": 32,
}
SVD_CALL = {"height": data.CANVAS, "width": data.CANVAS}


def _measure_images(
    sample: Callable[[torch.Tensor, torch.Generator], np.ndarray],
    n: int,
    batch: int,
    seed: int,
    classifier: DigitClassifier,
) -> dict[str, Any]:
    """Measure images; ``sample`` makes those of some places in the order of the ``n`` samples."""
    wanted = torch.arange(n) % data.NUM_CLASSES
    predicted, features = [], []
    began = time.perf_counter()
    for i, part in enumerate(torch.arange(n).split(batch)):
        images = sample(part, torch.Generator().manual_seed(seed + i))
        digits, feature = classify(images, classifier)
        predicted.append(digits)
        features.append(feature)
    seconds = time.perf_counter() - began
    hits = torch.cat(predicted) == wanted
    reference = held_out_features("images", classifier)
    return {
        "accuracy": round(hits.float().mean().item(), 4),
        "accuracy_by_class": _by_class(hits, wanted),
        "frechet_distance": round(frechet_distance(torch.cat(features), reference), 4),
        "frechet_distance_of_training_digits": round(training_floor("images", classifier, n), 4),
        "seconds": round(seconds, 1),
    }


def evaluate_dit(
    pipe: Any,
    n: int = 200,
    *,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch: int = 50,
    classifier: DigitClassifier | None = None,
    **call_kwargs: Any,
) -> dict[str, Any]:
    """Class-conditional samples of a ``DiTPipeline`` (or of anything called like one)."""

    def sample(part: torch.Tensor, rng: torch.Generator) -> np.ndarray:
        return pipe(
            class_labels=(part % data.NUM_CLASSES).tolist(),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=rng,
            output_type="np",
            **call_kwargs,
        ).images

    measured = _measure_images(sample, n, batch, seed, classifier or load_classifier())
    return {"samples": n, "steps": steps, "guidance_scale": guidance_scale, **measured}


def evaluate_pixart(
    pipe: Any,
    n: int = 200,
    *,
    steps: int = 20,
    guidance_scale: float = 4.5,
    seed: int = 0,
    batch: int = 50,
    classifier: DigitClassifier | None = None,
    **call_kwargs: Any,
) -> dict[str, Any]:
    """Text-conditional samples of a ``PixArtSigmaPipeline`` (or of anything called like one)."""
    rng = torch.Generator().manual_seed(seed)
    prompts = data.random_still_prompts(torch.arange(n) % data.NUM_CLASSES, rng)

    def sample(part: torch.Tensor, rng: torch.Generator) -> np.ndarray:
        return pipe(
            prompt=[prompts[i] for i in part.tolist()],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=rng,
            output_type="np",
            **{**PIXART_CALL, **call_kwargs},
        ).images

    measured = _measure_images(sample, n, batch, seed, classifier or load_classifier())
    return {"samples": n, "steps": steps, "guidance_scale": guidance_scale, **measured}


def evaluation_prompts(n: int, seed: int = 0) -> tuple[list[str], torch.Tensor]:
    """``n`` prompts that go round the digits, with random templates; and their digits."""
    rng = torch.Generator().manual_seed(seed)

    def pick(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=rng))]

    digits = torch.arange(n) % data.NUM_CLASSES
    prompts = [
        pick(data.TEMPLATES).format(
            digit=data.DIGIT_WORDS[digit],
            verb=pick(list(data.VERBS)),
            direction=pick(list(data.DIRECTIONS)),
        )
        for digit in digits.tolist()
    ]
    return prompts, digits


def _measure_videos(
    sample: Callable[[torch.Tensor, torch.Generator], np.ndarray],
    wanted: torch.Tensor,
    batch: int,
    seed: int,
    classifier: DigitClassifier,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Measure videos of the digits ``wanted``; returns their first frames ``(N, 3, H, W)``, too.

    ``sample`` makes the videos ``(N, F, H, W, 3)`` of some places in ``wanted``.
    """
    n = len(wanted)
    predicted, features, motion, starts = [], [], [], []
    began = time.perf_counter()
    for part in torch.arange(n).split(batch):
        frames = sample(part, torch.Generator().manual_seed(seed + int(part[0])))
        pixels = to_tensor(frames.reshape(-1, *frames.shape[2:]))
        digits, feature = classify(pixels, classifier)
        videos = pixels.unflatten(0, frames.shape[:2])
        predicted.append(digits.view(frames.shape[:2]))
        features.append(feature)
        motion.append(motion_of(videos))
        starts.append(videos[:, 0])
    seconds = time.perf_counter() - began
    hits = torch.cat(predicted) == wanted[:, None]
    reference = held_out_features("frames", classifier)
    steps_moved = torch.cat(motion)
    return {
        "frame_accuracy": round(hits.float().mean().item(), 4),
        "video_accuracy": round((hits.float().mean(dim=1) > 0.5).float().mean().item(), 4),
        "frame_accuracy_by_class": _by_class(hits.float().mean(dim=1), wanted),
        "frechet_distance": round(frechet_distance(torch.cat(features), reference), 4),
        "frechet_distance_of_training_digits": round(training_floor("frames", classifier, n), 4),
        "pixels_per_frame": round(steps_moved.mean().item(), 3),
        "largest_jump_pixels": round(steps_moved.amax().item(), 3),
        "seconds": round(seconds, 1),
    }, torch.cat(starts)


def evaluate_animatediff(
    pipe: Any,
    n: int = 40,
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch: int = 10,
    num_frames: int = data.NUM_FRAMES,
    classifier: DigitClassifier | None = None,
    **call_kwargs: Any,
) -> dict[str, Any]:
    """Text-conditional videos of an ``AnimateDiffPipeline`` (or of anything called like one)."""
    prompts, wanted = evaluation_prompts(n, seed)

    def sample(part: torch.Tensor, rng: torch.Generator) -> np.ndarray:
        return pipe(
            prompt=[prompts[i] for i in part.tolist()],
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=rng,
            output_type="np",
            **call_kwargs,
        ).frames

    classifier = classifier or load_classifier()
    measured, _ = _measure_videos(sample, wanted, batch, seed, classifier)
    return {
        "samples": n,
        "frames": n * num_frames,
        "steps": steps,
        "guidance_scale": guidance_scale,
        **measured,
    }


def first_frames(n: int, seed: int = 0) -> tuple[list[Image.Image], torch.Tensor]:
    """``n`` frames with held-out digits, which go round the digits; and their digits."""
    _, test = data.load_splits()
    rng = torch.Generator().manual_seed(seed)
    per_digit = [(test.labels == digit).nonzero().flatten() for digit in range(data.NUM_CLASSES)]
    wanted = torch.arange(n) % data.NUM_CLASSES
    index = torch.stack(
        [
            per_digit[digit][(i // data.NUM_CLASSES) % len(per_digit[digit])]
            for i, digit in enumerate(wanted.tolist())
        ]
    )
    frames, _ = data.render_clips(test, index, rng, num_frames=1)
    pixels = ((frames[:, 0].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    return [Image.fromarray(image) for image in pixels], wanted


def evaluate_svd(
    pipe: Any,
    n: int = 40,
    *,
    steps: int = 25,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch: int = 10,
    num_frames: int = data.CLIP_FRAMES,
    classifier: DigitClassifier | None = None,
    **call_kwargs: Any,
) -> dict[str, Any]:
    """Videos of a ``StableVideoDiffusionPipeline`` (or of anything called like one).

    The first frames show held-out digits. ``guidance_scale`` is that of the last frame; the
    guidance rises to it from 1. The first frame of a video is compared with the one given.
    """
    images, wanted = first_frames(n, seed)

    def sample(part: torch.Tensor, rng: torch.Generator) -> np.ndarray:
        return pipe(
            image=[images[i] for i in part.tolist()],
            num_frames=num_frames,
            num_inference_steps=steps,
            max_guidance_scale=guidance_scale,
            generator=rng,
            output_type="np",
            **{**SVD_CALL, **call_kwargs},
        ).frames

    classifier = classifier or load_classifier()
    measured, starts = _measure_videos(sample, wanted, batch, seed, classifier)
    given = to_tensor(images)
    error = ((starts - given) / 2).square().mean()
    return {
        "samples": n,
        "frames": n * num_frames,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "given_frame_accuracy": round(
            (classify(given, classifier)[0] == wanted).float().mean().item(), 4
        ),
        "first_frame_psnr_db": round(-10 * torch.log10(error).item(), 2),
        **measured,
    }


def _by_class(hits: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    return {
        str(digit): round(hits[wanted == digit].float().mean().item(), 4)
        for digit in sorted(set(wanted.tolist()))
    }


EVALUATORS: dict[str, Callable[..., dict[str, Any]]] = {
    "dit": evaluate_dit,
    "animatediff": evaluate_animatediff,
    "pixart": evaluate_pixart,
    "svd": evaluate_svd,
}


def load_pipeline(model: str, root: str | Path = HERE, dtype: str = "fp32") -> Any:
    """A saved reference pipeline: ``"dit"``, ``"animatediff"``, ``"pixart"`` or ``"svd"``."""
    pipe = PIPELINES[model].from_pretrained(Path(root) / model, dtype=DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate_saved(
    root: str | Path, model: str, n: int | None = None, dtype: str = "fp32", **kwargs: Any
) -> dict[str, Any]:
    """Load a saved pipeline and measure it (``n`` defaults to 200 images or 40 videos)."""
    pipe = load_pipeline(model, root, dtype)
    if n is not None:
        kwargs["n"] = n
    classifier = load_classifier(Path(root) / "classifier")
    return EVALUATORS[model](pipe, classifier=classifier, **kwargs)


def main() -> dict[str, Any]:
    """Command line: print the measurements as a table."""
    parser = argparse.ArgumentParser(description="Measure a saved reference model.")
    parser.add_argument("--model", choices=tuple(PIPELINES), required=True)
    parser.add_argument("--root", type=Path, default=HERE)
    parser.add_argument("--n", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    args = parser.parse_args()
    kwargs: dict[str, Any] = {"seed": args.seed}
    if args.steps is not None:
        kwargs["steps"] = args.steps
    if args.guidance is not None:
        kwargs["guidance_scale"] = args.guidance
    result = evaluate_saved(args.root, args.model, args.n, args.dtype, **kwargs)
    table = Table("measure", "value", title=f"{args.model} ({args.dtype})")
    for key, value in result.items():
        table.add_row(key, str(value))
    Console().print(table)
    return result


if __name__ == "__main__":
    main()
