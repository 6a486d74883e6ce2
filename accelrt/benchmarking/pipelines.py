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

from .models import Inputs

_VAE: Inputs = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_UP: Inputs = {"up_block_types": ("UpDecoderBlock2D",) * 4}

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
        paper: GiB that Streamlined Inference (arXiv 2411.01171, table 1) reports for its
            method and for the stock pipeline, or ``None``.
    """

    name: str
    title: str
    height: int
    width: int
    frames: int
    build: Callable[[Make], Any]
    call: Callable[[Any], Any]
    paper: tuple[float, float] | None = None

    @property
    def request(self) -> dict[str, int]:
        """The size, as :func:`accelrt.plan` takes it."""
        return {"height": self.height, "width": self.width, "num_frames": self.frames}


def _new(cls: Any, **settings: Any) -> Any:
    """An object of a class without type annotations."""
    return cls(**settings)


def _clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    settings: Inputs = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    return CLIPTextModel(CLIPTextConfig(**settings, num_attention_heads=12))


def _clip_vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings: Inputs = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(**settings, num_attention_heads=16, patch_size=14, projection_dim=1024)
    )


def animatediff(
    frames: int = 16, height: int = 576, width: int = 1024, **unet: Any
) -> PipelineCase:
    """AnimateDiff on Stable Diffusion 1.5."""
    paper = (11.07, 41.7) if (height, width, frames) == (576, 1024, 16) else None

    def build(make: Make) -> Any:
        scheduler = _new(
            DDIMScheduler, beta_start=0.00085, beta_end=0.012, beta_schedule="linear",
            clip_sample=False,
        )  # fmt: skip
        settings = {"cross_attention_dim": 768, **unet}
        return _new(
            AnimateDiffPipeline,
            vae=make(lambda: _new(AutoencoderKL, **_VAE, **_UP)),
            text_encoder=make(_clip_text),
            tokenizer=None,
            unet=make(lambda: _new(UNetMotionModel, **settings)),
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

    return PipelineCase("animatediff", "AnimateDiff", height, width, frames, build, call, paper)


def svd_xt(frames: int = 25, height: int = 576, width: int = 1024, **unet: Any) -> PipelineCase:
    """Stable Video Diffusion XT."""
    paper = (36.3, 61.2) if (height, width, frames) == (576, 1024, 25) else None

    def build(make: Make) -> Any:
        from transformers import CLIPImageProcessor

        scheduler = _new(
            EulerDiscreteScheduler, beta_start=0.00085, beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002,
            sigma_max=700.0, timestep_type="continuous", timestep_spacing="leading",
        )  # fmt: skip
        settings = {"num_frames": frames, **unet}
        return _new(
            StableVideoDiffusionPipeline,
            vae=make(lambda: _new(AutoencoderKLTemporalDecoder, **_VAE)),
            image_encoder=make(_clip_vision),
            unet=make(lambda: _new(UNetSpatioTemporalConditionModel, **settings)),
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

    return PipelineCase("svd-xt", "SVD-XT", height, width, frames, build, call, paper)


PIPELINES: dict[str, Callable[..., PipelineCase]] = {"animatediff": animatediff, "svd-xt": svd_xt}
