"""The settings of a training: validated, and read from dict, YAML or JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelrt.config import Settings
from accelrt.feedback.module import CONDITIONING, ENTERS, SCALES
from accelrt.feedback.schedule import FeedbackSchedule

OBJECTIVES = ("landing", "ahead")
PRECISIONS = ("no", "bf16", "fp16")
SAVED_AS = ("fp16", "bf16", "fp32")
#: What may differ between a checkpoint and the training that goes on from it.
CADENCE = ("checkpoint_every", "validate_every", "log_every", "tensorboard", "save_dtype")

_CHOICES = {
    "objective": OBJECTIVES, "enters": ENTERS, "scale_shape": SCALES,
    "conditioning": CONDITIONING, "mixed_precision": PRECISIONS, "save_dtype": SAVED_AS,
}  # fmt: skip
# The least value of each integer; those of the second group may be None.
_INTEGERS = {
    "stands_for": 1, "outer": 1, "passes": 1, "substeps": 1, "pool": 1, "epochs": 1,
    "rollout_batch": 1, "steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "seed": 0,
    "checkpoint_every": 1, "validate_every": 0, "validation_samples": 1, "log_every": 1,
}  # fmt: skip
_OPTIONAL = {"start": 0, "length": 1, "copy_block": 0, "max_sequence_length": 1}
# Lower end, upper end, and whether each end is allowed.
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "ahead": (0, 1, "[)"), "weight_power": (0, math.inf, "[)"),
    "condition_dropout": (0, 1, "[)"), "lr": (0, math.inf, "()"),
    "weight_decay": (0, math.inf, "[)"), "clip": (0, math.inf, "(]"),
    "ema_decay": (0, 1, "[)"), "diffusion_weight": (0, math.inf, "[)"),
}  # fmt: skip
_BOOLEANS = ("learned_scale", "tensorboard")


@dataclass(frozen=True)
class DistillConfig(Settings):
    """How a feedback module is trained.

    Args:
        objective: ``"landing"``: with the trained outputs the scheduler's own steps land on the
            teacher's trajectory of many small steps; ``"ahead"``: the output is that of the
            teacher at a less noisy timestep, made from the same picture and noise.
        stands_for: ``num_inference_steps`` of the calls that the module answers.
        outer: passes in place of them.
        timesteps: of the outer steps, falling; ``None`` for the scheduler's own.
        feedback: which of the outer steps have feedback; ``None`` for all.
        ahead: how far on its way to the next timestep a step's output stands for, from 0 to
            below 1; ``"ahead"`` takes its targets there.
        start, length, passes, enters, scale_shape, learned_scale, conditioning, copy_block: of the
            module; see :class:`~accelrt.feedback.FeedbackModule` and its ``from_backbone``.
        scheduler: name of a diffusers scheduler, made from the pipeline's configuration;
            ``None`` for the pipeline's own, or ``DPMSolverMultistepScheduler`` where that takes
            no timesteps.
        scheduler_options: changes of its configuration, such as ``solver_order``.
        guidance_scale: a number, or the least and the largest, of which each trajectory draws
            one; ``None`` for the default of the pipeline's call. ``"ahead"`` trains both halves
            of guidance and needs no number but for validation.
        classes: ids to draw from where no data is given; ``None`` for all that have a name.
        prompts: texts to draw from where no data is given.
        max_sequence_length: tokens of a prompt; ``None`` for the pipeline's default.
        substeps: steps of the teacher in each outer interval.
        pool: trajectories of a round, of all processes together.
        epochs: how often a round's steps are gone through before new ones are made.
        rollout_batch: trajectories that the teacher runs together.
        weight_power: how much more a step counts the further the plain outputs miss its landing:
            0 counts the shares of the misses that are left, of all steps alike; 1 the misses
            themselves, as the latents have them.
        condition_dropout: share of the rows of plain data that lose their class or prompt.
        steps: of the optimizer.
        batch: rows of a pass, for each process.
        accumulate: passes for each optimizer step.
        lr: largest learning rate; it rises over ``warmup`` steps and falls like a cosine to a
            hundredth.
        warmup: see ``lr``.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: largest norm of the gradient; infinity for none.
        ema_decay: of the average of the weights, which is what is kept.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``, as in accelerate.
        diffusion_weight: of the squared error to the noise, on data.
        seed: of everything random.
        checkpoint_every: optimizer steps between checkpoints.
        validate_every: optimizer steps between validations; 0 for one at the end.
        validation_samples: trajectories of a validation.
        log_every: optimizer steps between points of the loss curve.
        tensorboard: write event files.
        save_dtype: precision of the weights' file.

    Raises:
        ValueError: for a wrong value, naming the setting, the value and what is allowed.
    """

    objective: str = "landing"
    stands_for: int = 20
    outer: int = 10
    timesteps: tuple[int, ...] | None = None
    feedback: tuple[bool, ...] | None = None
    ahead: float = 0.5
    start: int | None = None
    length: int | None = None
    passes: int = 1
    enters: str = "every"
    scale_shape: str = "channel"
    learned_scale: bool = True
    conditioning: str = "t"
    copy_block: int | None = None
    scheduler: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float | tuple[float, float] | None = None
    classes: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None
    max_sequence_length: int | None = None
    substeps: int = 5
    pool: int = 256
    epochs: int = 3
    rollout_batch: int = 64
    weight_power: float = 0.3
    condition_dropout: float = 0.1
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema_decay: float = 0.995
    mixed_precision: str = "no"
    diffusion_weight: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 0
    validation_samples: int = 16
    log_every: int = 10
    tensorboard: bool = True
    save_dtype: str = "fp16"

    def __post_init__(self) -> None:
        for name in ("timesteps", "feedback", "classes", "prompts", "betas"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
            elif value is not None:
                raise ValueError(f"{name} is {value!r}; allowed: a list")
        if isinstance(self.guidance_scale, list):
            object.__setattr__(self, "guidance_scale", tuple(self.guidance_scale))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(choices)}"
                )
        for name, least in {**_INTEGERS, **_OPTIONAL}.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is_integer(value) or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}; allowed: an integer >= 0, below 2^63")
        for name, (low, high, ends) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high, ends)
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: true, false")
        if len(self.betas) != 2:
            raise ValueError(f"betas are {list(self.betas)}; allowed: two numbers")
        for value in self.betas:
            _check_number("betas", value, 0, 1, "[)")
        if not isinstance(self.scheduler_options, dict):
            raise ValueError(
                f"scheduler_options are {self.scheduler_options!r}; allowed: a mapping"
            )
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ValueError(f"scheduler is {self.scheduler!r}; allowed: a class name, or null")
        self._check_guidance()
        self._check_conditions()
        self._check_schedule()

    def _check_guidance(self) -> None:
        given = self.guidance_scale
        if given is None:
            return
        values = given if isinstance(given, tuple) else (given,)
        if len(values) > 2 or not values or any(not _is_number(v) or v < 1 for v in values):
            raise ValueError(
                f"guidance_scale is {given!r}; allowed: a number from 1, or the least and the "
                f"largest"
            )
        if values[0] > values[-1]:
            raise ValueError(f"guidance_scale is {list(values)}; allowed: the least first")

    def _check_conditions(self) -> None:
        if self.classes is not None and (
            not self.classes or any(not _is_integer(c) or c < 0 for c in self.classes)
        ):
            raise ValueError(f"classes are {list(self.classes)}; allowed: ids from 0")
        if self.prompts is not None and (
            not self.prompts or any(not isinstance(p, str) for p in self.prompts)
        ):
            raise ValueError(f"prompts are {list(self.prompts)}; allowed: texts, at least one")

    def _check_schedule(self) -> None:
        for name in ("timesteps", "feedback"):
            value = getattr(self, name)
            if value is not None and len(value) != self.outer:
                raise ValueError(
                    f"{name} has {len(value)} entries; allowed: {self.outer}, one for each outer "
                    f"step"
                )
        if self.timesteps is not None and any(not _is_integer(t) for t in self.timesteps):
            raise ValueError(f"timesteps are {list(self.timesteps)}; allowed: integers")
        if not any(self.schedule.feedback):
            raise ValueError("feedback is false at every step; allowed: true at one at least")
        if self.objective == "ahead" and self.ahead == 0:
            raise ValueError("ahead is 0; the objective ahead needs a number above 0, below 1")
        rows = self.pool * sum(self.schedule.feedback)
        if self.objective == "landing" and rows < self.batch:
            raise ValueError(
                f"pool {self.pool} with {sum(self.schedule.feedback)} steps of feedback makes "
                f"{rows} rows; allowed: at least batch, {self.batch}"
            )

    @property
    def schedule(self) -> FeedbackSchedule:
        """The outer steps."""
        feedback = (True,) * self.outer if self.feedback is None else self.feedback
        return FeedbackSchedule(self.stands_for, feedback, self.timesteps, self.ahead)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values; the inverse of :meth:`from_dict`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def differences(one: dict[str, Any], other: dict[str, Any]) -> Sequence[str]:
    """Settings that differ between two configs as dicts and would change the weights."""
    names = {*one, *other} - {*CADENCE}
    return sorted(name for name in names if one.get(name) != other.get(name))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check_number(name: str, value: Any, low: float, high: float, ends: str) -> None:
    above = _is_number(value) and (value >= low if ends[0] == "[" else value > low)
    if not above or not (value <= high if ends[1] == "]" else value < high):
        below = "" if high == math.inf else f", {'up to' if ends[1] == ']' else 'below'} {high:g}"
        raise ValueError(
            f"{name} is {value!r}; allowed: a number {'from' if ends[0] == '[' else 'above'} "
            f"{low:g}{below}"
        )
