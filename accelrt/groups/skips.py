"""Skip connections that are computed again when they are read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RecomputedSkip:
    """A skip ``[N, C, H, W]`` of which nothing is kept but the input that it comes from.

    Args:
        compute: the images ``start`` to ``stop``, channels-last, a new tensor.
        like: the tensor itself, for its shape, dtype and device; it is not kept.
    """

    def __init__(self, compute: Callable[[int, int], Tensor], like: Tensor) -> None:
        self._compute = compute
        self.shape = like.shape
        self.dtype: torch.dtype = like.dtype
        self.device: torch.device = like.device

    def images(self, start: int, stop: int) -> Tensor:
        """The images ``start`` to ``stop``: a new tensor, channels-last."""
        return self._compute(start, stop)

    def whole(self) -> Tensor:
        """All images."""
        return self._compute(0, self.shape[0])


Skip = Tensor | RecomputedSkip


def whole(skip: Skip) -> Tensor:
    """The skip as one tensor, computed if it was not kept."""
    return skip if isinstance(skip, Tensor) else skip.whole()
