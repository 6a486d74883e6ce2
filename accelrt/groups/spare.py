"""Buffers for the slices of a group, one slice after the other.

A tensor that comes and goes with every slice leaves a hole in the heap of the process, and
what comes next need not fit into it: on the CPU a run then holds much more than is alive in it.
A buffer that is there for all slices lies in the arena of a memory budget, and so in its plan.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from .state import empty_rows


class Spare:
    """Memory for one tensor at a time, which is made when the first one needs it.

    Args:
        like: gives dtype and device.
        elements: of the largest tensor.
    """

    def __init__(self, like: Tensor, elements: int) -> None:
        self._like = like.new_empty(0)  # ``like`` itself would be kept alive
        self._elements = elements
        self._flat: Tensor | None = None

    def rows(self, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, over the one before."""
        if self._flat is None:
            self._flat = empty_rows(self._like, self._elements)
        return self._flat[: prod(shape)].view(shape)

    def images(self, images: int, channels: int, height: int, width: int) -> Tensor:
        """An uninitialised channels-last ``[N, C, H, W]``, over the one before."""
        return self.rows(images, height, width, channels).permute(0, 3, 1, 2)
