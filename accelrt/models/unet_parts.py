"""Groups that the UNet families share."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config
from accelrt.groups import FUSED, Context, Group, State, Status
from accelrt.groups.base import StockGroup
from accelrt.groups.conditioning import SharedContext
from accelrt.groups.skips import whole
from accelrt.groups.state import channels_last, nhwc


class EmbedGroup(StockGroup):
    """Time embedding, added embeddings, and the context of the cross-attention layers.

    Args:
        name: as in :class:`Group`.
        model: the model, kept by weak reference: it must not keep itself alive.
        config: as in :class:`Group`.
    """

    why = "an embedding"
    decides = True

    def __init__(self, name: str, model: Any, config: Config) -> None:
        super().__init__(name, model.time_embedding, config)
        self._model = weakref.ref(model)
        self._shared = SharedContext()

    def decided(self, inputs: dict[str, Any], frames: int) -> bool:
        """Whether all frames share their context, if that is what the call gives."""
        context = inputs.get("encoder_hidden_states")
        if frames == 1 or not isinstance(context, Tensor):
            return False
        return self._shared.repeats(context, frames)

    def decide_alike(self, inputs: dict[str, Any], copies: dict[str, Any], frames: int) -> None:
        """The verdict on the context of ``inputs``."""
        context = copies.get("encoder_hidden_states")
        if frames > 1 and isinstance(context, Tensor):
            self._shared.assume(context, frames, self.decided(inputs, frames))

    @abstractmethod
    def time(self, unet: Any, state: State) -> Tensor:
        """The embedding of timestep and added conditions, ``[B, E]``."""

    @abstractmethod
    def conditioning(self, unet: Any, state: State) -> Any:
        """The context of :class:`Context.full`."""

    def attention_kwargs(self, unet: Any, state: State) -> dict[str, Any] | None:
        """What attention processors are given besides."""
        kwargs: dict[str, Any] | None = state.inputs.get("cross_attention_kwargs")
        return kwargs

    def run(self, state: State) -> None:
        """Fill ``state.temb`` and ``state.context``."""
        unet: Any = self._model()
        inputs = state.inputs
        dtype = inputs["sample"].dtype
        state.temb = self.time(unet, state)
        context = Context(
            full=self.conditioning(unet, state),
            attention_mask=attention_bias(inputs.get("attention_mask"), dtype),
            encoder_attention_mask=attention_bias(inputs.get("encoder_attention_mask"), dtype),
            cross_attention_kwargs=self.attention_kwargs(unet, state),
        )
        if isinstance(context.full, Tensor):
            context.shared = self._shared(context.full, state.frames)
        state.context = context


def attention_bias(mask: Tensor | None, dtype: Any) -> Tensor | None:
    """A mask ``[N, L]`` (one keeps, zero discards) as a bias ``[N, 1, L]``."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


class PushGroup(Group):
    """The last group of a down layer, whose output is also a skip.

    Args:
        group: the group.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group.name, group.module, group.config)
        self.group = group
        self.makes_skip = group.makes_skip

    def configure(self, config: Config) -> None:
        """That of the group."""
        super().configure(config)
        self.group.configure(config)

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


class _SumGroup(Group):
    """Adds tensors of the call, if it has any: one operator, without a module.

    Args:
        name, config: as in :class:`Group`.
    """

    source = ""

    def __init__(self, name: str, config: Config) -> None:
        super().__init__(name, nn.Identity(), config)

    def unfused(self) -> list[str]:
        """Nothing: a sum is one operator."""
        return []

    def status(self) -> Status:
        """Runs only for some calls."""
        return Status(FUSED, f"only with a {self.source}")

    def _sum(self, state: State, x: Tensor, residual: Tensor) -> Tensor:
        same = x.shape == residual.shape and x.dtype == residual.dtype
        if same and self.config.inplace and self.config.fuse and state.writable(x):
            ops.residual_blend(nhwc(x), nhwc(residual), out=nhwc(x))
            return x
        return channels_last(x + residual)


class ResidualsGroup(_SumGroup):
    """Adds the residuals of a ControlNet, if the call has any.

    Reads ``state.extras["down_residuals"]`` or ``["mid_residual"]``.

    Args:
        name, config: as in :class:`Group`.
        where: ``"down"`` (to the skips) or ``"mid"`` (to the hidden states).
    """

    source = "ControlNet"

    def __init__(self, name: str, config: Config, where: str) -> None:
        super().__init__(name, config)
        self.where = where

    def run(self, state: State) -> None:
        """Skips without a residual are dropped, as in the stock model."""
        if self.where == "mid":
            residual = state.extras.get("mid_residual")
            if residual is not None:
                hidden = state.take()
                state.hidden = self._sum(state, hidden, residual)
            return
        residuals = state.extras.get("down_residuals")
        if residuals is None:
            return
        waiting, state.skips = state.skips[::-1], []
        for residual in residuals[: len(waiting)]:
            skip = whole(waiting.pop())
            if skip is state.hidden:
                state.skips.append(channels_last(skip + residual))
            else:
                state.skips.append(self._sum(state, skip, residual))


class AdapterGroup(_SumGroup):
    """Adds the next feature of a T2I-Adapter to the hidden states, if the call has any.

    Takes it from the list ``state.extras["adapter"]``, which is the caller's: the stock
    model empties it too. A skip that is the hidden states gets the sum as well.

    Args:
        name, config: as in :class:`Group`.
        only_same_shape: leave a feature of another shape in the list.
    """

    source = "T2I-Adapter"

    def __init__(self, name: str, config: Config, *, only_same_shape: bool = False) -> None:
        super().__init__(name, config)
        self.only_same_shape = only_same_shape

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        features: Any = state.extras.get("adapter")
        if not features:
            return
        if self.only_same_shape and (
            state.hidden is None or state.hidden.shape != features[0].shape
        ):
            return
        hidden = state.take()
        is_skip = bool(state.skips) and state.skips[-1] is hidden
        if is_skip:
            state.skips.pop()
        state.hidden = self._sum(state, hidden, features.pop(0)).to(hidden.dtype)
        if is_skip:
            state.skips.append(state.hidden)


class _StockBlock(StockGroup):
    """A block of another class, or with hooks: called as it came.

    Args:
        name, module, config: as in :class:`Group`.
        why: the reason.
        frames: the block is told the number of frames.
    """

    def __init__(
        self, name: str, module: nn.Module, config: Config, why: str, *, frames: bool = False
    ) -> None:
        super().__init__(name, module, config)
        self.why = why
        self.frames = frames

    def _arguments(self, state: State) -> dict[str, Any]:
        """The keyword arguments that the block takes."""
        arguments: dict[str, Any] = {"temb": state.temb_per_image()}
        if self.frames:
            arguments["num_frames"] = state.frames
        if getattr(self.module, "has_cross_attention", False):
            context = state.context
            arguments.update(
                encoder_hidden_states=context.full,
                attention_mask=context.attention_mask,
                cross_attention_kwargs=context.cross_attention_kwargs,
            )
            if context.encoder_attention_mask is not None:
                arguments["encoder_attention_mask"] = context.encoder_attention_mask
        return arguments

    def _keep(self, state: State, hidden: Tensor) -> None:
        state.hidden = channels_last(hidden)
        state.hold(state.hidden)


class StockDownGroup(_StockBlock):
    """A whole down block."""

    def run(self, state: State) -> None:
        """Also pushes the block's skips."""
        arguments = self._arguments(state)
        features: Any = state.extras.get("adapter")
        if features and getattr(self.module, "has_cross_attention", False):
            arguments["additional_residuals"] = features.pop(0)
        hidden, skips = self.module(hidden_states=state.take(), **arguments)
        for skip in skips[:-1]:
            kept = channels_last(skip)
            state.skips.append(kept)
            state.hold(kept)
        self._keep(state, hidden)
        last = state.hidden if skips[-1] is hidden else channels_last(skips[-1])
        assert last is not None
        state.skips.append(last)


class StockMidGroup(_StockBlock):
    """A whole mid block."""

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        self._keep(state, self.module(state.take(), **self._arguments(state)))


class StockUpGroup(_StockBlock):
    """A whole up block.

    Args:
        name, module, config, why, frames: as for the other blocks.
        final: the last block, which has no upsampler to aim at a size.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: Config,
        why: str,
        *,
        final: bool,
        frames: bool = False,
    ) -> None:
        super().__init__(name, module, config, why, frames=frames)
        self.final = final

    def run(self, state: State) -> None:
        """Also pops the block's skips."""
        block: Any = self.module
        count = len(block.resnets)
        own, state.skips = tuple(map(whole, state.skips[-count:])), state.skips[:-count]
        size = None
        if not self.final and state.extras.get("odd_size"):
            size = state.skips[-1].shape[2:]
        hidden = block(
            hidden_states=state.take(),
            res_hidden_states_tuple=own,
            upsample_size=size,
            **self._arguments(state),
        )
        self._keep(state, hidden)
