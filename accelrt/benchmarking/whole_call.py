"""One whole call of a published pipeline in a process of its own: does it keep its budget?

``python -m accelrt.benchmarking.whole_call`` answers one request of :func:`.child.ask`. A process
of its own makes the peak of its resident memory, less what interpreter and libraries took before
the weights, the memory of the call.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

import accelrt
from accelrt.config import Config
from accelrt.memory.sizes import parse_budget
from accelrt.memory.tracker import weight_bytes

from .child import answer, ask
from .pipelines import PIPELINES, PipelineCase
from .process import ProcessWatch, release_memory
from .progress import Progress
from .weights import on_meta, random_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class WholeCall:
    """What one process measured.

    Args:
        name: of the pipeline.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        budget_bytes: what the call was to keep; ``None`` if the smallest plan was asked for.
        planned_bytes: the peak of the plan, weights included.
        process_bytes: growth of the resident memory from before the weights to its peak.
        weight_bytes: of all components.
        seconds: of the call, with one denoising step; planning apart.
        planning_seconds: of looking at the plan ahead of the call.
        misplaced, spills: buffers that were not where, or not in the arena that, the plan
            wanted.
        plans: per model: passes, live and reserved bytes that were planned.
        finite: all pixels are numbers.
    """

    name: str
    dtype: str
    budget_bytes: int | None
    planned_bytes: int
    process_bytes: int
    weight_bytes: int
    seconds: float
    planning_seconds: float
    misplaced: int
    spills: int
    plans: list[dict[str, Any]]
    finite: bool

    @property
    def kept(self) -> bool:
        """The process stayed within the budget."""
        return self.budget_bytes is None or self.process_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "kept": self.kept}


def on_meta_pipeline(case: PipelineCase, dtype: torch.dtype) -> Any:
    """The pipeline without weights, for plans."""
    return case.build(lambda make: on_meta(make, dtype))


def measure_here(
    name: str, size: str, dtype: str, budget: str, seed: int, config: Config
) -> WholeCall:
    """Build the pipeline, call it once under its budget, and measure this process.

    Args:
        name: one of :data:`PIPELINES`.
        size: ``"full"`` or ``"tiny"``.
        dtype: of weights and activations.
        budget: as :func:`accelrt.wrap` takes it.
        seed: of the weights.
        config: the other settings of the wrap.

    Raises:
        BudgetError: no exact plan keeps the budget.
        RuntimeError: the system does not tell the peak of a process.
    """
    case = PIPELINES[name](size)
    kind = DTYPES[dtype]
    _warm(name, kind)
    release_memory()
    with ProcessWatch() as watch, torch.no_grad():
        pipe = case.build(lambda make: random_model(make, kind, "cpu", seed))
        pipe.set_progress_bar_config(disable=True)
        weights = weight_bytes(*(m for m in pipe.components.values() if hasattr(m, "parameters")))
        begin = time.perf_counter()
        plan = accelrt.plan(
            pipe, height=case.height, width=case.width, num_frames=case.frames,
            memory_budget=budget, config=config,
        )  # fmt: skip
        planning = time.perf_counter() - begin
        accelrt.wrap(pipe, config=config, memory_budget=budget)
        begin = time.perf_counter()
        frames = case.call(pipe)
        seconds = time.perf_counter() - begin
    if watch.growth is None:
        raise RuntimeError("this system does not tell the peak of a process (Linux does)")
    spec = parse_budget(budget)
    planner: Any = pipe.unet.forward.planner
    arenas = planner.arenas
    return WholeCall(
        name=name,
        dtype=dtype,
        budget_bytes=spec if isinstance(spec, int) else None,
        planned_bytes=plan.peak_bytes,
        process_bytes=watch.growth,
        weight_bytes=weights,
        seconds=seconds,
        planning_seconds=planning,
        misplaced=sum(arena.misplaced for arena in arenas),
        spills=sum(arena.spills for arena in arenas),
        plans=[_about(part) for part in planner.plans.values()],
        finite=bool(torch.isfinite(torch.as_tensor(frames)).all()),
    )


def _about(part: Any) -> dict[str, Any]:
    return {
        "path": part.path,
        "samples_per_pass": part.samples_per_pass,
        "recompute_skips": part.recompute_skips,
        "live_bytes": part.peak_bytes,
        "reserved_bytes": part.reserved_bytes,
    }


def _warm(name: str, kind: torch.dtype) -> None:
    """Load what the libraries load at their first use: the same call, at a trial size."""
    case = PIPELINES[name]("tiny")
    with torch.no_grad():
        pipe = case.build(lambda make: random_model(make, kind, "cpu"))
        pipe.set_progress_bar_config(disable=True)
        accelrt.wrap(pipe, memory_budget="min")
        case.call(pipe)


def measure_apart(
    name: str, size: str, dtype: str, budget: str, seed: int, config: Config
) -> dict[str, Any]:
    """:func:`measure_here` in a new process.

    Raises:
        ValueError: the budget cannot be met, or is none.
        RuntimeError: the process failed; with its last words.
    """
    request = {
        "name": name, "size": size, "dtype": dtype, "budget": budget, "seed": seed,
        "config": config.to_dict(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    command = [sys.executable, "-m", "accelrt.benchmarking.whole_call"]
    result: dict[str, Any] = ask(command, request, Progress())
    if "error" in result:
        raise ValueError(result["error"])
    return result


def _handle(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    torch.set_num_threads(request.pop("threads"))
    try:
        config = Config.from_dict(request.pop("config"))
        return measure_here(**request, config=config).to_dict()
    except ValueError as error:  # a BudgetError, or what is no budget
        return {"error": str(error)}


if __name__ == "__main__":
    answer(_handle)
