"""What a transformer block in one call costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cost import Machine, Weights, rate_at

_ATTENTIONS = ("q", "k", "v", "out", "cross_q", "cross_k", "cross_v", "cross_out")


def block_seconds(arguments: dict[str, Any], rates: Machine, read: Weights) -> float:
    """The estimate for one call of :func:`accelrt.ops.transformer_block`.

    Args:
        arguments: of the native operator, by name.
        rates: of the machine.
        read: weights that were read before.
    """
    stream: Tensor = arguments["stream"]
    batch, length, _ = stream.shape
    tokens = batch * length
    context, keys = arguments["context"], arguments["keys"]
    seconds = rates.overhead
    for name in ("q", "k", "v", "out", "cross_q", "cross_out"):
        seconds += _product(arguments[f"{name}_weight"], tokens, tokens, rates)
    if context is not None:
        rows = batch * context.shape[1]
        for name in ("cross_k", "cross_v"):
            seconds += _product(arguments[f"{name}_weight"], rows, rows, rates)
    ff_rows = min(arguments["ff_rows"] or tokens, tokens)
    for name in ("ff_in", "ff_out"):
        seconds += _product(arguments[f"{name}_weight"], tokens, ff_rows, rates)
    first = (arguments[f"{name}_weight"] for name in _ATTENTIONS)
    seconds += read.seconds([weight for weight in first if weight is not None], rates)
    pieces = -(-tokens // max(ff_rows, 1))
    layers = [arguments["ff_in_weight"], arguments["ff_out_weight"]]
    seconds += read.seconds(layers, rates, pieces)
    seconds += _attention(arguments["out_weight"].shape[1], batch, length, length, rates)
    if arguments["cross_q_weight"] is not None:
        given = keys.shape[1] if context is None else context.shape[1]
        inner = arguments["cross_q_weight"].shape[0]
        seconds += _attention(inner, batch, length, given, rates)
    # The first norm reads the stream and writes; the second also reads and writes the sum.
    size = stream.numel() * stream.element_size()
    hidden = tokens * arguments["ff_in_weight"].shape[0] * stream.element_size()
    rest = 6 * size / rates.norm_bandwidth + (2 * hidden + 3 * size) / rates.bandwidth
    return float(seconds + rest)


def _product(weight: Tensor | None, rows: int, rows_at_once: int, rates: Machine) -> float:
    """``rows`` times a weight, some at a time."""
    if weight is None or not rows:
        return 0.0
    flops = 2 * rows * weight.numel()
    return float(flops / rate_at(rates.product_rates, rows_at_once))


def _attention(inner: int, batch: int, queries: int, keys: int, rates: Machine) -> float:
    flops = 4 * batch * queries * keys * inner
    return flops / rate_at(rates.attention_rates, queries)
