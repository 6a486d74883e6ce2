"""The frozen model as training sees it: latents, timesteps and conditions in, its output out."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .data import LatentData, PromptCoder

#: Rows that text encoders and autoencoders are given together.
CHUNK = 16

Output = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser(ABC):
    """The transformer of a pipeline with a table of conditions.

    Conditions are rows of the table; the last one is the empty condition of classifier-free
    guidance. Samples name theirs by index.

    Args:
        pipe: the pipeline.
        data: with the conditions of its samples; ``None`` for those of the settings.
        classes, prompts: to draw from where there is no data.
        max_sequence_length: of prompts.
        device: where the table lies.

    Raises:
        ValueError: the conditions do not fit the pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        data: LatentData | None,
        classes: Sequence[int] | None,
        prompts: Sequence[str] | None,
        max_sequence_length: int | None,
        device: torch.device,
    ) -> None:
        self.pipe = pipe
        self.model = pipe.transformer
        if data is not None:
            wanted, found = latent_shape(pipe), tuple(data.latents.shape[1:])
            if wanted != found:
                raise ValueError(
                    f"the latents are {list(found)}; {type(pipe).__name__} has {list(wanted)}"
                )
        table, index = self.conditions(data, classes, prompts, max_sequence_length, device)
        self.table = {name: rows.to(device) for name, rows in table.items()}
        #: Of each sample of the data, or of all conditions there are, ``[N]``.
        self.index = index

    @abstractmethod
    def conditions(
        self,
        data: LatentData | None,
        classes: Sequence[int] | None,
        prompts: Sequence[str] | None,
        max_sequence_length: int | None,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The table, the empty condition last, and the index of each sample in it ``[N]``."""

    @abstractmethod
    def arguments(self, x: Tensor, rows: dict[str, Tensor]) -> dict[str, Any]:
        """Keywords of the transformer's forward for rows of the table."""

    @property
    def empty(self) -> int:
        """Index of the empty condition."""
        return len(next(iter(self.table.values()))) - 1

    def output(self, x: Tensor, timestep: Tensor, index: Tensor) -> Tensor:
        """What the model predicts, without a learned variance.

        Args:
            x: latents ``[B, C, H, W]``.
            timestep: ``[B]``.
            index: of the conditions, ``[B]``.

        Returns:
            ``[B, C, H, W]``, fp32.
        """
        rows = {name: table[index] for name, table in self.table.items()}
        x = x.to(self.model.dtype)
        result = self.model(x, timestep=timestep, **self.arguments(x, rows)).sample
        output: Tensor = result[:, : x.shape[1]].float()
        return output

    def guided(
        self, output: Output, x: Tensor, timestep: Tensor, index: Tensor, scale: Tensor
    ) -> Tensor:
        """The output with classifier-free guidance, both halves in one call.

        Args:
            output: of the model, with feedback or without.
            x: ``[B, C, H, W]``.
            timestep: ``[B]``.
            index: ``[B]``.
            scale: of guidance, ``[B]``; where all are 1, only the half with conditions is run.

        Returns:
            ``[B, C, H, W]``, fp32.
        """
        if bool((scale == 1).all()):
            return output(x, timestep, index)
        both = output(*self.doubled(x, timestep, index))
        return combined(both, scale)

    def doubled(self, x: Tensor, timestep: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of both halves of guidance, ``[2 * B]``: without condition, with it."""
        empty = torch.full_like(index, self.empty)
        return torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([empty, index])

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Decode latents ``[B, C, H, W]`` to pictures ``[B, 3, h, w]`` from 0 to 1, fp32."""
        vae = self.pipe.vae
        scaled = latents / vae.config.scaling_factor + (
            getattr(vae.config, "shift_factor", None) or 0
        )
        parts = [
            vae.decode(part.to(vae.device, vae.dtype)).sample.float()
            for part in scaled.split(CHUNK)
        ]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def combined(both: Tensor, scale: Tensor) -> Tensor:
    """Guidance from both halves ``[2 * B, ...]``, scale ``[B]``."""
    without, with_condition = both.chunk(2)
    weight = scale.to(both).view(-1, *[1] * (both.dim() - 1))
    return without + weight * (with_condition - without)


class DiTDenoiser(Denoiser):
    """Conditions are classes."""

    def conditions(
        self,
        data: LatentData | None,
        classes: Sequence[int] | None,
        prompts: Sequence[str] | None,
        max_sequence_length: int | None,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """``class_labels`` ``[M]``."""
        count = int(self.model.config.num_embeds_ada_norm)
        if prompts is not None:
            raise ValueError(f"{type(self.pipe).__name__} takes classes, no prompts")
        if data is None:
            named = sorted({int(i) for i in (getattr(self.pipe, "labels", None) or {}).values()})
            labels = torch.tensor(sorted({*(classes or named or range(count))}))
        elif data.labels is None:
            raise ValueError(
                f"{type(self.pipe).__name__} needs a class for each sample of the data"
            )
        else:
            labels = data.labels.long()
        if int(labels.min()) < 0 or int(labels.max()) >= count:
            raise ValueError(
                f"classes go from {int(labels.min())} to {int(labels.max())}; allowed: 0 to "
                f"{count - 1}"
            )
        distinct, index = torch.unique(labels, return_inverse=True)
        return {"class_labels": torch.cat([distinct, torch.tensor([count])])}, index

    def arguments(self, x: Tensor, rows: dict[str, Tensor]) -> dict[str, Any]:
        """The classes."""
        return rows


class PixArtDenoiser(Denoiser):
    """Conditions are captions."""

    def conditions(
        self,
        data: LatentData | None,
        classes: Sequence[int] | None,
        prompts: Sequence[str] | None,
        max_sequence_length: int | None,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """``encoder_hidden_states`` ``[M, L, D]`` and ``encoder_attention_mask`` ``[M, L]``."""
        name = type(self.pipe).__name__
        if classes is not None:
            raise ValueError(f"{name} takes prompts, no classes")
        if data is not None and data.embeddings is not None:
            return self._embedded(data.embeddings, device)
        texts = prompts if data is None else data.prompts
        if texts is None:
            what = "each sample of the data" if data else "the settings: give data or prompts"
            raise ValueError(f"{name} needs a prompt for {what}")
        distinct = [*dict.fromkeys(texts)]
        places = {text: i for i, text in enumerate(distinct)}
        index = torch.tensor([places[text] for text in texts])
        coder = PromptCoder(self.pipe, max_sequence_length, device)
        states, masks = coder([*distinct, ""])
        return {"encoder_hidden_states": states, "encoder_attention_mask": masks}, index

    def _embedded(
        self, given: dict[str, Tensor], device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """From a file; the empty caption too, or encoded to the same length."""
        states, masks = given["states"], given["mask"]
        if "empty_states" in given:
            empty = given["empty_states"], given["empty_mask"]
        else:
            empty = PromptCoder(self.pipe, states.shape[1], device)([""])
        if empty[0].shape[1:] != states.shape[1:]:
            wanted, found = list(states.shape[1:]), list(empty[0].shape[1:])
            raise ValueError(f"captions are {wanted}, but the empty one is {found}")
        states = torch.cat([states.cpu(), empty[0].cpu().to(states.dtype)])
        masks = torch.cat([masks.cpu(), empty[1].cpu().to(masks.dtype)])
        table = {"encoder_hidden_states": states, "encoder_attention_mask": masks}
        return table, torch.arange(len(states) - 1)

    def arguments(self, x: Tensor, rows: dict[str, Tensor]) -> dict[str, Any]:
        """Captions, and the size of the pictures for a model that is told."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            factor = self.pipe.vae_scale_factor
            height, width = (side * factor for side in x.shape[-2:])
            added["resolution"] = x.new_tensor([[height, width]]).repeat(len(x), 1)
            added["aspect_ratio"] = x.new_tensor([[height / width]]).repeat(len(x), 1)
        states = rows["encoder_hidden_states"].to(x.dtype)
        return {**rows, "encoder_hidden_states": states, "added_cond_kwargs": added}


_DENOISERS: dict[str, type[Denoiser]] = {
    "DiTTransformer2DModel": DiTDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
}


def denoiser_class(pipe: Any) -> type[Denoiser]:
    """The class for a pipeline.

    Raises:
        ValueError: it has no transformer that can be trained for.
    """
    from accelrt.wrap import is_wrapped

    name = type(getattr(pipe, "transformer", None)).__name__
    if name not in _DENOISERS:
        raise ValueError(
            f"{type(pipe).__name__} cannot be trained for; allowed: pipelines with one of "
            f"{', '.join(_DENOISERS)}"
        )
    if is_wrapped(pipe.transformer):
        raise ValueError("the pipeline is wrapped; call accelrt.unwrap(pipe) first")
    return _DENOISERS[name]


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """Of the pipeline's default size, ``[C, H, W]``."""
    config = pipe.transformer.config
    return int(config.in_channels), int(config.sample_size), int(config.sample_size)


def default_guidance(pipe: Any) -> float:
    """The default of the pipeline's call."""
    return float(inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Meanwhile ``model`` is in evaluation mode and its parameters need no gradients."""
    training = model.training
    needed = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in needed:
            parameter.requires_grad_(True)
