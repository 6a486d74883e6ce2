"""The training stages: classifier, VAE, DiT and AnimateDiff."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    UNetMotionModel,
)
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import data, models
from .training import (
    DiffusionLoss,
    FitResult,
    autocast,
    fit,
    kl_to_standard_normal,
    reconstruction_loss,
    step_rng,
)

LABEL_DROPOUT = 0.1
NULL_CLASS = 1000


@dataclass(frozen=True)
class Settings:
    """Where things go and how long each stage trains."""

    out: Path
    work: Path
    seed: int = 0
    classifier_steps: int = 1500
    vae_steps: int = 2000
    dit_steps: int = 3000
    text_steps: int = 300
    unet_steps: int = 1200
    motion_steps: int = 1000
    t5_steps: int = 300
    pixart_steps: int = 4000
    temporal_vae_steps: int = 800
    clip_vision_steps: int = 3000
    svd_steps: int = 4700
    dit_pool: int = 40_000
    video_pool: int = 5_000
    clip_pool: int = 7_000


def train_classifier(cfg: Settings) -> dict[str, Any]:
    """Train the digit classifier and save it with its held-out accuracy."""
    train, test = data.load_splits()
    torch.manual_seed(cfg.seed)
    model = models.DigitClassifier()

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        index = data.sample_indices(train, 128, rng)
        render = data.render_images if step % 2 else data.render_frames
        images = render(train, index, rng)
        # A little noise, so that soft or slightly wrong strokes are not out of its world.
        level = torch.rand(len(images), 1, 1, 1, generator=rng) * 0.15
        images = images + level * torch.randn(images.shape, generator=rng)
        return F.cross_entropy(model(images), train.labels[index], label_smoothing=0.02)

    result = fit(
        "classifier",
        model,
        loss_fn,
        steps=cfg.classifier_steps,
        lr=2e-3,
        work=cfg.work,
        seed=cfg.seed,
        weight_decay=1e-3,
        ema_decay=0.99,
    )
    target = cfg.out / "classifier"
    target.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in half.items()}, target / "model.safetensors")

    model.load_state_dict(half)
    accuracies = {}
    for name, render in (("images", data.render_images), ("frames", data.render_frames)):
        index = torch.arange(len(test)).repeat(5)
        images = render(test, index, step_rng(cfg.seed, f"held-out {name}", 0))
        with torch.inference_mode():
            hits = model(images).argmax(dim=1) == test.labels[index]
        accuracies[name] = round(hits.float().mean().item(), 4)
    return {"training": result.as_dict(), "held_out_accuracy": accuracies}


def _half_images_half_frames(split: data.Split, n: int, rng: torch.Generator) -> torch.Tensor:
    stills = data.render_images(split, data.sample_indices(split, n // 2, rng), rng)
    frames = data.render_frames(split, data.sample_indices(split, n - n // 2, rng), rng)
    return torch.cat([stills, frames])


def train_vae(cfg: Settings) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Train the autoencoder both pipelines share and measure its scaling factor."""
    train, test = data.load_splits()
    torch.manual_seed(cfg.seed + 1)
    vae = models.build_vae()

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        images = _half_images_half_frames(train, 64, rng)
        with autocast(True):
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=rng)
            output = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample
        return reconstruction_loss(output, images) + 3e-4 * kl_to_standard_normal(mean, logvar)

    result = fit("vae", vae, loss_fn, steps=cfg.vae_steps, lr=2e-3, work=cfg.work, seed=cfg.seed)
    images = _half_images_half_frames(train, 2048, step_rng(cfg.seed, "vae scale", 0))
    std = encode(vae, images, scale=1.0).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))

    held_out = _half_images_half_frames(test, 512, step_rng(cfg.seed, "vae test", 0))
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(held_out).latent_dist.mean).sample.clamp(-1, 1)
    mse = F.mse_loss(decoded / 2, held_out / 2)
    return vae, {
        "training": result.as_dict(),
        "scaling_factor": vae.config.scaling_factor,
        "held_out_psnr_db": round(-10 * torch.log10(mse).item(), 2),
    }


def shared_vae(cfg: Settings, train: bool) -> tuple[AutoencoderKL, dict[str, Any] | None]:
    """The autoencoder of all image latents, with its measurements where it is trained here.

    Without ``train`` it is the one of a saved DiT pipeline, if there is any.
    """
    saved = cfg.out / "dit" / "vae"
    if train or (cfg.work / "vae.pt").exists() or not saved.exists():
        return train_vae(cfg)  # returns at once when it is trained already
    return AutoencoderKL.from_pretrained(saved, dtype=torch.float32).eval(), None


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Latents (posterior means, scaled) of images ``(N, 3, H, W)``."""
    factor = vae.config.scaling_factor if scale is None else scale
    parts = [vae.encode(chunk).latent_dist.mean for chunk in images.split(256)]
    return torch.cat(parts) * factor


def make_pool(
    count: int, chunk: int, label: str, make: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """A data set of ``count`` items; ``make(start)`` renders ``chunk`` of them."""
    starts = range(0, count, chunk)
    return torch.cat([make(start) for start in track(starts, description=label)]).clone()


def image_latents(cfg: Settings, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents of still training images ``(N, 4, 8, 8)`` and their digits ``(N,)``."""
    train, _ = data.load_splits()
    labels: list[torch.Tensor] = []

    def make(start: int) -> torch.Tensor:
        rng = step_rng(cfg.seed, "dit pool", start)
        index = data.sample_indices(train, 1000, rng)
        labels.append(train.labels[index])
        return encode(vae, data.render_images(train, index, rng))

    return make_pool(cfg.dit_pool, 1000, "latents (images)", make), torch.cat(labels)


def train_dit(cfg: Settings, vae: AutoencoderKL) -> dict[str, Any]:
    """Train the class-conditional DiT (with learned sigma) and save its pipeline."""
    pool, pool_labels = image_latents(cfg, vae)
    torch.manual_seed(cfg.seed + 2)
    model = models.build_dit()
    scheduler = models.dit_scheduler()
    diffusion = DiffusionLoss(scheduler.betas)

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(pool), (128,), generator=rng)
        classes = pool_labels[index]
        dropped = torch.rand(len(index), generator=rng) < LABEL_DROPOUT
        classes = torch.where(dropped, torch.full_like(classes, NULL_CLASS), classes)
        noisy, noise, timesteps = diffusion.add_noise(pool[index], rng)
        output = model(noisy, timestep=timesteps, class_labels=classes).sample
        prediction, variance = output.chunk(2, dim=1)
        bound = diffusion.variational(prediction, variance, pool[index], noisy, timesteps)
        return diffusion.simple(prediction, noise, timesteps) + 0.1 * bound

    # The label dropout above picks the null class; the model's own (0.1, in training mode)
    # would draw from the global generator, which a resumed run could not repeat.
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    result = fit("dit", model, loss_fn, steps=cfg.dit_steps, lr=1e-3, work=cfg.work, seed=cfg.seed)
    id2label = {str(i): f"{word}, {i}" for i, word in enumerate(data.DIGIT_WORDS)}
    pipe = DiTPipeline(model, copy_vae(vae), scheduler, id2label=id2label)
    pipe.register_to_config(id2label=id2label)
    save_pipeline(pipe, cfg.out / "dit")
    return {"training": result.as_dict()}


def _train_text_encoder(cfg: Settings, tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, FitResult]:
    """Teach the text encoder what the prompts mean, before any image is seen.

    Linear heads must tell digit, verb and direction from every position at and after the end of
    the prompt. (CLIP is trained before a diffusion model uses it, too, and is frozen then.)
    """
    train, _ = data.load_splits()
    torch.manual_seed(cfg.seed + 5)
    encoder = models.build_text_encoder(tokenizer)
    sizes = (data.NUM_CLASSES, len(data.VERBS), len(data.DIRECTIONS))
    heads = nn.ModuleList(nn.Linear(models.TEXT_DIM, size) for size in sizes)

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        index = data.sample_indices(train, 64, rng)
        prompts, verbs, directions = data.random_prompts(train.labels[index], rng)
        tokens = _tokenize(tokenizer, prompts)
        states = encoder(tokens).last_hidden_state
        after_end = tokens == tokenizer.eos_token_id
        targets = (train.labels[index], verbs, directions)
        loss = torch.zeros(())
        for head, target in zip(heads, targets, strict=True):
            wanted = target[:, None].expand_as(tokens)[after_end]
            loss = loss + F.cross_entropy(head(states[after_end]), wanted)
        return loss

    result = fit(
        "animatediff-text",
        nn.ModuleList([encoder, heads]),
        loss_fn,
        steps=cfg.text_steps,
        lr=2e-3,
        work=cfg.work,
        seed=cfg.seed,
        ema_decay=0.99,
        warmup=20,
    )
    return encoder.requires_grad_(False), result


def _tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    batch = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


def train_animatediff(cfg: Settings, vae: AutoencoderKL) -> dict[str, Any]:
    """Train AnimateDiff as its authors do: text encoder, image UNet, then motion modules.

    The last phase trains the spatial layers on as well, on videos and single frames in turn.
    """
    train, _ = data.load_splits()
    prompts: list[str] = []

    def make(start: int) -> torch.Tensor:
        rng = step_rng(cfg.seed, "video pool", start)
        videos, texts = data.render_videos(train, data.sample_indices(train, 100, rng), rng)
        prompts.extend(texts)
        latents = encode(vae, videos.flatten(0, 1))
        return latents.view(*videos.shape[:2], *latents.shape[1:]).transpose(1, 2).contiguous()

    pool = make_pool(cfg.video_pool, 100, "latents (AnimateDiff)", make)
    tokenizer = models.build_tokenizer()
    text_encoder, text = _train_text_encoder(cfg, tokenizer)
    with torch.inference_mode():
        states = [
            text_encoder(tokens).last_hidden_state
            for tokens in _tokenize(tokenizer, [*prompts, ""]).split(250)
        ]
    contexts = torch.cat(states).clone()

    scheduler = models.animatediff_scheduler()
    diffusion = DiffusionLoss(scheduler.betas)
    torch.manual_seed(cfg.seed + 3)
    unet = models.build_unet2d()

    def loss_of(
        model: nn.Module, clean: torch.Tensor, index: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        dropped = torch.rand(len(index), generator=rng) < LABEL_DROPOUT
        context = contexts[torch.where(dropped, len(contexts) - 1, index)]
        if clean.dim() == 5:
            context = context.repeat_interleave(clean.shape[2], dim=0)
        noisy, noise, timesteps = diffusion.add_noise(clean, rng)
        with autocast(True):
            prediction = model(noisy, timesteps, encoder_hidden_states=context).sample
        return diffusion.simple(prediction, noise, timesteps)

    def random_frames(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(len(pool), (128,), generator=rng)
        frame = torch.randint(pool.shape[2], (128,), generator=rng)
        return index, pool[index, :, frame]

    def image_loss(step: int, rng: torch.Generator) -> torch.Tensor:
        index, frames = random_frames(rng)
        return loss_of(unet, frames, index, rng)

    common: dict[str, Any] = {
        "work": cfg.work,
        "seed": cfg.seed,
        "checkpoint_every": 50,
        "warmup": 50,
    }
    images = fit("animatediff-images", unet, image_loss, steps=cfg.unet_steps, lr=1e-3, **common)
    torch.manual_seed(cfg.seed + 4)
    motion_unet = UNetMotionModel.from_unet2d(unet, models.build_motion_adapter())

    def video_loss(step: int, rng: torch.Generator) -> torch.Tensor:
        if step % 2:  # many prompts: a batch of single frames
            index, frames = random_frames(rng)
            return loss_of(motion_unet, frames[:, :, None], index, rng)
        index = torch.randint(len(pool), (8,), generator=rng)
        return loss_of(motion_unet, pool[index], index, rng)

    videos = fit(
        "animatediff-videos", motion_unet, video_loss, steps=cfg.motion_steps, lr=1e-3, **common
    )
    pipe = AnimateDiffPipeline(
        vae=copy_vae(vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=motion_unet,
        motion_adapter=models.export_motion_adapter(motion_unet),
        scheduler=scheduler,
    )
    target = cfg.out / "animatediff"
    save_pipeline(pipe, target)
    # Newer transformers write tokenizer.json only; older ones read these two.
    tokenizer.backend_tokenizer.model.save(str(target / "tokenizer"))
    return {
        "text_training": text.as_dict(),
        "image_training": images.as_dict(),
        "video_training": videos.as_dict(),
    }


def copy_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy, since saving turns a pipeline's weights into fp16."""
    copy = models.build_vae()
    copy.load_state_dict(vae.state_dict())
    copy.register_to_config(scaling_factor=vae.config.scaling_factor)
    return copy


def save_pipeline(pipe: DiffusionPipeline, target: Path) -> None:
    """Save a pipeline with fp16 weights (which turns its own weights into fp16, too)."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.to(torch.float16).save_pretrained(target, safe_serialization=True)
