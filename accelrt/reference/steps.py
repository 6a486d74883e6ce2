"""References of the operators that work between denoising steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype, store


def guided_step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    sample_coef: float,
    eps_coef: float,
    history: Tensor | None = None,
    history_coef: float = 0.0,
    out: Tensor | None = None,
    eps_out: Tensor | None = None,
) -> Tensor:
    """Guidance and a linear scheduler update; see :func:`accelrt.ops.guided_step`."""
    acc = accumulation_dtype(sample)
    eps = cond.to(acc)
    if uncond is not None:
        u = uncond.to(acc)
        eps = u + guidance_scale * (eps - u)
    if eps_out is not None:
        eps_out.copy_(eps)
    result = sample_coef * sample.to(acc) + eps_coef * eps
    if history is not None:
        result = result + history_coef * history.to(acc)
    return store(result, sample, out)


def feature_delta(a: Tensor, b: Tensor, *, p: int = 1, out: Tensor | None = None) -> Tensor:
    """Per-sample relative change ``|a - b|_p / |b|_p``; see :func:`accelrt.ops.feature_delta`."""
    acc = accumulation_dtype(a)
    x, y = (t.to(acc).reshape(t.shape[0], -1) for t in (a, b))
    if p == 1:
        num, den = (x - y).abs().sum(1), y.abs().sum(1)
    else:
        num, den = (x - y).square().sum(1).sqrt(), y.square().sum(1).sqrt()
    result = num / den.clamp(min=torch.finfo(acc).tiny)
    return result if out is None else out.copy_(result)
