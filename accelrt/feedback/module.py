"""The feedback block, its scales, and what says where and when they are used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from accelrt.steps.origin import model_hash, model_id, weight_norms

from .schedule import FeedbackSchedule

BLOCKS: dict[str, type[nn.Module]] = {"BasicTransformerBlock": BasicTransformerBlock}
#: Shapes of the scales: one number for each loop block and channel, for each loop block, or one.
SCALES = ("channel", "block", "scalar")
#: Which loop blocks get the feedback added to their input.
ENTERS = ("every", "first")
#: Timestep of the passes with feedback: that of the step, what the output stands for, the next.
CONDITIONING = ("t", "ahead", "next")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no module, or whose weights may lie elsewhere.

    Raises:
        ValueError: naming the file that is missing, or is one too many.
    """
    for name in ("config.json", SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; allowed: the folder of a module")
    # An index of several files could name any, and a module is never so large.
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise ValueError(f"{folder} has {SAFE_WEIGHTS_INDEX_NAME}; allowed: one file")


class FeedbackModule(ModelMixin, ConfigMixin):
    """Inner Loop Feedback: one learned block that lets a pass through a transformer do more.

    Of the blocks of the backbone, ``start`` run first, the next ``length`` are the loop. The
    loop's output goes through the feedback block; then the loop runs again from where it began,
    ``passes`` times, with the block's output added to the input of its blocks, times learned
    scales that are 0 before training. With scales of 0 the model's output is the backbone's.

    Args:
        block_class: of the feedback block; the class of the backbone's blocks.
        block_config: arguments of that class.
        width: channels of the residual stream.
        start: blocks before the loop.
        length: blocks of the loop.
        passes: how often the loop runs again, each time with new feedback.
        enters: ``"every"`` loop block gets feedback, or only the ``"first"``.
        scale_shape: ``"channel"`` ``[length, width]``, ``"block"`` ``[length, 1]`` or ``"scalar"``
            ``[1, 1]``.
        learned_scale: ``False`` fixes the scales at 1; the feedback block's last layer is then
            what begins at 0.
        conditioning: timestep of the feedback block and of the loop's passes with feedback:
            ``"t"`` of the step, ``"ahead"``, what the output stands for, or ``"next"``, of the
            next step.
        schedules: by number of steps that they stand for, see :class:`FeedbackSchedule`.
        guidance_scale: that it was trained with: one, or the least and the largest.
        base_class, base_hash, base_id, base_norms: the backbone that it was trained for.
        scheduler_class, scheduler_config: whose steps it was trained for.

    Raises:
        ValueError: for a wrong value, naming it and what is allowed.

    Source: Inner Loop Feedback (arXiv 2501.13107, section 3). Where the feedback enters, the
    scales' shape, and the conditioning are not stated there.
    """

    config_name: Any = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_class: str = "BasicTransformerBlock",
        block_config: dict[str, Any] | None = None,
        width: int = 0,
        start: int = 0,
        length: int = 1,
        passes: int = 1,
        enters: str = "every",
        scale_shape: str = "channel",
        learned_scale: bool = True,
        conditioning: str = "t",
        schedules: dict[str, Any] | None = None,
        guidance_scale: Sequence[float] = (),
        base_class: str = "",
        base_hash: str = "",
        base_id: str = "",
        base_norms: Sequence[float] = (),
        scheduler_class: str = "",
        scheduler_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _allowed("block_class", block_class, tuple(BLOCKS))
        _allowed("enters", enters, ENTERS)
        _allowed("scale_shape", scale_shape, SCALES)
        _allowed("conditioning", conditioning, CONDITIONING)
        counts = (
            ("width", width, 0), ("start", start, 0), ("length", length, 1), ("passes", passes, 1),
        )  # fmt: skip
        for name, value, least in counts:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")
        self.start, self.length, self.passes = start, length, passes
        self.enters, self.scale_shape, self.conditioning = enters, scale_shape, conditioning
        if not isinstance(learned_scale, bool):
            raise ValueError(f"learned_scale is {learned_scale!r}; allowed: True, False")
        self.schedules = _schedules(schedules)
        try:
            self.block = BLOCKS[block_class](**(block_config or {}))
        except Exception as error:  # whatever a constructor of diffusers raises
            raise ValueError(f"block_config is not one of {block_class}: {error}") from error
        for part in self.block.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0  # who trains says which samples have no label
        rows = length if enters == "every" else 1
        shape = {"channel": (rows, width), "block": (rows, 1), "scalar": (1, 1)}[scale_shape]
        if learned_scale:
            self.scales = nn.Parameter(torch.zeros(shape))
        else:
            self.register_buffer("scales", torch.ones(shape))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any] | None, **options: Any
    ) -> Any:
        """A module out of the folder that ``save_pretrained`` wrote; safetensors alone are read.

        Args:
            pretrained_model_name_or_path: the folder, or a hub id.
            options: of diffusers' method of this name.

        Raises:
            ValueError: the folder misses a file, or an index leads to other ones.
            OSError: a file cannot be read.
        """
        folder = Path(pretrained_model_name_or_path or "")
        if pretrained_model_name_or_path and folder.is_dir():
            check_folder(folder / (options.get("subfolder") or ""))
        options["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_backbone(
        cls,
        model: nn.Module,
        *,
        start: int | None = None,
        length: int | None = None,
        copy_block: int | None = None,
        **settings: Any,
    ) -> FeedbackModule:
        """A new module for a model, not trained.

        Args:
            model: of a family that lists like blocks (DiT, PixArt).
            start: blocks before the loop; by default a quarter of all.
            length: blocks of the loop; by default three sevenths of all, as published for 28.
            copy_block: begin with the weights of this block of the model; ``None``: anew.
            settings: further arguments of the constructor.

        Raises:
            ValueError: the model has no list of like blocks, or the loop does not fit in it.
        """
        blocks = like_blocks(model)
        count = len(blocks)
        start = count // 4 if start is None else start
        length = max(1, round(count * 3 / 7)) if length is None else length
        if start < 0 or length < 1 or start + length > count:
            raise ValueError(
                f"start {start} and length {length} do not fit in {count} blocks; allowed: "
                f"start >= 0, length >= 1, start + length <= {count}"
            )
        if copy_block is not None and not 0 <= copy_block < count:
            raise ValueError(f"copy_block is {copy_block}; allowed: 0 to {count - 1}, or None")
        block_config = block_arguments(blocks[start], model)
        module: Any = cls(
            block_class=type(blocks[start]).__name__,
            block_config=block_config,
            width=int(blocks[start].dim),
            start=start,
            length=length,
            base_class=type(model).__name__,
            base_hash=model_hash(model),
            base_id=model_id(model),
            base_norms=list(weight_norms(model)),
            **settings,
        )
        theirs = {name: tuple(p.shape) for name, p in blocks[start].named_parameters()}
        ours = {name: tuple(p.shape) for name, p in module.block.named_parameters()}
        if theirs != ours:
            raise ValueError(
                f"a {type(blocks[start]).__name__} made anew differs from those of "
                f"{type(model).__name__}: {sorted(set(theirs.items()) ^ set(ours.items()))}"
            )
        if copy_block is not None:
            module.block.load_state_dict(blocks[copy_block].state_dict())
        if not module.config["learned_scale"]:
            block: Any = module.block
            for parameter in block.ff.net[-1].parameters():
                nn.init.zeros_(parameter)
        example = next(model.parameters())
        # ModelMixin.to() warns of modules to be kept in fp32, of which there are none.
        nn.Module.to(module, device=example.device, dtype=example.dtype)
        made: FeedbackModule = module
        return made

    @property
    def loop(self) -> range:
        """Indices of the loop's blocks."""
        return range(self.start, self.start + self.length)

    def scale(self, index: int) -> Tensor | None:
        """Of the feedback into the loop's block ``index``, ``[width]`` or ``[1]``; or ``None``."""
        if self.enters == "first":
            return self.scales[0] if index == 0 else None
        return self.scales[0 if self.scale_shape == "scalar" else index]

    def check(self, model: nn.Module) -> None:
        """Refuse another model than the one that this module is for.

        Raises:
            ValueError: naming what differs.
        """
        from accelrt.steps.origin import same_weights

        config: Any = self.config
        name = type(model).__name__
        blocks = like_blocks(model)
        what = ""
        if name != config.base_class:
            what = f"{config.base_class}, not {name}"
        elif model_hash(model) != config.base_hash:
            what = f"another {name} ({config.base_id or 'hash ' + config.base_hash})"
        elif not same_weights(tuple(config.base_norms), weight_norms(model)):
            what = f"a {name} with other weights ({config.base_id})"
        elif self.start + self.length > len(blocks):
            what = f"a {name} with at least {self.start + self.length} blocks"
        if what:
            raise ValueError(f"the feedback module was trained for {what}")

    def scheduler(self) -> Any:
        """A new scheduler, of the kind and with the settings that the module was trained for.

        Raises:
            ValueError: it was not trained.
        """
        import diffusers

        config: Any = self.config
        if not config.scheduler_class:
            raise ValueError("the feedback module does not say what scheduler it was trained for")
        cls: Any = getattr(diffusers, str(config.scheduler_class), None)
        if diffusers.SchedulerMixin not in getattr(cls, "__mro__", ()):
            raise ValueError(
                f"scheduler_class is {config.scheduler_class!r}; allowed: a scheduler of diffusers"
            )
        return cls.from_config(dict(config.scheduler_config or {}))

    def blocks_run(self, count: int, feedback: bool) -> int:
        """Blocks that one pass through a model of ``count`` blocks runs, with the feedback's."""
        return count + (self.passes * (self.length + 1) if feedback else 0)

    @contextmanager
    def applied(self, model: nn.Module, ahead: Tensor | None = None) -> Iterator[None]:
        """Meanwhile the *stock* forward of ``model`` runs with feedback, with gradients.

        This is what training uses and what the runtime is compared with: hooks on the blocks,
        no other code of the model's.

        Args:
            model: the backbone, not wrapped.
            ahead: timestep ``[B]`` for the passes with feedback, unless ``conditioning`` is
                ``"t"``.
        """
        from accelrt.models.family import parts_of

        (_, family), *_ = parts_of(model)
        blocks = like_blocks(model)
        loop: list[Any] = [blocks[i] for i in self.loop]
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        inputs: dict[str, Any] = {}
        signature = inspect.signature(type(model).forward)
        busy = False

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            bound = signature.bind(model, *args, **kwargs)
            bound.apply_defaults()
            inputs.update(bound.arguments)
            calls.clear()

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not busy:
                calls.append((args, kwargs))

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            nonlocal busy
            if busy:
                return None
            busy = True
            try:
                positional, given = calls[0]
                if ahead is not None and self.conditioning != "t":
                    given = family.at_time(model, inputs, given, ahead)
                return self._again(loop, positional[0], output, given)
            finally:
                busy = False

        handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            loop[0].register_forward_pre_hook(enter, with_kwargs=True),
            loop[-1].register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _again(
        self, loop: Sequence[nn.Module], head: Tensor, u: Tensor, given: dict[str, Any]
    ) -> Tensor:
        """The loop's output with feedback, from its first output."""
        for _ in range(self.passes):
            g = self.block(u, **given)
            v = head
            for index, block in enumerate(loop):
                scale = self.scale(index)
                v = block(v if scale is None else v + scale * g, **given)
            u = v
        return u


def like_blocks(model: nn.Module) -> Sequence[Any]:
    """The equal blocks of a model, in order.

    Raises:
        ValueError: the model's description lists none.
    """
    from accelrt.models.family import parts_of

    parts = parts_of(model)
    blocks = parts[0][1].like_blocks(model) if len(parts) == 1 else ()
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no list of like blocks; allowed: models whose description "
            f"has one (DiT, PixArt)"
        )
    return blocks


def block_arguments(block: Any, model: Any) -> dict[str, Any]:
    """The arguments that a block of a model was made with, as far as it or the model keeps them."""
    found = {}
    config = getattr(model, "config", {})
    for name, parameter in list(inspect.signature(type(block).__init__).parameters.items())[1:]:
        if name in block.__dict__:
            value = block.__dict__[name]
        elif name in config:
            value = config[name]
        elif parameter.default is not inspect.Parameter.empty:
            value = parameter.default
        else:
            raise ValueError(f"{type(block).__name__} does not tell its {name}")
        found[name] = value
    return found


def _schedules(given: Any) -> dict[int, FeedbackSchedule]:
    """By number of steps that they stand for, from the values of a configuration."""
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(str(steps).isdecimal() for steps in given):
        raise ValueError(f"schedules are {given!r}; allowed: a mapping from numbers of steps")
    return {
        int(steps): FeedbackSchedule.from_dict(int(steps), entry) for steps, entry in given.items()
    }


def _allowed(name: str, value: Any, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(values)}")
