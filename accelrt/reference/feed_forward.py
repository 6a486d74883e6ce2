"""Reference of the feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from ._common import accumulation_dtype, store
from .block import FeedForwardWeights
from .linear import linear


def feed_forward(
    x: Tensor,
    weights: FeedForwardWeights,
    *,
    gate: Tensor | None = None,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Both products with nothing rounded between; see :func:`accelrt.ops.feed_forward`."""
    acc = accumulation_dtype(x)
    first, second = (
        (w.weight.to(acc), None if w.bias is None else w.bias.to(acc))
        for w in (weights.hidden, weights.out)
    )
    hidden = linear(x.to(acc), *first, activation=weights.activation)
    if add_to is None:
        return store(linear(hidden, *second), x, out)
    wide = None if gate is None else gate.to(acc)
    total = add_to.to(acc, copy=True)
    return store(linear(hidden, *second, gate=wide, add_to=total), x, add_to)
