"""One small pipeline per family, called alike: for tests of what pipelines can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import model_zoo as zoo
import torch
import zoo_pixart
import zoo_svd
import zoo_unet2d
from diffusers import (
    AnimateDiffControlNetPipeline,
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from accelrt.quality.observe import captured_latents

DTYPE = torch.float64


STEPS = {"num_inference_steps": 2}  # the second one has a history


def _run_dit(pipe: Any, **overrides: Any) -> Tensor:
    """The latents before they are decoded: images are float32 whatever the pipeline is."""
    arguments: dict[str, Any] = {
        "class_labels": [3, 77],
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    with captured_latents(pipe) as latents:
        pipe(**{**arguments, **STEPS, **overrides})
    return latents[0]


def _run_svd(pipe: Any, **overrides: Any) -> Tensor:
    """Few frames, of which slices of three leave one over."""
    return zoo_svd.run_svd(pipe, **{"num_frames": 4, **overrides})


def _first(run: Callable[..., Any]) -> Callable[..., Tensor]:
    """``run``, also where ``return_dict=False`` makes the pipeline return a tuple."""

    class Tuple:
        def __init__(self, pipe: Any) -> None:
            self.pipe = pipe

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipe, name)

        def __call__(self, **arguments: Any) -> Any:
            result = self.pipe(**arguments)
            if isinstance(result, Tensor):  # Stable Video Diffusion returns no tuple
                result = (result,)
            if not isinstance(result, tuple):
                return result
            return type("Output", (), {"images": result[0], "frames": result[0]})

    return lambda pipe, **overrides: run(Tuple(pipe), **{**STEPS, **overrides})


@dataclass(frozen=True)
class Family:
    """A pipeline and its call.

    Args:
        denoiser: name of the component that is called at every step.
        build: makes the pipeline, in a dtype.
        run: calls it with overrides of its arguments; returns latents or images.
    """

    denoiser: str
    build: Callable[[torch.dtype], Any]
    run: Callable[..., Tensor]

    def pipe(self) -> Any:
        """The pipeline in float64."""
        return self.build(DTYPE)

    def model(self, pipe: Any) -> Any:
        """The denoiser of ``pipe``."""
        return getattr(pipe, self.denoiser)


FAMILIES = {
    "animatediff": Family("unet", zoo.animatediff_pipeline, _first(zoo.run_animatediff)),
    "svd": Family("unet", zoo_svd.svd_pipeline, _first(_run_svd)),
    "unet2d": Family("unet", zoo_unet2d.pipeline, _first(zoo_unet2d.run)),
    "dit": Family("transformer", zoo.dit_pipeline, _run_dit),
    "pixart-alpha": Family("transformer", zoo_pixart.alpha_pipeline, _first(zoo_pixart.run)),
    "pixart-sigma": Family("transformer", zoo_pixart.sigma_pipeline, _first(zoo_pixart.run)),
}


def _controlnet(**settings: Any) -> ControlNetModel:
    """A ControlNet whose residuals are not zero."""
    return zoo.randomise(
        ControlNetModel(
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=zoo.CONTEXT_WIDTH,
            attention_head_dim=4,
            conditioning_embedding_out_channels=(8, 8, 8, 16),
            **settings,
        )
    ).to(DTYPE)


def _rebuilt(cls: Any, pipe: Any, **more: Any) -> Any:
    known = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in known}
    result = cls(**parts, **more)
    result.set_progress_bar_config(disable=True)
    return result


def with_controlnet(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a family with a ControlNet, and the arguments that it adds."""
    pipe = FAMILIES[name].pipe()
    if name == "unet2d":
        net = _controlnet(
            block_out_channels=(16, 32, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        )
        image = zoo.normal(1, 3, 72, 120, seed=60).sigmoid().to(DTYPE)
        return _rebuilt(StableDiffusionControlNetPipeline, pipe, controlnet=net), {"image": image}
    net = _controlnet(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")
    )
    frames = [zoo.normal(3, 72, 120, seed=60 + i).sigmoid().to(DTYPE) for i in range(7)]
    return (
        _rebuilt(AnimateDiffControlNetPipeline, pipe, controlnet=net),
        {"conditioning_frames": frames},
    )


def with_t2i_adapter() -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion with a T2I-Adapter, and the arguments that it adds."""
    pipe = FAMILIES["unet2d"].pipe()
    adapter = zoo.randomise(
        T2IAdapter(
            in_channels=3,
            channels=[16, 32, 32],
            num_res_blocks=1,
            downscale_factor=8,
            adapter_type="full_adapter",
        )
    )
    pipe = _rebuilt(StableDiffusionAdapterPipeline, pipe, adapter=adapter.to(DTYPE))
    return pipe, {"image": zoo.normal(1, 3, 72, 120, seed=61).sigmoid().to(DTYPE)}


def ip_adapter_weights(unet: Any, width: int = 12) -> dict[str, dict[str, Tensor]]:
    """The checkpoint of an IP-Adapter for ``unet``, with random weights."""
    projection = {
        "proj.weight": zoo.normal(4 * zoo.CONTEXT_WIDTH, width, seed=70) * width**-0.5,
        "proj.bias": 0.3 * zoo.normal(4 * zoo.CONTEXT_WIDTH, seed=71),
        "norm.weight": torch.ones(zoo.CONTEXT_WIDTH),
        "norm.bias": torch.zeros(zoo.CONTEXT_WIDTH),
    }
    layers: dict[str, Tensor] = {}
    index = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for kind in ("k", "v"):
            weight = zoo.normal(inner, zoo.CONTEXT_WIDTH, seed=72 + index)
            layers[f"{index}.to_{kind}_ip.weight"] = weight * zoo.CONTEXT_WIDTH**-0.5
        index += 2
    return {
        "image_proj": {key: value.to(DTYPE) for key, value in projection.items()},
        "ip_adapter": {key: value.to(DTYPE) for key, value in layers.items()},
    }


def text_encoder() -> CLIPTextModel:
    """For pipelines that ask their text encoder for more than embeddings."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=16,
            hidden_size=zoo.CONTEXT_WIDTH,
            intermediate_size=32,
            projection_dim=zoo.CONTEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    ).to(DTYPE)
