"""The published pipelines with random weights: one whole call, text or picture to frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

from .models import Inputs, two_levels

#: Turns a constructor of a model into the model: with random weights, or on the meta device.
Make = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline at one size of request.

    Args:
        name: as the command line knows it.
        title: as a table shows it.
        height, width: of the pictures in pixels.
        frames: of the video.
        build: the pipeline, given how its models are made.
        call: runs it once with one denoising step; returns the frames.
        budget: that the call is to keep, weights included.
        paper: GB that Streamlined Inference (arXiv 2411.01171, table 1) reports for the
            stock pipeline and for its method, or ``None``.
    """

    name: str
    title: str
    height: int
    width: int
    frames: int
    build: Callable[[Make], Any]
    call: Callable[[Any], Any]
    budget: str
    paper: tuple[float, float] | None = None


def _new(cls: Any, **settings: Any) -> Any:
    """An object of a class without type annotations."""
    return cls(**settings)


def _clip_text(**overrides: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    settings: Inputs = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    settings = {**settings, "num_attention_heads": 12, **overrides}
    return CLIPTextModel(CLIPTextConfig(**settings))


def _clip_vision(**overrides: Any) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings: Inputs = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    more: Inputs = {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**settings, **more, **overrides}))


def animatediff(size: str = "full") -> PipelineCase:
    """AnimateDiff on Stable Diffusion 1.5: 16 frames of 576x1024."""
    tiny = size == "tiny"
    frames, height, width = (3, 16, 32) if tiny else (16, 576, 1024)
    unet: Inputs = {"cross_attention_dim": 768}
    text: Inputs = {}
    if tiny:
        heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2}
        unet = {**two_levels("Motion"), **heads}
        text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        text["num_attention_heads"] = 2
    vae = _vae(tiny, up=True)

    def build(make: Make) -> Any:
        scheduler = _new(
            DDIMScheduler, beta_start=0.00085, beta_end=0.012, beta_schedule="linear",
            clip_sample=False,
        )  # fmt: skip
        return _new(
            AnimateDiffPipeline,
            vae=make(lambda: _new(AutoencoderKL, **vae)),
            text_encoder=make(lambda: _clip_text(**text)),
            tokenizer=None,
            unet=make(lambda: _new(UNetMotionModel, **unet)),
            motion_adapter=None,
            scheduler=scheduler,
        )

    def call(pipe: Any) -> Any:
        ids = torch.arange(77)[None] + 320
        embeds = pipe.text_encoder(ids).last_hidden_state
        return pipe(
            prompt_embeds=embeds, negative_prompt_embeds=embeds.flip(1), height=height,
            width=width, num_frames=frames, num_inference_steps=1, guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames  # fmt: skip

    paper = None if tiny else (41.71, 11.07)
    return PipelineCase(
        "animatediff", "AnimateDiff", height, width, frames, build, call, "3.5GiB", paper
    )


def svd_xt(size: str = "full") -> PipelineCase:
    """Stable Video Diffusion XT: 25 frames of 576x1024."""
    tiny = size == "tiny"
    frames, height, width = (3, 16, 32) if tiny else (25, 576, 1024)
    unet: Inputs = {"num_frames": frames}
    vision: Inputs = {}
    if tiny:
        unet |= two_levels("SpatioTemporal") | {"num_attention_heads": (2, 4)}
        unet |= {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48}
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 2, "projection_dim": 48}
    vae = _vae(tiny, up=False)

    def build(make: Make) -> Any:
        from transformers import CLIPImageProcessor

        scheduler = _new(
            EulerDiscreteScheduler, beta_start=0.00085, beta_end=0.012,
            beta_schedule="scaled_linear", prediction_type="v_prediction",
            use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
            timestep_type="continuous", timestep_spacing="leading",
        )  # fmt: skip
        return _new(
            StableVideoDiffusionPipeline,
            vae=make(lambda: _new(AutoencoderKLTemporalDecoder, **vae)),
            image_encoder=make(lambda: _clip_vision(**vision)),
            unet=make(lambda: _new(UNetSpatioTemporalConditionModel, **unet)),
            scheduler=scheduler,
            feature_extractor=CLIPImageProcessor(),
        )

    def call(pipe: Any) -> Any:
        import numpy
        from PIL import Image

        noise = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype="uint8")
        return pipe(
            Image.fromarray(noise), height=height, width=width, num_frames=frames,
            num_inference_steps=1, decode_chunk_size=frames,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames  # fmt: skip

    paper = None if tiny else (61.2, 36.32)
    return PipelineCase("svd", "SVD-XT", height, width, frames, build, call, "8.5GiB", paper)


def _vae(tiny: bool, *, up: bool) -> Inputs:
    """Settings of the VAE of Stable Diffusion, or of a small one of as many levels as two."""
    channels = (32, 64) if tiny else (128, 256, 512, 512)
    settings: Inputs = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "layers_per_block": 1 if tiny else 2,
    }
    if up:
        settings["up_block_types"] = ("UpDecoderBlock2D",) * len(channels)
    return settings


PIPELINES: dict[str, Callable[[str], PipelineCase]] = {"animatediff": animatediff, "svd": svd_xt}
