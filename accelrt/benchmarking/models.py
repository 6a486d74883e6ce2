"""The published models that are measured: how they are built, called, and made small.

Configurations and inputs are those of the published checkpoints at one size, with
classifier-free guidance batched: two samples. Weights and inputs are random.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor

Inputs = dict[str, Any]
Run = Callable[[Any, Inputs], Tensor]

SAMPLES = 2  # guidance: with and without the condition


@dataclass(frozen=True)
class Switches:
    """Memory switches of the stock model, all on together.

    Where a switch has a size, it is the largest that reaches the smallest peak at the
    published size: the fastest form of the stock model's smallest memory.

    Args:
        label: a word or two for tables.
        text: what is called, as one would write it.
        apply: switches them on.
        run: for switches of the pipeline: the call as the pipeline then makes it.
        exact: the output stays what it was, up to rounding.
    """

    label: str
    text: str
    apply: Callable[[Any], None] = lambda model: None
    run: Run | None = None
    exact: bool = True


def forward(model: Any, inputs: Inputs) -> Tensor:
    """One denoising step's forward."""
    return model(**inputs).sample  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ModelCase:
    """A model at one size.

    Args:
        name: as the command line knows it.
        title: as a table shows it.
        detail: the size of the input.
        build: constructs the model.
        make_inputs: keywords of one call, in float32 on the CPU.
        run: one call.
        switches: sets of the stock model's memory switches, each measured by itself.
    """

    name: str
    title: str
    detail: str
    build: Callable[[], Any]
    make_inputs: Callable[[], Inputs]
    run: Run = forward
    switches: tuple[Switches, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        """The inputs in ``dtype``; time steps, labels and masks keep their own."""

        def convert(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: convert(item) for key, item in value.items()}
            if not isinstance(value, Tensor):
                return value
            floating = value.is_floating_point() and value.dim() > 1
            return value.to(device=device, dtype=dtype if floating else None)

        return {key: convert(value) for key, value in self.make_inputs().items()}


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _constructor(cls: Any, settings: dict[str, Any]) -> Callable[[], Any]:
    return lambda: cls(**settings)


def _lowest(height: int, width: int) -> int:
    """Tokens of the lowest level of a UNet; a chunk must divide those of every level."""
    return -(-height // 8) * -(-width // 8)


def _chunked(size: int, dim: int) -> Callable[[Any], None]:
    """Feed-forward chunking of every block that has it."""

    def apply(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "set_chunk_feed_forward"):
                module.set_chunk_feed_forward(chunk_size=size, dim=dim)

    return apply


def svd(frames: int = 14, height: int = 32, width: int = 56, **overrides: Any) -> ModelCase:
    """The UNet of Stable Video Diffusion; ``height`` and ``width`` of the latents."""
    settings = {"num_frames": frames, **overrides}
    context = settings.get("cross_attention_dim", 1024)

    def inputs() -> Inputs:
        return {
            "sample": _normal(SAMPLES, frames, 8, height, width, seed=1),
            "timestep": torch.tensor(501.0),
            "encoder_hidden_states": _normal(SAMPLES, 1, context, seed=2),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(SAMPLES, 1),
        }

    return ModelCase(
        "svd",
        "SVD UNet",
        f"{frames} frames {8 * height}x{8 * width}",
        _constructor(UNetSpatioTemporalConditionModel, settings),
        inputs,
        switches=(
            Switches(
                "chunked",
                "enable_forward_chunking()",
                lambda model: model.enable_forward_chunking(),
            ),
        ),
    )


def animatediff(frames: int = 16, height: int = 32, width: int = 32, **overrides: Any) -> ModelCase:
    """The UNet of Stable Diffusion 1.5 with motion modules."""
    settings: dict[str, Any] = {"cross_attention_dim": 768, **overrides}
    # Over images and over pixels: chunks over tokens reach the same peak, many times slower,
    # because a linear layer copies its weights for every row of a strided chunk.
    chunk = math.gcd(8, SAMPLES * frames, SAMPLES * _lowest(height, width))

    def inputs() -> Inputs:
        context = _normal(SAMPLES, 77, settings["cross_attention_dim"], seed=2)
        return {
            "sample": _normal(SAMPLES, 4, frames, height, width, seed=1),
            "timestep": torch.tensor(501),
            "encoder_hidden_states": context.repeat_interleave(frames, 0),
        }

    return ModelCase(
        "animatediff",
        "AnimateDiff UNet",
        f"{frames} frames {8 * height}x{8 * width}",
        _constructor(UNetMotionModel, settings),
        inputs,
        switches=(
            Switches(
                "chunked",
                f"enable_forward_chunking({chunk}, dim=0)",
                lambda model: model.enable_forward_chunking(chunk, dim=0),
            ),
        ),
    )


def unet2d(size: int = 64, **overrides: Any) -> ModelCase:
    """The UNet of Stable Diffusion 1.5."""
    settings: dict[str, Any] = {
        "sample_size": size,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        **overrides,
    }
    chunk = math.gcd(64, _lowest(size, size))
    chunked = _chunked(chunk, 1)
    text = f"set_chunk_feed_forward({chunk}, 1) of the blocks"

    def chunked_and_sliced(model: Any) -> None:
        chunked(model)
        model.set_attention_slice("max")

    def inputs() -> Inputs:
        return {
            "sample": _normal(SAMPLES, 4, size, size, seed=1),
            "timestep": torch.tensor(501),
            "encoder_hidden_states": _normal(SAMPLES, 77, settings["cross_attention_dim"], seed=2),
        }

    return ModelCase(
        "unet2d",
        "Stable Diffusion 1.5 UNet",
        f"{8 * size}x{8 * size}",
        _constructor(UNet2DConditionModel, settings),
        inputs,
        switches=(
            Switches("chunked", text, chunked),
            Switches(
                "chunked, sliced attn",
                f"{text}; set_attention_slice('max')",
                chunked_and_sliced,
            ),
        ),
    )


def dit(size: int = 32, **overrides: Any) -> ModelCase:
    """DiT-XL/2."""
    settings: dict[str, Any] = {"sample_size": size, "out_channels": 8, **overrides}
    tokens = (size // 2) ** 2

    def inputs() -> Inputs:
        return {
            "hidden_states": _normal(SAMPLES, 4, size, size, seed=1),
            "timestep": torch.tensor([501, 501]),
            "class_labels": torch.tensor([207, 1000]),
        }

    return ModelCase(
        "dit",
        "DiT-XL/2",
        f"{8 * size}x{8 * size}",
        _constructor(DiTTransformer2DModel, settings),
        inputs,
        switches=(_transformer_chunks(tokens),),
    )


def pixart(size: int = 64, caption: int = 120, **overrides: Any) -> ModelCase:
    """PixArt-alpha: captions of ``caption`` tokens with a mask."""
    settings: dict[str, Any] = {
        "sample_size": size,
        "caption_channels": 4096,
        # The 1024 x 1024 checkpoint is conditioned on the size.
        "use_additional_conditions": size == 128,
        **overrides,
    }
    sized = settings["use_additional_conditions"]
    tokens, width = (size // 2) ** 2, settings["caption_channels"]

    def inputs() -> Inputs:
        lengths = torch.tensor([[1], [37]])  # the empty caption, and one of a sentence
        return {
            "hidden_states": _normal(SAMPLES, 4, size, size, seed=1),
            "encoder_hidden_states": _normal(SAMPLES, caption, width, seed=2),
            "timestep": torch.tensor([501, 501]),
            "added_cond_kwargs": {
                "resolution": torch.full((SAMPLES, 2), 8.0 * size) if sized else None,
                "aspect_ratio": torch.ones(SAMPLES, 1) if sized else None,
            },
            "encoder_attention_mask": (torch.arange(caption) < lengths).long(),
        }

    return ModelCase(
        "pixart",
        "PixArt-alpha",
        f"{8 * size}x{8 * size}",
        _constructor(PixArtTransformer2DModel, settings),
        inputs,
        switches=(_transformer_chunks(tokens),),
    )


def pixart_1024(size: int = 128, caption: int = 120, **overrides: Any) -> ModelCase:
    """PixArt-alpha as its 1024 x 1024 checkpoint is: conditioned on size and aspect ratio."""
    settings = {"use_additional_conditions": True, **overrides}
    return dataclasses.replace(pixart(size, caption, **settings), name="pixart-1024")


def _transformer_chunks(tokens: int) -> Switches:
    """The models have no switch of their own, their blocks have."""
    size = min(64, tokens // 4)
    return Switches(
        "chunked", f"set_chunk_feed_forward({size}, 1) of the blocks", _chunked(size, 1)
    )


def _decode(model: Any, inputs: Inputs) -> Tensor:
    return model.decode(**inputs).sample  # type: ignore[no-any-return]


def vae(images: int = 2, size: int = 64, **overrides: Any) -> ModelCase:
    """The decoder of Stable Diffusion 1.5."""
    settings: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        **overrides,
    }
    return ModelCase(
        "vae",
        "SD VAE decode",
        f"{images} images {8 * size}x{8 * size}",
        _constructor(AutoencoderKL, settings),
        lambda: {"z": _normal(images, 4, size, size, seed=1)},
        run=_decode,
        # enable_tiling() is not exact: norms and attention see a tile.
        switches=(Switches("sliced", "enable_slicing()", lambda model: model.enable_slicing()),),
    )


def svd_vae(frames: int = 14, height: int = 32, width: int = 56, **overrides: Any) -> ModelCase:
    """The decoder of Stable Video Diffusion, all frames in one call."""
    settings: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "layers_per_block": 2,
        **overrides,
    }

    def frame_by_frame(model: Any, inputs: Inputs) -> Tensor:
        return torch.cat([model.decode(z, num_frames=1).sample for z in inputs["z"].split(1)])

    return ModelCase(
        "svd-vae",
        "SVD VAE decode",
        f"{frames} frames {8 * height}x{8 * width}",
        _constructor(AutoencoderKLTemporalDecoder, settings),
        lambda: {"z": _normal(frames, 4, height, width, seed=1), "num_frames": frames},
        run=_decode,
        switches=(
            Switches(
                "frame by frame",
                "decode_chunk_size=1 of the pipeline, not exact",
                run=frame_by_frame,
                exact=False,
            ),
        ),
    )


FULL: dict[str, Callable[[], ModelCase]] = {
    "svd": svd,
    "pixart": pixart,
    "pixart-1024": pixart_1024,
    "dit": dit,
    "animatediff": animatediff,
    "unet2d": unet2d,
    "vae": vae,
    "svd-vae": svd_vae,
}

_CHANNELS = (32, 64)


def two_levels(suffix: str) -> dict[str, Any]:
    """A UNet of two levels with one layer each, and every kind of block."""
    return {
        "block_out_channels": _CHANNELS,
        "down_block_types": (f"CrossAttnDownBlock{suffix}", f"DownBlock{suffix}"),
        "up_block_types": (f"UpBlock{suffix}", f"CrossAttnUpBlock{suffix}"),
        "layers_per_block": 1,
        "cross_attention_dim": 48,
    }


def _tiny_pixart(make: Callable[..., ModelCase], head_dim: int) -> ModelCase:
    return make(
        16, num_attention_heads=4, attention_head_dim=head_dim, cross_attention_dim=4 * head_dim,
        num_layers=3, caption_channels=48,
    )  # fmt: skip


TINY: dict[str, Callable[[], ModelCase]] = {
    "svd": lambda: svd(
        3, 8, 16, **two_levels("SpatioTemporal"), num_attention_heads=(2, 4),
        addition_time_embed_dim=16, projection_class_embeddings_input_dim=48,
    ),
    "pixart": lambda: _tiny_pixart(pixart, 16),
    "pixart-1024": lambda: _tiny_pixart(pixart_1024, 24),
    "dit": lambda: dit(16, num_attention_heads=4, attention_head_dim=16, num_layers=3),
    "animatediff": lambda: animatediff(
        3, 8, 8, **two_levels("Motion"), num_attention_heads=2, motion_num_attention_heads=2
    ),
    "unet2d": lambda: unet2d(16, **two_levels("2D"), attention_head_dim=2),
    "vae": lambda: vae(
        2, 8, block_out_channels=_CHANNELS, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    ),
    "svd-vae": lambda: svd_vae(
        3, 8, 8, block_out_channels=_CHANNELS, down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
    ),
}  # fmt: skip

SIZES = {"full": FULL, "tiny": TINY}
