"""Operators between denoising steps: the guided update and the feature change."""

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


def _check_step(
    sample: Tensor, cond: Tensor, optional: tuple[tuple[str, Tensor | None], ...], out: Tensor
) -> None:
    op = "guided_step"
    check_tensor(op, "sample", sample)
    if not 1 <= sample.dim() <= 5:
        raise fails(op, f"sample has {sample.dim()} dimensions; 1 to 5 are supported")
    for name, t in (("cond", cond), *optional, ("out", out)):
        if t is not None:
            check_tensor(op, name, t, sample)
            check_shape(op, name, t, sample.shape)
    check_cuda_built(op, sample)


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
    """Classifier-free guidance and a linear scheduler update in one pass.

    ``eps = uncond + guidance_scale (cond - uncond)``;
    ``sample_coef * sample + eps_coef * eps + history_coef * history``. DDIM with
    eta 0 and Euler are of this form without history, DPM-Solver++(2M) with it.

    Args:
        sample: the latents ``[B, ...]``, up to 5 dimensions, any strides.
        cond, uncond: model outputs of the same shape (the guidance halves); without
            ``uncond``, ``eps = cond``.
        guidance_scale, sample_coef, eps_coef, history_coef: plain numbers.
        history: same shape, or ``None``.
        out: same shape; may be any of the inputs.
        eps_out: where the guided ``eps`` is stored, or ``None``.
    """
    if sample.dtype == torch.float64:
        return reference.guided_step(
            sample, cond, uncond, guidance_scale=guidance_scale, sample_coef=sample_coef,
            eps_coef=eps_coef, history=history, history_coef=history_coef, out=out,
            eps_out=eps_out,
        )  # fmt: skip
    result = torch.empty_like(sample) if out is None else out
    optional = (("uncond", uncond), ("history", history), ("eps_out", eps_out))
    try:
        native.guided_step(
            sample, cond, uncond, history, guidance_scale, sample_coef, eps_coef, history_coef,
            result, eps_out,
        )  # fmt: skip
    except RuntimeError as error:
        explain(error, _check_step, sample, cond, optional, result)
    return result


def _check_delta(a: Tensor, b: Tensor, p: int, out: Tensor) -> None:
    op = "feature_delta"
    check_tensor(op, "a", a)
    if not 1 <= a.dim() <= 5:
        raise fails(op, f"a has {a.dim()} dimensions; 1 to 5 are supported")
    if p not in (1, 2):
        raise fails(op, f"p is {p}; allowed: 1, 2")
    check_tensor(op, "b", b, a)
    check_shape(op, "b", b, a.shape)
    check_float_list(op, "out", out, a, (a.shape[0],))
    check_cuda_built(op, a)


def feature_delta(a: Tensor, b: Tensor, *, p: int = 1, out: Tensor | None = None) -> Tensor:
    """Per-sample relative change ``|a - b|_p / |b|_p`` in one pass, left on the device.

    Args:
        a, b: ``[B, ...]``, the same shape, up to 5 dimensions, any strides.
        p: 1 or 2.
        out: float32 ``[B]``.

    Returns:
        float32 ``[B]``; no host synchronisation takes place. A zero ``b`` gives a very
        large number, two zeros give 0.
    """
    if a.dtype == torch.float64:
        return reference.feature_delta(a, b, p=p, out=out)
    result = a.new_empty((a.shape[0],), dtype=torch.float32) if out is None else out
    try:
        native.feature_delta(a, b, p, result)
    except RuntimeError as error:
        explain(error, _check_delta, a, b, p, result)
    return result


@register_fake("guided_step")
def _(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    history: Tensor | None,
    guidance_scale: float,
    sample_coef: float,
    eps_coef: float,
    history_coef: float,
    out: Tensor,
    eps_out: Tensor | None,
) -> None:
    _check_step(sample, cond, (("uncond", uncond), ("history", history), ("eps_out", eps_out)), out)


@register_fake("feature_delta")
def _(a: Tensor, b: Tensor, p: int, out: Tensor) -> None:
    _check_delta(a, b, p, out)
