"""Digits, rendered as still images and as short videos of a bouncing digit.

Everything random is drawn from an explicit ``torch.Generator`` so that a stage can be
repeated, or resumed in the middle, and see the same data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CANVAS = 32
NUM_FRAMES = 16
CLIP_FRAMES = 8
CLIP_SPEEDS = (0.6, 2.0)
NUM_CLASSES = 10
SPLIT_SEED = 0
TEST_FRACTION = 0.2

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "to the right": (1.0, 0.0),
    "to the left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "diagonally": (0.7071, 0.7071),
}
# Verb -> range of speeds, in pixels a frame.
VERBS: dict[str, tuple[float, float]] = {"bouncing": (1.5, 2.0), "moving": (0.7, 1.0)}
TEMPLATES = (
    "a handwritten {digit} {verb} {direction}",
    "the digit {digit} {verb} {direction}",
    "a white {digit} {verb} {direction} on black",
    "{digit} {verb} {direction}",
)
STILL_TEMPLATES = (
    "a handwritten {digit}",
    "the digit {digit}",
    "a white {digit} on black",
    "{digit}",
)

# A glyph is the 8x8 digit with 2 pixels of margin on each side, upscaled by this factor.
_GLYPH_MARGIN = 2
_GLYPH_UPSCALE = 4
_GLYPH_CELLS = 8 + 2 * _GLYPH_MARGIN


@dataclass(frozen=True)
class Split:
    """Upscaled glyphs ``(N, 1, 48, 48)`` in [0, 1] with their labels ``(N,)``."""

    glyphs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def _upscale(digits: torch.Tensor) -> torch.Tensor:
    """8x8 digits in [0, 1] to crisp, smooth glyphs with a margin."""
    padded = F.pad(digits[:, None], (_GLYPH_MARGIN,) * 4)
    big = F.interpolate(padded, scale_factor=_GLYPH_UPSCALE, mode="bicubic", antialias=True)
    return ((big - 0.3) * 2.2).clamp(0, 1)


@lru_cache(maxsize=1)
def load_splits() -> tuple[Split, Split]:
    """The fixed stratified (training, held-out) split; held-out digits are never trained on."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16.0
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        list(range(len(labels))),
        test_size=TEST_FRACTION,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    glyphs = _upscale(images)
    return Split(glyphs[train], labels[train]), Split(glyphs[test], labels[test])


def _uniform(n: int, low: float, high: float, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=rng) * (high - low) + low


def _place(
    glyphs: torch.Tensor, size: torch.Tensor, angle: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """Draw glyphs on the canvas: ``size`` and ``centre`` (x, y from the middle) in pixels.

    Returns RGB images in [-1, 1], white on black.
    """
    half_extent = size * _GLYPH_CELLS / 8 / 2
    cos, sin = torch.cos(angle) / half_extent, torch.sin(angle) / half_extent
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    offset = -(rotation @ centre[:, :, None])
    theta = torch.cat([rotation * (CANVAS / 2), offset], dim=-1)
    grid = F.affine_grid(theta, [len(glyphs), 1, CANVAS, CANVAS], align_corners=False)
    drawn = F.grid_sample(glyphs, grid, mode="bilinear", align_corners=False)
    return drawn.expand(-1, 3, -1, -1) * 2 - 1


def render_images(split: Split, index: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Still images ``(N, 3, 32, 32)``: one large digit, slightly moved, turned and scaled."""
    n = len(index)
    return _place(
        split.glyphs[index],
        size=_uniform(n, 22.0, 27.0, rng),
        angle=_uniform(n, -0.15, 0.15, rng),
        centre=_uniform(2 * n, -1.5, 1.5, rng).view(n, 2),
    )


def _reflect(position: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Fold an unbounded position into [-limit, limit] as a bouncing ball would."""
    phase = torch.remainder(position + limit, 4 * limit)
    return torch.minimum(phase, 4 * limit - phase) - limit


def random_prompts(
    labels: torch.Tensor, rng: torch.Generator
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Random prompts for digits, with the indices of their verbs and directions."""
    n = len(labels)
    names, verbs = list(DIRECTIONS), list(VERBS)
    direction_ids = torch.randint(len(names), (n,), generator=rng)
    verb_ids = torch.randint(len(verbs), (n,), generator=rng)
    template_ids = torch.randint(len(TEMPLATES), (n,), generator=rng).tolist()
    numeral = (torch.rand(n, generator=rng) < 0.25).tolist()
    prompts = [
        TEMPLATES[template_ids[i]].format(
            digit=str(label) if numeral[i] else DIGIT_WORDS[label],
            verb=verbs[int(verb_ids[i])],
            direction=names[int(direction_ids[i])],
        )
        for i, label in enumerate(labels.tolist())
    ]
    return prompts, verb_ids, direction_ids


def random_still_prompts(labels: torch.Tensor, rng: torch.Generator) -> list[str]:
    """Random prompts that name a digit and no motion."""
    template_ids = torch.randint(len(STILL_TEMPLATES), (len(labels),), generator=rng).tolist()
    numeral = (torch.rand(len(labels), generator=rng) < 0.25).tolist()
    return [
        STILL_TEMPLATES[template_ids[i]].format(
            digit=str(label) if numeral[i] else DIGIT_WORDS[label]
        )
        for i, label in enumerate(labels.tolist())
    ]


def render_videos(
    split: Split, index: torch.Tensor, rng: torch.Generator, num_frames: int = NUM_FRAMES
) -> tuple[torch.Tensor, list[str]]:
    """Videos ``(N, F, 3, 32, 32)`` of a digit that moves and bounces, and their prompts."""
    n = len(index)
    prompts, verb_ids, direction_ids = random_prompts(split.labels[index], rng)
    size = _uniform(n, 16.0, 20.0, rng)
    speed_range = torch.tensor(list(VERBS.values()))[verb_ids]
    speed = speed_range[:, 0] + torch.rand(n, generator=rng) * speed_range.diff(dim=1)[:, 0]
    velocity = torch.tensor(list(DIRECTIONS.values()))[direction_ids] * speed[:, None]
    return _bounce(split.glyphs[index], size, velocity, num_frames, rng), prompts


def _bounce(
    glyphs: torch.Tensor,
    size: torch.Tensor,
    velocity: torch.Tensor,
    num_frames: int,
    rng: torch.Generator,
) -> torch.Tensor:
    """Videos ``(N, F, 3, 32, 32)`` of glyphs that start anywhere, at pixels a frame."""
    n = len(glyphs)
    limit = (CANVAS - size) / 2
    start = _uniform(2 * n, -1.0, 1.0, rng).view(n, 2) * limit[:, None]
    frames = torch.arange(num_frames)[None, :, None]
    centre = _reflect(start[:, None] + velocity[:, None] * frames, limit[:, None, None])

    def repeat(value: torch.Tensor) -> torch.Tensor:
        return value.repeat_interleave(num_frames, dim=0)

    pixels = _place(
        repeat(glyphs),
        size=repeat(size),
        angle=repeat(_uniform(n, -0.12, 0.12, rng)),
        centre=centre.reshape(-1, 2),
    )
    return pixels.view(n, num_frames, 3, CANVAS, CANVAS)


def render_clips(
    split: Split, index: torch.Tensor, rng: torch.Generator, num_frames: int = CLIP_FRAMES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos ``(N, F, 3, 32, 32)`` without a prompt, and their speeds ``(N,)`` in pixels a frame.

    The digit, its direction and its speed are random, any speed between those of the verbs.
    """
    n = len(index)
    size = _uniform(n, 16.0, 20.0, rng)
    speed = _uniform(n, *CLIP_SPEEDS, rng)
    directions = torch.tensor(list(DIRECTIONS.values()))
    direction_ids = torch.randint(len(directions), (n,), generator=rng)
    velocity = directions[direction_ids] * speed[:, None]
    return _bounce(split.glyphs[index], size, velocity, num_frames, rng), speed


def render_frames(split: Split, index: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Single frames as they occur in the videos: a smaller digit at any place."""
    return render_videos(split, index, rng, num_frames=1)[0][:, 0]


def sample_indices(split: Split, n: int, rng: torch.Generator) -> torch.Tensor:
    """``n`` random examples of a split."""
    return torch.randint(len(split), (n,), generator=rng)


def vocabulary_words() -> list[str]:
    """Every word a prompt may hold, in a fixed order (for the tokenizer's merges)."""
    texts = [*TEMPLATES, *STILL_TEMPLATES, *VERBS, *DIRECTIONS, *DIGIT_WORDS]
    words = {w for text in texts for w in text.split() if not w.startswith("{")}
    return sorted(words)
