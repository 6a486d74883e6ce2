"""Stable Diffusion 1.x, 2.x and XL: ``UNet2DConditionModel``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from diffusers.utils.deprecation_utils import deprecate
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.spatial import SpatialTransformerGroup

from .family import CallShape, meta, register, without_guidance
from .unet import UNet
from .unet_parts import EmbedGroup


class ConditionEmbedGroup(EmbedGroup):
    """Embeddings and context of images, by the model's own methods."""

    def time(self, unet: Any, state: State) -> Tensor:
        """Timestep, class and added conditions, ``[B, E]``.

        A hint (``addition_embed_type="image_hint"``) is joined to the sample.
        """
        inputs = state.inputs
        sample: Tensor = state.extras["sample"]
        steps = unet.get_time_embed(sample=sample, timestep=inputs["timestep"])
        temb: Tensor = unet.time_embedding(steps, inputs["timestep_cond"])
        classes = unet.get_class_embed(sample=sample, class_labels=inputs["class_labels"])
        if classes is not None:
            concat = unet.config.class_embeddings_concat
            temb = torch.cat([temb, classes], dim=-1) if concat else temb + classes
        added = unet.get_aug_embed(
            emb=temb,
            encoder_hidden_states=inputs["encoder_hidden_states"],
            added_cond_kwargs=inputs["added_cond_kwargs"],
        )
        if unet.config.addition_embed_type == "image_hint":
            added, hint = added
            inputs["sample"] = torch.cat([sample, hint], dim=1)
        if added is not None:
            temb = temb + added
        return temb if unet.time_embed_act is None else unet.time_embed_act(temb)

    def conditioning(self, unet: Any, state: State) -> Any:
        """The context that the model's projection makes of text and images."""
        return unet.process_encoder_hidden_states(
            encoder_hidden_states=state.inputs["encoder_hidden_states"],
            added_cond_kwargs=state.inputs["added_cond_kwargs"],
        )

    def attention_kwargs(self, unet: Any, state: State) -> dict[str, Any] | None:
        """With the boxes of GLIGEN as embedded objects."""
        kwargs = super().attention_kwargs(unet, state)
        if kwargs is None or kwargs.get("gligen") is None:
            return kwargs
        return {**kwargs, "gligen": {"objs": unet.position_net(**kwargs["gligen"])}}


class UNet2DCondition(UNet):
    """The UNet of Stable Diffusion."""

    lora_scale_kwargs = "cross_attention_kwargs"
    down_classes = (DownBlock2D, CrossAttnDownBlock2D)
    mid_classes = (UNetMidBlock2DCrossAttn,)
    up_classes = (UpBlock2D, CrossAttnUpBlock2D)
    layers = (("attentions", SpatialTransformerGroup),)
    controlnets = True
    dimensions = 4
    adapters = True

    def embed(self, model: nn.Module, config: Config) -> Group:
        """Embeddings and context."""
        return ConditionEmbedGroup("time_embedding", model, config)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Also the centred sample, and whose residuals the call has."""
        unet: Any = model
        state = super().begin(model, dict(inputs))
        if unet.config.center_input_sample:
            state.inputs["sample"] = 2 * inputs["sample"] - 1.0
        state.extras["sample"] = state.inputs["sample"]
        down = inputs["down_block_additional_residuals"]
        mid = inputs["mid_block_additional_residual"]
        features = inputs["down_intrablock_additional_residuals"]
        if down is not None and mid is not None:
            state.extras["down_residuals"] = down
            state.extras["mid_residual"] = mid
        elif down is not None and features is None:
            deprecate(
                "T2I should not use down_block_additional_residuals",
                "1.3.0",
                "Pass the features of a T2I-Adapter as down_intrablock_additional_residuals.",
                standard_warn=False,
            )
            features = down
        state.extras["adapter"] = features
        return state

    def call_shape(self, model: nn.Module, inputs: dict[str, Any]) -> CallShape:
        """From the sample ``[B, C, H, W]``."""
        batch, _, height, width = inputs["sample"].shape
        return CallShape(batch, without_guidance(batch), 1, height, width)

    def example(
        self, model: nn.Module, shape: CallShape, dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """A picture and its text; with the pooled text and sizes of SDXL, if it takes them."""
        unet: Any = model
        config = unet.config
        if config.class_embed_type is not None or config.encoder_hid_dim_type is not None:
            return None
        size = (shape.samples, config.in_channels, shape.height, shape.width)
        text = (shape.samples, shape.tokens or 77, config.cross_attention_dim)
        inputs: dict[str, Any] = {
            "sample": meta(*size, dtype=dtype),
            "timestep": meta(dtype=torch.int64),
            "encoder_hidden_states": meta(*text, dtype=dtype),
        }
        if config.addition_embed_type == "text_time":
            ids = 6
            pooled = config.projection_class_embeddings_input_dim
            pooled -= ids * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {
                "text_embeds": meta(shape.samples, pooled, dtype=dtype),
                "time_ids": meta(shape.samples, ids, dtype=dtype),
            }
        elif config.addition_embed_type is not None:
            return None
        return inputs

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """``[B, C, H, W]``."""
        return state.take()

    def result(self, model: nn.Module, inputs: dict[str, Any], output: Tensor) -> Any:
        """A tuple, or diffusers' output class."""
        if not inputs["return_dict"]:
            return (output,)
        return UNet2DConditionOutput(sample=output)


register(UNet2DConditionModel, ("", UNet2DCondition()))
