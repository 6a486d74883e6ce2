"""The conditioning of a spatial transformer's call, cut along its images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .state import Context

# Arguments of an attention layer that its block fills in.
_TAKEN = ("hidden_states", "encoder_hidden_states", "attention_mask")


@dataclass(frozen=True)
class ImageConditioning:
    """What the blocks of a spatial transformer are given, with one row per image.

    Args:
        text: context ``[N, L, D]``, or ``None`` for self-attention.
        pictures: embeddings ``[N, ...]`` of an IP-Adapter; ``None`` without one.
        self_bias: ``[N, 1 or S, S]``, added to the scores of the first attention layer.
        cross_bias: ``[N, 1 or S, L]``, added to those of the second one.
        kwargs: other arguments of the attention layers, the same for all images.
    """

    text: Tensor | None = None
    pictures: tuple[Tensor, ...] | None = None
    self_bias: Tensor | None = None
    cross_bias: Tensor | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Context, dtype: torch.dtype) -> ImageConditioning:
        """That of a call for which :func:`unsliceable` is empty."""
        text, pictures = context.full, None
        if isinstance(text, tuple):
            text, pictures = text[0], tuple(text[1])
        return cls(
            text,
            pictures,
            _bias(context.attention_mask, dtype),
            _bias(context.encoder_attention_mask, dtype),
            context.cross_attention_kwargs or {},
        )

    def context(self, start: int, stop: int) -> Any:
        """The context of some images, as stock attention layers take it."""
        text = None if self.text is None else self.text[start:stop]
        if self.pictures is None:
            return text
        return (text, [picture[start:stop] for picture in self.pictures])


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask ``[N, L]`` as ``Transformer2DModel`` reads it; a bias stays as it is."""
    if mask is None or mask.dim() != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def unsliceable(context: Context, images: int, tokens: int) -> str:
    """Why the conditioning of a call cannot be sliced surely; empty if it can.

    Args:
        context: of the call.
        images: ``N``.
        tokens: ``S``, pixels of an image.
    """
    text: Any = context.full
    pictures: Any = ()
    if isinstance(text, tuple):
        if len(text) != 2 or not isinstance(text[1], (list, tuple)):
            return "the conditioning is a tuple of an unknown kind"
        text, pictures = text
        if not isinstance(text, Tensor):
            return "the conditioning has no text beside its image embeddings"
    if text is not None and not isinstance(text, Tensor):
        return f"the conditioning is a {type(text).__name__}"
    if text is not None and (text.dim() != 3 or text.shape[0] != images):
        return f"the context {tuple(text.shape)} has not one row per image"
    if not all(isinstance(p, Tensor) and p.shape[:1] == (images,) for p in pictures):
        return "the image embeddings have not one row per image"
    length = tokens if text is None else text.shape[1]
    return (
        _mask_reason("attention", context.attention_mask, images, tokens, tokens)
        or _mask_reason("encoder attention", context.encoder_attention_mask, images, tokens, length)
        or _kwargs_reason(context.cross_attention_kwargs or {})
    )


def _mask_reason(name: str, mask: Tensor | None, images: int, tokens: int, keys: int) -> str:
    if mask is None:
        return ""
    shape = tuple(mask.shape)
    if shape in ((images, keys), (images, 1, keys), (images, tokens, keys)):
        return ""
    return f"the {name} mask {shape} has not one row of {keys} keys per image"


def _kwargs_reason(kwargs: dict[str, Any]) -> str:
    """Tensors in ``kwargs`` may be per image: only masks of IP-Adapters surely are not."""
    for key, value in kwargs.items():
        if key in _TAKEN:
            return f"cross_attention_kwargs has {key!r}, which the block gives itself"
        if key == "gligen":
            return "GLIGEN's objects were given"
        if key == "ip_adapter_masks" and _same_for_all(value):
            continue
        if not _without_tensors(value):
            return f"cross_attention_kwargs[{key!r}] holds a tensor or an unknown object"
    return ""


def _same_for_all(masks: Any) -> bool:
    """IP-Adapter masks ``[1, images of the adapter, H, W]`` serve every image of the batch."""
    if isinstance(masks, Tensor):  # the older form, one [1, H, W] per adapter
        return masks.dim() == 4 and masks.shape[1] == 1
    return isinstance(masks, (list, tuple)) and all(
        mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] == 1)
        for mask in masks
    )


def _without_tensors(value: Any) -> bool:
    """``value`` is made of plain numbers, strings and containers of them."""
    if isinstance(value, (list, tuple, set)):
        return all(_without_tensors(item) for item in value)
    if isinstance(value, dict):
        return all(_without_tensors(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float, str))
