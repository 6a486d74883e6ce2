"""The plan of one model for one size of call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from accelrt.config import Config
from accelrt.errors import BudgetError
from accelrt.groups.slicing import default_slice_mib
from accelrt.memory.sizes import bytes_text
from accelrt.models.forward import Forward

from .cost import Machine
from .plan import ComponentPlan
from .search import Found, Model, finish, loosest, lowered, search, smallest

#: How often a plan is tightened because its arena has gaps.
TIGHTENINGS = 4
#: How often one is loosened because what is kept and the largest scratch do not meet, and for how
#: much room, as a share of the limit.
LOOSENINGS, ROOM = 2, 0.02
#: By the estimates, how much longer the plan of "min" may take than the fastest.
SLOWER_AT_MOST = 1.1
#: How finely its memory is looked for, as a share of it.
LIMIT_STEP = 0.01


def plan_component(
    clone: Forward,
    inputs: dict[str, Any],
    base: Config,
    rates: Machine,
    device: torch.device,
    limit: int | None,
    apart: int = 0,
    graphs: bool = False,
) -> tuple[ComponentPlan, Model, Found]:
    """The fastest plan whose memory stays within ``limit``.

    Args:
        clone: a forward of a module on the meta device.
        inputs: all arguments of the call, meta tensors among them.
        base: what the user configured.
        rates: of the machine that the plan is for.
        device: where it runs.
        limit: bytes for the activations; ``None`` for the least that is not much slower.
        apart: bytes of the budget that are taken already, for the error.
        graphs: its passes become CUDA graphs, whose pool counts.

    Raises:
        BudgetError: no exact plan fits.
    """
    shape = clone.family.call_shape(clone.module, inputs)
    batch = 1 if shape is None else shape.samples
    model = Model(clone, inputs, base, rates, default_slice_mib(device))
    if limit is None:
        found = lowered(model, _least_in_time(model, batch), SLOWER_AT_MOST)
        plan = _finished(model, found, clone.path, 0, graphs)
        return replace(plan, limit_bytes=plan.needed_bytes), model, found
    target = limit
    for _ in range(TIGHTENINGS):
        chosen = search(model, batch, target)
        if chosen is None:
            break
        plan = _finished(model, chosen, clone.path, limit, graphs)
        if plan.needed_bytes <= limit:
            return _loosened(model, batch, target, plan, chosen, graphs)
        target -= plan.needed_bytes - limit
    found = _least(model, batch)
    plan = _finished(model, found, clone.path, limit, graphs)
    if plan.needed_bytes <= limit:
        return plan, model, found
    raise _refusal(plan.needed_bytes, apart, limit, clone.path, plan.binding)


def _loosened(
    model: Model, batch: int, target: int, plan: ComponentPlan, found: Found, graphs: bool
) -> tuple[ComponentPlan, Model, Found]:
    """A faster plan within the limit, if the search for one has left room there."""
    limit = plan.limit_bytes
    for _ in range(LOOSENINGS):
        room = limit - plan.needed_bytes
        if room < ROOM * limit:
            break
        target += room
        faster = search(model, batch, target)
        if faster is None or faster.seconds >= found.seconds:
            break
        other = _finished(model, faster, plan.path, limit, graphs)
        if other.needed_bytes > limit:
            break
        plan, found = other, faster
    return plan, model, found


def _finished(model: Model, found: Found, path: str, limit: int, graphs: bool) -> ComponentPlan:
    """The plan of a cut, with the pool of its graphs."""
    plan = finish(model, found, path, limit)
    return replace(plan, graphs_bytes=plan.own_bytes) if graphs else plan


def _least(model: Model, batch: int) -> Found:
    """The fastest cut among those that need least."""
    found = search(model, batch, smallest(model, batch))
    if found is None:
        raise RuntimeError(f"{model.forward.path or 'the model'}: the smallest cut is not one")
    return found


def _least_in_time(model: Model, batch: int) -> Found:
    """The cut with the least memory among those that are not much slower.

    Some kilobytes are not worth twice the time. A limit that is higher allows a faster cut:
    the lowest that allows one which is fast enough is found by halving.
    """
    found = _least(model, batch)
    fastest = model.run(model.settings(batch)[0], model.fastest)
    longest = SLOWER_AT_MOST * fastest.seconds
    if found.seconds <= longest:
        return found
    low, high = smallest(model, batch), loosest(fastest)
    while high - low > LIMIT_STEP * high:
        limit = (low + high) // 2
        faster = search(model, batch, limit)
        if faster is not None and faster.seconds <= longest:
            found, high = faster, limit
        else:
            low = limit
    return found


def _refusal(smallest_bytes: int, apart: int, limit: int, path: str, binding: str) -> BudgetError:
    """The error of a budget that no plan keeps."""
    budget, needed = limit + apart, smallest_bytes + apart
    where = f"{path}: {binding}" if path else binding
    beside = f", beside {bytes_text(apart)} of weights and workspace" if apart else ""
    return BudgetError(
        f"memory_budget {bytes_text(budget)} cannot be met: the smallest is "
        f"{bytes_text(needed)}; {where} binds with {bytes_text(smallest_bytes)} of "
        f"activations{beside}",
        budget_bytes=budget,
        smallest_bytes=needed,
        binding=where,
    )
