"""The attention layer in the middle of a VAE, with its own GroupNorm and residual."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from accelrt import ops

from .attention import attention_reason, self_attention
from .base import Group
from .products import runs_on_cpu
from .recognise import plain_norm
from .slicing import independent, slice_length
from .spare import Spare
from .state import State, channels_last, tokens


class VaeAttentionGroup(Group):
    """``Attention`` on ``[N, C, H, W]``, sliced along images: each attends to itself."""

    axis = "frames"
    classes = (Attention,)

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

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
        images, _, height, width = x.shape
        size = x[0].numel() * x.element_size()
        n = slice_length(images, self.config.frames_per_slice, size, self.config, x.device)
        self.measured(n, images)
        in_place = self.config.inplace and state.writable(x)
        spares: list[Spare] = []
        if runs_on_cpu(x) and not self.config.pipeline_slices:
            widest = max(x.shape[1], attn.inner_dim)
            spares = [Spare(x, n * widest * height * width) for _ in range(4)]
        if n >= images:
            y = self._images(x, in_place, spares)
        else:
            whole = x if in_place else torch.empty_like(x)
            for start in independent(images, n, x, self.config, attn):
                part = self._images(x[start : start + n], in_place, spares)
                if not in_place or not attn.residual_connection:
                    tokens(whole[start : start + n]).copy_(part)
            y = tokens(whole)
        state.hidden = y.view(images, height, width, -1).permute(0, 3, 1, 2)

    def _images(self, x: Tensor, in_place: bool, spares: list[Spare]) -> Tensor:
        """Some images ``[n, C, H, W]`` as tokens ``[n, H * W, C]``, over ``x`` if it may be.

        ``spares`` are for the normed images and the output, for queries, keys and values; all
        are tensors of their own without.
        """
        attn: Any = self.module
        norm = attn.group_norm
        stats = ops.group_norm_stats(x, norm.num_groups)
        normed = ops.group_norm_apply(
            x, stats, norm.num_groups, norm.weight, norm.bias, eps=norm.eps,
            out=spares[0].images(*x.shape) if spares else None,
        )  # fmt: skip
        y = self_attention(attn, tokens(normed), spares=spares)
        scale = 1.0 / attn.rescale_output_factor
        if attn.residual_connection:
            source = tokens(x)
            return ops.residual_blend(source, y, scale=scale, out=source if in_place else y)
        return y if scale == 1.0 else y * scale
