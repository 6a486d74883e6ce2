"""Public functional operators: the fourth level, one fused kernel each.

Every function takes CPU or CUDA tensors in float32, bfloat16 or float16 with
arbitrary strides (the last, or the channel, stride being 1 is the fast case),
accumulates in float32 and rounds once. float64 tensors are computed by
:mod:`accelrt.reference`, the pure-torch truth with the same signatures. ``out=``
writes to a tensor of the caller, which may be a strided view; each docstring
says which inputs it may alias. All raise :class:`ValueError` naming the operator
and the offending value before anything is written. None has a gradient.
"""

from . import _flops, _runtime_cuda
from .activations import geglu, gelu, gelu_tanh, silu
from .attention import attention, temporal_attention
from .blend import residual_blend
from .block import (
    AttentionWeights,
    BlockWeights,
    FeedForwardWeights,
    LinearWeights,
    NormWeights,
    context_keys,
    transformer_block,
    transformer_block_workspace,
)
from .conv2d import conv2d
from .feed_forward import feed_forward, feed_forward_scratch
from .group_norm import group_norm_apply, group_norm_merge, group_norm_stats
from .layer_norm import gate_residual_layer_norm_modulate, layer_norm_modulate
from .linear import linear
from .steps import feature_delta, guided_step
from .weighted_sum import weighted_sum

_flops.register()
_runtime_cuda.register()

__all__ = [
    "AttentionWeights",
    "BlockWeights",
    "FeedForwardWeights",
    "LinearWeights",
    "NormWeights",
    "attention",
    "context_keys",
    "conv2d",
    "feature_delta",
    "feed_forward",
    "feed_forward_scratch",
    "gate_residual_layer_norm_modulate",
    "geglu",
    "gelu",
    "gelu_tanh",
    "group_norm_apply",
    "group_norm_merge",
    "group_norm_stats",
    "guided_step",
    "layer_norm_modulate",
    "linear",
    "residual_blend",
    "silu",
    "temporal_attention",
    "transformer_block",
    "transformer_block_workspace",
    "weighted_sum",
]
