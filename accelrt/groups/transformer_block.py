"""The inside of a ``BasicTransformerBlock``, shared by all UNet transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .attention import attention_reason
from .banded_attention import BandedAttention
from .base import UNTOUCHED, Status
from .feed_forward import FeedForwardRunner, activation_remark, feed_forward_reason
from .recognise import is_plain, is_plain_linear, plain_norm
from .slicing import independent
from .state import with_rows

Attend = Callable[[Tensor], Tensor]


def block_reason(module: nn.Module) -> str:
    """Why a block must be called as it came; empty if its parts can be run one by one."""
    if not is_plain(module, BasicTransformerBlock):
        return f"{type(module).__name__} is not a plain BasicTransformerBlock"
    block: Any = module
    if block.norm_type != "layer_norm":
        return f"norm_type {block.norm_type!r} runs as it came"
    if block.only_cross_attention:
        return "only_cross_attention runs as it came"
    return ""


def _is_chunked(block: object) -> bool:
    return getattr(block, "_chunk_size", None) is not None


def chunking_reason(block: nn.Module) -> str:
    """Why forward chunking of a block must stay; empty if it is off, or replaced.

    It cuts the feed-forward along samples or tokens. A recognised feed-forward treats
    every token alone, so ``ff_rows`` bounds its memory as well, whatever the sizes.
    """
    if _is_chunked(block) and (block_reason(block) or feed_forward_reason(block.ff)):  # type: ignore[arg-type]
        return "forward chunking of a block that is not recognised"
    return ""


def remark_chunking(status: Status, blocks: Iterable[nn.Module]) -> Status:
    """``status`` with the remark that ``ff_rows`` takes the place of forward chunking."""
    if status.kind != UNTOUCHED and any(_is_chunked(block) for block in blocks):
        remark = "ff_rows in place of forward chunking"
        status.reason = f"{status.reason}; {remark}" if status.reason else remark
    return status


def block_parts(module: nn.Module) -> list[str]:
    """Remarks about parts of a recognised block that have no fused operator."""
    block: Any = module
    remarks = []
    for name in ("norm1", "norm2", "norm3"):
        norm = getattr(block, name)
        if norm is not None and not plain_norm(norm, nn.LayerNorm, None):
            remarks.append(f"{name}: {type(norm).__name__} runs as it came")
    for name in ("attn1", "attn2"):
        attn = getattr(block, name)
        if attn is not None and attention_reason(attn):
            remarks.append(f"{name}: {attention_reason(attn)}")
    reason = feed_forward_reason(block.ff) or activation_remark(block.ff)
    if reason:
        remarks.append(reason)
    return remarks


class ResidualNorms:
    """The LayerNorms of a block, fused with the residual sums before them.

    Args:
        block: has the norms as attributes.
        names: of the norms.
        dtype: of the residual stream.
        fuse: allow the fused operators.
    """

    def __init__(
        self, block: nn.Module, names: tuple[str, ...], dtype: torch.dtype, fuse: bool
    ) -> None:
        self.block = block
        self.fused = {
            name: fuse and plain_norm(getattr(block, name), nn.LayerNorm, dtype) for name in names
        }

    def norm(self, name: str, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``norm(x) + shift``, a new tensor.

        Args:
            name: of the norm.
            x: ``[n, S, D]``.
            shift: ``[n, D]`` or ``None``.
        """
        norm: Any = getattr(self.block, name)
        if self.fused[name]:
            return ops.layer_norm_modulate(x, norm.weight, norm.bias, shift=shift, eps=norm.eps)
        y: Tensor = norm(x)
        return y if shift is None else y + shift[:, None, :]

    def add_norm(
        self,
        name: str,
        y: Tensor,
        stream: Tensor,
        *,
        into: Tensor | None = None,
        shift: Tensor | None = None,
        constant: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``stream += y + constant``; returns ``norm(stream) + shift``.

        Args:
            name: of the norm.
            y, stream: ``[n, S, D]``.
            into: where the new stream goes; over ``stream`` by default.
            shift: ``[n, D]`` or ``None``.
            constant: ``[n, 1, D]`` or ``None``.
            out: where the result may go, ``y`` for instance; a fused norm uses it.
        """
        norm: Any = getattr(self.block, name)
        into = stream if into is None else into
        if self.fused[name] and y.dtype == stream.dtype:
            rows = with_rows(y)
            normed, _ = ops.gate_residual_layer_norm_modulate(
                rows, stream, None, norm.weight, norm.bias, shift=shift, eps=norm.eps,
                inject=None if constant is None else with_rows(constant).expand_as(y),
                out=rows if out is y else out, residual_out=into,
            )  # fmt: skip
            return normed
        if into is stream:
            stream.add_(y)
        else:
            torch.add(stream, y, out=into)
        if constant is not None:
            into.add_(constant)
        return self.norm(name, into, shift)


class SubLayers:
    """Attention layers and feed-forward of a block, on a residual stream, in place.

    Each residual sum is fused with the LayerNorm of the next sub-layer.

    Args:
        block: has ``norm1`` to ``norm3``, ``attn1``, ``attn2`` and ``ff``.
        config: ``fuse`` and ``ff_rows``.
        dtype: of the residual stream.
        norms: names of all norms of the block.
    """

    def __init__(
        self,
        block: nn.Module,
        config: Config,
        dtype: torch.dtype,
        norms: tuple[str, ...] = ("norm1", "norm2", "norm3"),
    ) -> None:
        layers: Any = block
        self.block = layers
        self.config = config
        self.feed_forward = FeedForwardRunner(layers.ff, config)
        self.norms = ResidualNorms(block, norms, dtype, config.fuse)

    def run(
        self,
        stream: Tensor,
        first: Attend,
        second: Attend | None,
        *,
        normed: Tensor | None = None,
        constant: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        """Run the sub-layers on ``stream`` ``[n, S, D]``, contiguous, in place.

        Args:
            stream: the residual stream.
            first: the first attention layer, from the normed stream to its output.
            second: the second one, or ``None``.
            normed: ``norm1`` of the stream, if the caller has it already.
            constant: ``[n, 1, D]`` if ``second`` gives every token of an image the same,
                whatever the stream; ``norm2`` is then left out.
            shift: ``[n, D]`` or ``None``, added after ``norm1`` and ``norm2``.
        """
        block, norms = self.block, self.norms
        if normed is None:
            normed = norms.norm("norm1", stream, shift)
        y, last = first(normed), block.attn1
        del normed
        if not norms.fused["norm2"]:  # a hook of the norm wants to be called
            constant = None
        if second is not None and constant is None:
            out = y if output_is_fresh(last) else None
            normed = norms.add_norm("norm2", y, stream, shift=shift, out=out)
            del y, out
            y, last = second(normed), block.attn2
            del normed
        out = y if output_is_fresh(last) else None
        normed = norms.add_norm("norm3", y, stream, constant=constant, out=out)
        del y, out
        self.feed_forward(normed, stream)

    def run_in_bands(
        self,
        stream: Tensor,
        first: BandedAttention,
        second: Attend | None,
        place: slice,
        *,
        constant: Tensor | None = None,
    ) -> None:
        """Run the sub-layers on one image ``[1, S, D]`` in place, some tokens at a time.

        Keys and values of the first attention layer are made of all tokens before the
        first token is written; all else treats each token alone.

        Args:
            stream: the residual stream, contiguous.
            first: the first attention layer.
            second, constant: as in :meth:`run`.
            place: of the image in the call.
        """

        def normed(rows: slice) -> Tensor:
            return self.norms.norm("norm1", stream[:, rows])

        first.prepare(normed, place)
        tokens = stream.shape[1]
        for start in independent(tokens, first.rows, stream, self.config, self.block):
            rows = slice(start, start + first.rows)

            def attend(_: Tensor, rows: slice = rows) -> Tensor:
                return first.attend(normed, place, rows)

            band = stream[:, rows]
            self.run(band, attend, second, normed=band, constant=constant)


class BlockRunner(SubLayers):
    """Runs a recognised ``BasicTransformerBlock`` on a residual stream, in place.

    Args:
        module: a block for which :func:`block_reason` is empty.
        config: ``fuse`` and ``ff_rows``.
        x: any tensor of the dtype of the stream.
        frames: frames per sample; needed for a positional embedding.
    """

    def __init__(self, module: nn.Module, config: Config, x: Tensor, frames: int = 1) -> None:
        super().__init__(module, config, x.dtype)
        self.frames = frames
        self.shift = self._position_shift(x)

    def _position_shift(self, x: Tensor) -> Tensor | None:
        """The positional embedding as a shift per image, ``[N, D]``."""
        position: Any = self.block.pos_embed
        if position is None or not self.positions_known(x):
            return None
        table: Tensor = position.pe[0, : self.frames]
        return table.repeat(x.shape[0] // self.frames, 1)

    def positions_known(self, x: Tensor) -> bool:
        """The positional embedding is absent, or plain, long enough and of our dtype."""
        position: Any = self.block.pos_embed
        return position is None or (
            is_plain(position, SinusoidalPositionalEmbedding)
            and position.pe.dtype == x.dtype
            and position.pe.shape[1] >= self.frames
        )

    def __call__(
        self,
        stream: Tensor,
        first: Attend,
        second: Attend | None,
        constant: Tensor | None = None,
    ) -> None:
        """Run the block on ``stream`` ``[n, S, D]``, contiguous, in place.

        Args:
            stream, first, second, constant: as in :meth:`SubLayers.run`.
        """
        self.run(stream, first, second, constant=constant, shift=self.shift)


def output_is_fresh(attn: Any) -> bool:
    """The layer's output is a new tensor that nobody else sees."""
    return not attention_reason(attn) and is_plain_linear(attn.to_out[0])
