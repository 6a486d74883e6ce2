"""The contact sheet of samples and the size of the saved models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AnimateDiffPipeline, DiTPipeline
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


def folder_megabytes(out: Path) -> dict[str, float]:
    """Sizes of the saved models, in units of 10**6 bytes."""
    sizes = {}
    for name in ("classifier", "dit", "animatediff"):
        files = [f for f in (out / name).rglob("*") if f.is_file()]
        sizes[name] = round(sum(f.stat().st_size for f in files) / 1e6, 2)
    sizes["total"] = round(sum(sizes.values()), 2)
    return sizes


def _row(frames: list[Image.Image]) -> np.ndarray:
    return np.concatenate([np.asarray(frame.convert("L")) for frame in frames], axis=1)


def write_sample_sheet(out: Path, target: Path, seed: int = 1234) -> None:
    """Four rows of DiT samples (1.6 of each digit a row), then one row for each video."""
    dit = DiTPipeline.from_pretrained(out / "dit", dtype=torch.float32)
    video = AnimateDiffPipeline.from_pretrained(out / "animatediff", dtype=torch.float32)
    for pipe in (dit, video):
        pipe.set_progress_bar_config(disable=True)
    classes = [i % data.NUM_CLASSES for i in range(4 * data.NUM_FRAMES)]
    images = dit(
        class_labels=classes,
        num_inference_steps=25,
        generator=torch.Generator().manual_seed(seed),
    ).images
    rows = [_row(images[i : i + data.NUM_FRAMES]) for i in range(0, 64, data.NUM_FRAMES)]
    rows.append(np.full((4, rows[0].shape[1]), 128, dtype=np.uint8))
    clips = video(
        prompt=list(SHEET_PROMPTS),
        num_frames=data.NUM_FRAMES,
        num_inference_steps=25,
        generator=torch.Generator().manual_seed(seed),
    ).frames
    rows += [_row(clip) for clip in clips]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet = sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.BILINEAR)
    sheet.save(target, optimize=True)
