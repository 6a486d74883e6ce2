"""Plans of a model that is wrapped with a memory budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelrt.wrap import forwards


def plan_call(wrapped: Any, inputs: Mapping[str, Any]) -> int:
    """Plan a forward without running it.

    Args:
        wrapped: a denoiser with a memory budget.
        inputs: of the forward, by keyword.

    Returns:
        Bytes that its plan reserves.

    Raises:
        BudgetError: the budget cannot be met.
    """
    for _, forward in forwards(wrapped):
        if forward.planner is not None:
            forward.stages()  # a look at the module voids its plans, so it comes first
            forward.planner.cut(forward, forward.arguments(**inputs))
    return reserved_bytes(wrapped)


def reserved_bytes(wrapped: Any) -> int:
    """The most that a plan of a called, or planned, model reserves.

    Raises:
        ValueError: it has no plan.
    """
    planners: list[Any] = [forward.planner for _, forward in forwards(wrapped)]
    plans = [plan for p in planners if p is not None for plan in p.plans.values()]
    if not plans:
        raise ValueError("the model has no plan; wrap it with a memory_budget and call it")
    return max(int(plan.reserved_bytes) for plan in plans)
