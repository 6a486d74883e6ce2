"""Measure the reference models: do their samples show what was asked for?

    python examples/reference_models/evaluate.py --model dit --n 200
    python examples/reference_models/evaluate.py --model animatediff --n 40

Samples come from the ordinary pipeline calls, with fixed seeds. A classifier that saw only
training digits tells what they show, and its features give a Frechet distance to renderings
of the held-out digits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AnimateDiffPipeline, DiTPipeline  # noqa: E402
from reference_digits import data  # noqa: E402
from reference_digits.models import DigitClassifier  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_classifier(folder: str | Path = HERE / "classifier") -> DigitClassifier:
    """The saved digit classifier, in fp32 and evaluation mode."""
    model = DigitClassifier()
    weights = load_file(Path(folder) / "model.safetensors")
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    return model.eval()


def to_tensor(images: torch.Tensor | np.ndarray | Sequence[Any]) -> torch.Tensor:
    """PIL images, an array ``(N, H, W, 3)`` in [0, 1], or a tensor in [-1, 1], to the latter."""
    if isinstance(images, torch.Tensor):
        return images.detach().float().cpu()
    if not isinstance(images, np.ndarray):
        images = np.stack([np.asarray(image.convert("RGB")) for image in images]) / 255.0
    return torch.from_numpy(images).float().permute(0, 3, 1, 2) * 2 - 1


@torch.inference_mode()
def classify(
    images: torch.Tensor | np.ndarray | Sequence[Any], classifier: DigitClassifier | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted digits ``(N,)`` and features ``(N, 64)`` of images (see :func:`to_tensor`)."""
    classifier = classifier or load_classifier()
    features = torch.cat([classifier.features(part) for part in to_tensor(images).split(512)])
    return classifier.head(features).argmax(dim=1), features


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features ``(N, D)``."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean_gap = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(mean_gap + cov_a.trace() + cov_b.trace() - 2 * cross)


def held_out_features(
    kind: str, classifier: DigitClassifier, n: int = 1800, seed: int = 99
) -> torch.Tensor:
    """Features of held-out digits, drawn as ``"images"`` or as video ``"frames"``."""
    _, test = data.load_splits()
    render = data.render_images if kind == "images" else data.render_frames
    rng = torch.Generator().manual_seed(seed)
    index = torch.arange(n) % len(test)
    return classify(render(test, index, rng), classifier)[1]


def training_floor(kind: str, classifier: DigitClassifier, n: int) -> float:
    """The Frechet distance that ``n`` images, or videos, of *training* digits have.

    It tells what is reachable: distances of few samples are biased upwards.
    """
    train, _ = data.load_splits()
    rng = torch.Generator().manual_seed(98)
    order = torch.argsort(train.labels, stable=True)
    index = order[torch.linspace(0, len(order) - 1, n).long()]
    if kind == "images":
        pixels = data.render_images(train, index, rng)
    else:
        pixels = data.render_videos(train, index, rng)[0].flatten(0, 1)
    features = classify(pixels, classifier)[1]
    return frechet_distance(features, held_out_features(kind, classifier))


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
    classifier = classifier or load_classifier()
    wanted = torch.arange(n) % data.NUM_CLASSES
    predicted, features = [], []
    began = time.perf_counter()
    for i, part in enumerate(wanted.split(batch)):
        images = pipe(
            class_labels=part.tolist(),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed + i),
            output_type="np",
            **call_kwargs,
        ).images
        digits, feature = classify(images, classifier)
        predicted.append(digits)
        features.append(feature)
    seconds = time.perf_counter() - began
    hits = torch.cat(predicted) == wanted
    reference = held_out_features("images", classifier)
    return {
        "samples": n,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "accuracy": round(hits.float().mean().item(), 4),
        "accuracy_by_class": _by_class(hits, wanted),
        "frechet_distance": round(frechet_distance(torch.cat(features), reference), 4),
        "frechet_distance_of_training_digits": round(training_floor("images", classifier, n), 4),
        "seconds": round(seconds, 1),
    }


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


def motion_of(videos: torch.Tensor) -> torch.Tensor:
    """Movement of the centre of mass between frames, in pixels ``(N, F-1)``.

    ``videos`` are ``(N, F, 3, H, W)`` in [-1, 1].
    """
    mass = ((videos.mean(dim=2) + 1) / 2).clamp(0, 1)
    mass = torch.where(mass > 0.25, mass, 0.0)
    total = mass.sum(dim=(-2, -1)).clamp(min=1e-6)
    ys = torch.arange(mass.shape[-2], dtype=mass.dtype)
    xs = torch.arange(mass.shape[-1], dtype=mass.dtype)
    centre = torch.stack([(mass.sum(-2) * xs).sum(-1), (mass.sum(-1) * ys).sum(-1)], dim=-1)
    return (centre / total[..., None]).diff(dim=1).norm(dim=-1)


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
    classifier = classifier or load_classifier()
    prompts, wanted = evaluation_prompts(n, seed)
    predicted, features, motion = [], [], []
    began = time.perf_counter()
    for i in range(0, n, batch):
        frames = pipe(
            prompt=prompts[i : i + batch],
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed + i),
            output_type="np",
            **call_kwargs,
        ).frames
        digits, feature = classify(frames.reshape(-1, *frames.shape[2:]), classifier)
        predicted.append(digits.view(-1, num_frames))
        features.append(feature)
        motion.append(
            motion_of(
                to_tensor(frames.reshape(-1, *frames.shape[2:])).unflatten(0, (-1, num_frames))
            )
        )
    seconds = time.perf_counter() - began
    hits = torch.cat(predicted) == wanted[:, None]
    reference = held_out_features("frames", classifier)
    steps_moved = torch.cat(motion)
    return {
        "samples": n,
        "frames": int(hits.numel()),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "frame_accuracy": round(hits.float().mean().item(), 4),
        "video_accuracy": round((hits.float().mean(dim=1) > 0.5).float().mean().item(), 4),
        "frame_accuracy_by_class": _by_class(hits.float().mean(dim=1), wanted),
        "frechet_distance": round(frechet_distance(torch.cat(features), reference), 4),
        "frechet_distance_of_training_digits": round(training_floor("frames", classifier, n), 4),
        "pixels_per_frame": round(steps_moved.mean().item(), 3),
        "largest_jump_pixels": round(steps_moved.amax().item(), 3),
        "seconds": round(seconds, 1),
    }


def _by_class(hits: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    return {
        str(digit): round(hits[wanted == digit].float().mean().item(), 4)
        for digit in sorted(set(wanted.tolist()))
    }


def load_pipeline(model: str, root: str | Path = HERE, dtype: str = "fp32") -> Any:
    """A saved reference pipeline: ``"dit"`` or ``"animatediff"``."""
    cls = {"dit": DiTPipeline, "animatediff": AnimateDiffPipeline}[model]
    pipe = cls.from_pretrained(Path(root) / model, dtype=DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate_saved(
    root: str | Path, model: str, n: int | None = None, dtype: str = "fp32", **kwargs: Any
) -> dict[str, Any]:
    """Load a saved pipeline and measure it (``n`` defaults to 200 images or 40 videos)."""
    pipe = load_pipeline(model, root, dtype)
    classifier = load_classifier(Path(root) / "classifier")
    if model == "dit":
        return evaluate_dit(pipe, n or 200, classifier=classifier, **kwargs)
    return evaluate_animatediff(pipe, n or 40, classifier=classifier, **kwargs)


def main() -> dict[str, Any]:
    """Command line: print the measurements as a table."""
    parser = argparse.ArgumentParser(description="Measure a saved reference model.")
    parser.add_argument("--model", choices=("dit", "animatediff"), required=True)
    parser.add_argument("--root", type=Path, default=HERE)
    parser.add_argument("--n", type=int)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    args = parser.parse_args()
    kwargs: dict[str, Any] = {"steps": args.steps, "seed": args.seed}
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
