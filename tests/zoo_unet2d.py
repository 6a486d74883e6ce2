"""Small UNets of Stable Diffusion, their inputs, and a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from model_zoo import CONTEXT_WIDTH, normal, randomise, tiny_vae
from torch import Tensor, nn

# Skips of `sd15` on 8 x 8 latents: channels and size.
SKIPS = ((16, 8), (16, 8), (16, 4), (32, 4), (32, 2), (32, 2))
# Output of its down blocks, the last layer of those with cross-attention: for T2I-Adapters.
ADAPTER = ((16, 8), (32, 4), (32, 2))


def sd15(**overrides: Any) -> UNet2DConditionModel:
    """All block types of Stable Diffusion 1.5: three levels, 16 and 32 channels."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": CONTEXT_WIDTH,
        "attention_head_dim": 4,
    }
    return randomise(UNet2DConditionModel(**{**settings, **overrides}))


def two_levels(**overrides: Any) -> UNet2DConditionModel:
    """The smallest UNet with every kind of layer, for options."""
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return sd15(**{**settings, **overrides})


def sd2() -> UNet2DConditionModel:
    """Stable Diffusion 2.1: linear projections, heads per level."""
    return two_levels(
        layers_per_block=2,
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        upcast_attention=True,
    )


def sdxl() -> UNet2DConditionModel:
    """SDXL: no attention at the top, several transformer layers, added embeddings."""
    return two_levels(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
        time_cond_proj_dim=8,
    )


def inputs(batch: int, height: int, width: int, draw: int = 0) -> dict[str, Any]:
    """Inputs as a pipeline gives them; others for every ``draw``."""
    return {
        "sample": normal(batch, 4, height, width, seed=3 + 100 * draw),
        "timestep": torch.tensor([7.0, 301.0, 800.0][:batch]),
        "encoder_hidden_states": normal(batch, 5, CONTEXT_WIDTH, seed=2 + 100 * draw),
    }


def sdxl_inputs(batch: int, height: int, width: int, draw: int = 0) -> dict[str, Any]:
    """With the added conditions of SDXL and the guidance embedding of LCM."""
    return {
        **inputs(batch, height, width, draw),
        "timestep_cond": normal(batch, 8, seed=9 + 100 * draw),
        "added_cond_kwargs": {
            "text_embeds": normal(batch, 12, seed=8 + 100 * draw),
            "time_ids": torch.arange(6 * batch).view(batch, 6),
        },
    }


def residuals(shapes: Any, batch: int = 2) -> list[Tensor]:
    """One tensor per (channels, size)."""
    return [normal(batch, c, s, s, seed=30 + i).double() for i, (c, s) in enumerate(shapes)]


class Pictures(nn.Module):
    """The image projection of an IP-Adapter: one token per image."""

    def forward(self, embeds: list[Tensor]) -> list[Tensor]:
        return [embed.unsqueeze(2) for embed in embeds]


def add_ip_adapters(unet: Any, *, older: bool = False) -> None:
    """Give the model two IP-Adapters with processors of their own weights."""
    from diffusers.models import attention_processor

    name = "IPAdapterAttnProcessor" if older else "IPAdapterAttnProcessor2_0"
    cls = getattr(attention_processor, name)
    unet.encoder_hid_proj = Pictures()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = dict(unet.attn_processors)
    for key in processors:
        if key.endswith("attn2.processor"):
            layer = unet.get_submodule(key.removesuffix(".processor"))
            width = layer.inner_dim
            processors[key] = randomise(
                cls(width, CONTEXT_WIDTH, num_tokens=(1, 1), scale=[0.6, 0.9])
            )
    unet.set_attn_processor(processors)


def pictures(batch: int) -> dict[str, Any]:
    """Embeddings for two adapters, of one and of two images."""
    return {
        "image_embeds": [
            normal(batch, 1, CONTEXT_WIDTH, seed=40),
            normal(batch, 2, CONTEXT_WIDTH, seed=41),
        ]
    }


Option = tuple[Callable[[], Any], dict[str, Any]]


def _class(kind: str | None, labels: Tensor, **more: Any) -> Option:
    return (lambda: two_levels(class_embed_type=kind, **more)), {"class_labels": labels}


def _added(kind: str, added: dict[str, Any] | None = None, **more: Any) -> Option:
    given = {} if added is None else {"added_cond_kwargs": added}
    return (lambda: two_levels(addition_embed_type=kind, **more)), given


def _projected(kind: str, text: int, added: dict[str, Any] | None = None) -> Option:
    given: dict[str, Any] = {"encoder_hidden_states": normal(2, 5, text, seed=2)}
    if added is not None:
        given["added_cond_kwargs"] = added
    return (lambda: two_levels(encoder_hid_dim_type=kind, encoder_hid_dim=text)), given


_PROJECTED = {"projection_class_embeddings_input_dim": 12}
_IMAGE = {"image_embeds": normal(2, 12, seed=50)}
_WIDE = {"image_embeds": normal(2, CONTEXT_WIDTH, seed=51)}

# Everything that the embeddings may be made of; batches of two.
EMBEDDINGS: dict[str, Option] = {
    "class-table": _class(None, torch.tensor([1, 3]), num_class_embeds=4),
    "class-timestep": _class("timestep", torch.tensor([5.0, 9.0])),
    "class-identity": _class("identity", normal(2, 64, seed=52)),
    "class-projection": _class("projection", normal(2, 12, seed=53), **_PROJECTED),
    "class-simple": _class("simple_projection", normal(2, 12, seed=53), **_PROJECTED),
    "class-joined": _class(
        "projection", normal(2, 12, seed=53), class_embeddings_concat=True, **_PROJECTED
    ),
    "added-text": _added("text", addition_embed_type_num_heads=4),
    "added-text-image": _added(
        "text_image", {**_WIDE, "text_embeds": normal(2, CONTEXT_WIDTH, seed=54)}
    ),
    "added-image": _added("image", _IMAGE, encoder_hid_dim=12, encoder_hid_dim_type="image_proj"),
    "added-hint": _added(
        "image_hint",
        {**_IMAGE, "hint": normal(2, 3, 64, 64, seed=55)},
        encoder_hid_dim=12,
        encoder_hid_dim_type="image_proj",
        in_channels=8,
    ),
    "context-text": _projected("text_proj", 12),
    "context-text-image": _projected("text_image_proj", 12, _WIDE),
    "context-image": _projected("image_proj", 12, _IMAGE),
    "time-fourier": ((lambda: two_levels(time_embedding_type="fourier")), {}),
    "time-activated": (
        lambda: two_levels(
            time_embedding_act_fn="silu", timestep_post_act="gelu", time_embedding_dim=48
        ),
        {"timestep": 12},
    ),
    "time-scalar": (two_levels, {"timestep": torch.tensor(12.5)}),
    "time-float": (two_levels, {"timestep": 12.5}),
    "centred": ((lambda: two_levels(center_input_sample=True)), {}),
    "no-context": ((lambda: two_levels(cross_attention_dim=16, mid_block_type=None,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)),
        {"encoder_hidden_states": None}),
}  # fmt: skip

# Options of the blocks.
BLOCKS: dict[str, Callable[[], Any]] = {
    "scale-shift": lambda: two_levels(
        resnet_time_scale_shift="scale_shift", resnet_out_scale_factor=1.4, mid_block_scale_factor=2
    ),
    "skip-time-act": lambda: two_levels(resnet_skip_time_act=True, act_fn="gelu"),
    "kernels": lambda: two_levels(conv_in_kernel=5, conv_out_kernel=1, downsample_padding=0),
    "asymmetric": lambda: two_levels(
        layers_per_block=[1, 2],
        cross_attention_dim=[CONTEXT_WIDTH, CONTEXT_WIDTH],
        transformer_layers_per_block=[[2], [1, 1]],
        reverse_transformer_layers_per_block=[[1, 1, 2], [2, 1]],
        mid_block_type=None,
    ),
    "only-cross": lambda: two_levels(only_cross_attention=True),
}
# Blocks of other classes, with the groups that then run as they came.
OTHER_BLOCKS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "plain-mid": (lambda: two_levels(mid_block_type="UNetMidBlock2D"), {"mid_block"}),
    "simple-cross": (
        lambda: two_levels(
            down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        ),
        {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"},
    ),
    "attention": (
        lambda: two_levels(
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        ),
        {"down_blocks.0", "up_blocks.1"},
    ),
}


def pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A pipeline to be called with prompt embeddings."""
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
        text_encoder=None,
        tokenizer=None,
        unet=sd15(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def run(pipe: StableDiffusionPipeline, **overrides: Any) -> Any:
    """Four guided steps on 9 x 15 latents from a fixed start."""
    dtype = pipe.unet.dtype
    images = overrides.get("num_images_per_prompt", 1)
    arguments: dict[str, Any] = {
        "prompt_embeds": normal(1, 5, CONTEXT_WIDTH, seed=4).to(dtype),
        "negative_prompt_embeds": normal(1, 5, CONTEXT_WIDTH, seed=5).to(dtype),
        "latents": normal(images, 4, 9, 15, seed=6).to(dtype),
        "height": 72,
        "width": 120,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).images
