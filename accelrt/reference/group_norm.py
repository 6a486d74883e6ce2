"""References of the two passes of GroupNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, store


def _joined(x: Tensor, x2: Tensor | None, add: Tensor | None) -> Tensor:
    """The logical input [N, C1 + C2, H, W] in the accumulation dtype."""
    acc = accumulation_dtype(x)
    full = x.to(acc) if x2 is None else torch.cat([x.to(acc), x2.to(acc)], dim=1)
    return full if add is None else full + add.to(acc)[:, :, None, None]


def group_norm_merge(a: Tensor, b: Tensor) -> Tensor:
    """Merge two partial statistics (count, mean, M2) with Chan's formula."""
    na, nb = a[..., 0], b[..., 0]
    n = na + nb
    delta = b[..., 1] - a[..., 1]
    weight = torch.where(n > 0, nb / n.clamp(min=1), torch.zeros_like(n))
    mean = a[..., 1] + delta * weight
    m2 = a[..., 2] + b[..., 2] + delta * delta * na * weight
    return torch.stack([n, mean, m2], dim=-1)


def group_norm_stats(
    x: Tensor,
    num_groups: int,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    frames: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Partial statistics of a slice; see :func:`accelrt.ops.group_norm_stats`."""
    full = _joined(x, x2, add)
    images, channels = full.shape[:2]
    grouped = full.reshape(images // frames, frames, num_groups, channels // num_groups, -1)
    grouped = grouped.transpose(1, 2).flatten(2)  # [N / frames, G, frames * C/g * H * W]
    if grouped.shape[-1] == 0:
        stats = full.new_zeros(images // frames, num_groups, 3)
    else:
        mean = grouped.mean(dim=-1)
        m2 = (grouped - mean[..., None]).square().sum(dim=-1)
        stats = torch.stack([torch.full_like(mean, grouped.shape[-1]), mean, m2], dim=-1)
    if out is None:
        return stats
    return out.copy_(group_norm_merge(out, stats) if accumulate else stats)


def group_norm_apply(
    x: Tensor,
    stats: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    frames: int = 1,
    silu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise a slice with given statistics; see :func:`accelrt.ops.group_norm_apply`."""
    full = _joined(x, x2, add)
    channels = full.shape[1]
    stats = stats.to(full.dtype).repeat_interleave(frames, dim=0)  # [N, G, 3]
    per_group = channels // num_groups
    mean = stats[..., 1].repeat_interleave(per_group, dim=1)[:, :, None, None]
    variance = stats[..., 2] / stats[..., 0]
    rstd = torch.rsqrt(variance + eps).repeat_interleave(per_group, dim=1)[:, :, None, None]
    y = (full - mean) * rstd
    if weight is not None:
        y = y * weight.to(y.dtype)[None, :, None, None]
    if bias is not None:
        y = y + bias.to(y.dtype)[None, :, None, None]
    if scale is not None:
        y = y * (1 + scale.to(y.dtype)[:, :, None, None])
    if shift is not None:
        y = y + shift.to(y.dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    return store(y, x, out)
