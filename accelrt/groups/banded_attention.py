"""Self-attention of one sample at a time, in bands of its tokens.

A norm and a projection treat each token alone, so they need not exist for a whole sample;
keys and values must. Two ways of keeping them, of which the smaller fits the slice size:

- all heads: keys and values of a whole sample are made first, band by band. Every band is
  then read once more, for its queries, and may be overwritten with its result.
- some heads at a time: the queries of all heads are made first, into a buffer in which the
  result of the heads replaces them; keys and values exist for these heads only. The norm
  runs once per group of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from accelrt.config import Config

from .products import linear_into, project
from .recognise import has_plain_weights, is_plain_linear
from .sample_attention import SampleAttention
from .slicing import independent, slice_length, starts
from .state import empty_rows

Normed = Callable[[slice], Tensor]


class BandedAttention:
    """Self-attention of samples ``[1, S, D]``, whose buffers serve one sample after the other.

    Args:
        layer: self-attention for which ``by_tokens`` is true.
        stream: ``[B, S, D]``, the residual stream of the whole call.
        config: gives ``slice_mib``.
    """

    def __init__(self, layer: SampleAttention, stream: Tensor, config: Config) -> None:
        self.layer = layer
        self.attn: Any = layer.attn
        self.like = stream
        self.config = config
        self.tokens: int = stream.shape[1]
        self.rows = band_length(stream, config)
        self.heads = self._heads_at_a_time()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.mixed: Tensor | None = None

    def _heads_at_a_time(self) -> int:
        """A divisor of the number of heads."""
        attn, like = self.attn, self.like
        total: int = attn.heads
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if not all(is_plain_linear(m) and has_plain_weights(m, like.dtype) for m in layers):
            return total
        size = self.tokens * (attn.inner_dim // total) * like.element_size()
        heads = slice_length(total, None, size, self.config, like.device)
        while total % heads:
            heads -= 1
        # The buffer of queries is as large as the keys: two groups would save nothing.
        return heads if 2 * heads < total else total

    def prepare(self, normed: Normed, samples: slice) -> None:
        """Make what every band of a sample needs.

        Args:
            normed: gives the normed tokens ``[1, s, D]`` of a slice of a sample, anew at
                each call.
            samples: the sample, by its place in the batch.
        """
        if self.heads < self.attn.heads:
            self._mix(normed, samples)
            return
        for start in independent(self.tokens, self.rows, self.like, self.config, self.attn):
            x = normed(slice(start, start + self.rows))
            self.keys = self._fill(self.keys, self.attn.to_k, x, start)
            self.values = self._fill(self.values, self.attn.to_v, x, start)
            del x  # not beside the next band

    def attend(self, normed: Normed, samples: slice, rows: slice) -> Tensor:
        """The output ``[1, s, D]`` of the layer for a band; ``normed`` as before."""
        if self.mixed is not None:
            return project(self.attn.to_out[0], self.mixed[:, rows])
        assert self.keys is not None
        assert self.values is not None
        return self.layer.queries(normed(rows), self.keys, self.values, samples, rows)

    def _mix(self, normed: Normed, samples: slice) -> None:
        """``self.mixed``, the attention of all heads before ``to_out``."""
        attn, like, width = self.attn, self.like, self.attn.inner_dim // self.attn.heads
        if self.mixed is None:
            self.mixed = empty_rows(like, 1, self.tokens, attn.inner_dim)
            self.keys = empty_rows(like, 1, self.tokens, self.heads * width)
            self.values = empty_rows(like, 1, self.tokens, self.heads * width)
        assert self.keys is not None
        assert self.values is not None
        for head in starts(attn.heads, self.heads, like):
            columns = slice(head * width, (head + self.heads) * width)
            for start in independent(self.tokens, self.rows, like, self.config, attn):
                rows = slice(start, start + self.rows)
                x = normed(rows)[0]
                if head == 0:
                    linear_into(self.mixed[0, rows], x, attn.to_q)
                linear_into(self.keys[0, rows], x, attn.to_k, columns)
                linear_into(self.values[0, rows], x, attn.to_v, columns)
                del x
            self._mix_heads(self.mixed[..., columns], head, samples)

    def _mix_heads(self, mixed: Tensor, head: int, samples: slice) -> None:
        """Replace the queries ``[1, S, h * d]`` of some heads by their attention."""
        assert self.keys is not None
        assert self.values is not None
        size = mixed.shape[2] * mixed.element_size()
        step = slice_length(self.tokens, None, size, self.config, mixed.device)
        heads = slice(head, head + self.heads)
        for start in independent(self.tokens, step, mixed, self.config, self.attn):
            rows = slice(start, start + step)
            mixed[:, rows] = self.layer.mix(
                mixed[:, rows], self.keys, self.values, samples, rows, heads
            )

    def _fill(self, buffer: Tensor | None, linear: Any, x: Tensor, start: int) -> Tensor:
        """``linear(x)`` in its rows of the buffer ``[1, S, D]``, made with the first of them."""
        if is_plain_linear(linear) and has_plain_weights(linear, x.dtype):
            if buffer is None:
                buffer = empty_rows(x, 1, self.tokens, linear.out_features)
            linear_into(buffer[0, start : start + x.shape[1]], x[0], linear)
            return buffer
        y: Tensor = linear(x)
        if buffer is None:
            buffer = empty_rows(y, 1, self.tokens, y.shape[2])
        buffer[:, start : start + x.shape[1]] = y
        return buffer


def image_slices(
    images: int, step: int, like: Tensor, stream: tuple[int, int], config: Config, module: nn.Module
) -> Iterable[int]:
    """Starts of slices of images for blocks that may run one image in bands.

    They are independent unless that is so: the buffers of the bands serve one image after the
    other.

    Args:
        images, step, like, config, module: as for :func:`independent`.
        stream: tokens of an image, and channels.
    """
    tokens, width = stream
    size = width * like.element_size()
    if slice_length(tokens, None, size, config, like.device) < tokens:
        return starts(images, step, like)
    return independent(images, step, like, config, module)


def band_length(stream: Tensor, config: Config) -> int:
    """Tokens in a band of ``[B, S, D]``; ``S`` where a sample fits the slice size."""
    _, tokens, width = stream.shape
    return slice_length(tokens, None, width * stream.element_size(), config, stream.device)
