"""What measurements are made of: the classifier, Frechet distances, motion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from . import data
from .models import DigitClassifier

CLASSIFIER = Path(__file__).resolve().parents[1] / "classifier"


def load_classifier(folder: str | Path = CLASSIFIER) -> DigitClassifier:
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
