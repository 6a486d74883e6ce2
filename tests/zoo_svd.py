"""Small spatio-temporal UNets and a Stable Video Diffusion pipeline with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.resnet import AlphaBlender
from model_zoo import normal, randomise
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CONTEXT_WIDTH = 24
TIME_WIDTH = 8


def tiny_svd_unet(**overrides: Any) -> UNetSpatioTemporalConditionModel:
    """All block types: two levels; the temporal halves need 32 groups, hence the widths."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "layers_per_block": 1,
        "cross_attention_dim": CONTEXT_WIDTH,
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": 3 * TIME_WIDTH,
        "num_frames": 7,
    }
    model = randomise(UNetSpatioTemporalConditionModel(**{**settings, **overrides}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():  # every blend has a factor of its own
        for mixer in model.modules():
            if isinstance(mixer, AlphaBlender):
                mixer.mix_factor.copy_(torch.randn(1, generator=generator))
    return model


def deep_svd_unet() -> UNetSpatioTemporalConditionModel:
    """Two layers per block and per transformer, three levels, one head at the first."""
    return tiny_svd_unet(
        block_out_channels=(32, 32, 64),
        down_block_types=(
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types=(
            "UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
        ),
        layers_per_block=(1, 2, 1),
        num_attention_heads=(1, 2, 4),
        transformer_layers_per_block=(2, 1, 2),
    )


def svd_inputs(
    batch: int, frames: int, height: int, width: int, *, length: int = 1
) -> dict[str, Tensor]:
    """Inputs of a call in which every sample has its own context, ids and time step."""
    return {
        "sample": normal(batch, frames, 8, height, width, seed=3),
        "timestep": torch.tensor([0.7, -0.3])[:batch],
        "encoder_hidden_states": normal(batch, length, CONTEXT_WIDTH, seed=2),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [12.0, 33.0, 0.3]])[:batch],
    }


def svd_pipeline(dtype: torch.dtype = torch.float32) -> StableVideoDiffusionPipeline:
    """A pipeline whose VAE has the published factor of 8; its image encoder sees 224 x 224."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        projection_dim=CONTEXT_WIDTH,
    )
    pipe = StableVideoDiffusionPipeline(
        vae=randomise(
            AutoencoderKLTemporalDecoder(
                block_out_channels=(32,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                layers_per_block=1,
                sample_size=16,
                force_upcast=True,
            )
        ),
        image_encoder=randomise(CLIPVisionModelWithProjection(vision)),
        unet=tiny_svd_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessorPil(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def picture(seed: int = 8) -> Image.Image:
    """A smooth random picture of 120 x 72."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 72))


def run_svd(pipe: StableVideoDiffusionPipeline, **overrides: Any) -> Tensor:
    """Latents of a guided run on frames of 9 x 15 latents from a fixed start."""
    arguments: dict[str, Any] = {
        "image": [picture()],
        "height": 72,
        "width": 120,
        "num_frames": 7,
        "num_inference_steps": 4,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 3.0,
        "noise_aug_strength": 0.0,
        "output_type": "latent",
        **overrides,
    }
    videos = len(arguments["image"]) * arguments.get("num_videos_per_prompt", 1)
    latents = normal(videos, arguments["num_frames"], 4, 9, 15, seed=6).to(pipe.unet.dtype)
    frames: Tensor = pipe(latents=latents, **arguments).frames
    return frames
