"""Stable Video Diffusion: its models, and how they are trained.

The first frame is given, as a latent beside the noisy ones and as one CLIP token; the digit in it
bounces on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from . import data, models
from .stages import LABEL_DROPOUT, Settings, encode, make_pool, save_pipeline
from .training import (
    autocast,
    fit,
    kl_to_standard_normal,
    reconstruction_loss,
    step_rng,
)

EMBED_DIM = 64
# The pipeline resizes every image to this for the CLIP encoder.
CLIP_SIZE = 224
PATCH_SIZE = 32
TIME_ID_DIM = 32
# ``motion_bucket_id`` of a digit that moves one pixel a frame.
BUCKETS_PER_PIXEL = 100.0
MAX_NOISE_AUG = 0.2
SIGMA_LOG_MEAN, SIGMA_LOG_STD = 1.0, 1.5
# (clips, frames of each) of one batch for the autoencoder, in turn.
VAE_BATCHES = ((12, 4), (3, 14), (48, 1))


def build_vae() -> AutoencoderKLTemporalDecoder:
    """KL autoencoder with a decoder that sees neighbouring frames, 3x32x32 to 4x8x8.

    The class has 32 normalization groups everywhere, hence the numbers of channels.
    """
    return AutoencoderKLTemporalDecoder(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=models.LATENT_CHANNELS,
        sample_size=data.CANVAS,
    )


@torch.no_grad()
def build_image_encoder() -> CLIPVisionModelWithProjection:
    """A two-layer CLIP vision tower; it is trained first and then frozen.

    Its patch filters are fixed: the 64 slowest cosine waves of a patch's brightness. The pixels of
    enlarged images are so much alike that filters would not learn at the others' rate.
    """
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=EMBED_DIM,
            intermediate_size=2 * EMBED_DIM,
            projection_dim=EMBED_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=CLIP_SIZE,
            patch_size=PATCH_SIZE,
        )
    )
    count = math.isqrt(EMBED_DIM)
    frequencies = torch.arange(count)[:, None]
    waves = torch.cos(math.pi * frequencies * (torch.arange(PATCH_SIZE) + 0.5) / PATCH_SIZE)
    waves[1:] *= math.sqrt(2)
    filters = torch.einsum("ay,bx->abyx", waves, waves).view(EMBED_DIM, 1, PATCH_SIZE, PATCH_SIZE)
    patches = model.vision_model.embeddings.patch_embedding.requires_grad_(False)
    patches.weight.copy_(filters.expand_as(patches.weight) * 4 / patches.weight[0].numel())
    return model


def build_unet() -> UNetSpatioTemporalConditionModel:
    """The spatio-temporal UNet: a cross-attention level and a plain one."""
    model = UNetSpatioTemporalConditionModel(
        sample_size=models.LATENT_SIZE,
        in_channels=2 * models.LATENT_CHANNELS,
        out_channels=models.LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=models.UNET_CHANNELS,
        layers_per_block=models.UNET_LAYERS,
        addition_time_embed_dim=TIME_ID_DIM,
        projection_class_embeddings_input_dim=3 * TIME_ID_DIM,
        cross_attention_dim=EMBED_DIM,
        num_attention_heads=models.UNET_HEADS,
        num_frames=data.CLIP_FRAMES,
    )
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


def scheduler() -> EulerDiscreteScheduler:
    """SVD's continuous Karras noise levels; its ``sigma_max`` of 700 is for larger latents."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=80.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )


def clip_pixels(images: torch.Tensor, processor: CLIPImageProcessor) -> torch.Tensor:
    """Grey images ``(N, 3, H, W)`` in [-1, 1] as the pipeline makes them for the CLIP encoder."""
    grey = (_resize_with_antialiasing(images[:, :1], (CLIP_SIZE, CLIP_SIZE)) + 1) / 2
    mean = torch.tensor(processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    return (grey - mean) / std


def train_vae(cfg: Settings) -> tuple[AutoencoderKLTemporalDecoder, dict[str, Any]]:
    """Train the autoencoder on clips and single frames, and measure its scaling factor."""
    train, test = data.load_splits()
    torch.manual_seed(cfg.seed + 8)
    vae = build_vae()

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        clips, frames = VAE_BATCHES[step % len(VAE_BATCHES)]
        index = data.sample_indices(train, clips, rng)
        images = data.render_clips(train, index, rng, frames)[0].flatten(0, 1)
        with autocast(True):
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=rng)
            latents = mean + torch.exp(0.5 * logvar) * noise
            output = vae.decode(latents, num_frames=frames).sample
        return reconstruction_loss(output, images) + 3e-4 * kl_to_standard_normal(mean, logvar)

    result = fit(
        "svd-vae",
        vae,
        loss_fn,
        steps=cfg.temporal_vae_steps,
        lr=2e-3,
        work=cfg.work,
        seed=cfg.seed,
        checkpoint_every=50,
        ema_decay=0.997,
    )
    rng = step_rng(cfg.seed, "svd vae scale", 0)
    images = data.render_frames(train, data.sample_indices(train, 1024, rng), rng)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, images, 1.0).std().item(), 5))

    rng = step_rng(cfg.seed, "svd vae test", 0)
    clips, _ = data.render_clips(test, data.sample_indices(test, 24, rng), rng)
    held_out = clips.flatten(0, 1)
    with torch.inference_mode():
        latents = vae.encode(held_out).latent_dist.mode()
        decoded = vae.decode(latents, num_frames=data.CLIP_FRAMES).sample.clamp(-1, 1)
    mse = F.mse_loss(decoded / 2, held_out / 2)
    return vae, {
        "vae_training": result.as_dict(),
        "scaling_factor": vae.config.scaling_factor,
        "held_out_psnr_db": round(-10 * torch.log10(mse).item(), 2),
    }


def _centres(images: torch.Tensor) -> torch.Tensor:
    """Centre of mass ``(N, 2)`` of white on black, in [-1, 1] across the image."""
    mass = (images.mean(dim=1) + 1) / 2
    axis = torch.linspace(-1, 1, images.shape[-1])
    weighted = torch.stack([(mass * axis).sum((1, 2)), (mass * axis[:, None]).sum((1, 2))], dim=1)
    return weighted / mass.sum((1, 2)).clamp(min=1e-6)[:, None]


class FoldedPatches(nn.Module):
    """The pipeline's resizing and the fixed patch filters as one matrix, for training.

    It takes images ``(N, 3, 32, 32)`` in [-1, 1] and returns what the filters of the image
    encoder find in them at 224x224 pixels, which takes far longer to compute.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    @torch.no_grad()
    def __init__(self, filters: nn.Conv2d, processor: CLIPImageProcessor) -> None:
        super().__init__()
        pixels = torch.eye(data.CANVAS**2).view(-1, 1, data.CANVAS, data.CANVAS)
        self.shape = (EMBED_DIM, CLIP_SIZE // PATCH_SIZE, CLIP_SIZE // PATCH_SIZE)
        bias = filters(clip_pixels(torch.zeros_like(pixels[:1]), processor)).flatten(1)
        rows = [filters(clip_pixels(part, processor)).flatten(1) for part in pixels.split(64)]
        self.register_buffer("weight", torch.cat(rows) - bias, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Patch embeddings ``(N, 64, 7, 7)`` of grey images."""
        return (images[:, 0].flatten(1) @ self.weight + self.bias).unflatten(1, self.shape)


def train_image_encoder(
    cfg: Settings, processor: CLIPImageProcessor
) -> tuple[CLIPVisionModelWithProjection, dict[str, Any]]:
    """Teach the image encoder what is in an image and where, from linear heads on its embedding."""
    train, test = data.load_splits()
    torch.manual_seed(cfg.seed + 9)
    encoder = build_image_encoder()
    what, where = nn.Linear(EMBED_DIM, data.NUM_CLASSES), nn.Linear(EMBED_DIM, 2)
    embeddings = encoder.vision_model.embeddings
    filters = embeddings.patch_embedding
    embeddings.patch_embedding = FoldedPatches(filters, processor)

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        index = data.sample_indices(train, 64, rng)
        render = data.render_frames if step % 2 else data.render_images
        images = render(train, index, rng)
        # (The position table is not interpolated: there are as many patches as it has places.)
        embeds = encoder(images, interpolate_pos_encoding=True).image_embeds
        digit = F.cross_entropy(what(embeds), train.labels[index], label_smoothing=0.02)
        return digit + 10 * F.mse_loss(where(embeds), _centres(images))

    result = fit(
        "svd-image-encoder",
        nn.ModuleList([encoder, what, where]),
        loss_fn,
        steps=cfg.clip_vision_steps,
        lr=2e-3,
        work=cfg.work,
        seed=cfg.seed,
        ema_decay=0.98,
        warmup=20,
        checkpoint_every=50,
    )
    embeddings.patch_embedding = filters
    index = torch.arange(len(test))
    images = data.render_frames(test, index, step_rng(cfg.seed, "svd image encoder test", 0))
    with torch.inference_mode():
        digits = what(encoder(clip_pixels(images, processor)).image_embeds).argmax(dim=1)
    hits = (digits == test.labels).float().mean().item()
    return encoder.requires_grad_(False), {
        "image_encoder_training": result.as_dict(),
        "image_encoder_held_out_accuracy": round(hits, 4),
    }


def train_svd(cfg: Settings) -> dict[str, Any]:
    """Train the autoencoder, the image encoder and the UNet, and save the pipeline."""
    vae, vae_values = train_vae(cfg)
    processor = CLIPImageProcessor()
    image_encoder, vision = train_image_encoder(cfg, processor)
    train, _ = data.load_splits()
    conditions: list[torch.Tensor] = []
    embeds: list[torch.Tensor] = []
    time_ids: list[torch.Tensor] = []

    @torch.inference_mode()
    def make(start: int) -> torch.Tensor:
        rng = step_rng(cfg.seed, "svd pool", start)
        clips, speed = data.render_clips(train, data.sample_indices(train, 100, rng), rng)
        first = clips[:, 0]
        strength = MAX_NOISE_AUG * torch.rand(len(first), generator=rng).square()
        noise = torch.randn(first.shape, generator=rng)
        conditions.append(encode(vae, first + strength.view(-1, 1, 1, 1) * noise, scale=1.0))
        embeds.append(image_encoder(clip_pixels(first, processor)).image_embeds)
        # The frames themselves do not depend on the rate at which they are shown.
        fps = torch.randint(4, 30, (len(first),), generator=rng).float()
        time_ids.append(torch.stack([fps, speed * BUCKETS_PER_PIXEL, strength], dim=1))
        with autocast(True):
            latents = encode(vae, clips.flatten(0, 1))
        return latents.float().unflatten(0, clips.shape[:2])

    pool = make_pool(cfg.clip_pool, 100, "latents (SVD)", make)
    first_latents, tokens = torch.cat(conditions).clone(), torch.cat(embeds).clone()[:, None]
    ids = torch.cat(time_ids).clone()
    torch.manual_seed(cfg.seed + 10)
    unet = build_unet()
    # The fused kernel is slow backwards for as many short sequences as there are over time.
    unet.set_attn_processor(AttnProcessor())

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(pool), (14,), generator=rng)
        clean = pool[index]
        kept = (torch.rand(len(index), generator=rng) >= LABEL_DROPOUT).float()
        sigma = torch.exp(SIGMA_LOG_MEAN + SIGMA_LOG_STD * torch.randn(len(index), generator=rng))
        noise = torch.randn(clean.shape, generator=rng)
        level = sigma.view(-1, 1, 1, 1, 1)
        # EDM's preconditioning for unit variance of the data, as the scheduler undoes it.
        scale = (level.square() + 1).rsqrt()
        condition = (first_latents[index] * kept.view(-1, 1, 1, 1))[:, None].expand_as(clean)
        with autocast(True):
            output = unet(
                torch.cat([(clean + level * noise) * scale, condition], dim=2),
                0.25 * sigma.log(),
                encoder_hidden_states=tokens[index] * kept.view(-1, 1, 1),
                added_time_ids=ids[index],
            ).sample
        return F.mse_loss(output.float(), (noise - level * clean) * scale)

    result = fit(
        "svd",
        unet,
        loss_fn,
        steps=cfg.svd_steps,
        lr=1e-3,
        work=cfg.work,
        seed=cfg.seed,
        checkpoint_every=50,
        warmup=50,
        ema_decay=0.997,
    )
    unet.set_attn_processor(AttnProcessor2_0())
    pipe = StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=image_encoder,
        unet=unet,
        scheduler=scheduler(),
        feature_extractor=processor,
    )
    # Without torchvision the processor's class goes by a name that older transformers lack.
    pipe.register_to_config(feature_extractor=("transformers", "CLIPImageProcessor"))
    save_pipeline(pipe, cfg.out / "svd")
    return {
        **vae_values,
        **vision,
        "training": result.as_dict(),
    }
