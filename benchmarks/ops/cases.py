"""The operators at the sizes of real models: ours, the stock way, and what they must move.

Sizes name where they occur. Each case makes fresh inputs, so that several sets can be
rotated for a cold cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accelrt import ops


@dataclass(frozen=True)
class Inputs:
    """One set of tensors, bound into calls."""

    ours: Callable[[], object]  # writes to preallocated memory, as the groups do
    ours_allocating: Callable[[], object]
    eager: Callable[[], object]
    compiled: Callable[[Callable[..., object]], Callable[[], object]]  # of the eager function
    function: Callable[..., object]
    moved_bytes: int  # read and written once
    flops: int


@dataclass(frozen=True)
class Case:
    """An operator at one size."""

    op: str
    size: str
    bound: str  # "memory" or "compute"
    make: Callable[[torch.dtype, str], Inputs]


def _bind(
    function: Callable[..., object],
    args: tuple[object, ...],
    ours: Callable[[], object],
    allocating: Callable[[], object],
    moved: int,
    flops: int = 0,
) -> Inputs:
    return Inputs(
        ours=ours,
        ours_allocating=allocating,
        eager=lambda: function(*args),
        compiled=lambda compiled: lambda: compiled(*args),
        function=function,
        moved_bytes=moved,
        flops=flops,
    )


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _image(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    t = torch.randn(shape, device=device).to(dtype)
    return t.contiguous(memory_format=torch.channels_last)


def group_norm_silu(shape: tuple[int, ...], frames: int = 1) -> Callable[..., Inputs]:
    """Both passes, with SiLU; reads twice, writes once."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        x = _image(shape, dtype, device)
        w, b = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        stats = torch.empty(shape[0] // frames, 32, 3, device=device)

        def ours() -> object:
            ops.group_norm_stats(x, 32, frames=frames, out=stats)
            return ops.group_norm_apply(x, stats, 32, w, b, frames=frames, silu=True, out=out)

        def allocating() -> object:
            s = ops.group_norm_stats(x, 32, frames=frames)
            return ops.group_norm_apply(x, s, 32, w, b, frames=frames, silu=True)

        def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            if frames > 1:
                n, c, h, wd = x.shape
                clip = x.reshape(n // frames, frames, c, h, wd).permute(0, 2, 1, 3, 4)
                y = F.silu(F.group_norm(clip, 32, w, b))
                return y.permute(0, 2, 1, 3, 4).reshape(n, c, h, wd)
            return F.silu(F.group_norm(x, 32, w, b))

        return _bind(eager, (x, w, b), ours, allocating, 2 * _nbytes(x) + _nbytes(out))

    return make


def layer_norm_modulate(batch: int, rows: int, width: int) -> Callable[..., Inputs]:
    """adaLN: LayerNorm without affine, then scale and shift."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        x = torch.randn(batch, rows, width, device=device).to(dtype)
        scale, shift = (torch.randn(batch, width, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)

        def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return F.layer_norm(x, (width,)) * (1 + scale[:, None]) + shift[:, None]

        return _bind(
            eager,
            (x, scale, shift),
            lambda: ops.layer_norm_modulate(x, scale=scale, shift=shift, out=out),
            lambda: ops.layer_norm_modulate(x, scale=scale, shift=shift),
            _nbytes(x, out),
        )

    return make


def gate_residual_layer_norm_modulate(batch: int, rows: int, width: int) -> Callable[..., Inputs]:
    """The seam between two sub-layers of a DiT block."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        x, residual = (torch.randn(batch, rows, width, device=device).to(dtype) for _ in range(2))
        gate, scale, shift = (torch.randn(batch, width, device=device).to(dtype) for _ in range(3))
        out, new = torch.empty_like(x), torch.empty_like(x)

        def eager(
            x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
        ) -> tuple[Tensor, Tensor]:
            r = residual + gate[:, None] * x
            return F.layer_norm(r, (width,)) * (1 + scale[:, None]) + shift[:, None], r

        return _bind(
            eager,
            (x, residual, gate, scale, shift),
            lambda: ops.gate_residual_layer_norm_modulate(
                x, residual, gate, scale=scale, shift=shift, out=out, residual_out=new
            ),
            lambda: ops.gate_residual_layer_norm_modulate(
                x, residual, gate, scale=scale, shift=shift
            ),
            _nbytes(x, residual, out, new),
        )

    return make


def geglu(rows: int, width: int) -> Callable[..., Inputs]:
    """value * gelu(gate) of a [rows, 2 width] projection."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        x = torch.randn(rows, 2 * width, device=device).to(dtype)
        out = torch.empty(rows, width, dtype=dtype, device=device)

        def eager(x: Tensor) -> Tensor:
            value, gate = x.chunk(2, dim=-1)
            return value * F.gelu(gate)

        return _bind(
            eager, (x,), lambda: ops.geglu(x, out=out), lambda: ops.geglu(x), _nbytes(x, out)
        )

    return make


def activation(name: str, rows: int, width: int) -> Callable[..., Inputs]:
    """silu, gelu or gelu_tanh with bias."""
    stock = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }[name]

    def make(dtype: torch.dtype, device: str) -> Inputs:
        x = torch.randn(rows, width, device=device).to(dtype)
        bias = torch.randn(width, device=device).to(dtype)
        out = torch.empty_like(x)
        op = getattr(ops, name)
        return _bind(
            lambda x, b: stock(x + b),
            (x, bias),
            lambda: op(x, bias, out=out),
            lambda: op(x, bias),
            _nbytes(x, out),
        )

    return make


def attention(
    batch: int, queries: int, keys: int, heads: int, dim: int, masked: bool = False
) -> Callable[..., Inputs]:
    """Tokens attend to tokens, from one fused projection, or to a context."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        def tokens(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, heads, dim, device=device).to(dtype)

        q, k, v = (
            tokens(queries, 3).unbind(2)
            if keys == queries
            else (tokens(queries), tokens(keys), tokens(keys))
        )
        bias = torch.zeros(batch, 1, 1, keys, device=device, dtype=dtype) if masked else None
        out = torch.empty(q.shape, device=device, dtype=dtype)

        def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
            )
            return y.transpose(1, 2)

        return _bind(
            eager,
            (q, k, v, bias),
            lambda: ops.attention(q, k, v, bias=bias, out=out),
            lambda: ops.attention(q, k, v, bias=bias),
            _nbytes(q, k, v, out),
            4 * batch * heads * queries * keys * dim,
        )

    return make


class Linear(torch.nn.Module):
    """A layer and what follows it. Parameters, so that the compiler may pack them ahead."""

    def __init__(self, width: int, out: int, activation: str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, out, dtype=dtype).requires_grad_(False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.activation == "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        if self.activation == "geglu":
            value, gate = y.chunk(2, dim=-1)
            return value * F.gelu(gate)
        return y


def linear(rows: int, width: int, out: int, activation: str | None = None) -> Callable[..., Inputs]:
    """A linear layer of a transformer, with the activation that follows it."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        columns = 2 * out if activation == "geglu" else out
        module = Linear(width, columns, activation, dtype).to(device)
        weight, bias = module.layer.weight, module.layer.bias
        x = torch.randn(rows, width, device=device).to(dtype)
        result = torch.empty(rows, out, dtype=dtype, device=device)
        return _bind(
            module,
            (x,),
            lambda: ops.linear(x, weight, bias, activation=activation, out=result),
            lambda: ops.linear(x, weight, bias, activation=activation),
            _nbytes(x, weight, result),
            2 * rows * width * columns,
        )

    return make


def conv2d(n: int, channels: int, side: int, out: int) -> Callable[..., Inputs]:
    """A 3x3 convolution of channels-last images."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        module = torch.nn.Conv2d(channels, out, 3, padding=1, dtype=dtype).requires_grad_(False)
        module = module.to(device)
        x = torch.randn(n, side, side, channels, device=device).to(dtype).permute(0, 3, 1, 2)
        result = torch.empty(n, side, side, out, dtype=dtype, device=device).permute(0, 3, 1, 2)
        weight, bias = module.weight, module.bias
        return _bind(
            module,
            (x,),
            lambda: ops.conv2d(x, weight, bias, padding=1, out=result),
            lambda: ops.conv2d(x, weight, bias, padding=1),
            _nbytes(x, weight, result),
            2 * x.numel() * 9 * out,
        )

    return make


class FeedForward(torch.nn.Module):
    """Both layers around a GEGLU, as transformers of images have them."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = Linear(width, 2 * hidden, "geglu", dtype)
        self.out = torch.nn.Linear(hidden, width, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.first(x))
        return y


def feed_forward(rows: int, width: int, hidden: int) -> Callable[..., Inputs]:
    """A GEGLU feed-forward layer; ours by slices whose hidden activations stay in the cache."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        module = FeedForward(width, hidden, dtype).to(device)
        first, last = module.first.layer, module.out
        weights = ops.FeedForwardWeights(
            ops.LinearWeights(first.weight, first.bias),
            ops.LinearWeights(last.weight, last.bias),
            "geglu",
        )
        x = torch.randn(rows, width, device=device).to(dtype)
        result = torch.empty_like(x)
        scratch = x.new_empty(ops.feed_forward_scratch(x, weights, add=False))
        return _bind(
            module,
            (x,),
            lambda: ops.feed_forward(x, weights, out=result, scratch=scratch),
            lambda: ops.feed_forward(x, weights),
            _nbytes(x, first.weight, last.weight, result),
            6 * rows * width * hidden,
        )

    return make


def temporal_attention(
    batch: int, frames: int, pixels: int, heads: int, dim: int
) -> Callable[..., Inputs]:
    """Frames attend to frames at every pixel; the stock way permutes twice around SDPA."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        shape = (batch, frames, pixels, heads * dim)
        q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        out = torch.empty_like(q)

        def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            def split(t: Tensor) -> Tensor:
                t = t.permute(0, 2, 1, 3).reshape(batch * pixels, frames, heads, dim)
                return t.transpose(1, 2)

            y = F.scaled_dot_product_attention(split(q), split(k), split(v))
            y = y.transpose(1, 2).reshape(batch, pixels, frames, heads * dim)
            return y.permute(0, 2, 1, 3).contiguous()

        return _bind(
            eager,
            (q, k, v),
            lambda: ops.temporal_attention(q, k, v, heads, out=out),
            lambda: ops.temporal_attention(q, k, v, heads),
            _nbytes(q, k, v, out),
            4 * batch * pixels * heads * frames * frames * dim,
        )

    return make


def residual_blend(shape: tuple[int, ...], blended: bool) -> Callable[..., Inputs]:
    """The end of a ResNet block, or an AlphaBlender."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        x, y = (_image(shape, dtype, device) for _ in range(2))
        out = torch.empty_like(x)
        alpha = torch.full((1,), 0.3, device=device) if blended else None

        def eager(x: Tensor, y: Tensor, alpha: Tensor | None) -> Tensor:
            if alpha is None:
                return (x + y) / 1.0
            a = alpha.to(x.dtype)
            return a * x + (1.0 - a) * y

        return _bind(
            eager,
            (x, y, alpha),
            lambda: ops.residual_blend(x, y, alpha=alpha, out=out),
            lambda: ops.residual_blend(x, y, alpha=alpha),
            _nbytes(x, y, out),
        )

    return make


def guided_step(shape: tuple[int, ...]) -> Callable[..., Inputs]:
    """Guidance and a DDIM step."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        sample, cond, uncond = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        out = torch.empty_like(sample)

        def eager(sample: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
            eps = uncond + 7.5 * (cond - uncond)
            return 0.98 * sample - 0.11 * eps

        keywords = {"guidance_scale": 7.5, "sample_coef": 0.98, "eps_coef": -0.11}
        return _bind(
            eager,
            (sample, cond, uncond),
            lambda: ops.guided_step(sample, cond, uncond, **keywords, out=out),
            lambda: ops.guided_step(sample, cond, uncond, **keywords),
            _nbytes(sample, cond, uncond, out),
        )

    return make


def feature_delta(shape: tuple[int, ...], p: int) -> Callable[..., Inputs]:
    """Relative change per sample."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        a, b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        out = torch.empty(shape[0], device=device)

        def eager(a: Tensor, b: Tensor) -> Tensor:
            x, y = a.float().flatten(1), b.float().flatten(1)
            if p == 1:
                return (x - y).abs().sum(1) / y.abs().sum(1)
            return (x - y).norm(dim=1) / y.norm(dim=1)

        return _bind(
            eager,
            (a, b),
            lambda: ops.feature_delta(a, b, p=p, out=out),
            lambda: ops.feature_delta(a, b, p=p),
            _nbytes(a, b),
        )

    return make


def weighted_sum(shape: tuple[int, ...], slots: int) -> Callable[..., Inputs]:
    """A predictor's features: stored ones with weights per sample, onto the residual stream."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        features = torch.randn(slots, *shape, device=device).to(dtype)
        weights = torch.randn(shape[0], slots, device=device)
        base = torch.randn(shape, device=device).to(dtype)
        out = torch.empty_like(base)

        # The fastest of eager: a chain of addcmul, ahead of einsum and of products and sums.
        def eager(features: Tensor, weights: Tensor, base: Tensor) -> Tensor:
            w = weights.to(features.dtype).reshape(shape[0], slots, *([1] * (len(shape) - 1)))
            total = torch.addcmul(base, w[:, 0], features[0])
            for k in range(1, slots):
                total.addcmul_(w[:, k], features[k])
            return total

        return _bind(
            eager,
            (features, weights, base),
            lambda: ops.weighted_sum(features, weights, base=base, out=out),
            lambda: ops.weighted_sum(features, weights, base=base),
            _nbytes(features, base, out),
        )

    return make


CASES = [
    Case("group_norm+silu", "AnimateDiff 32x320x64x64", "memory",
         group_norm_silu((32, 320, 64, 64))),
    Case("group_norm+silu", "AnimateDiff 32x1280x8x8", "memory", group_norm_silu((32, 1280, 8, 8))),
    Case("group_norm+silu", "VAE 1x128x512x512", "memory", group_norm_silu((1, 128, 512, 512))),
    Case("group_norm+silu", "clip 32x320x32x32, 16 frames", "memory",
         group_norm_silu((32, 320, 32, 32), frames=16)),
    Case("layer_norm_modulate", "PixArt 2x4096x1152", "memory", layer_norm_modulate(2, 4096, 1152)),
    Case("layer_norm_modulate", "DiT 2x256x1152", "memory", layer_norm_modulate(2, 256, 1152)),
    Case("gate_residual_layer_norm_modulate", "PixArt 2x4096x1152", "memory",
         gate_residual_layer_norm_modulate(2, 4096, 1152)),
    Case("gate_residual_layer_norm_modulate", "DiT 2x256x1152", "memory",
         gate_residual_layer_norm_modulate(2, 256, 1152)),
    Case("geglu", "AnimateDiff 32768x1280", "memory", geglu(32768, 1280)),
    Case("geglu", "AnimateDiff 512x5120", "memory", geglu(512, 5120)),
    Case("gelu_tanh", "PixArt 8192x4608", "memory", activation("gelu_tanh", 8192, 4608)),
    Case("gelu", "8192x4608", "memory", activation("gelu", 8192, 4608)),
    Case("silu", "8192x1280", "memory", activation("silu", 8192, 1280)),
    Case("attention", "DiT 2x256, 16x72", "compute", attention(2, 256, 256, 16, 72)),
    Case("attention", "PixArt 512 2x1024, 16x72", "compute", attention(2, 1024, 1024, 16, 72)),
    Case("attention", "PixArt 1024 1x4096, 16x72", "compute", attention(1, 4096, 4096, 16, 72)),
    Case("attention", "PixArt 1024 2x4096 to 120, 16x72", "compute",
         attention(2, 4096, 120, 16, 72, masked=True)),
    Case("attention", "AnimateDiff 8x1024, 8x40", "compute", attention(8, 1024, 1024, 8, 40)),
    Case("attention", "AnimateDiff 1x4096, 8x40", "compute", attention(1, 4096, 4096, 8, 40)),
    Case("linear", "PixArt 8192 rows 1152->1152", "compute", linear(8192, 1152, 1152)),
    Case("linear", "DiT 512 rows 1152->4608, GELU", "compute",
         linear(512, 1152, 4608, "gelu_tanh")),
    Case("linear", "PixArt 8192 rows 1152->4608, GELU", "compute",
         linear(8192, 1152, 4608, "gelu_tanh")),
    Case("linear", "AnimateDiff 8192 rows 320->1280, GEGLU", "compute",
         linear(8192, 320, 1280, "geglu")),
    Case("conv2d", "AnimateDiff 4x320x64x64", "compute", conv2d(4, 320, 64, 320)),
    Case("conv2d", "AnimateDiff 4x1280x16x16", "compute", conv2d(4, 1280, 16, 1280)),
    Case("conv2d", "VAE 1x256x128x128 to 128", "compute", conv2d(1, 256, 128, 128)),
    Case("feed_forward", "AnimateDiff 32768 rows 320->1280->320, GEGLU", "compute",
         feed_forward(32768, 320, 1280)),
    Case("temporal_attention", "AnimateDiff 2x16x4096, 8x40", "memory",
         temporal_attention(2, 16, 4096, 8, 40)),
    Case("temporal_attention", "AnimateDiff 2x16x256, 8x160", "memory",
         temporal_attention(2, 16, 256, 8, 160)),
    Case("residual_blend", "AnimateDiff 32x320x64x64", "memory",
         residual_blend((32, 320, 64, 64), False)),
    Case("residual_blend alpha", "SVD 28x320x32x56", "memory",
         residual_blend((28, 320, 32, 56), True)),
    Case("guided_step", "2x4x16x64x64", "memory", guided_step((2, 4, 16, 64, 64))),
    Case("guided_step", "8x16x256x256", "memory", guided_step((8, 16, 256, 256))),
    Case("feature_delta", "PixArt 2x4096x1152, L1", "memory", feature_delta((2, 4096, 1152), 1)),
    Case("feature_delta", "PixArt 2x4096x1152, L2", "memory", feature_delta((2, 4096, 1152), 2)),
    Case("weighted_sum", "PixArt 2x4096x1152, 1 slot", "memory", weighted_sum((2, 4096, 1152), 1)),
    Case("weighted_sum", "PixArt 2x4096x1152, 3 slots", "memory", weighted_sum((2, 4096, 1152), 3)),
    Case("weighted_sum", "DiT 2x256x1152, 3 slots", "memory", weighted_sum((2, 256, 1152), 3)),
    Case("weighted_sum", "AnimateDiff 32x320x64x64, 2 slots", "memory",
         weighted_sum((32, 320, 64, 64), 2)),
]  # fmt: skip

# What levels.py measures of them: one size of each operator, as the models have it.
LEVEL_SIZES = {
    "AnimateDiff 32x320x64x64", "PixArt 2x4096x1152", "DiT 2x256x1152", "AnimateDiff 32768x1280",
    "PixArt 8192x4608", "8192x4608", "8192x1280", "PixArt 512 2x1024, 16x72",
    "AnimateDiff 2x16x4096, 8x40", "SVD 28x320x32x56", "2x4x16x64x64", "PixArt 2x4096x1152, L2",
    "PixArt 2x4096x1152, 3 slots", "DiT 512 rows 1152->4608, GELU", "AnimateDiff 4x1280x16x16",
}  # fmt: skip
