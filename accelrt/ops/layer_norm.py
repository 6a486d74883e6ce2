"""LayerNorm with modulation, and with the gated residual before it."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary

from ._library import (
    check_cuda_built,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)


def _check_rows(
    op: str,
    x: Tensor,
    vectors: tuple[tuple[str, Tensor | None], ...],
    modulations: tuple[tuple[str, Tensor | None], ...],
    same: tuple[tuple[str, Tensor | None], ...],
) -> None:
    check_tensor(op, "x", x)
    if x.dim() != 3:
        raise fails(op, f"x has shape {tuple(x.shape)}; expected [B, S, D]")
    batch, _, width = x.shape
    for name, t in vectors:
        if t is not None:
            check_tensor(op, name, t, x)
            check_shape(op, name, t, (width,))
    for name, t in modulations:
        if t is not None:
            check_tensor(op, name, t, x)
            check_shape(op, name, t, (batch, width))
    for name, t in same:
        if t is not None:
            check_tensor(op, name, t, x)
            check_shape(op, name, t, x.shape)
    for name, t in (("x", x), *vectors, *modulations, *same):
        if t is not None and t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise fails(op, f"the last stride of {name} is {t.stride(-1)}; it must be 1")
    check_cuda_built(op, x)


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm over the last dimension, then ``y * (1 + scale) + shift``.

    Args:
        x: ``[B, S, D]``; batch and row strides are free, the last stride is 1.
        weight, bias: ``[D]`` or ``None``.
        scale, shift: ``[B, D]`` or ``None``, one per sample (adaLN; a positional
            embedding per frame is a ``shift``). Views of a chunk are fine.
        eps: added to the variance.
        out: like ``x``; may be ``x`` itself.
    """
    if x.dtype == torch.float64:
        return reference.layer_norm_modulate(
            x, weight, bias, scale=scale, shift=shift, eps=eps, out=out
        )
    result = temporary(x, *x.shape) if out is None else out
    args = (x, weight, bias, scale, shift, eps, result)
    try:
        native.layer_norm_modulate(*args)
    except RuntimeError as error:
        explain(error, _fake_layer_norm_modulate, *args)
    return result


def gate_residual_layer_norm_modulate(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    inject: Tensor | None = None,
    inject_scale: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """End one sub-layer and begin the next in one pass over memory.

    ``r = residual + gate * x + inject_scale * inject``; returns
    ``(LayerNorm(r) * (1 + scale) + shift, r)``.

    Args:
        x: ``[B, S, D]``, the output of the sub-layer.
        residual: ``[B, S, D]``.
        gate: ``[B, D]`` or ``None`` (one).
        weight, bias, scale, shift, eps: as in :func:`layer_norm_modulate`.
        inject: ``[B, S, D]``, the feedback ``g`` of Inner Loop Feedback (arXiv
            2501.13107), or ``None``.
        inject_scale: ``[D]``, its learned scale ``s``, or ``None`` (one).
        out: ``[B, S, D]``; may be ``x``.
        residual_out: ``[B, S, D]``; may be ``residual``.
    """
    if x.dtype == torch.float64:
        return reference.gate_residual_layer_norm_modulate(
            x, residual, gate, weight, bias, scale=scale, shift=shift, inject=inject,
            inject_scale=inject_scale, eps=eps, out=out, residual_out=residual_out,
        )  # fmt: skip
    normed = temporary(x, *x.shape) if out is None else out
    new = temporary(x, *x.shape) if residual_out is None else residual_out
    args = (x, residual, gate, weight, bias, scale, shift, inject, inject_scale, eps, normed, new)
    try:
        native.gate_residual_layer_norm_modulate(*args)
    except RuntimeError as error:
        explain(error, _fake_gate_residual_layer_norm_modulate, *args)
    return normed, new


@register_fake("layer_norm_modulate")
def _fake_layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    _check_rows(
        "layer_norm_modulate",
        x,
        (("weight", weight), ("bias", bias)),
        (("scale", scale), ("shift", shift)),
        (("out", out),),
    )


@register_fake("gate_residual_layer_norm_modulate")
def _fake_gate_residual_layer_norm_modulate(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    inject: Tensor | None,
    inject_scale: Tensor | None,
    eps: float,
    out: Tensor,
    residual_out: Tensor,
) -> None:
    _check_rows(
        "gate_residual_layer_norm_modulate",
        x,
        (("weight", weight), ("bias", bias), ("inject_scale", inject_scale)),
        (("gate", gate), ("scale", scale), ("shift", shift)),
        (("residual", residual), ("inject", inject), ("out", out), ("residual_out", residual_out)),
    )
