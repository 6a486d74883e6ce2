"""The attention layer in the middle of a VAE, with its own GroupNorm and residual."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from accelrt import ops

from .attention import attention_reason, self_attention
from .base import Group
from .recognise import plain_norm
from .state import State, channels_last, tokens


class VaeAttentionGroup(Group):
    """``Attention`` on ``[N, C, H, W]``; the images of a call are one slice of the VAE."""

    axis = "images"
    classes = (Attention,)

    def configured_length(self) -> int | None:
        """Images per run of the VAE."""
        return self.config.vae_images

    def unrecognised(self) -> str:
        """Besides hooks: an attention layer that is not the usual one."""
        reason = super().unrecognised() or attention_reason(self.module, in_vae=True)
        if reason:
            return reason
        module: Any = self.module
        if not plain_norm(module.group_norm, nn.GroupNorm, None):
            return "the norm inside the attention layer is not a plain GroupNorm"
        return ""

    def unfused(self) -> list[str]:
        """Nothing, once recognised."""
        return []

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        attn: Any = self.module
        reason = self.unrecognised()
        if not reason and not plain_norm(attn.group_norm, nn.GroupNorm, x.dtype):
            reason = f"the norm's weights are not {x.dtype}"
        if reason or not self.config.fuse:
            self.left_alone = reason
            y = attn(x.contiguous(), temb=None)
            state.hidden = channels_last(y)
            if reason:
                state.hold(state.hidden)
            return
        self.measured(x.shape[0], x.shape[0])
        norm = attn.group_norm
        stats = ops.group_norm_stats(x, norm.num_groups)
        normed = ops.group_norm_apply(
            x, stats, norm.num_groups, norm.weight, norm.bias, eps=norm.eps
        )
        y = self_attention(attn, tokens(normed))
        source = tokens(x)
        scale = 1.0 / attn.rescale_output_factor
        if attn.residual_connection:
            out = source if self.config.inplace and state.writable(x) else y
            y = ops.residual_blend(source, y, scale=scale, out=out)
        elif scale != 1.0:
            y = y * scale
        batch, _, height, width = x.shape
        state.hidden = y.view(batch, height, width, -1).permute(0, 3, 1, 2)
