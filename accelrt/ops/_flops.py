"""Tells torch's FLOP counter what the operators with products in them compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _named(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    schema = getattr(torch.ops.accelrt, name).default._schema
    return {a.name: value for a, value in zip(schema.arguments, args, strict=False)}


def _attention(batch: int, queries: int, keys: int, inner: int) -> int:
    return 4 * batch * queries * keys * inner


def block_flops(*args: Any, **_: Any) -> int:
    """FLOPs of ``transformer_block``; tensors are given as their shapes."""
    given = _named("transformer_block", args)
    batch, length, _width = given["stream"]
    tokens, total = batch * length, 0
    for name in ("q", "k", "v", "out", "cross_q", "cross_out", "ff_in", "ff_out"):
        weight = given[f"{name}_weight"]
        total += 0 if weight is None else 2 * tokens * weight[0] * weight[1]
    total += _attention(batch, length, length, given["out_weight"][1])
    if given["cross_q_weight"] is None:
        return total
    context = given["context"]
    known = given["keys"][1] if context is None else context[1]
    if context is not None:
        for name in ("cross_k", "cross_v"):
            rows, columns = given[f"{name}_weight"]
            total += 2 * batch * known * rows * columns
    return total + _attention(batch, length, known, given["cross_q_weight"][0])


def attention_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    """FLOPs of ``attention``: both products."""
    batch, queries, heads, width = q
    return _attention(batch, queries, k[1], heads * width)


def product_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """FLOPs of ``linear`` and ``block_projection``: ``x`` ``[M, K]``, ``weight`` ``[N, K]``."""
    return int(2 * x[0] * x[1] * weight[0])


def convolution_flops(*args: Any, **_: Any) -> int:
    """FLOPs of ``conv2d``: ``weight`` ``[O, C, kh, kw]`` for every pixel of ``out``."""
    given = _named("conv2d", args)
    out_channels, channels, *kernel = given["weight"]
    pixels = math.prod(given["out"][:3])
    return int(2 * pixels * out_channels * channels * math.prod(kernel))


def feed_forward_flops(*args: Any, **_: Any) -> int:
    """FLOPs of ``feed_forward``; tensors are given as their shapes."""
    given = _named("feed_forward", args)
    weights = (given["in_weight"], given["out_weight"])
    return int(sum(2 * given["x"][0] * rows * columns for rows, columns in weights))


def register() -> None:
    """Let ``torch.utils.flop_counter.FlopCounterMode`` count them."""
    ops: Any = torch.ops.accelrt
    register_flop_formula(ops.transformer_block)(block_flops)
    register_flop_formula(ops.feed_forward)(feed_forward_flops)
    register_flop_formula(ops.conv2d)(convolution_flops)
    register_flop_formula(ops.attention)(attention_flops)
    register_flop_formula([ops.linear, ops.block_projection])(product_flops)
