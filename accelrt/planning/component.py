"""The plan of one model for one size of call."""

from __future__ import annotations

from typing import Any

import torch

from accelrt.config import Config
from accelrt.groups.slicing import default_slice_mib
from accelrt.models.forward import Forward

from .budget import refuse
from .cost import Machine
from .plan import ComponentPlan
from .search import Found, Model, finish, search, smallest

#: How often a plan is tightened because its arena has gaps.
TIGHTENINGS = 4


def plan_component(
    clone: Forward,
    inputs: dict[str, Any],
    base: Config,
    rates: Machine,
    device: torch.device,
    limit: int | None,
    apart: int = 0,
) -> tuple[ComponentPlan, Model, Found]:
    """The fastest plan whose memory stays within ``limit``.

    Args:
        clone: a forward of a module on the meta device.
        inputs: all arguments of the call, meta tensors among them.
        base: what the user configured.
        rates: of the machine that the plan is for.
        device: where it runs.
        limit: bytes for the activations; ``None`` for the least there can be.
        apart: bytes of the budget that are taken already, for the error.

    Raises:
        BudgetError: no exact plan fits.
    """
    shape = clone.family.call_shape(clone.module, inputs)
    batch = 1 if shape is None else shape.samples
    model = Model(clone, inputs, base, rates, default_slice_mib(device))
    if limit is None:
        least = smallest(model, batch)
        found = search(model, batch, least)
        assert found is not None
        return finish(model, found, clone.path, least), model, found
    target = limit
    for _ in range(TIGHTENINGS):
        found = search(model, batch, target)
        if found is None:
            break
        plan = finish(model, found, clone.path, limit)
        if plan.reserved_bytes <= limit:
            return plan, model, found
        target -= plan.reserved_bytes - limit
    least = smallest(model, batch)
    found = search(model, batch, least)
    assert found is not None
    plan = finish(model, found, clone.path, limit)
    if plan.reserved_bytes <= limit:
        return plan, model, found
    raise refuse(plan.reserved_bytes, apart, limit, clone.path, plan.binding)
