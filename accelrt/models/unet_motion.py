"""AnimateDiff: ``UNetMotionModel``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from diffusers.models.unets.unet_motion_model import (
    CrossAttnDownBlockMotion,
    CrossAttnUpBlockMotion,
    DownBlockMotion,
    UNetMidBlockCrossAttnMotion,
    UNetMotionModel,
    UNetMotionOutput,
    UpBlockMotion,
)
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.motion import MotionGroup
from accelrt.groups.spatial import SpatialTransformerGroup

from .family import CallShape, meta, register, without_guidance
from .unet import UNet
from .unet_parts import EmbedGroup


class MotionEmbedGroup(EmbedGroup):
    """Embeddings and context of a video."""

    def time(self, unet: Any, state: State) -> Tensor:
        """The embedding of timestep and added conditions, ``[B, E]``."""
        inputs = state.inputs
        sample, timestep = inputs["sample"], inputs["timestep"]
        if not torch.is_tensor(timestep):
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
        elif timestep.dim() == 0:
            timestep = timestep[None].to(sample.device)
        steps = unet.time_proj(timestep.expand(sample.shape[0])).to(dtype=unet.dtype)
        temb: Tensor = unet.time_embedding(steps, inputs["timestep_cond"])
        if unet.config.addition_embed_type == "text_time":
            added = inputs["added_cond_kwargs"]
            for key in ("text_embeds", "time_ids"):
                if key not in added:
                    raise ValueError(
                        f"addition_embed_type 'text_time' needs {key!r} in added_cond_kwargs; "
                        f"given: {sorted(added)}"
                    )
            text = added["text_embeds"]
            times = unet.add_time_proj(added["time_ids"].flatten()).reshape(text.shape[0], -1)
            temb = temb + unet.add_embedding(torch.cat([text, times], dim=-1).to(temb.dtype))
        return temb

    def conditioning(self, unet: Any, state: State) -> Any:
        """The text context, with image embeddings beside it for IP-Adapters."""
        inputs = state.inputs
        context = inputs["encoder_hidden_states"]
        projection = unet.encoder_hid_proj
        if projection is None or unet.config.encoder_hid_dim_type != "ip_image_proj":
            return context
        added = inputs["added_cond_kwargs"]
        if "image_embeds" not in added:
            raise ValueError(
                "encoder_hid_dim_type 'ip_image_proj' needs 'image_embeds' in added_cond_kwargs; "
                f"given: {sorted(added)}"
            )
        images = projection(added["image_embeds"])
        return (context, [image.repeat_interleave(state.frames, dim=0) for image in images])


class UNetMotion(UNet):
    """The UNet of AnimateDiff: a 2-D UNet with motion modules between its layers."""

    lora_scale_kwargs = "cross_attention_kwargs"
    down_classes = (DownBlockMotion, CrossAttnDownBlockMotion)
    mid_classes = (UNetMidBlockCrossAttnMotion, UNetMidBlock2DCrossAttn)
    up_classes = (UpBlockMotion, CrossAttnUpBlockMotion)
    layers = (("attentions", SpatialTransformerGroup), ("motion_modules", MotionGroup))
    frames = True
    controlnets = True
    dimensions = 5

    def frames_of(self, inputs: dict[str, Any]) -> int:
        """Frames are the third axis."""
        frames: int = inputs["sample"].shape[2]
        return frames

    def embed(self, model: nn.Module, config: Config) -> Group:
        """Embeddings and context."""
        return MotionEmbedGroup("time_embedding", model, config)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Also frames, and the residuals of a ControlNet."""
        state = super().begin(model, inputs)
        state.frames = inputs["sample"].shape[2]
        state.extras["down_residuals"] = inputs["down_block_additional_residuals"]
        state.extras["mid_residual"] = inputs["mid_block_additional_residual"]
        return state

    def call_shape(self, model: nn.Module, inputs: dict[str, Any]) -> CallShape:
        """From the sample ``[B, C, T, H, W]``."""
        batch, _, frames, height, width = inputs["sample"].shape
        return CallShape(batch, without_guidance(batch), frames, height, width)

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """A video and a text for every frame."""
        config: Any = model.config
        images = shape.samples * shape.frames
        size = (shape.samples, config.in_channels, shape.frames, shape.height, shape.width)
        text = (images, shape.tokens or 77, config.cross_attention_dim)
        return {
            "sample": meta(*size, dtype=dtype),
            "timestep": meta(dtype=torch.int64),
            "encoder_hidden_states": meta(*text, dtype=dtype),
        }

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """``[B * T, C, H, W]`` to ``[B, C, T, H, W]``."""
        images = state.take()
        sample = images.view(-1, state.frames, *images.shape[1:]).permute(0, 2, 1, 3, 4)
        return sample

    def result(self, model: nn.Module, inputs: dict[str, Any], output: Tensor) -> Any:
        """A tuple, or diffusers' output class."""
        if not inputs["return_dict"]:
            return (output,)
        return UNetMotionOutput(sample=output)


register(UNetMotionModel, ("", UNetMotion()))
