"""Blocks of PixArt: one modulation for all blocks (adaLN-single), cross-attention to a caption."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .modulated import ModulatedBlockGroup
from .sample_attention import SampleAttention, mask_by_sample
from .state import State


class AdaLNSingleBlockGroup(ModulatedBlockGroup):
    """``BasicTransformerBlock`` with ``norm_type="ada_norm_single"``.

    The block adds a table of its own to the modulation of the model, ``state.extras``
    ``["modulation"]`` ``[B, 6 * D]``. No norm precedes the cross-attention.
    """

    norm_type = "ada_norm_single"

    def norms(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """``norm1`` and ``norm2``."""
        block: Any = self.module
        return ("norm1", block.norm1), ("norm2", block.norm2)

    def modulation(self, state: State, stream: Tensor) -> Tensor:
        """The block's table, shifted by the embedding of the timestep."""
        table: Any = self.module.scale_shift_table
        shared: Tensor = state.extras["modulation"]
        modulation: Tensor = table[None] + shared.reshape(stream.shape[0], 6, -1)
        return modulation

    def attentions(self, state: State, stream: Tensor) -> tuple[SampleAttention, ...] | str:
        """Self-attention, and cross-attention with the caption, each with its mask."""
        block: Any = self.module
        context, batch = state.context.full, stream.shape[0]
        layers = [(block.attn1, None, state.context.attention_mask)]
        if block.attn2 is not None:
            if context is not None and (context.dim() != 3 or context.shape[0] != batch):
                return f"a caption {tuple(context.shape)} for {batch} samples"
            layers.append((block.attn2, context, state.context.encoder_attention_mask))
        found = []
        for attn, caption, mask in layers:
            keys = stream.shape[1] if caption is None else caption.shape[1]
            bias = None
            if mask is not None:
                heads = getattr(attn, "heads", 1)
                bias = mask_by_sample(mask, batch, heads, stream.shape[1], keys)
                if bias is None:
                    return f"an attention mask {tuple(mask.shape)} of an unknown form"
            layer = SampleAttention(attn, self.config.fuse, stream.dtype, caption, bias)
            if caption is not None:
                layer.keep_keys(state.extras.get("context_keys"), self.name)
            found.append(layer)
        return tuple(found)

    def as_it_came(self, state: State, stream: Tensor) -> Tensor:
        """With both masks and the caption."""
        y: Tensor = self.module(
            stream,
            attention_mask=state.context.attention_mask,
            encoder_hidden_states=state.context.full,
            encoder_attention_mask=state.context.encoder_attention_mask,
            timestep=state.extras["modulation"],
            cross_attention_kwargs=state.context.cross_attention_kwargs,
            class_labels=None,
        )
        return y
