"""Reference of the residual blend operator."""

from __future__ import annotations

from torch import Tensor

from ._common import accumulation_dtype, store


def residual_blend(
    x: Tensor,
    y: Tensor,
    *,
    alpha: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``(x + y) * scale`` or ``(alpha x + (1 - alpha) y) * scale``; see :mod:`accelrt.ops`."""
    acc = accumulation_dtype(x)
    a, b = x.to(acc), y.to(acc)
    if alpha is None:
        return store((a + b) * scale, x, out)
    weight = alpha.to(acc).reshape(-1, *([1] * (x.dim() - 1)))
    return store((weight * a + (1 - weight) * b) * scale, x, out)
