"""A small PixArt with random weights, and its pipelines."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

CAPTION_WIDTH = 20
CAPTION_LENGTH = 7


def tiny_pixart(**overrides: Any) -> PixArtTransformer2DModel:
    """Three adaLN-single blocks of width 24 on 8 x 8 latents, patches of 2."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "cross_attention_dim": 24,
        "caption_channels": CAPTION_WIDTH,
        "sample_size": 8,
        "patch_size": 2,
        "use_additional_conditions": False,
    }
    return zoo.randomise(PixArtTransformer2DModel(**{**settings, **overrides}))


def alpha_1024(**overrides: Any) -> PixArtTransformer2DModel:
    """With the conditions on resolution and aspect ratio that the 1024 model has."""
    return tiny_pixart(use_additional_conditions=True, **overrides)


def variant() -> PixArtTransformer2DModel:
    """GEGLU, affine norms, no caption projection, patches of one pixel."""
    return tiny_pixart(
        activation_fn="geglu",
        norm_elementwise_affine=True,
        caption_channels=None,
        cross_attention_dim=CAPTION_WIDTH,
        patch_size=1,
        attention_bias=False,
    )


def conditions(batch: int) -> dict[str, Tensor]:
    """Resolution and aspect ratio, as the pipeline of alpha gives them."""
    return {
        "resolution": torch.tensor([[512.0, 768.0]]).repeat(batch, 1),
        "aspect_ratio": torch.tensor([[0.67]]).repeat(batch, 1),
    }


def caption_mask(batch: int) -> Tensor:
    """1 keeps a token; samples have different lengths, the first one has all."""
    lengths = torch.tensor([CAPTION_LENGTH, 3, 5, 1]).repeat(batch)[:batch]
    return (torch.arange(CAPTION_LENGTH)[None] < lengths[:, None]).long()


def inputs(batch: int, height: int, width: int) -> dict[str, Any]:
    """Inputs as a pipeline gives them, other timesteps for every sample."""
    return {
        "hidden_states": zoo.normal(batch, 4, height, width, seed=3),
        "encoder_hidden_states": zoo.normal(batch, CAPTION_LENGTH, CAPTION_WIDTH, seed=2),
        "timestep": torch.tensor([7, 301, 999, 50]).repeat(batch)[:batch],
        "encoder_attention_mask": caption_mask(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _pipeline(cls: Any, dtype: torch.dtype, scheduler: Any, **overrides: Any) -> Any:
    pipe = cls(
        tokenizer=None,
        text_encoder=None,
        vae=zoo.tiny_vae(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
        transformer=tiny_pixart(**overrides),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def sigma_pipeline(dtype: torch.dtype = torch.float32) -> PixArtSigmaPipeline:
    """To be called with prompt embeddings."""
    scheduler = DPMSolverMultistepScheduler()
    return _pipeline(PixArtSigmaPipeline, dtype, scheduler)


def alpha_pipeline(dtype: torch.dtype = torch.float32) -> PixArtAlphaPipeline:
    """To be called with prompt embeddings; conditioned on resolution as at 1024."""
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return _pipeline(
        PixArtAlphaPipeline, dtype, scheduler, sample_size=128, use_additional_conditions=True
    )


def run(pipe: Any, **overrides: Any) -> Tensor:
    """The latents of two images of 18 x 30 after four guided steps from a fixed start."""
    dtype = pipe.transformer.dtype
    arguments: dict[str, Any] = {
        "prompt_embeds": zoo.normal(1, CAPTION_LENGTH, CAPTION_WIDTH, seed=4).to(dtype),
        "prompt_attention_mask": caption_mask(2)[1:],
        "negative_prompt_embeds": zoo.normal(1, CAPTION_LENGTH, CAPTION_WIDTH, seed=5).to(dtype),
        "negative_prompt_attention_mask": caption_mask(1),
        "negative_prompt": None,
        "latents": zoo.normal(2, 4, 18, 30, seed=6).to(dtype),
        "height": 144,
        "width": 240,
        "num_images_per_prompt": 2,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "use_resolution_binning": False,
    }
    return pipe(**{**arguments, **overrides}).images
