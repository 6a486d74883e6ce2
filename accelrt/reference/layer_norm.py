"""References of the LayerNorm operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, store


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
    """LayerNorm, then ``y (1 + scale) + shift``; see :func:`accelrt.ops.layer_norm_modulate`."""
    acc = accumulation_dtype(x)
    w = None if weight is None else weight.to(acc)
    b = None if bias is None else bias.to(acc)
    y = F.layer_norm(x.to(acc), x.shape[-1:], w, b, eps)
    if scale is not None:
        y = y * (1 + scale.to(acc)[:, None, :])
    if shift is not None:
        y = y + shift.to(acc)[:, None, :]
    return store(y, x, out)


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
    """New residual and its modulated LayerNorm; see :mod:`accelrt.ops`."""
    acc = accumulation_dtype(x)
    gated = x.to(acc) if gate is None else gate.to(acc)[:, None, :] * x.to(acc)
    new = residual.to(acc) + gated
    if inject is not None:
        s = 1.0 if inject_scale is None else inject_scale.to(acc)
        new = new + s * inject.to(acc)
    normed = layer_norm_modulate(
        new,
        None if weight is None else weight.to(acc),
        None if bias is None else bias.to(acc),
        scale=scale,
        shift=shift,
        eps=eps,
    )
    return store(normed, x, out), store(new, x, residual_out)
