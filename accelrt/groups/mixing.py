"""The blend of spatial and temporal features: diffusers' ``AlphaBlender``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import AlphaBlender
from torch import Tensor, nn

from .recognise import is_plain
from .state import State


def mixer_reason(module: nn.Module) -> str:
    """Why a blend must run as it came; empty if :func:`temporal_weight` knows it."""
    if not is_plain(module, AlphaBlender):
        return f"{type(module).__name__} is not a plain AlphaBlender"
    return ""


def image_only(state: State, like: Tensor) -> Tensor:
    """The indicator ``[B, T]`` of frames that are images by themselves; zeros if none was given."""
    given = state.extras.get("image_only")
    if given is not None:
        return given  # type: ignore[no-any-return]
    batch = like.shape[0] // state.frames
    return torch.zeros(batch, state.frames, dtype=like.dtype, device=like.device)


def temporal_weight(module: nn.Module, state: State, like: Tensor) -> Tensor:
    """``w`` of ``(1 - w) spatial + w temporal``, rounded to the dtype of ``like`` as stock does.

    Args:
        module: a mixer for which :func:`mixer_reason` is empty.
        state: gives frames and the indicator of single images.
        like: a tensor ``[B * T, ...]``.

    Returns:
        ``[1, 1, 1]``, or ``[B * T, 1, 1]`` if frames have weights of their own.
    """
    mixer: Any = module
    alpha: Tensor = mixer.get_alpha(image_only(state, like), 3).to(like.dtype)
    weight = alpha if mixer.switch_spatial_to_temporal_mix else 1.0 - alpha
    return weight.reshape(-1, 1, 1)


def spatial_weight(module: nn.Module, state: State, like: Tensor) -> Tensor:
    """``a`` of ``a spatial + (1 - a) temporal`` for :func:`accelrt.ops.residual_blend`.

    Args:
        module: a mixer for which :func:`mixer_reason` is empty.
        state: gives frames and the indicator of single images.
        like: a tensor ``[B * T, ...]``.

    Returns:
        ``[1]`` or ``[B * T]``, at least float32.
    """
    mixer: Any = module
    alpha: Tensor = mixer.get_alpha(image_only(state, like), 3).reshape(-1)
    alpha = alpha.to(torch.promote_types(like.dtype, torch.float32))
    return 1.0 - alpha if mixer.switch_spatial_to_temporal_mix else alpha
