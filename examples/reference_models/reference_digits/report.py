"""The contact sheet of samples and the size of the saved models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import data

SHEET_PROMPTS = (
    "a handwritten seven bouncing to the right",
    "a handwritten two bouncing down",
    "the digit three bouncing diagonally",
    "a white eight moving up on black",
    "zero moving to the left",
    "the digit 5 bouncing to the left",
)
SHEET_VIDEOS = 6
GREY = 128


def folder_megabytes(out: Path) -> dict[str, float]:
    """Sizes of the saved models, in units of 10**6 bytes."""
    sizes = {}
    for name in ("classifier", "dit", "animatediff", "pixart", "svd"):
        files = [f for f in (out / name).rglob("*") if f.is_file()]
        if files:
            sizes[name] = round(sum(f.stat().st_size for f in files) / 1e6, 2)
    sizes["total"] = round(sum(sizes.values()), 2)
    return sizes


def _row(frames: list[Image.Image]) -> np.ndarray:
    return np.concatenate([np.asarray(frame.convert("L")) for frame in frames], axis=1)


def _grid(images: list[Image.Image]) -> list[np.ndarray]:
    width = data.NUM_FRAMES
    return [_row(images[i : i + width]) for i in range(0, len(images), width)]


def write_sample_sheet(
    target: Path,
    load: Callable[[str], Any],
    first_frames: list[Image.Image],
    pixart_call: dict[str, Any],
    svd_call: dict[str, Any],
    seed: int = 1234,
) -> None:
    """Samples of every model, each below the other and parted by a grey line.

    Four rows of DiT samples (1.6 of each digit a row), one row for each AnimateDiff video, four
    rows of PixArt samples in the order of DiT's, and one row for each SVD video: the given first
    frame, a gap and the frames of the video, filled up with grey. ``load`` returns a pipeline by
    its name.
    """

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    width = data.NUM_FRAMES
    digits = [i % data.NUM_CLASSES for i in range(4 * width)]
    dit = load("dit")(class_labels=digits, num_inference_steps=25, generator=rng()).images
    clips = load("animatediff")(
        prompt=list(SHEET_PROMPTS),
        num_frames=width,
        num_inference_steps=25,
        generator=rng(),
    ).frames
    prompts = [f"a handwritten {data.DIGIT_WORDS[digit]}" for digit in digits]
    pixart = load("pixart")(prompt=prompts, generator=rng(), **pixart_call).images
    given = first_frames[:SHEET_VIDEOS]
    bounces = load("svd")(image=given, generator=rng(), **svd_call).frames
    gap = Image.new("L", (data.CANVAS, data.CANVAS), GREY)
    parts = [
        _grid(dit),
        [_row(clip) for clip in clips],
        _grid(pixart),
        [
            _row([first, gap, *clip, *[gap] * (width - 2 - len(clip))])
            for first, clip in zip(given, bounces, strict=True)
        ],
    ]
    line = np.full((4, width * data.CANVAS), GREY, dtype=np.uint8)
    rows = [row for part in parts for row in (*part, line)][:-1]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet = sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.BILINEAR)
    sheet.save(target, optimize=True)
