"""Feedback modules: reading them, and how they were made."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.feedback import FeedbackModule, FeedbackSchedule


@dataclass(frozen=True)
class Made:
    """A module as it was made.

    Args:
        name: of its row.
        start, length, passes, enters: see :class:`accelrt.feedback.FeedbackModule`.
        scales: shape of the scales, or ``"fixed at 1"``.
        conditioning: timestep of the passes with feedback.
        objective: that it was trained with; ``None`` where nothing says so.
        feedback_steps: outer steps with feedback.
        ahead: share of a step that an output with feedback stands ahead.
    """

    name: str
    start: int
    length: int
    passes: int
    enters: str
    scales: str
    conditioning: str
    objective: str | None
    feedback_steps: int
    ahead: float


def load_module(folder: Path, pipe: Any, steps: int) -> FeedbackModule:
    """A module for the denoiser of a pipeline.

    Raises:
        ValueError: the folder has none, or it is for another model or number of steps.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; allowed: the folder of a feedback module")
    module: FeedbackModule = FeedbackModule.from_pretrained(folder)
    check_module(module, pipe, steps, str(folder))
    return module


def check_module(module: FeedbackModule, pipe: Any, steps: int, name: str) -> None:
    """Refuse a module for another model or number of steps.

    Raises:
        ValueError: naming the module and what differs.
    """
    try:
        module.check(pipe.transformer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if steps not in module.schedules:
        known = ", ".join(map(str, sorted(module.schedules))) or "none: it has no schedule"
        raise ValueError(f"{name}: steps is {steps}; allowed: {known}")


def load_ablations(folder: Path, pipe: Any, steps: int) -> dict[Path, FeedbackModule]:
    """The modules in the sub-folders of a folder, ordered by name.

    Raises:
        ValueError: there is none, or one is for another model or number of steps.
    """
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise ValueError(f"{folder}: no sub-folder has a config.json; at least one is needed")
    return {path: load_module(path, pipe, steps) for path in found}


def described(name: str, module: FeedbackModule, steps: int, folder: Path | None) -> Made:
    """A module as it was made, by its configuration and the ``training.json`` beside it."""
    config: Any = module.config
    schedule: FeedbackSchedule = module.schedules[steps]
    report = None if folder is None else folder / "training.json"
    objective = None
    if report is not None and report.is_file():
        values = json.loads(report.read_text(encoding="utf-8"))
        objective = values.get("config", {}).get("objective")
    return Made(
        name=name,
        start=module.start,
        length=module.length,
        passes=module.passes,
        enters=module.enters,
        scales=module.scale_shape if config["learned_scale"] else "fixed at 1",
        conditioning=module.conditioning,
        objective=objective,
        feedback_steps=sum(schedule.feedback),
        ahead=schedule.ahead,
    )


def without_feedback(module: FeedbackModule, steps: int) -> FeedbackModule:
    """The same module with its outer steps, none of which has feedback."""
    schedule = module.schedules[steps]
    silent = copy.copy(module)
    off = (False,) * schedule.outer
    silent.schedules = {steps: FeedbackSchedule(steps, off, schedule.timesteps)}
    return silent
