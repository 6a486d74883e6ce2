"""Slice lengths: the rule behind ``None`` in the config."""

from __future__ import annotations

import torch

from accelrt.config import Config

CPU_SLICE_MIB = 8.0
GPU_SLICE_MIB = 64.0


def slice_length(
    total: int, wanted: int | None, bytes_per_item: int, config: Config, device: torch.device
) -> int:
    """How many items of ``total`` one slice takes.

    Args:
        total: items along the sliced axis.
        wanted: the configured length, or ``None`` for the rule of :class:`accelrt.Config`.
        bytes_per_item: size of the group's widest intermediate for one item.
        config: gives ``slice_mib``.
        device: where the group runs.
    """
    if total <= 1:
        return 1
    if wanted is not None:
        return min(wanted, total)
    mib = config.slice_mib
    if mib is None:
        mib = CPU_SLICE_MIB if device.type == "cpu" else GPU_SLICE_MIB
    longest = max(1, int(mib * 2**20) // max(1, bytes_per_item))
    if longest >= total:
        return total
    pieces = -(-total // longest)
    return -(-total // pieces)
