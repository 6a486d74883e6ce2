"""Blocks and output of image transformers with adaLN modulation, sliced along samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .attention import attention_reason
from .banded_attention import BandedAttention, band_length
from .base import Group
from .block_call import BlockCall
from .feed_forward import FeedForwardRunner, activation_remark, feed_forward_reason
from .independence import mixes
from .recognise import plain_norm
from .sample_attention import SampleAttention
from .slicing import independent, slice_length, starts
from .state import State, with_rows


class ModulatedBlockGroup(Group):
    """A ``BasicTransformerBlock`` whose norms are modulated and whose sub-layers are gated.

    Modulated norm, self-attention, gate; cross-attention, if the block has it; modulated
    norm, feed-forward, gate. Samples are independent; inside a slice of samples the
    feed-forward is sliced along tokens, and a single sample that exceeds the slice size is
    sliced along tokens throughout. Layers that may mix samples see all of them.
    """

    axis = "samples"
    classes = (BasicTransformerBlock,)
    norm_type = ""

    @abstractmethod
    def norms(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """The norms before self-attention and before the feed-forward, with their names."""

    @abstractmethod
    def modulation(self, state: State, stream: Tensor) -> Tensor:
        """Shift, scale, gate of the attention, then of the feed-forward: ``[B or 1, 6, D]``."""

    @abstractmethod
    def as_it_came(self, state: State, stream: Tensor) -> Tensor:
        """Call the block with the arguments that the stock model gives it."""

    def attentions(self, state: State, stream: Tensor) -> tuple[SampleAttention, ...] | str:
        """The attention layers of this call, or why its conditioning is not recognised."""
        block: Any = self.module
        return (SampleAttention(block.attn1, self.config.fuse, stream.dtype),)

    def configured_length(self) -> int | None:
        """Samples per slice."""
        return self.config.samples_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: blocks of another kind."""
        reason = super().unrecognised()
        if reason:
            return reason
        block: Any = self.module
        if block.norm_type != self.norm_type:
            return f"norm_type {block.norm_type!r} is not known"
        if block.pos_embed is not None or block.only_cross_attention:
            return "a positional embedding or only cross-attention in the block"
        if block._chunk_size is not None:
            return "forward chunking is enabled"
        return ""

    def together(self) -> str:
        """Why all samples must pass in one slice; empty if they need not."""
        reason = mixes(self.module)
        return f"{reason}, so all samples pass together" if reason else ""

    def unfused(self) -> list[str]:
        """Norms, attention and activation that are not recognised."""
        block: Any = self.module
        remarks = []
        for name, norm in self.norms():
            if not plain_norm(norm, nn.LayerNorm, None):
                remarks.append(f"{name}: {type(norm).__name__} runs as it came")
        for name, layer in (("attn1", block.attn1), ("attn2", block.attn2)):
            attention = "" if layer is None else attention_reason(layer)
            if attention:
                remarks.append(f"{name}: {attention}")
        reason = feed_forward_reason(block.ff) or activation_remark(block.ff)
        return [*remarks, *filter(None, (reason, self.together()))]

    def run(self, state: State) -> None:
        """``[B, S, D]`` to the same shape."""
        stream = state.take()
        attentions: tuple[SampleAttention, ...] | str = ""
        reason = self.unrecognised()
        if not reason and state.inputs.get("cross_attention_kwargs"):
            reason = "cross_attention_kwargs were given"
        if not reason:
            attentions = self.attentions(state, stream)
            reason = attentions if isinstance(attentions, str) else ""
        if not reason:
            made: Tensor | None = state.extras.get("modulations", {}).get(self.name)
            modulation = self.modulation(state, stream) if made is None else made
            reason = _misfit(modulation, stream)
        if reason:
            self.left_alone = reason
            state.hidden = self.as_it_came(state, stream)
            state.hold(state.hidden)
            return
        assert not isinstance(attentions, str)
        modulation = modulation.expand(stream.shape[0], -1, -1)
        if not stream.is_contiguous():  # the patch embedding leaves channels outermost
            stream = stream.contiguous()
        elif not (self.config.inplace and state.writable(stream)):
            stream = stream.clone()
        self._slices(stream, modulation, attentions)
        state.hidden = stream

    def _slices(
        self, stream: Tensor, modulation: Tensor, attentions: tuple[SampleAttention, ...]
    ) -> None:
        """Run the block on ``[B, S, D]`` in place, some samples at a time."""
        batch, length, width = stream.shape
        size = length * width * stream.element_size()
        n = slice_length(batch, self.config.samples_per_slice, size, self.config, stream.device)
        if n < batch and self.together():
            n = batch
        self.measured(n, batch)
        block: Any = self.module
        feed_forward = FeedForwardRunner(block.ff, self.config)
        banded = None
        exceeds = n == 1 and band_length(stream, self.config) < length
        if exceeds and self._by_tokens(attentions, feed_forward):
            banded = BandedAttention(attentions[0], stream, self.config)
        whole = None
        if banded is None and self.config.fuse:
            norms = [norm for _, norm in self.norms()]
            whole = BlockCall.of(norms, attentions, feed_forward, stream[:n], self.config)
        for start in starts(batch, n, stream):
            part = slice(start, start + n)
            if whole is not None:
                whole(stream[part], modulation[part], part)
            elif banded is None:
                self._samples(stream[part], modulation[part], part, attentions, feed_forward)
            else:
                self._bands(stream[part], modulation[part], part, banded, attentions, feed_forward)

    def _by_tokens(
        self, attentions: tuple[SampleAttention, ...], feed_forward: FeedForwardRunner
    ) -> bool:
        """Every layer but the first attention's keys and values may see a band of tokens."""
        plain = all(plain_norm(norm, nn.LayerNorm, None) for _, norm in self.norms())
        layers = all(attention.by_tokens for attention in attentions)
        contexts = all(attention.context is not None for attention in attentions[1:])
        return plain and layers and contexts and feed_forward.known

    def _samples(
        self,
        stream: Tensor,
        modulation: Tensor,
        part: slice,
        attentions: tuple[SampleAttention, ...],
        feed_forward: FeedForwardRunner,
    ) -> None:
        """Run the block on some samples ``[b, S, D]``, in place."""
        norm = self.norms()[0][1]
        shift, scale, first_gate, *rest = modulation.unbind(1)
        gate: Tensor | None = first_gate
        last = attentions[0]
        y = last.attend(self._norm(norm, stream, scale, shift), part)
        for following in attentions[1:]:
            _add(stream, y, gate)
            del y
            last, gate = following, None
            y = last.attend(stream.clone() if last.keeps_input else stream, part)
        normed = self._add_norm(stream, y, gate, rest, last.fresh)
        del y
        feed_forward(normed, stream, rest[2])

    def _bands(
        self,
        stream: Tensor,
        modulation: Tensor,
        part: slice,
        banded: BandedAttention,
        attentions: tuple[SampleAttention, ...],
        feed_forward: FeedForwardRunner,
    ) -> None:
        """Run the block on one sample ``[1, S, D]``, in place, some tokens at a time."""
        norm = self.norms()[0][1]
        shift, scale, first_gate, *rest = modulation.unbind(1)

        def normed_rows(rows: slice) -> Tensor:
            return self._norm(norm, stream[:, rows], scale, shift)

        banded.prepare(normed_rows, part)
        keys = [attention.context_keys(part) for attention in attentions[1:]]
        gate: Tensor | None
        tokens = stream.shape[1]
        for start in independent(tokens, banded.rows, stream, self.config, self.module):
            rows = slice(start, start + banded.rows)
            band, gate, last = stream[:, rows], first_gate, attentions[0]
            y = banded.attend(normed_rows, part, rows)
            for following, (k, v) in zip(attentions[1:], keys, strict=True):
                _add(band, y, gate)
                del y
                last, gate = following, None
                y = last.queries(band.clone() if last.keeps_input else band, k, v, part, rows)
            normed = self._add_norm(band, y, gate, rest, last.fresh)
            del y
            feed_forward(normed, band, rest[2])
            del normed

    def _add_norm(
        self,
        stream: Tensor,
        y: Tensor,
        gate: Tensor | None,
        modulation: Sequence[Tensor],
        overwrite: bool,
    ) -> Tensor:
        """``stream += gate * y``; returns its modulated norm, in place of ``y`` if allowed."""
        norm = self.norms()[1][1]
        shift, scale = modulation[0], modulation[1]
        fused = self.config.fuse and plain_norm(norm, nn.LayerNorm, stream.dtype)
        if fused and y.dtype == stream.dtype and y.shape == stream.shape:
            y = with_rows(y)
            normed, _ = ops.gate_residual_layer_norm_modulate(
                y, stream, gate, norm.weight, norm.bias, scale=scale, shift=shift,
                eps=norm.eps, out=y if overwrite else None, residual_out=stream,
            )  # fmt: skip
            return normed
        _add(stream, y, gate)
        return self._norm(norm, stream, scale, shift)

    def _norm(self, norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if self.config.fuse and plain_norm(norm, nn.LayerNorm, x.dtype):
            return ops.layer_norm_modulate(
                x, norm.weight, norm.bias, scale=scale, shift=shift, eps=norm.eps
            )
        y: Tensor = norm(x) * (1 + scale[:, None]) + shift[:, None]
        return y


def _add(stream: Tensor, y: Tensor, gate: Tensor | None) -> None:
    """``stream += gate * y``."""
    if gate is None:
        stream.add_(y)
    else:
        stream.addcmul_(gate[:, None], y)


def _misfit(modulation: Tensor, stream: Tensor) -> str:
    """Why a modulation cannot be applied slice by slice, in place; empty if it can."""
    batch, _, width = stream.shape
    if modulation.shape[0] not in (1, batch) or modulation.shape[2] != width:
        return f"a modulation {tuple(modulation.shape)} for a stream {tuple(stream.shape)}"
    if modulation.dtype != stream.dtype:
        return f"a modulation of {modulation.dtype} for a stream of {stream.dtype}"
    return ""


class ModulatedOutGroup(Group):
    """Final norm, modulated per sample, and projection of every token.

    Args:
        name: as in :class:`Group`.
        norm: the final norm.
        projection: the layer after it.
        config: as in :class:`Group`.
    """

    def __init__(self, name: str, norm: nn.Module, projection: nn.Module, config: Config) -> None:
        super().__init__(name, norm, config)
        self.projection = projection

    @abstractmethod
    def modulation(self, state: State, x: Tensor) -> Tensor:
        """Shift and scale ``[B or 1, 2, D]``."""

    def unfused(self) -> list[str]:
        """The norm, if it is not plain."""
        if plain_norm(self.module, nn.LayerNorm, None):
            return []
        return [f"{self.name}: {type(self.module).__name__} runs as it came"]

    def run(self, state: State) -> None:
        """``[B, S, D]`` to ``[B, S, patch * patch * C]``."""
        norm: Any = self.module
        x = state.take()
        made: Tensor | None = state.extras.get("modulations", {}).get(self.name)
        shift, scale = (self.modulation(state, x) if made is None else made).unbind(1)
        fused = self.config.fuse and plain_norm(norm, nn.LayerNorm, x.dtype)
        if fused and scale.dtype == x.dtype and scale.shape[0] in (1, x.shape[0]):
            overwrite = self.config.inplace and state.writable(x)
            y = ops.layer_norm_modulate(
                with_rows(x), norm.weight, norm.bias, scale=scale.expand(x.shape[0], -1),
                shift=shift.expand(x.shape[0], -1), eps=norm.eps,
                out=x if overwrite and x.stride(-1) == 1 else None,
            )  # fmt: skip
        else:
            y = norm(x) * (1 + scale[:, None]) + shift[:, None]
        state.hidden = self.projection(y)


def unpatchify(x: Tensor, height: int, width: int, patch: int, channels: int) -> Tensor:
    """Put the patches of ``[B, S, patch * patch * C]`` back into ``[B, C, H, W]``.

    Args:
        x: one row per patch.
        height, width: patches per side.
        patch, channels: pixels per side of a patch, and ``C``.
    """
    patches = x.reshape(-1, height, width, patch, patch, channels)
    image = patches.permute(0, 5, 1, 3, 2, 4)
    return image.reshape(-1, channels, height * patch, width * patch)
