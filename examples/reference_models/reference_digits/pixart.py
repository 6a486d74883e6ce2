"""PixArt: its tokenizer, T5 encoder and transformer, and how they are trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from . import data, models
from .stages import LABEL_DROPOUT, Settings, copy_vae, image_latents, save_pipeline
from .training import DiffusionLoss, FitResult, fit, step_rng

# The share of images whose prompt tells a motion, too (which a still image cannot show).
MOTION_PROMPTS = 0.25
TOKEN_LENGTH = 16


def build_tokenizer() -> T5Tokenizer:
    """A T5 unigram tokenizer in which every word of the prompts is one token.

    Other words fall apart into letters.
    """
    words = [*data.vocabulary_words(), *(str(digit) for digit in range(data.NUM_CLASSES))]
    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + word, -1.0) for word in words]
    vocab += [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=300)


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer T5 (1.1) encoder; it is trained first and then frozen."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=models.TEXT_DIM,
            d_kv=16,
            d_ff=2 * models.TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> PixArtTransformer2DModel:
    """The PixArt transformer: one adaLN for all blocks, captions by cross-attention."""
    model = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=models.LATENT_CHANNELS,
        out_channels=2 * models.LATENT_CHANNELS,
        num_layers=8,
        cross_attention_dim=96,
        caption_channels=models.TEXT_DIM,
        sample_size=models.LATENT_SIZE,
        patch_size=2,
        use_additional_conditions=False,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def scheduler() -> DPMSolverMultistepScheduler:
    """The linear schedule of PixArt with its second-order multistep solver."""
    return DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", solver_order=2
    )


def _tokenize(tokenizer: T5Tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(
        prompts,
        padding="max_length",
        max_length=TOKEN_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids, batch.attention_mask


def train_text_encoder(cfg: Settings, tokenizer: T5Tokenizer) -> tuple[T5EncoderModel, FitResult]:
    """Teach the T5 encoder what the prompts mean, before any image is seen.

    Linear heads must tell the digit, and verb and direction where the prompt has them, from
    every token of the prompt.
    """
    train, _ = data.load_splits()
    torch.manual_seed(cfg.seed + 6)
    encoder = build_text_encoder(tokenizer)
    sizes = (data.NUM_CLASSES, len(data.VERBS), len(data.DIRECTIONS))
    heads = nn.ModuleList(nn.Linear(models.TEXT_DIM, size) for size in sizes)

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        labels = train.labels[data.sample_indices(train, 64, rng)]
        moving, verbs, directions = data.random_prompts(labels, rng)
        prompts = [*moving, *data.random_still_prompts(labels, rng)]
        tokens, mask = _tokenize(tokenizer, prompts)
        states = encoder(tokens, attention_mask=mask).last_hidden_state
        loss = torch.zeros(())
        for head, target in zip(heads, (labels.repeat(2), verbs, directions), strict=True):
            used = mask[: len(target)].bool()
            wanted = target[:, None].expand_as(used)[used]
            loss = loss + F.cross_entropy(head(states[: len(target)][used]), wanted)
        return loss

    result = fit(
        "pixart-text",
        nn.ModuleList([encoder, heads]),
        loss_fn,
        steps=cfg.t5_steps,
        lr=2e-3,
        work=cfg.work,
        seed=cfg.seed,
        ema_decay=0.99,
        warmup=20,
    )
    return encoder.requires_grad_(False), result


def image_prompts(labels: torch.Tensor, rng: torch.Generator) -> list[str]:
    """A prompt for every image; some of them name a motion."""
    still = data.random_still_prompts(labels, rng)
    moving, _, _ = data.random_prompts(labels, rng)
    told = (torch.rand(len(labels), generator=rng) < MOTION_PROMPTS).tolist()
    return [moving[i] if told[i] else still[i] for i in range(len(labels))]


def train_pixart(cfg: Settings, vae: AutoencoderKL) -> dict[str, Any]:
    """Train the text encoder, then the transformer on it, and save the pipeline."""
    tokenizer = build_tokenizer()
    text_encoder, text = train_text_encoder(cfg, tokenizer)
    pool, labels = image_latents(cfg, vae)
    prompts = image_prompts(labels, step_rng(cfg.seed, "pixart prompts", 0))
    # There are few different prompts: encode each once. The last is the empty one.
    distinct = [*dict.fromkeys(prompts), ""]
    places = {prompt: i for i, prompt in enumerate(distinct)}
    prompt_ids = torch.tensor([places[prompt] for prompt in prompts])
    tokens, mask = _tokenize(tokenizer, distinct)
    with torch.inference_mode():
        encoded = text_encoder(tokens, attention_mask=mask).last_hidden_state
    contexts = encoded.clone()

    torch.manual_seed(cfg.seed + 7)
    model = build_transformer()
    schedule = scheduler()
    diffusion = DiffusionLoss(schedule.betas)

    def loss_fn(step: int, rng: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(pool), (128,), generator=rng)
        dropped = torch.rand(len(index), generator=rng) < LABEL_DROPOUT
        chosen = torch.where(dropped, len(distinct) - 1, prompt_ids[index])
        noisy, noise, timesteps = diffusion.add_noise(pool[index], rng)
        output = model(
            noisy,
            encoder_hidden_states=contexts[chosen],
            encoder_attention_mask=mask[chosen],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        prediction, variance = output.chunk(2, dim=1)
        bound = diffusion.variational(prediction, variance, pool[index], noisy, timesteps)
        return diffusion.simple(prediction, noise, timesteps) + 0.1 * bound

    result = fit(
        "pixart", model, loss_fn, steps=cfg.pixart_steps, lr=1e-3, work=cfg.work, seed=cfg.seed
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=copy_vae(vae),
        transformer=model,
        scheduler=schedule,
    )
    save_pipeline(pipe, cfg.out / "pixart")
    return {"text_training": text.as_dict(), "training": result.as_dict()}
