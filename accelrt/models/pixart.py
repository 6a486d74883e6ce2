"""PixArt-alpha and -sigma: ``PixArtTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Context, Group, State
from accelrt.groups.base import StockGroup
from accelrt.groups.modulated import ModulatedOutGroup, unpatchify
from accelrt.groups.patch_embed import PatchEmbedGroup
from accelrt.groups.pixart_block import AdaLNSingleBlockGroup
from accelrt.steps.conditions import rows_of_times, tiled

from .family import CallShape, Family, meta, register, without_guidance
from .passes import sample_passes
from .stages import Stage

_PER_SAMPLE = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask")
_CONDITIONS = ("resolution", "aspect_ratio")


class ModulationGroup(StockGroup):
    """The embedding of timestep, resolution and aspect ratio, and the shared modulation."""

    why = "an embedding"

    def run(self, state: State) -> None:
        """``temb`` ``[B, D]``, and ``extras["modulation"]`` ``[B, 6 * D]``."""
        hidden = state.hidden
        assert hidden is not None
        made = state.extras.get("modulations", {})
        if self.name in made:
            state.extras["modulation"] = made[self.name]
            state.temb = made[f"{self.name}.temb"]
            return
        state.extras["modulation"], state.temb = self.embed(
            state.inputs, hidden.shape[0], hidden.dtype
        )

    def embed(
        self, inputs: dict[str, Any], batch: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``[B, 6 * D]`` and ``[B, D]``, from ``timestep`` and ``added_cond_kwargs``."""
        modulation, temb = self.module(
            inputs["timestep"], inputs["added_cond_kwargs"], batch_size=batch, hidden_dtype=dtype
        )
        return modulation, temb


class CaptionGroup(StockGroup):
    """The projection of the caption to the width of the stream."""

    why = "an embedding"

    def run(self, state: State) -> None:
        """``context.full`` ``[B, L, E]`` to ``[B, L, D]``."""
        hidden = state.hidden
        assert hidden is not None
        known: dict[str, tuple[Tensor, ...]] | None = state.extras.get("context_keys")
        if known is not None and self.name in known:
            state.context.full = known[self.name][0]
            return
        caption: Tensor = self.module(state.context.full)
        # Where batches differ, the stock model deals the rows out anew; so must we.
        state.context.full = caption.view(hidden.shape[0], -1, hidden.shape[-1])
        if known is not None:
            known[self.name] = (state.context.full,)


class PixArtOutGroup(ModulatedOutGroup):
    """Final norm, modulated by the model's table, ``extras["table"]``, and the timestep."""

    def modulation(self, state: State, x: Tensor) -> Tensor:
        """Shift and scale ``[B or 1, 2, D]``."""
        table, temb = state.extras["table"], state.temb
        assert temb is not None
        made: Tensor = (table[None] + temb[:, None].to(table.device)).to(x.device)
        return made


class PixArt(Family):
    """Patch embedding and caption, adaLN-single blocks with cross-attention, modulated output."""

    input_name = "hidden_states"
    conditioning = ("encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs")

    def declines(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Besides the usual reasons: what makes the stock model raise."""
        reason = super().declines(model, inputs)
        if reason:
            return reason
        pixart: Any = model
        if inputs["hidden_states"].dim() != 4:
            return "hidden_states is not [B, C, H, W]"
        if pixart.use_additional_conditions and inputs["added_cond_kwargs"] is None:
            return "added_cond_kwargs are missing"
        return ""

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """``samples_per_pass`` at a time, where samples do not look at each other."""
        # The stock model deals the rows of these out anew if they are not one per sample.
        batch = inputs["hidden_states"].shape[0]
        rows = [inputs[name] for name in _PER_SAMPLE]
        if model.use_additional_conditions:
            rows += [inputs["added_cond_kwargs"].get(name) for name in _CONDITIONS]
        else:
            rows.append(inputs["timestep"])
        if any(isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] != batch) for x in rows):
            return [inputs]
        return sample_passes(model, self.blocks(model), inputs, config)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """The caption as it was given, and both masks as biases."""
        pixart: Any = model
        dtype = inputs["hidden_states"].dtype
        context = Context(
            full=inputs["encoder_hidden_states"],
            attention_mask=_bias(inputs["attention_mask"], dtype),
            encoder_attention_mask=_bias(inputs["encoder_attention_mask"], dtype),
            cross_attention_kwargs=inputs["cross_attention_kwargs"],
        )
        extras: dict[str, Any] = {
            "table": pixart.scale_shift_table,
            "embedding": pixart.adaln_single,
        }
        return State(inputs, context=context, extras=extras)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The transformer blocks."""
        blocks: Any = model.transformer_blocks
        return blocks  # type: ignore[no-any-return]

    def like_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks."""
        blocks: Any = model.transformer_blocks
        return tuple(blocks)

    def block_group(self, model: nn.Module, name: str, block: nn.Module, config: Config) -> Group:
        """An adaLN-single block."""
        return AdaLNSingleBlockGroup(name, block, config)

    def at_time(
        self, model: nn.Module, inputs: dict[str, Any], given: dict[str, Any], timestep: Tensor
    ) -> dict[str, Any]:
        """Blocks are given the modulation of the model's own embedding."""
        x = inputs["hidden_states"]
        embedding: Any = model.adaln_single
        modulation, _ = embedding(
            timestep, inputs["added_cond_kwargs"], batch_size=x.shape[0], hidden_dtype=x.dtype
        )
        return {**given, "timestep": modulation}

    def retime(self, state: State, timestep: Tensor) -> None:
        """The blocks are given the modulation of another timestep."""
        inputs = state.inputs
        x = inputs["hidden_states"]
        state.inputs = {**inputs, "timestep": timestep}
        made = state.extras.get("modulations", {})
        if "adaln_single" in made:
            state.extras["modulation"] = made["adaln_single"]
            return
        embedding: Any = state.extras["embedding"]
        state.extras["modulation"], _ = embedding(
            state.inputs["timestep"], inputs["added_cond_kwargs"],
            batch_size=len(x), hidden_dtype=x.dtype,
        )  # fmt: skip

    def made_ahead(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        inputs: dict[str, Any],
        times: Sequence[float],
    ) -> dict[str, Tensor]:
        """The embeddings of the timesteps, and the modulations of the blocks."""
        x = inputs["hidden_states"]
        rows = len(times) * len(x)
        given = tiled(inputs, ("added_cond_kwargs",), len(x), len(times))
        given["timestep"] = rows_of_times(times, len(x), inputs["timestep"])
        state, made = State(given), {}
        for group in groups:
            if isinstance(group, ModulationGroup):
                shared, temb = group.embed(given, rows, x.dtype)
                made[group.name], made[f"{group.name}.temb"] = shared, temb
                state.extras["modulation"] = shared
        for group in groups:
            if isinstance(group, AdaLNSingleBlockGroup) and not group.unrecognised():
                made[group.name] = group.modulation(state, x.new_empty(rows, 0))
        return made

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``embed``, ``blocks.0`` onwards, ``out``."""
        pixart: Any = model
        embed: list[StockGroup] = [
            PatchEmbedGroup("pos_embed", pixart.pos_embed, config),
            ModulationGroup("adaln_single", pixart.adaln_single, config),
        ]
        if pixart.caption_projection is not None:
            embed.append(CaptionGroup("caption_projection", pixart.caption_projection, config))
        result = [Stage("embed", tuple(embed))]
        for i, block in enumerate(pixart.transformer_blocks):
            group = AdaLNSingleBlockGroup(f"transformer_blocks.{i}", block, config)
            result.append(Stage(f"blocks.{i}", (group,)))
        out = PixArtOutGroup("norm_out", pixart.norm_out, pixart.proj_out, config)
        result.append(Stage("out", (out,)))
        return tuple(result)

    def call_shape(self, model: nn.Module, inputs: dict[str, Any]) -> CallShape:
        """From the latents ``[B, C, H, W]``."""
        batch, _, height, width = inputs["hidden_states"].shape
        return CallShape(batch, without_guidance(batch), 1, height, width)

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """Latents and captions with their mask; the size, if the model is told of it."""
        config: Any = model.config
        batch, tokens = shape.samples, shape.tokens or 300
        size = (batch, config.in_channels, shape.height, shape.width)
        pixart: Any = model
        sized = pixart.use_additional_conditions
        return {
            "hidden_states": meta(*size, dtype=dtype),
            "encoder_hidden_states": meta(batch, tokens, config.caption_channels, dtype=dtype),
            "timestep": meta(batch, dtype=torch.int64),
            "added_cond_kwargs": {
                "resolution": meta(batch, 2, dtype=dtype) if sized else None,
                "aspect_ratio": meta(batch, 1, dtype=dtype) if sized else None,
            },
            "encoder_attention_mask": meta(batch, tokens, dtype=torch.int64),
        }

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """Put the patches of ``[B, S, patch * patch * C]`` back into an image."""
        pixart: Any = model
        patch = pixart.config.patch_size
        height, width = (side // patch for side in state.inputs["hidden_states"].shape[-2:])
        output = unpatchify(state.take(), height, width, patch, pixart.out_channels)
        return output

    def result(self, model: nn.Module, inputs: dict[str, Any], output: Tensor) -> Any:
        """A tuple, or diffusers' output class."""
        if not inputs["return_dict"]:
            return (output,)
        return Transformer2DModelOutput(sample=output)


def _bias(mask: Any, dtype: Any) -> Any:
    """A mask ``[B, K]`` (1 keeps) as a bias ``[B, 1, K]``; a bias as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


register(PixArtTransformer2DModel, ("", PixArt()))
