"""The forms of a model that take turns: eager, compiled, accelrt, accelrt within memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import accelrt
from accelrt.benchmarking.budgets import plan_call
from accelrt.benchmarking.measure import Form
from accelrt.benchmarking.models import ModelCase
from accelrt.benchmarking.weights import share

EAGER, COMPILED, FROZEN = "eager", "compile", "compile+freezing"
OURS, TWICE, FLOOR = "accelrt", "accelrt 2x min", "accelrt min"
NAMES = (EAGER, COMPILED, FROZEN, OURS, TWICE, FLOOR)
#: These spend minutes on their first call.
COMPILING = (COMPILED, FROZEN)
COMPILERS = ("inductor", "eager")


@dataclass(frozen=True)
class Made:
    """A form, ready for its first call.

    Args:
        form: to be called.
        reserved_bytes: of its memory plan, where it has one.
    """

    form: Form
    reserved_bytes: int | None = None


def make(
    case: ModelCase,
    model: Any,
    dtype: torch.dtype,
    names: Sequence[str] = NAMES,
    compiler: str = "inductor",
) -> dict[str, Made]:
    """The forms around the same weights, in the order of :data:`NAMES`.

    Plans of memory are made here; nothing is compiled yet.

    Args:
        case: inputs and call.
        model: in ``dtype``, on the CPU.
        dtype: of the inputs.
        names: the forms that are wanted.
        compiler: backend of ``torch.compile``; ``"eager"`` only traces.
    """
    inputs = case.inputs(dtype, "cpu")
    floor: list[int] = []

    def within(budget: int | str) -> Made:
        wrapped = accelrt.wrap(share(model), memory_budget=budget)
        return Made(Form(wrapped, inputs, case.run), plan_call(wrapped, inputs))

    def smallest() -> Made:
        made = within("min")
        floor.append(made.reserved_bytes or 0)
        return made

    def twice() -> Made:
        if not floor:
            smallest()
        return within(2 * floor[0])

    def compiled(**options: Any) -> Made:
        chosen: dict[str, Any] = {"backend": compiler, "dynamic": False}
        if compiler == "inductor":
            chosen["options"] = options
        return Made(Form(torch.compile(share(model), **chosen), inputs, case.run))

    makers: dict[str, Callable[[], Made]] = {
        EAGER: lambda: Made(Form(model, inputs, case.run)),
        COMPILED: compiled,
        FROZEN: lambda: compiled(freezing=True),
        OURS: lambda: Made(Form(accelrt.wrap(share(model)), inputs, case.run)),
        FLOOR: smallest,
        TWICE: twice,
    }
    found = {name: makers[name]() for name in makers if name in names}
    return {name: found[name] for name in NAMES if name in found}
