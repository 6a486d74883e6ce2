"""The weighted sum over stored features: the arithmetic of every linear predictor."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference

from ._library import (
    check_cuda_built,
    check_float_list,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)

MAX_SLOTS = 16


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise fails(
            "weighted_sum",
            f"{name} of shape {tuple(t.shape)} has strides {t.stride()}; it must be contiguous",
        )


def _check(features: Tensor, weights: Tensor, base: Tensor | None, out: Tensor) -> None:
    op = "weighted_sum"
    check_tensor(op, "features", features)
    if not 2 <= features.dim() <= 6:
        raise fails(op, f"features has {features.dim()} dimensions; 2 to 6 are supported")
    slots, batch = features.shape[:2]
    if not 1 <= slots <= MAX_SLOTS:
        raise fails(op, f"features has {slots} slots; allowed: 1 to {MAX_SLOTS}")
    _check_contiguous("features", features)
    check_float_list(op, "weights", weights, features, (batch, slots))
    _check_contiguous("weights", weights)
    for name, t in (("base", base), ("out", out)):
        if t is not None:
            check_tensor(op, name, t, features)
            check_shape(op, name, t, features.shape[1:])
            _check_contiguous(name, t)
    check_cuda_built(op, features)


def weighted_sum(
    features: Tensor, weights: Tensor, *, base: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``base[b] + sum_k weights[b, k] features[k, b]`` in one pass.

    Reuse, Taylor, Hermite and learned linear predictors are of this form, with
    weights of their own. They stay on the device: no host synchronisation takes
    place, and a weight that is exactly 0 means that the slot's sample is not read
    (it may be uninitialised memory).

    Args:
        features: ``[K, B, ...]``, contiguous, 1 to 16 slots ``K``, 2 to 6 dimensions.
        weights: float32 ``[B, K]``, contiguous.
        base: ``[B, ...]``, contiguous, or ``None``: zero.
        out: ``[B, ...]``, contiguous; may be ``base`` or one slot of ``features``.

    Returns:
        ``[B, ...]`` in the dtype of ``features``, rounded once.
    """
    if features.dtype == torch.float64:
        return reference.weighted_sum(features, weights, base=base, out=out)
    result = features.new_empty(features.shape[1:]) if out is None else out
    try:
        native.weighted_sum(features, weights, base, result)
    except RuntimeError as error:
        explain(error, _check, features, weights, base, result)
    return result


@register_fake("weighted_sum")
def _(features: Tensor, weights: Tensor, base: Tensor | None, out: Tensor) -> None:
    _check(features, weights, base, out)
