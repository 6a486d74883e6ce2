"""The (small) models, in the stock diffusers and transformers classes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import data

LATENT_CHANNELS = 4
LATENT_SIZE = data.CANVAS // 4
TEXT_DIM = 64
TEXT_LENGTH = 32
UNET_CHANNELS = (64, 64)
UNET_HEADS = 4
UNET_LAYERS = 1
UNET_GROUPS = 16


class DigitClassifier(nn.Module):
    """A small convolutional network; ``features`` feeds the Frechet distance."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()

        def block(cin: int, cout: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(cin, cout, 3, padding=1, bias=False),
                nn.BatchNorm2d(cout),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )

        self.body = nn.Sequential(block(1, 24), block(24, 48), block(48, 64))
        self.embed = nn.Linear(64 * 16, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, data.NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features ``(N, 64)`` of RGB images in [-1, 1]."""
        grey = images.mean(dim=1, keepdim=True)
        return torch.relu(self.embed(self.body(grey).flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits ``(N, 10)`` of RGB images in [-1, 1]."""
        return self.head(self.features(images))


def build_vae() -> AutoencoderKL:
    """KL autoencoder, 3x32x32 to 4x8x8, with attention in the middle block."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=data.CANVAS,
    )


def build_dit() -> DiTTransformer2DModel:
    """DiT with adaLN-zero blocks and learned sigma, laid out as the published ones."""
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=8,
        sample_size=LATENT_SIZE,
        patch_size=2,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
            # Rows of classes that do not exist stay zero (1000 is the pipeline's null class).
            table = block.norm1.emb.class_embedder.embedding_table.weight
            table.normal_(std=0.02)
            table[data.NUM_CLASSES : 1000] = 0
        for head in (model.proj_out_1, model.proj_out_2):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
    return model


def build_unet2d() -> UNet2DConditionModel:
    """The spatial UNet: a cross-attention level and a plain one, as in Stable Diffusion."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=UNET_LAYERS,
        norm_num_groups=UNET_GROUPS,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=UNET_HEADS,  # the stock config's name for the number of heads
    )


def build_motion_adapter() -> MotionAdapter:
    """Motion modules for every level and the middle, silent (zero output) at first."""
    adapter = MotionAdapter(
        block_out_channels=UNET_CHANNELS,
        motion_layers_per_block=UNET_LAYERS,
        motion_num_attention_heads=UNET_HEADS,
        motion_norm_num_groups=UNET_GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=True,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            nn.init.zeros_(parameter)
    return adapter


def export_motion_adapter(unet: UNetMotionModel) -> MotionAdapter:
    """A stand-alone adapter that holds the motion modules of ``unet``."""
    adapter = build_motion_adapter()
    weights = unet.state_dict()
    adapter.load_state_dict({key: weights[key] for key in adapter.state_dict()})
    return adapter


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in CLIP's order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-level BPE tokenizer in which every word of the prompts is one token."""
    symbols = _byte_symbols()
    vocab = [*symbols, *(s + "</w>" for s in symbols)]
    merges: list[tuple[str, str]] = []
    for word in data.vocabulary_words():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = ["".join(pair), *parts[2:]]
    vocab += [a + b for a, b in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    table = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder; it is trained first and then frozen."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=4 * TEXT_DIM,
            projection_dim=TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def dit_scheduler() -> DDIMScheduler:
    """The linear schedule of DiT."""
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, steps_offset=1
    )


def animatediff_scheduler() -> DDIMScheduler:
    """The linear schedule of AnimateDiff."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="linspace",
    )
