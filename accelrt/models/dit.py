"""DiT: ``DiTTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.dit_block import AdaLNBlockGroup
from accelrt.groups.modulated import ModulatedOutGroup, unpatchify
from accelrt.groups.patch_embed import PatchEmbedGroup
from accelrt.steps.conditions import rows_of_times, tiled

from .family import CallShape, Family, meta, register, without_guidance
from .passes import sample_passes
from .stages import Stage


class DiTOutGroup(ModulatedOutGroup):
    """Final norm, modulated by the first block's embedding of timestep and class.

    Args:
        name: as in :class:`accelrt.groups.Group`.
        model: the model, of which only the parts are kept: a group that held the
            model would keep it alive.
        config: as in :class:`accelrt.groups.Group`.
    """

    def __init__(self, name: str, model: Any, config: Config) -> None:
        super().__init__(name, model.norm_out, model.proj_out_2, config)
        self.embed = model.transformer_blocks[0].norm1
        self.source = model.proj_out_1

    def modulation(self, state: State, x: Tensor) -> Tensor:
        """Shift and scale ``[B or 1, 2, D]``."""
        inputs = state.inputs
        emb = self.embed.emb(inputs["timestep"], inputs["class_labels"], hidden_dtype=x.dtype)
        made: Tensor = self.source(F.silu(emb))
        return made.view(made.shape[0], 2, -1)


class DiT(Family):
    """Patch embedding, adaLN-Zero blocks, modulated output."""

    input_name = "hidden_states"
    conditioning = ("class_labels",)

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """``samples_per_pass`` at a time, where samples do not look at each other."""
        dit: Any = model
        x = inputs["hidden_states"]
        height, width = (side // dit.patch_size for side in x.shape[-2:])
        # Of tokens that make no square the stock model makes another number of images.
        if x.dim() != 4 or int((height * width) ** 0.5) ** 2 != height * width:
            return [inputs]
        return sample_passes(model, self.blocks(model), inputs, config)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Nothing is known before the patch embedding."""
        return State(inputs)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The transformer blocks."""
        blocks: Any = model.transformer_blocks
        return blocks  # type: ignore[no-any-return]

    def like_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks."""
        blocks: Any = model.transformer_blocks
        return tuple(blocks)

    def block_group(self, model: nn.Module, name: str, block: nn.Module, config: Config) -> Group:
        """An adaLN-Zero block."""
        return AdaLNBlockGroup(name, block, config)

    def at_time(
        self, model: nn.Module, inputs: dict[str, Any], given: dict[str, Any], timestep: Tensor
    ) -> dict[str, Any]:
        """Blocks embed the timestep themselves."""
        return {**given, "timestep": timestep}

    def retime(self, state: State, timestep: Tensor) -> None:
        """Blocks embed the timestep of the call themselves."""
        state.inputs = {**state.inputs, "timestep": timestep}

    def made_ahead(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        inputs: dict[str, Any],
        times: Sequence[float],
    ) -> dict[str, Tensor]:
        """The modulations of the blocks and of the output."""
        x, batch = inputs["hidden_states"], inputs["hidden_states"].shape[0]
        given = tiled(inputs, ("class_labels",), batch, len(times))
        given["timestep"] = rows_of_times(times, batch, inputs["timestep"])
        made = {}
        for group in groups:
            if isinstance(group, (AdaLNBlockGroup, DiTOutGroup)) and not group.unrecognised():
                made[group.name] = group.modulation(State(given), x.new_empty(0))
        return made

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``embed``, ``blocks.0`` onwards, ``out``."""
        dit: Any = model
        result = [Stage("embed", (PatchEmbedGroup("pos_embed", dit.pos_embed, config),))]
        for i, block in enumerate(dit.transformer_blocks):
            group = AdaLNBlockGroup(f"transformer_blocks.{i}", block, config)
            result.append(Stage(f"blocks.{i}", (group,)))
        result.append(Stage("out", (DiTOutGroup("norm_out", dit, config),)))
        return tuple(result)

    def call_shape(self, model: nn.Module, inputs: dict[str, Any]) -> CallShape:
        """From the latents ``[B, C, H, W]``."""
        batch, _, height, width = inputs["hidden_states"].shape
        return CallShape(batch, without_guidance(batch), 1, height, width)

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """Latents, with timestep and class of every sample."""
        config: Any = model.config
        size = (shape.samples, config.in_channels, shape.height, shape.width)
        return {
            "hidden_states": meta(*size, dtype=dtype),
            "timestep": meta(shape.samples, dtype=torch.int64),
            "class_labels": meta(shape.samples, dtype=torch.int64),
        }

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """Put the patches of ``[B, S, patch * patch * C]`` back into an image."""
        dit: Any = model
        x = state.take()
        # The stock model takes every token grid for a square one; so must we.
        side = int(x.shape[1] ** 0.5)
        output = unpatchify(x, side, side, dit.patch_size, dit.out_channels)
        return output

    def result(self, model: nn.Module, inputs: dict[str, Any], output: Tensor) -> Any:
        """A tuple, or diffusers' output class."""
        if not inputs["return_dict"]:
            return (output,)
        return Transformer2DModelOutput(sample=output)


register(DiTTransformer2DModel, ("", DiT()))
