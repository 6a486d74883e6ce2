"""Reference of the convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, store


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    out: Tensor | None = None,
) -> Tensor:
    """A convolution; see :func:`accelrt.ops.conv2d`."""
    acc = accumulation_dtype(x)
    both = (stride, padding)
    strides, paddings = (list(v) if isinstance(v, Sequence) else [v, v] for v in both)
    summand = None if bias is None else bias.to(acc)
    y = F.conv2d(x.to(acc), weight.to(acc), summand, strides, paddings)
    return store(y.contiguous(memory_format=torch.channels_last), x, out)
