"""Recognise a module in full, or leave it alone.

A fused operator takes the place of a module only if nothing about the module
could make its own forward differ from the operator: exact class, no hooks, no
instance-level forward, no parametrization, plain weights in the dtype of the
activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_plain(module: object, *classes: type) -> bool:
    """``module`` is exactly of one of ``classes`` and its call is its class's forward.

    False for subclasses (LoRA, quantised layers, parametrized modules), for modules
    with forward hooks, and for modules whose instance carries its own ``forward``
    (offloading, layerwise casting).
    """
    if type(module) not in classes:
        return False
    assert isinstance(module, nn.Module)
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """Somebody watches or replaces the calls of the module, or of a part of it."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
        for part in module.modules()
    )


def has_plain_weights(module: nn.Module, dtype: torch.dtype | None) -> bool:
    """All direct parameters are ordinary tensors of ``dtype`` (any, if ``None``)."""
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if type(parameter) not in _PLAIN_TENSORS:
            return False
        if dtype is not None and parameter.dtype != dtype:
            return False
    return True


def plain_norm(module: object, cls: type, dtype: torch.dtype | None) -> bool:
    """A ``nn.GroupNorm`` or ``nn.LayerNorm`` that a fused operator may replace."""
    if not is_plain(module, cls):
        return False
    assert isinstance(module, nn.Module)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return False
    return has_plain_weights(module, dtype)


def is_plain_linear(module: object) -> bool:
    """A ``nn.Linear`` whose output is a fresh tensor that may be overwritten."""
    return is_plain(module, nn.Linear)


def is_plain_conv(module: object) -> bool:
    """A ``nn.Conv2d`` whose output is a fresh tensor that may be overwritten."""
    return is_plain(module, nn.Conv2d)


def is_pointwise_conv(module: object, dtype: torch.dtype | None) -> bool:
    """A plain 1x1 ``nn.Conv2d``: on channels-last data, a linear layer over pixels."""
    return (
        is_plain(module, nn.Conv2d)
        and isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), 0)
        and module.groups == 1
        and has_plain_weights(module, dtype)
    )


def is_row_wise(module: object) -> bool:
    """A linear layer, plain or extended (LoRA, quantised), that treats each row alone."""
    if isinstance(module, nn.Linear):
        return True
    origin = type(module).__module__.partition(".")[0]
    return origin in ("peft", "bitsandbytes", "torchao") and hasattr(module, "in_features")


def is_silu(module: object) -> bool:
    """A plain SiLU activation."""
    return is_plain(module, nn.SiLU)


def is_inactive_dropout(module: object) -> bool:
    """A dropout that changes nothing now: evaluation mode or probability zero."""
    return is_plain(module, nn.Dropout) and (
        not module.training or module.p == 0  # type: ignore[attr-defined]
    )
