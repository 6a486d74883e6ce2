"""Pure-torch truth of every operator in :mod:`accelrt.ops`, with the same signatures.

The functions here are written for clarity. They compute in float64 when the
inputs are float64 and in float32 otherwise, and round once, when the result is
stored. The kernels are tested against them, and :mod:`accelrt.ops` itself uses
them for float64 tensors, for which there are no kernels.
"""

from .activations import geglu, gelu, gelu_tanh, silu
from .attention import attention, temporal_attention
from .blend import residual_blend
from .block import (
    AttentionWeights,
    BlockWeights,
    FeedForwardWeights,
    LinearWeights,
    NormWeights,
    transformer_block,
)
from .conv2d import conv2d
from .feed_forward import feed_forward
from .group_norm import group_norm_apply, group_norm_merge, group_norm_stats
from .layer_norm import gate_residual_layer_norm_modulate, layer_norm_modulate
from .linear import linear
from .steps import feature_delta, guided_step
from .weighted_sum import weighted_sum

__all__ = [
    "AttentionWeights",
    "BlockWeights",
    "FeedForwardWeights",
    "LinearWeights",
    "NormWeights",
    "attention",
    "conv2d",
    "feature_delta",
    "feed_forward",
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
    "weighted_sum",
]
