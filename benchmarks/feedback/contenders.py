"""The rows: plain steps, Inner Loop Feedback, and what else there is in its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import rivals
import tasks
from configurations import wrapped
from diffusers import DPMSolverMultistepScheduler
from measure import Baselines, Row, timed

from accelrt.feedback import FeedbackModule
from accelrt.feedback.module import like_blocks
from accelrt.steps import Boundary, Interval, Rehash, Reuse, Taylor

MODELS = ("dit", "pixart")
FEWER_STEPS = (12, 11, 10, 9, 8)
ILF, WITHOUT = "ILF", "ILF's steps, no feedback"
NAIVE = "caching of the inner blocks, every 2nd"

# Settings to choose from, of each the one whose time is nearest to that of feedback.
FAMILIES: dict[str, tuple[rivals.Rival, ...]] = {
    "TaylorSeer": tuple(rivals.taylor_seer(n) for n in (3, 4, 6)),
    "TaylorSeer lite": tuple(rivals.taylor_seer_lite(n) for n in (2, 3, 4)),
    "FirstBlockCache": tuple(rivals.first_block_cache(t) for t in (0.03, 0.05, 0.1, 0.2)),
    "DBCache": tuple(rivals.cache_dit(t, taylor=True) for t in (0.08, 0.12, 0.2, 0.4)),
}


def pipeline(model: str) -> Any:
    """The stock pipeline of a reference model with DPM-Solver++.

    Its timesteps are spaced as the solver's own default has it: with DiT's "leading" ones the
    first is not the last noise level, and every number of steps ends at the same error.

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; allowed: {', '.join(MODELS)}")
    pipe = tasks.load(model)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config,
        algorithm_type="dpmsolver++",
        timestep_spacing="linspace",
        steps_offset=0,
    )
    return pipe


def fed(name: str, module: FeedbackModule, steps: int, kind: str = "ilf") -> Row:
    """The row of a module."""
    return Row(name, kind, steps, partial(wrapped, feedback=module))


def plain_rows(steps: int) -> tuple[list[Row], Baselines]:
    """Stock and exact, and exact with fewer steps.

    Raises:
        ValueError: ``steps`` is below 2.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; allowed: at least 2")
    counts = [steps, *(n for n in FEWER_STEPS if n < steps)]
    stock = Row(f"diffusers, {steps} steps", "stock", steps)
    exact = [Row(f"accelrt, {n} steps", "exact", n, wrapped) for n in counts]
    return [stock, *exact], Baselines(stock.name, exact[0].name)


def cut_rows(pipe: Any, steps: int) -> list[Row]:
    """Step rehash, and caching as the paper compares with.

    Its 326 of 560 blocks are 9 of 20 steps that run the first and the last block only: every
    second one but the last (a reading: it is not described there).
    """
    blocks = len(like_blocks(pipe.transformer))
    inner = Boundary(f"blocks.{blocks - 2}", f"blocks.{min(1, blocks - 2)}")
    out = Boundary("out")
    found = {
        "Taylor 2 of the output, every 2nd": ("rehash", Rehash(Interval(2), Taylor(2), out)),
        "Taylor 2 of the output, every 3rd": ("rehash", Rehash(Interval(3), Taylor(2), out)),
        NAIVE: ("caching", Rehash(Interval(2, warmup_steps=1), Reuse(), inner)),
    }
    return [
        Row(name, kind, steps, partial(wrapped, rehash=rehash))
        for name, (kind, rehash) in found.items()
    ]


def tuned(
    model: str,
    pipe: Any,
    steps: int,
    batch: int,
    target: Row,
    families: dict[str, tuple[rivals.Rival, ...]],
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Row], dict[str, float], dict[str, str]]:
    """Of each family of rivals the setting whose time is nearest to that of a row.

    Timed on one batch from a seed that no measured picture has.

    Args:
        model, pipe: what is sampled.
        steps: of the rivals.
        batch: pictures of the call.
        target: whose time to come near to.
        families: by name, their settings.
        tell: is told how far it is.

    Returns:
        The chosen rows; seconds over the target's of all that were tried; rivals that there
        are not, with reasons.
    """
    call = tasks.make(model, batch, batch, seed=rivals.CALIBRATION_SEED).batches[0]
    ratios: dict[str, float] = {}
    reasons: dict[str, str] = {}
    last = timed(pipe, target, call)[0]
    for family in families.values():
        seconds: dict[str, float] = {}
        for rival in family:
            reason = rival.supports(model, pipe)
            if reason is None:
                try:
                    seconds[rival.name] = timed(pipe, rival.row(steps), call)[0]
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                reasons[rival.name] = reason
            tell(f"choosing: {rival.name}, {reason or f'{seconds[rival.name]:.2f} s'}")
        # The target before and after: what the machine did in between falls on both alike.
        aim = timed(pipe, target, call)[0]
        ratios.update((name, 2 * value / (last + aim)) for name, value in seconds.items())
        last = aim
    chosen = [nearest(family, ratios) for family in families.values()]
    return [rival.row(steps) for rival in chosen if rival is not None], ratios, reasons


def nearest(family: Sequence[rivals.Rival], ratios: dict[str, float]) -> rivals.Rival | None:
    """The rival whose ratio is nearest to 1; ``None`` if none was timed."""
    known = [rival for rival in family if rival.name in ratios]
    return min(known, key=lambda rival: abs(math.log(ratios[rival.name])), default=None)
