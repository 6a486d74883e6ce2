"""The patches of an image and their positions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed_from_grid
from torch import Tensor, nn

from .base import StockGroup
from .recognise import is_plain, plain_norm
from .slicing import independent, slice_length
from .state import State, empty_rows


class PatchEmbedGroup(StockGroup):
    """A strided convolution, and a table of positions added to it.

    A plain one runs in bands of patches, straight into the residual stream.
    """

    why = "an embedding"

    def run(self, state: State) -> None:
        """``[B, C, H, W]`` to the residual stream ``[B, S, D]``."""
        x: Tensor = state.inputs["hidden_states"]
        if self._whole(x):
            state.hidden = self.module(x)
            if not is_plain(self.module, PatchEmbed):
                state.hold(state.hidden)
            return
        embed: Any = self.module
        patch: int = embed.patch_size
        batch, (height, width) = x.shape[0], (side // patch for side in x.shape[2:])
        positions = Positions(embed, height, width, x.device)
        stream = empty_rows(x, batch, height * width, embed.proj.out_channels)
        line = width * stream.shape[2] * stream.element_size()
        samples = slice_length(batch, None, height * line, self.config, x.device)
        lines = slice_length(height, None, line, self.config, x.device)
        for sample in independent(batch, samples, x, self.config, embed):
            some = slice(sample, sample + samples)
            for start in independent(height, lines, x, self.config, embed):
                y = embed.proj(x[some, :, start * patch : (start + lines) * patch])
                y = y.flatten(2).transpose(1, 2)
                if embed.layer_norm:
                    y = embed.norm(y)
                rows = slice(start * width, start * width + y.shape[1])
                # Summed in the wider dtype and rounded once, as the stock layer does it.
                stream[some, rows] = y + positions(rows)
                del y
        state.hidden = stream

    def _whole(self, x: Tensor) -> bool:
        """The module must be called as it came."""
        embed: Any = self.module
        if not is_plain(embed, PatchEmbed) or not is_plain(embed.proj, nn.Conv2d):
            return True
        if x.dim() != 4 or x.shape[1] != embed.proj.in_channels:
            return True
        if embed.pos_embed is None or embed.pos_embed_max_size or not embed.flatten:
            return True
        if embed.layer_norm and not plain_norm(embed.norm, nn.LayerNorm, None):
            return True
        patch = (embed.patch_size, embed.patch_size)
        known = embed.proj.kernel_size == embed.proj.stride == patch
        known = known and embed.proj.padding in ((0, 0), 0) and embed.proj.dilation == (1, 1)
        # Weights of another dtype, and images smaller than a patch, make the layer raise.
        return not known or embed.proj.weight.dtype != x.dtype or min(x.shape[2:]) < patch[0]


class Positions:
    """The table of positions for a grid of patches, by rows.

    Args:
        embed: a plain ``PatchEmbed``, whose own table is used if the grid is its own.
        height, width: of the grid.
        device: where the rows are computed otherwise.
    """

    def __init__(self, embed: Any, height: int, width: int, device: torch.device) -> None:
        self.table: Tensor = embed.pos_embed
        self.grid: Tensor | None = None
        if (embed.height, embed.width) == (height, width):
            return
        # The places of the patches, row by row, in float32 as diffusers computes them.
        down, across = (
            torch.arange(side, device=device, dtype=torch.float32)
            / (side / embed.base_size)
            / embed.interpolation_scale
            for side in (height, width)
        )
        self.grid = torch.stack((across.repeat(height), down.repeat_interleave(width)))

    def __call__(self, rows: slice) -> Tensor:
        """The rows ``[1, s, D]`` of the table."""
        if self.grid is None:
            return self.table[:, rows]
        width = self.table.shape[2]
        from_grid: Any = get_2d_sincos_pos_embed_from_grid
        table: Tensor = from_grid(width, self.grid[:, rows], output_type="pt")
        return table.float()[None]
