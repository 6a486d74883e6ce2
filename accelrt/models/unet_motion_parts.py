"""Groups of the AnimateDiff UNet that no other family has."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config
from accelrt.groups import FUSED, Context, Group, State, Status
from accelrt.groups.base import StockGroup
from accelrt.groups.conditioning import SharedContext
from accelrt.groups.state import channels_last, nhwc


class EmbedGroup(StockGroup):
    """Time embedding, added embeddings, and the context of the cross-attention layers.

    Args:
        name: as in :class:`Group`.
        model: the model, kept by weak reference: it must not keep itself alive.
        config: as in :class:`Group`.
    """

    why = "an embedding"

    def __init__(self, name: str, model: Any, config: Config) -> None:
        super().__init__(name, model.time_embedding, config)
        self._model = weakref.ref(model)
        self._shared = SharedContext()

    def run(self, state: State) -> None:
        """Fill ``state.temb`` and ``state.context``."""
        unet: Any = self._model()
        inputs = state.inputs
        state.temb = self._time(unet, inputs)
        mask = inputs["attention_mask"]
        if mask is not None:
            mask = ((1 - mask.to(inputs["sample"].dtype)) * -10000.0).unsqueeze(1)
        context = Context(
            full=self._conditioning(unet, inputs, state.frames),
            attention_mask=mask,
            cross_attention_kwargs=inputs["cross_attention_kwargs"],
        )
        if isinstance(context.full, Tensor):
            context.shared = self._shared(context.full, state.frames)
        state.context = context

    @staticmethod
    def _time(unet: Any, inputs: dict[str, Any]) -> Tensor:
        """The embedding of timestep and added conditions, ``[B, E]``."""
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

    @staticmethod
    def _conditioning(unet: Any, inputs: dict[str, Any], frames: int) -> Any:
        """The text context, with image embeddings beside it for IP-Adapters."""
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
        return (context, [image.repeat_interleave(frames, dim=0) for image in images])


class PushGroup(Group):
    """The last group of a down layer, whose output is also a skip.

    Args:
        group: the group.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group.name, group.module, group.config)
        self.group = group

    def run(self, state: State) -> None:
        """Run the group and push its output on the stack of skips."""
        self.group(state)
        assert state.hidden is not None
        state.skips.append(state.hidden)

    def unfused(self) -> list[str]:
        """Those of the group."""
        return self.group.unfused()

    def status(self) -> Status:
        """That of the group."""
        return self.group.status()


class ResidualsGroup(Group):
    """Adds the residuals of a ControlNet, if the call has any.

    Args:
        name, config: as in :class:`Group`; the sum has no module.
        where: ``"down"`` (to the skips) or ``"mid"`` (to the hidden states).
    """

    def __init__(self, name: str, config: Config, where: str) -> None:
        super().__init__(name, nn.Identity(), config)
        self.where = where

    def unfused(self) -> list[str]:
        """Nothing: a sum is one operator."""
        return []

    def status(self) -> Status:
        """Runs only with a ControlNet."""
        return Status(FUSED, "only with a ControlNet")

    def run(self, state: State) -> None:
        """Add ``down_block_additional_residuals`` or ``mid_block_additional_residual``."""
        if self.where == "mid":
            residual = state.inputs["mid_block_additional_residual"]
            if residual is not None:
                hidden = state.take()
                state.hidden = self._sum(state, hidden, residual)
            return
        residuals = state.inputs["down_block_additional_residuals"]
        if residuals is None:
            return
        waiting, state.skips = state.skips[::-1], []
        for residual in residuals[: len(waiting)]:
            skip = waiting.pop()
            if skip is state.hidden:
                state.skips.append(channels_last(skip + residual))
            else:
                state.skips.append(self._sum(state, skip, residual))

    def _sum(self, state: State, x: Tensor, residual: Tensor) -> Tensor:
        same = x.shape == residual.shape and x.dtype == residual.dtype
        if same and self.config.inplace and self.config.fuse and state.writable(x):
            ops.residual_blend(nhwc(x), nhwc(residual), out=nhwc(x))
            return x
        return channels_last(x + residual)


class _StockBlock(StockGroup):
    """A block of another class, or with hooks: called as it came."""

    def __init__(self, name: str, module: nn.Module, config: Config, why: str) -> None:
        super().__init__(name, module, config)
        self.why = why

    def _arguments(self, state: State, *, motion: bool) -> dict[str, Any]:
        """The keyword arguments that the block takes."""
        arguments: dict[str, Any] = {"temb": state.temb_per_image()}
        if motion:
            arguments["num_frames"] = state.frames
        if getattr(self.module, "has_cross_attention", False):
            arguments.update(
                encoder_hidden_states=state.context.full,
                attention_mask=state.context.attention_mask,
                cross_attention_kwargs=state.context.cross_attention_kwargs,
            )
        return arguments

    def _keep(self, state: State, hidden: Tensor) -> None:
        state.hidden = channels_last(hidden)
        state.hold(state.hidden)


class StockDownGroup(_StockBlock):
    """A whole down block."""

    def run(self, state: State) -> None:
        """Also pushes the block's skips."""
        arguments = self._arguments(state, motion=True)
        hidden, skips = self.module(hidden_states=state.take(), **arguments)
        for skip in skips[:-1]:
            state.skips.append(channels_last(skip))
            state.hold(state.skips[-1])
        self._keep(state, hidden)
        last = state.hidden if skips[-1] is hidden else channels_last(skips[-1])
        assert last is not None
        state.skips.append(last)


class StockMidGroup(_StockBlock):
    """A whole mid block."""

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        motion = hasattr(self.module, "motion_modules")
        self._keep(state, self.module(state.take(), **self._arguments(state, motion=motion)))


class StockUpGroup(_StockBlock):
    """A whole up block.

    Args:
        name, module, config, why: as for the other blocks.
        final: the last block, which has no upsampler to aim at a size.
    """

    def __init__(
        self, name: str, module: nn.Module, config: Config, why: str, *, final: bool
    ) -> None:
        super().__init__(name, module, config, why)
        self.final = final

    def run(self, state: State) -> None:
        """Also pops the block's skips."""
        block: Any = self.module
        count = len(block.resnets)
        own, state.skips = tuple(state.skips[-count:]), state.skips[:-count]
        size = None
        if not self.final and state.extras["odd_size"]:
            size = state.skips[-1].shape[2:]
        hidden = block(
            hidden_states=state.take(),
            res_hidden_states_tuple=own,
            upsample_size=size,
            **self._arguments(state, motion=True),
        )
        self._keep(state, hidden)
