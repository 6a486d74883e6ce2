"""Residual sums and alpha blends."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary_as

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


def _check(x: Tensor, y: Tensor, alpha: Tensor | None, out: Tensor) -> None:
    op = "residual_blend"
    check_tensor(op, "x", x)
    if not 1 <= x.dim() <= 5:
        raise fails(op, f"x has {x.dim()} dimensions; 1 to 5 are supported")
    for name, t in (("y", y), ("out", out)):
        check_tensor(op, name, t, x)
        check_shape(op, name, t, x.shape)
    if alpha is not None:
        if alpha.dim() != 1 or alpha.shape[0] not in (1, x.shape[0]):
            raise fails(op, f"alpha has shape {tuple(alpha.shape)}; expected [1] or [N]")
        check_float_list(op, "alpha", alpha, x, alpha.shape)
    check_cuda_built(op, x)


def residual_blend(
    x: Tensor,
    y: Tensor,
    *,
    alpha: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``(x + y) * scale``, or with ``alpha``: ``(alpha x + (1 - alpha) y) * scale``.

    The first form ends a ResNet block (``scale = 1 / output_scale_factor``), the
    second is diffusers' ``AlphaBlender``.

    Args:
        x, y: ``[N, ...]``, the same shape, up to 5 dimensions, any strides.
        alpha: float32 ``[1]`` or ``[N]`` on the same device, or ``None``.
        scale: factor of the result.
        out: like ``x``; may be ``x`` or ``y``.
    """
    if x.dtype == torch.float64:
        return reference.residual_blend(x, y, alpha=alpha, scale=scale, out=out)
    result = temporary_as(x) if out is None else out
    try:
        native.residual_blend(x, y, alpha, scale, result)
    except RuntimeError as error:
        explain(error, _check, x, y, alpha, result)
    return result


@register_fake("residual_blend")
def _(x: Tensor, y: Tensor, alpha: Tensor | None, scale: float, out: Tensor) -> None:
    _check(x, y, alpha, out)
