"""Reference of the product with an epilogue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, store
from .activations import geglu, gelu, gelu_tanh

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "geglu": geglu,
    "geglu_tanh": partial(geglu, approximate="tanh"),
}


def activated(y: Tensor, activation: str) -> Tensor:
    """``y``, or with a GEGLU one half of its last dimension, activated."""
    return _ACTIVATIONS[activation](y)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A product, then an activation or a gated sum; see :func:`accelrt.ops.linear`."""
    acc = accumulation_dtype(x)
    y = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    if activation is not None:
        y = activated(y, activation)
    if add_to is None:
        return store(y, x, out)
    if gate is not None:
        y = y * gate.to(acc).repeat_interleave(x.shape[0] // gate.shape[0], dim=0)
    return store(add_to.to(acc) + y, x, add_to)
