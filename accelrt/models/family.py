"""The description of a model family, and the registry of descriptions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.recognise import is_plain
from accelrt.steps.boundary import Boundary

from .stages import Stage

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda", "meta")


@dataclass(frozen=True)
class CallShape:
    """The size of a request, as the models of a pipeline see it.

    Args:
        samples: rows of the denoiser's batch, guidance halves among them.
        outputs: pictures or videos that come out.
        frames: per video; 1 for pictures.
        height, width: of the latents.
        tokens: of the text; ``None`` for as many as the model is usually given.
    """

    samples: int
    outputs: int
    frames: int
    height: int
    width: int
    tokens: int | None = None


class Family(ABC):
    """One swapped forward: how to run it as stages.

    A family has no state of its own; one instance serves all models.
    """

    input_name = "sample"
    #: Dimensions that the input must have; ``None`` if the stages take any that stock takes.
    dimensions: int | None = None
    lora_scale_kwargs: str | None = None
    #: Arguments that say what is wanted, and stay the same from step to step.
    conditioning: tuple[str, ...] = ()
    #: Earlier stages push skips that later ones pop.
    has_skips = False

    @abstractmethod
    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """The state before the first stage."""

    @abstractmethod
    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """The stages of ``model``, in order."""

    @abstractmethod
    def finish(self, model: nn.Module, state: State) -> Tensor:
        """The output, from the state after the last stage."""

    def result(self, model: nn.Module, inputs: dict[str, Any], output: Tensor) -> Any:
        """What the stock forward returns, from the output."""
        return output

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The containers whose children the groups hold."""
        return ()

    def like_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The equal blocks through which the residual stream passes, in order, if there are such.

        Their stages are ``blocks.0`` onwards, of one group each.
        """
        return ()

    def block_group(self, model: nn.Module, name: str, block: nn.Module, config: Config) -> Group:
        """The group of one more block like :meth:`like_blocks`; ``name`` is its own."""
        raise TypeError(f"{type(self).__name__} has no like blocks")

    def at_time(
        self, model: nn.Module, inputs: dict[str, Any], given: dict[str, Any], timestep: Tensor
    ) -> dict[str, Any]:
        """What the stock model gives its blocks, ``given``, at another timestep ``[B]``."""
        raise TypeError(f"{type(self).__name__} has no like blocks")

    def retime(self, state: State, timestep: Tensor) -> None:
        """Let the groups of the like blocks run at another timestep ``[B]`` from here on."""
        raise TypeError(f"{type(self).__name__} has no like blocks")

    def made_ahead(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        inputs: dict[str, Any],
        times: Sequence[float],
    ) -> dict[str, Tensor]:
        """What some groups compute from timestep and conditioning alone, for several timesteps.

        Args:
            model: the model.
            groups: of a call, the feedback block's among them.
            inputs: arguments of a call with ``B`` samples.
            times: timesteps.

        Returns:
            By name of the group, ``[len(times) * B, ...]``.
        """
        return {}

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """The calls that one call is cut into; their outputs are joined along the first axis."""
        return [inputs]

    def call_shape(self, model: nn.Module, inputs: dict[str, Any]) -> CallShape | None:
        """The request that a call belongs to, if this is a denoiser.

        Half of the samples are taken for guidance, if their number is even.
        """
        return None

    def example(
        self, model: nn.Module, shape: CallShape, dtype: torch.dtype
    ) -> dict[str, Any] | None:
        """Arguments of a call of that size, as meta tensors; ``None`` if it has no such call.

        Arguments that keep their defaults may be left out.
        """
        return None

    def frames_of(self, inputs: dict[str, Any]) -> int:
        """Frames per sample."""
        return 1

    def latents(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What of the input the scheduler steps: guidance halves have the same."""
        x: Tensor = inputs[self.input_name]
        return x

    def adds_to_skips(self, inputs: dict[str, Any]) -> bool:
        """A call whose later stages add to the skips that earlier ones made."""
        return False

    def default_boundary(self, stages: Sequence[Stage]) -> Boundary:
        """What a step policy leaves out if it is not told: all but the output."""
        return Boundary(stages[-2].name)

    def published_boundary(self, stages: Sequence[Stage]) -> Boundary | None:
        """What Step Rehash leaves out, if the model has temporal layers in its last up block."""
        return None

    def declines(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Why this call must run the stock forward; empty if it need not."""
        x = inputs.get(self.input_name)
        if not isinstance(x, Tensor):
            return f"{self.input_name} is not a tensor"
        if self.dimensions not in (None, x.dim()):
            return f"{self.input_name} has {x.dim()} dimensions, not {self.dimensions}"
        if x.numel() == 0:
            return f"{self.input_name} is empty"
        if x.dtype not in DTYPES or x.device.type not in DEVICES:
            return f"{x.dtype} on {x.device.type} has no kernels"
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return "autocast is active"
        return ""

    def structure(self, model: nn.Module) -> tuple[Any, ...]:
        """Changes when the stages must be built anew: modules replaced, hooks attached."""
        key: list[Any] = [id(child) for child in model._modules.values()]
        for block in self.blocks(model):
            key += (id(block), is_plain(block, type(block)))
            for child in block._modules.values():
                key.append(id(child))
                if isinstance(child, nn.ModuleList):
                    key += [id(item) for item in child._modules.values()]
        return tuple(key)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A meta tensor: what :meth:`Family.example` gives."""
    return torch.empty(shape, dtype=dtype, device="meta")


def without_guidance(samples: int) -> int:
    """Pictures or videos among the samples of a denoiser's batch."""
    return samples // 2 if samples % 2 == 0 else samples


def random_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose output is random in training mode: slicing would change the draw."""
    found: list[nn.Module] = []
    for module in model.modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        labels = isinstance(module, LabelEmbedding) and module.dropout_prob > 0
        if dropout or labels:
            found.append(module)
    return found


# Class name -> (path of the submodule whose forward is swapped, its family), in order.
_REGISTRY: dict[type, tuple[tuple[str, Family], ...]] = {}


def register(cls: type, *parts: tuple[str, Family]) -> None:
    """Describe a model class.

    Args:
        cls: the diffusers class; subclasses are not included.
        parts: paths of the submodules whose forward is swapped (``""`` is the model
            itself), each with its family.
    """
    _REGISTRY[cls] = parts


def parts_of(model: object) -> tuple[tuple[str, Family], ...]:
    """What to swap in ``model``; empty if its class is not described."""
    return _REGISTRY.get(type(model), ())


def supported() -> list[str]:
    """Names of the described classes."""
    return sorted(cls.__name__ for cls in _REGISTRY)
