"""What treats every row of a batch alone, and so may be sliced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models import attention_processor as processors
from diffusers.models.attention import (
    BasicTransformerBlock,
    FeedForward,
    FreeNoiseTransformerBlock,
    TemporalBasicTransformerBlock,
)
from torch import nn

_BLOCKS = (BasicTransformerBlock, FreeNoiseTransformerBlock, TemporalBasicTransformerBlock)
_ATTENTION = (processors.Attention,)
_FEED_FORWARD = (FeedForward,)
# Processors that treat every row of the batch alone; others may look at the whole batch.
_PER_ROW = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
    processors.CustomDiffusionAttnProcessor,
    processors.CustomDiffusionAttnProcessor2_0,
    processors.CustomDiffusionXFormersAttnProcessor,
    processors.IPAdapterAttnProcessor,
    processors.IPAdapterAttnProcessor2_0,
    processors.IPAdapterXFormersAttnProcessor,
)
# Hooks of accelerate and diffusers that only move or cast weights and inputs.
_PLACING_HOOKS = (
    "AlignDevicesHook",
    "CpuOffload",
    "GroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LayerwiseCastingHook",
    "LazyPrefetchGroupOffloadingHook",
    "PeftInputAutocastDisableHook",
)


def mixes(block: nn.Module, items: str = "images") -> str:
    """Why all rows of a batch must go through a block together; empty if each goes alone.

    A class that is not known may look at the whole batch: cross-frame attention does, and
    so does perturbed-attention guidance, which tells its branches apart by their place.

    Args:
        block: a transformer block.
        items: what a row is: ``"images"``, or ``"pixels"`` of a temporal block.
    """
    for name, known in (("", _BLOCKS), ("attn1", _ATTENTION), ("attn2", _ATTENTION),
                        ("ff_in", _FEED_FORWARD), ("ff", _FEED_FORWARD)):  # fmt: skip
        module = getattr(block, name, None) if name else block
        if module is None:
            continue
        where = f"{name}: " if name else ""
        if type(module) not in known:
            return f"{where}{type(module).__name__} may mix {items}"
        if is_watched(module):
            return f"{where}a hook of {type(module).__name__} may want all {items}"
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor) not in _PER_ROW:
            return f"{where}{type(processor).__name__} may mix {items}"
    return ""


def mixes_samples(model: nn.Module) -> str:
    """Why all samples of a batch must go through a model together; empty if each goes alone.

    Attention processors that are not known may look at the whole batch, and so may hooks.
    """
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor) not in _PER_ROW:
            return f"{name}: {type(processor).__name__} may mix samples"
        if name and is_watched(module):
            return f"{name}: a hook of {type(module).__name__} may want all samples"
    return ""


def together(blocks: Iterable[nn.Module], items: str = "images", name: str = "block") -> str:
    """Why the rows of some blocks must pass in one slice; empty if they need not."""
    for index, block in enumerate(blocks):
        reason = mixes(block, items)
        if reason:
            return f"{name} {index}: {reason}, so they pass together"
    return ""


def is_watched(module: nn.Module) -> bool:
    """Something beside its own forward sees its input or output, and may want the whole batch."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _is_replaced(module))


def _is_replaced(module: Any) -> bool:
    """The instance has a forward that is not only offloading or casting."""
    if "forward" not in module.__dict__:
        return False
    hooks: list[Any] = []
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hooks += getattr(hook, "hooks", [hook])
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        hooks += registry.hooks.values()
    return not hooks or any(type(hook).__name__ not in _PLACING_HOOKS for hook in hooks)
