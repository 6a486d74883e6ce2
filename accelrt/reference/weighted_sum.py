"""Reference of the weighted sum over slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype, store


def weighted_sum(
    features: Tensor, weights: Tensor, *, base: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``base[b] + sum_k weights[b, k] features[k, b]``; see :func:`accelrt.ops.weighted_sum`."""
    acc = accumulation_dtype(features)
    per_slot = weights.to(acc).t().reshape(*features.shape[:2], *([1] * (features.dim() - 2)))
    # A slot with weight zero may hold NaN.
    read = torch.where(per_slot == 0, 0.0, features.to(acc))
    result = (per_slot * read).sum(0)
    if base is not None:
        result = base.to(acc) + result
    return store(result, features, out)
