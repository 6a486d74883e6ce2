"""Pictures of a comparison: stock, accelrt and their difference, side by side."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from accelrt.files import write_bytes
from accelrt.quality import Comparison

DIFFERENCE_GAIN = 64
FRAME_MS = 125
_PANEL = 320  # pixels that a panel of small pictures is enlarged to
_GAP = 12
_CAPTION = 26
_BACKGROUND = (20, 23, 28)
_TEXT = (214, 219, 226)


def panels(result: Comparison) -> list[Image.Image]:
    """One picture per frame: all stock pictures, all accelerated ones, their difference.

    Small pictures are enlarged by a whole factor without smoothing. The difference is
    multiplied by :data:`DIFFERENCE_GAIN`.
    """
    stock = result.stock.pictures.nan_to_num()
    ours = result.accelrt.pictures.nan_to_num()
    parts = (
        ("stock", stock),
        ("accelrt", ours),
        (f"difference x{DIFFERENCE_GAIN}", (ours - stock).abs() * DIFFERENCE_GAIN),
    )
    frames: list[Image.Image] = []
    for i in range(stock.shape[1]):
        grids = [(caption, _grid(images[:, i])) for caption, images in parts]
        frames.append(_compose(grids))
    return frames


def write_pictures(result: Comparison, folder: Path, name: str) -> Path:
    """Write ``name.gif`` for a video, ``name.png`` for images; returns the path."""
    frames, buffer = panels(result), io.BytesIO()
    if not result.video:
        path = folder / f"{name}.png"
        frames[0].save(buffer, "PNG", optimize=True)
        write_bytes(path, buffer.getvalue())
        return path
    path = folder / f"{name}.gif"
    indexed = [
        frame.quantize(
            256, dither=Image.Dither.NONE if _grey(frame) else Image.Dither.FLOYDSTEINBERG
        )
        for frame in frames
    ]
    indexed[0].save(
        buffer, "GIF", save_all=True, append_images=indexed[1:], duration=FRAME_MS, loop=0,
        optimize=True,
    )  # fmt: skip
    write_bytes(path, buffer.getvalue())
    return path


def _grey(frame: Image.Image) -> bool:
    colours = frame.getcolors(256)
    return colours is not None


def _grid(images: Tensor) -> Image.Image:
    """``[N, C, H, W]`` in [0, 1] as one picture, about as wide as high."""
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count * height / width))
    if count == 20:
        columns = 5
    rows = math.ceil(count / columns)
    scale = max(1, round(_PANEL / (columns * width)))
    sheet = Image.new("RGB", (columns * width * scale, rows * height * scale), _BACKGROUND)
    levels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    if levels.shape[1] == 1:
        levels = levels.expand(-1, 3, -1, -1)
    for i, picture in enumerate(levels):
        tile = Image.fromarray(picture[:3].permute(1, 2, 0).contiguous().numpy())
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * width * scale, i // columns * height * scale))
    return sheet


def _compose(grids: list[tuple[str, Image.Image]]) -> Image.Image:
    """Panels in a row, each under its caption."""
    width = sum(grid.width for _, grid in grids) + _GAP * (len(grids) + 1)
    height = max(grid.height for _, grid in grids) + _CAPTION + _GAP
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    left = _GAP
    for caption, grid in grids:
        draw.text((left, 6), caption, fill=_TEXT, font=font)
        sheet.paste(grid, (left, _CAPTION))
        left += grid.width + _GAP
    return sheet
