"""Small models and pipelines with random weights, and the exactness rule."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn

CONTEXT_WIDTH = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time in thread barriers; import it to use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention without a score matrix, as the flash kernels run it; import it to use it."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        batch, heads, length, dim = q.shape
        return q.new_empty(batch, length, heads, dim).transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Give every parameter a value that matters, zero-initialised ones too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(1 + 0.3 * noise if is_scale else 0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.shape[0] else 1
                parameter.copy_(noise * fan_in**-0.5)
    return model.eval()


def tiny_unet(**overrides: Any) -> UNetMotionModel:
    """All block types of AnimateDiff's UNet: three levels, 16 and 32 channels."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "down_block_types": (
            "CrossAttnDownBlockMotion",
            "CrossAttnDownBlockMotion",
            "DownBlockMotion",
        ),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": CONTEXT_WIDTH,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 4,
        "motion_max_seq_length": 16,
    }
    return randomise(UNetMotionModel(**{**settings, **overrides}))


def unet_variant() -> UNetMotionModel:
    """The options that the usual configuration leaves out."""
    return tiny_unet(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=2,
        use_motion_mid_block=False,
        use_linear_projection=True,
        transformer_layers_per_block=2,
        temporal_transformer_layers_per_block=2,
        mid_block_scale_factor=1.5,
        downsample_padding=0,
    )


def unet_text_time() -> UNetMotionModel:
    """With the added embeddings of an XL model."""
    return tiny_unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
        time_cond_proj_dim=8,
    )


def tiny_dit(sample_size: int = 8, patch_size: int = 2, **overrides: Any) -> DiTTransformer2DModel:
    """Three adaLN-Zero blocks of width 24."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": sample_size,
        "patch_size": patch_size,
        "num_embeds_ada_norm": 1000,
    }
    return randomise(DiTTransformer2DModel(**{**settings, **overrides}))


def tiny_vae(**overrides: Any) -> AutoencoderKL:
    """Two levels with attention in the middle."""
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return randomise(AutoencoderKL(**{**settings, **overrides}))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(
    batch: int, frames: int, height: int, width: int, *, per_frame_context: bool = False
) -> dict[str, Tensor]:
    """Inputs as a pipeline gives them; every sample has a context of its own."""
    context = normal(batch, 5, CONTEXT_WIDTH, seed=2).repeat_interleave(frames, 0)
    if per_frame_context:
        context = normal(batch * frames, 5, CONTEXT_WIDTH, seed=2)
    return {
        "sample": normal(batch, 4, frames, height, width, seed=3),
        "timestep": torch.tensor([7.0, 301.0][:batch]),
        "encoder_hidden_states": context,
    }


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors inside ``value`` in ``dtype``; time steps stay as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
    if isinstance(value, dict):
        return {key: to_dtype(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_dtype(item, dtype) for item in value)
    return value


def in_turn(cases: Iterable[Any], configs: Iterable[Any]) -> list[tuple[Any, str, Any]]:
    """Every case with every config in float64, and in one of the other dtypes.

    Whether slices are exact shows in float64; what the kernels of a dtype do does not depend on
    the case. Over three cases every config meets every dtype.
    """
    low, matrix, configs = ("float32", "bfloat16", "float16"), [], tuple(configs)
    for i, case in enumerate(cases):
        for j, config in enumerate(configs):
            matrix += [(case, dtype, config) for dtype in ("float64", low[(i + j) % 3])]
    return matrix


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Relative L2 distance in float64."""
    return float((result.double() - truth).norm() / truth.norm())


def assert_rule(wrapped: float, stock: float) -> None:
    """The exactness contract: no further from float64 than the stock model is."""
    assert wrapped <= 1.1 * stock + 1e-6, f"wrapped {wrapped:.3e}, stock {stock:.3e}"


def clone(model: Any, dtype: torch.dtype) -> Any:
    """An independent copy of ``model`` in ``dtype``."""
    return copy.deepcopy(model).to(dtype)


def animatediff_pipeline(dtype: torch.dtype = torch.float32) -> AnimateDiffPipeline:
    """A pipeline to be called with prompt embeddings."""
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=4,
        sample_size=8,
    )
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        motion_max_seq_length=16,
    )
    pipe = AnimateDiffPipeline(
        vae=tiny_vae(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    randomise(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def run_animatediff(pipe: AnimateDiffPipeline, **overrides: Any) -> Tensor:
    """Four guided steps on 7 frames of 9 x 15 latents from a fixed start."""
    dtype = pipe.unet.dtype
    arguments: dict[str, Any] = {
        "prompt_embeds": normal(1, 5, CONTEXT_WIDTH, seed=4).to(dtype),
        "negative_prompt_embeds": normal(1, 5, CONTEXT_WIDTH, seed=5).to(dtype),
        "latents": normal(1, 4, 7, 9, 15, seed=6).to(dtype),
        "num_frames": 7,
        "height": 72,
        "width": 120,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    return pipe(**{**arguments, **overrides}).frames


def dit_pipeline(dtype: torch.dtype = torch.float32) -> DiTPipeline:
    """A class-conditional image pipeline."""
    pipe = DiTPipeline(
        transformer=tiny_dit(),
        vae=tiny_vae(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def run_dit(pipe: DiTPipeline, monkeypatch: Any, guidance_scale: float = 3.0) -> Tensor:
    """The latents after four steps from a fixed start in every dtype."""
    import diffusers.pipelines.dit.pipeline_dit as module

    def start(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return normal(*shape, seed=7).to(dtype)

    latents: list[Tensor] = []
    decode = pipe.vae.decode

    def record(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(z)
        return decode(z, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "randn_tensor", start)
        patch.setattr(pipe.vae, "decode", record)
        pipe([3, 77], num_inference_steps=4, guidance_scale=guidance_scale, output_type="pt")
    return latents[0]
