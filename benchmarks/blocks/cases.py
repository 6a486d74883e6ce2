"""Transformer blocks at the sizes of published models, and of our reference model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from accelrt import Config
from accelrt.groups.dit_block import AdaLNBlockGroup
from accelrt.groups.pixart_block import AdaLNSingleBlockGroup
from accelrt.groups.state import Context, State


@dataclass(frozen=True)
class Case:
    """A block and the tokens that pass through it.

    Args:
        name: of the model.
        batch, tokens, heads, head_dim: of the residual stream.
        caption: tokens of the context; 0 for a block of DiT, without cross-attention.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    caption: int = 0

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim


CASES = (
    Case("DiT-XL/2 256x256", 2, 256, 16, 72),
    Case("PixArt 512x512", 2, 1024, 16, 72, 120),
    Case("PixArt 1024x1024", 2, 4096, 16, 72, 120),
    Case("reference DiT, 100 samples", 100, 16, 3, 32),
)


@dataclass(frozen=True)
class Built:
    """A block with its inputs.

    Args:
        block: the stock module.
        stock: its call on the residual stream, for ``torch.compile`` too.
        ours: the group's call.
        stream: ``[B, S, D]``; no call writes to it.
    """

    block: Any
    stock: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    stream: Tensor


def build(case: Case, dtype: torch.dtype, device: str) -> Built:
    """Random weights and inputs."""
    torch.manual_seed(0)
    single = case.caption > 0
    block: Any = BasicTransformerBlock(
        case.width, case.heads, case.head_dim,
        cross_attention_dim=case.width if single else None,
        activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False,
        norm_type="ada_norm_single" if single else "ada_norm_zero",
        num_embeds_ada_norm=None if single else 1000, norm_eps=1e-6 if single else 1e-5,
    )  # fmt: skip
    block = block.to(device, dtype).eval().requires_grad_(False)
    stream = torch.randn(case.batch, case.tokens, case.width, device=device).to(dtype)
    # The slices are what a call with the memory of the stock block would take.
    config = Config(slice_mib=1024.0)
    if not single:
        timestep = torch.full((case.batch,), 500, device=device)
        labels = torch.arange(case.batch, device=device) % 1000

        def stock(x: Tensor) -> Tensor:
            y: Tensor = block(x, timestep=timestep, class_labels=labels)
            return y

        group: Any = AdaLNBlockGroup("block", block, config)

        def state(x: Tensor) -> State:
            return State({"timestep": timestep, "class_labels": labels})

        return Built(block, stock, _runner(group, state), stream)
    modulation = torch.randn(case.batch, 6 * case.width, device=device).to(dtype)
    context = torch.randn(case.batch, case.caption, case.width, device=device).to(dtype)
    lengths = torch.tensor([[1], [37]], device=device)  # the empty caption, and a sentence
    kept = torch.arange(case.caption, device=device) < lengths
    mask = (1 - kept.to(dtype))[:, None] * -10000.0

    def stock_single(x: Tensor) -> Tensor:
        y: Tensor = block(
            x, encoder_hidden_states=context, encoder_attention_mask=mask, timestep=modulation
        )
        return y

    def state_single(x: Tensor) -> State:
        conditioning = Context(full=context, encoder_attention_mask=mask)
        return State({}, context=conditioning, extras={"modulation": modulation})

    group = AdaLNSingleBlockGroup("block", block, config)
    return Built(block, stock_single, _runner(group, state_single), stream)


def _runner(group: Any, make: Callable[[Tensor], State]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        state = make(x)
        state.hidden = x
        state.hold(x)  # the result is a tensor of its own, as of the stock block
        group(state)
        assert state.hidden is not None
        return state.hidden

    return run


def count_flops(case: Case) -> int:
    """FLOPs of the stock block; a multiplication and an addition are two."""
    built = build(case, torch.bfloat16, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built.stock(built.stream)
    return int(counter.get_total_flops())
