"""Activations with bias: ``silu``, ``gelu``, ``gelu_tanh``, ``geglu``."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary, temporary_as

from ._library import (
    check_cuda_built,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)

_SILU, _GELU, _GELU_TANH = 0, 1, 2
_GEGLU_KINDS = {"none": _GELU, "tanh": _GELU_TANH}


def _check(op: str, x: Tensor, bias: Tensor | None, out: Tensor, width: int) -> None:
    check_tensor(op, "x", x)
    check_tensor(op, "out", out, x)
    check_shape(op, "out", out, (*x.shape[:-1], width))
    if bias is not None:
        check_tensor(op, "bias", bias, x)
        check_shape(op, "bias", bias, x.shape[-1:])
    check_cuda_built(op, x)


def _activation(op: str, kind: int, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if x.dim() == 0:
        raise fails(op, "x has no dimension")
    result = temporary_as(x) if out is None else out
    try:
        native.activation(x, bias, kind, result)
    except RuntimeError as error:
        explain(error, _check, op, x, bias, result, x.shape[-1])
    return result


def silu(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``silu(x + bias)``.

    Args:
        x: ``[..., D]``.
        bias: ``[D]`` or ``None``.
        out: like ``x``; may be ``x`` itself.
    """
    if x.dtype == torch.float64:
        return reference.silu(x, bias, out=out)
    return _activation("silu", _SILU, x, bias, out)


def gelu(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)`` in its erf form. Arguments as for :func:`silu`."""
    if x.dtype == torch.float64:
        return reference.gelu(x, bias, out=out)
    return _activation("gelu", _GELU, x, bias, out)


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)`` in its tanh form (``gelu-approximate``). Arguments as for :func:`silu`."""
    if x.dtype == torch.float64:
        return reference.gelu_tanh(x, bias, out=out)
    return _activation("gelu_tanh", _GELU_TANH, x, bias, out)


def geglu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``value * gelu(gate)``, where ``value, gate`` are the halves of ``x + bias``.

    Args:
        x: ``[..., 2 D]``.
        bias: ``[2 D]`` or ``None``.
        approximate: ``"none"`` (erf, as diffusers' ``GEGLU``) or ``"tanh"``.
        out: ``[..., D]``; may be ``x[..., :D]``.
    """
    if x.dtype == torch.float64:
        return reference.geglu(x, bias, approximate=approximate, out=out)
    if approximate not in _GEGLU_KINDS:
        raise fails("geglu", f"approximate is {approximate!r}; allowed: 'none', 'tanh'")
    if x.dim() == 0 or x.shape[-1] % 2:
        raise fails("geglu", f"the last dimension of x {tuple(x.shape)} must be even")
    width = x.shape[-1] // 2
    result = temporary(x, *x.shape[:-1], width) if out is None else out
    try:
        native.geglu(x, bias, _GEGLU_KINDS[approximate], result)
    except RuntimeError as error:
        explain(error, _check, "geglu", x, bias, result, width)
    return result


@register_fake("activation")
def _(x: Tensor, bias: Tensor | None, kind: int, out: Tensor) -> None:
    _check("activation", x, bias, out, x.shape[-1])


@register_fake("geglu")
def _(x: Tensor, bias: Tensor | None, kind: int, out: Tensor) -> None:
    _check("geglu", x, bias, out, x.shape[-1] // 2)
