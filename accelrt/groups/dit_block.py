"""Blocks of DiT: adaLN-Zero, with an embedding of timestep and class in every block."""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor

from .modulated import ModulatedBlockGroup
from .recognise import is_plain
from .state import State


class AdaLNBlockGroup(ModulatedBlockGroup):
    """``BasicTransformerBlock`` with ``norm_type="ada_norm_zero"`` and self-attention."""

    norm_type = "ada_norm_zero"

    def unrecognised(self) -> str:
        """Besides other kinds of blocks: another first norm, and cross-attention."""
        reason = super().unrecognised()
        if reason:
            return reason
        block: Any = self.module
        if not is_plain(block.norm1, AdaLayerNormZero) or block.norm1.emb is None:
            return f"norm1: {type(block.norm1).__name__} is not a plain AdaLayerNormZero"
        return "cross-attention in the block" if block.attn2 is not None else ""

    def norms(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """Inside ``norm1``, and ``norm3``."""
        block: Any = self.module
        return ("norm1", block.norm1.norm), ("norm3", block.norm3)

    def modulation(self, state: State, stream: Tensor) -> Tensor:
        """From the block's own embedding of timestep and class."""
        norm1: Any = self.module.norm1
        timestep, labels = state.inputs["timestep"], state.inputs["class_labels"]
        emb = norm1.emb(timestep, labels, hidden_dtype=stream.dtype)
        modulation: Tensor = norm1.linear(norm1.silu(emb))
        return modulation.view(modulation.shape[0], 6, -1)

    def as_it_came(self, state: State, stream: Tensor) -> Tensor:
        """With timestep and class."""
        inputs = state.inputs
        y: Tensor = self.module(
            stream,
            timestep=inputs["timestep"],
            class_labels=inputs["class_labels"],
            cross_attention_kwargs=inputs.get("cross_attention_kwargs"),
        )
        return y
