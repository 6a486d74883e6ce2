"""References of the activation operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, store


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulation_dtype(x)
    return x.to(acc) if bias is None else x.to(acc) + bias.to(acc)


def silu(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``silu(x + bias)``; see :func:`accelrt.ops.silu`."""
    return store(F.silu(_biased(x, bias)), x, out)


def gelu_tanh(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)``, tanh form; see :func:`accelrt.ops.gelu_tanh`."""
    return store(F.gelu(_biased(x, bias), approximate="tanh"), x, out)


def gelu(x: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)``, erf form; see :func:`accelrt.ops.gelu`."""
    return store(F.gelu(_biased(x, bias)), x, out)


def geglu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``value * gelu(gate)`` of the two halves of ``x + bias``; see :func:`accelrt.ops.geglu`."""
    value, gate = _biased(x, bias).chunk(2, dim=-1)
    return store(value * F.gelu(gate, approximate=approximate), x, out)
