"""DiT: ``DiTTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.base import StockGroup
from accelrt.groups.dit_block import AdaLNBlockGroup
from accelrt.groups.recognise import plain_norm
from accelrt.groups.state import with_rows

from .family import Family, register
from .stages import Stage


class PatchEmbedGroup(StockGroup):
    """Patches and their positions: a strided convolution and a table."""

    why = "an embedding"

    def run(self, state: State) -> None:
        """``[B, C, H, W]`` to the residual stream ``[B, S, D]``."""
        state.hidden = self.module(state.inputs["hidden_states"])


class DiTOutGroup(Group):
    """Final modulated norm and projection of every token.

    Args:
        name: as in :class:`Group`.
        model: the model, of which only the parts are kept: a group that held the
            model would keep it alive.
        config: as in :class:`Group`.
    """

    def __init__(self, name: str, model: Any, config: Config) -> None:
        super().__init__(name, model.norm_out, config)
        self.embed = model.transformer_blocks[0].norm1
        self.modulation = model.proj_out_1
        self.projection = model.proj_out_2

    def unfused(self) -> list[str]:
        """The norm, if it is not plain."""
        if plain_norm(self.module, nn.LayerNorm, None):
            return []
        return [f"norm_out: {type(self.module).__name__} runs as it came"]

    def run(self, state: State) -> None:
        """``[B, S, D]`` to ``[B, S, patch * patch * C]``."""
        norm: Any = self.module
        x = state.take()
        inputs = state.inputs
        emb = self.embed.emb(inputs["timestep"], inputs["class_labels"], hidden_dtype=x.dtype)
        modulation: Tensor = self.modulation(F.silu(emb))
        shift, scale = modulation.expand(x.shape[0], -1).chunk(2, dim=1)
        fused = self.config.fuse and plain_norm(norm, nn.LayerNorm, x.dtype)
        if fused and modulation.dtype == x.dtype:
            overwrite = self.config.inplace and state.writable(x)
            y = ops.layer_norm_modulate(
                with_rows(x), norm.weight, norm.bias, scale=scale, shift=shift, eps=norm.eps,
                out=x if overwrite and x.stride(-1) == 1 else None,
            )  # fmt: skip
        else:
            y = norm(x) * (1 + scale[:, None]) + shift[:, None]
        state.hidden = self.projection(y)


class DiT(Family):
    """Patch embedding, adaLN-Zero blocks, modulated output."""

    input_name = "hidden_states"

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Nothing is known before the patch embedding."""
        return State(inputs)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The transformer blocks."""
        blocks: Any = model.transformer_blocks
        return blocks  # type: ignore[no-any-return]

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``embed``, ``blocks.0`` onwards, ``out``."""
        dit: Any = model
        result = [Stage("embed", (PatchEmbedGroup("pos_embed", dit.pos_embed, config),))]
        for i, block in enumerate(dit.transformer_blocks):
            group = AdaLNBlockGroup(f"transformer_blocks.{i}", block, config)
            result.append(Stage(f"blocks.{i}", (group,)))
        result.append(Stage("out", (DiTOutGroup("norm_out", dit, config),)))
        return tuple(result)

    def finish(self, model: nn.Module, state: State) -> Any:
        """Put the patches of ``[B, S, patch * patch * C]`` back into an image."""
        dit: Any = model
        x = state.take()
        # The stock model takes every token grid for a square one; so must we.
        side = int(x.shape[1] ** 0.5)
        patch, channels = dit.patch_size, dit.out_channels
        x = x.reshape(shape=(-1, side, side, patch, patch, channels))
        x = torch.einsum("nhwpqc->nchpwq", x)
        output = x.reshape(shape=(-1, channels, side * patch, side * patch))
        if not state.inputs["return_dict"]:
            return (output,)
        return Transformer2DModelOutput(sample=output)


register(DiTTransformer2DModel, ("", DiT()))
