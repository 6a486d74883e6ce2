"""Detects that all frames of a sample share their cross-attention context."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .capture import NotCapturable, is_capturing


class SharedContext:
    """Finds ``[B, L, D]`` in a context ``[B * T, L, D]`` that repeats it for every frame.

    Video pipelines repeat the prompt once per frame before the denoising loop, so keys
    and values would be computed ``T`` times. The comparison is made once per context
    tensor, not once per step: it costs one device synchronisation per request.
    """

    def __init__(self) -> None:
        # One tuple, replaced at once: threads may share the model.
        self._verdict: tuple[weakref.ref[Tensor], int, int, bool] | None = None

    def __call__(self, context: Tensor, frames: int) -> Tensor | None:
        """The rows of the first frame of every sample, or ``None`` if frames differ.

        Args:
            context: ``[B * T, L, D]``.
            frames: ``T``.
        """
        if frames == 1:
            return context
        return context[::frames] if self.repeats(context, frames) else None

    def repeats(self, context: Tensor, frames: int) -> bool:
        """Whether the rows of all frames of a sample are the same.

        Raises:
            NotCapturable: a graph is being captured, and the context was not seen before.
        """
        if context.dim() != 3 or context.shape[0] % frames or context.device.type == "meta":
            return False
        if torch.compiler.is_compiling():
            return False  # what depends on values cannot be part of a graph
        repeats = self._known(context, frames)
        if repeats is None:
            if is_capturing():
                raise NotCapturable("whether all frames share a context depends on its values")
            if context.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            grouped = context.view(-1, frames, *context.shape[1:])
            repeats = bool((grouped == grouped[:, :1]).all())
            if not context.is_inference():
                self._verdict = (weakref.ref(context), context._version, frames, repeats)
        return repeats

    def assume(self, context: Tensor, frames: int, repeats: bool) -> None:
        """Take a verdict on another tensor for ``context``, which holds the same values."""
        self._verdict = (weakref.ref(context), context._version, frames, repeats)

    def _known(self, context: Tensor, frames: int) -> bool | None:
        """The verdict on ``context``, if it was seen and has not been written to since."""
        verdict = self._verdict
        if verdict is None or context.is_inference():  # no version counter: cannot tell
            return None
        reference, version, seen_frames, repeats = verdict
        same = reference() is context and version == context._version and seen_frames == frames
        return repeats if same else None
