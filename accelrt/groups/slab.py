"""One storage for the chain of tensors of a decoder over whole videos."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .state import State, empty_rows

Shape = tuple[int, int, int]


class FrameSlab:
    """Where the outputs of a decoder's transitions lie, each over its dead predecessors.

    The storage is as large as the largest output, which starts at its beginning; the outputs
    before that alternate between the end and the beginning. A transition runs image by image
    in ascending order, and its output may reach into the part of the input that was read:
    input and largest output together need no more than the latter. Nothing here keeps the
    storage alive: it lives as long as the hidden states that lie in it.

    Args:
        shapes: ``(C, H, W)`` of the outputs in order.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.largest = max(map(prod, shapes))
        middle = list(map(prod, shapes)).index(self.largest)
        self._at_end = {shape: (middle - i) % 2 == 1 for i, shape in enumerate(shapes)}
        self._storage: weakref.ref[Any] | None = None
        self._base = 0

    def place(self, state: State, x: Tensor, shape: Shape) -> Tensor | None:
        """Memory for the output of a transition, or ``None`` if it needs a tensor of its own.

        Args:
            state: says whether somebody keeps ``x``.
            x: the input ``[N, C, H, W]``, which nothing but the transition needs.
            shape: ``(C, H, W)`` of the output.

        Returns:
            Channels-last ``[N, C, H, W]``. It may be written image by image in ascending
            order, each when no more of its own image of ``x`` will be read: see
            :func:`overlap`.
        """
        if shape not in self._at_end or not state.writable(x) or torch.compiler.is_compiling():
            return None
        images, size = x.shape[0], x.shape[0] * self.largest
        if self._storage is None:
            flat = empty_rows(x, size)
            self._storage = weakref.ref(flat.untyped_storage())
            self._base = int(flat.storage_offset())
            first = last = size  # the input lies elsewhere
        elif self._storage() is x.untyped_storage():
            flat = x.as_strided((size,), (1,), self._base)
            first = int(x.storage_offset()) - self._base
            last = first + x.numel()
        else:
            return None  # the chain was broken: somebody may keep what lies in the storage
        total, read = images * prod(shape), x[0].numel()
        fits_end = last <= size - total or first >= size
        # After each image but the last, what was written must end before what is unread.
        growth = max(0, total // images - read)
        fits_start = total <= first or (images - 1) * growth <= first
        if self._at_end[shape] and fits_end:
            start = size - total
        elif fits_start:
            start = 0
        elif fits_end:
            start = size - total
        else:
            return None
        channels, height, width = shape
        part = flat[start : start + total].view(images, height, width, channels)
        return part.permute(0, 3, 1, 2)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors share memory."""
    if a.untyped_storage() is not b.untyped_storage():
        return False
    start, other = a.storage_offset(), b.storage_offset()
    return start < other + b.numel() and other < start + a.numel()
