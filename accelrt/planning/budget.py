"""Keeps the memory budget of a wrapped pipeline: plans every new call before it runs."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.errors import BudgetError
from accelrt.memory.arena import Arena
from accelrt.memory.sizes import AUTO, MIN, bytes_text
from accelrt.memory.tracker import storage_bytes
from accelrt.models.forward import Cut, Forward
from accelrt.steps.graphs import expected

from .clone import Double, double_of, fingerprint, inputs_on_meta
from .component import plan_component
from .cost import machine
from .dryrun import MetaKernels
from .plan import ComponentPlan
from .resident import free_bytes, product_bytes, resident_bytes, workspace_bytes
from .search import Found, Model

#: Share of the free memory that "auto" leaves free.
AUTO_MARGIN = 0.1
#: Sizes of calls whose plans are kept.
KEPT_PLANS = 32


@dataclass
class _Planned:
    """One call's plan, and the cut that runs it."""

    plan: ComponentPlan
    cut: Cut
    held_bytes: int = 0  # for its graphs, while other models run


class BudgetPlanner:
    """Plans calls and keeps their plans: one per wrapped pipeline or model.

    The budget of a pipeline is for the whole call: the weights of all components, the
    activations of the one that runs, and what the library needs. That of a single model
    is for what its forward allocates. It is for one call at a time: a call that finds
    another running takes its buffers from outside of the arena, and is counted.

    Args:
        spec: what :func:`accelrt.memory.sizes.parse_budget` returned.
        config: what the user configured.
        modules: all modules of the pipeline, wrapped or not.
        standalone: a single model, whose weights are not counted.
    """

    def __init__(
        self, spec: int | str, config: Config, modules: list[nn.Module], *, standalone: bool
    ) -> None:
        self.spec = spec
        self.config = config
        self.standalone = standalone
        self._modules = [weakref.ref(module) for module in modules]
        self._forwards: list[weakref.ref[Forward]] = []
        self._planned: OrderedDict[tuple[Any, ...], _Planned] = OrderedDict()
        self._doubles: dict[int, Double] = {}
        self._arenas: dict[torch.device, Arena] = {}
        self._lock = threading.RLock()
        self._told: set[str] = set()
        self.plans: dict[str, ComponentPlan] = {}
        self._held: dict[str, int] = {}

    def check_weights(self) -> None:
        """Refuse a budget that the weights alone exceed.

        Raises:
            BudgetError: naming what the weights need.
        """
        if not isinstance(self.spec, int) or self.standalone:
            return
        modules = self._living()
        devices = {p.device.type: p.device for module in modules for p in module.parameters()}
        device = devices.get("cuda", devices.get("cpu", torch.device("cpu")))
        weights = resident_bytes(modules, device)
        if weights >= self.spec:
            raise BudgetError(
                f"memory_budget {bytes_text(self.spec)} cannot be met: the weights alone are "
                f"{bytes_text(weights)}; weights bind (on a GPU, pipe.enable_group_offload() "
                f"before the wrap streams them)",
                budget_bytes=self.spec,
                smallest_bytes=weights,
                binding="weights",
            )

    def attach(self, forward: Forward) -> None:
        """``forward`` asks here before each call."""
        forward.planner = self
        self._forwards.append(weakref.ref(forward))

    def cut(self, forward: Forward, inputs: dict[str, Any]) -> Cut:
        """The planned cut of a call; planned now if there is none of its size yet.

        Raises:
            BudgetError: no exact cut fits, of this model or of those that run after it.
        """
        with self._lock:
            key = (id(forward), fingerprint(forward.module), signature(inputs))
            planned = self._planned.get(key)
            if planned is None:
                try:
                    planned = self._plan(forward, inputs)
                    self._look_ahead(forward, inputs, planned.held_bytes)
                finally:
                    self._doubles.clear()
                self._planned[key] = planned
                while len(self._planned) > KEPT_PLANS:
                    self._planned.popitem(last=False)
            self._planned.move_to_end(key)
            self.plans[forward.path] = planned.plan
            # The pool is as large as the largest form needs.
            held = self._held.get(forward.path, 0)
            self._held[forward.path] = max(held, planned.held_bytes)
            return planned.cut

    def done(self, forward: Forward) -> None:
        """Tell of what exceeded its plan; give the slab back after a VAE.

        Pictures are made next, by nobody's plan. A denoiser's slab stays for its next step.
        """
        for arena in self.arenas:
            if arena.spills:
                self._tell(
                    f"{arena.spills} buffers ({bytes_text(arena.spilled_bytes)}) found no room in "
                    f"the planned arena: something keeps features alive, and the run exceeds its "
                    f"plan"
                )
            if not forward.is_denoiser and arena.busy.acquire(blocking=False):
                try:
                    arena.release()
                finally:
                    arena.busy.release()

    def skipped(self, forward: Forward, reason: str) -> None:
        """A call runs without a plan."""
        name = forward.path or type(forward.module).__name__
        self._tell(f"{name} runs without its memory budget: {reason}")

    def forget(self, forward: Forward) -> None:
        """The module has changed: plan its calls anew."""
        with self._lock:
            for key in [key for key in self._planned if key[0] == id(forward)]:
                del self._planned[key]

    def release(self) -> None:
        """Give the arenas back."""
        with self._lock:
            for arena in self._arenas.values():
                arena.release()
            self._planned.clear()
            self._arenas.clear()

    @property
    def arenas(self) -> tuple[Arena, ...]:
        """Where the buffers live, one per device."""
        return tuple(self._arenas.values())

    def report(self, forward: Forward) -> tuple[int | None, int]:
        """Reserved bytes of the last plan, if there was a call; and :meth:`exceeded`."""
        plan = self.plans.get(forward.path)
        return None if plan is None else plan.reserved_bytes, self.exceeded()

    def exceeded(self) -> int:
        """Buffers that found no room in the arena, and runs that found it taken."""
        return sum(arena.spills + arena.contended for arena in self.arenas)

    def _tell(self, message: str) -> None:
        """Warn, once for each kind of message."""
        kind = message.rpartition(":")[2]
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, stacklevel=4)

    def _living(self) -> list[nn.Module]:
        modules = (reference() for reference in self._modules)
        return [module for module in modules if module is not None]

    def _limit(self, forward: Forward, inputs: dict[str, Any]) -> tuple[int | None, int]:
        """What the activations of a call may take, or ``None``; and what is set apart."""
        if self.spec == MIN:
            return None, 0
        tensors = list(tensors_of(inputs))
        device = device_of(tensors)
        count = self.spec if isinstance(self.spec, int) else 0
        workspace = workspace_bytes(forward.module, device, count)
        if self.spec == AUTO:
            arena = self._arenas.get(device)
            held = 0 if arena is None else arena.reserved_bytes + arena.temporary_bytes
            return int((free_bytes(device) + held) * (1 - AUTO_MARGIN)) - workspace, 0
        apart = 0
        if not self.standalone:
            apart = workspace + storage_bytes(tensors)
            apart += resident_bytes(self._living(), device, forward.module)
            apart += self._graphs_of_others(forward)
        assert isinstance(self.spec, int)
        return self.spec - apart, apart

    def _plan(self, forward: Forward, inputs: dict[str, Any]) -> _Planned:
        limit, apart = self._limit(forward, inputs)
        device = device_of(tensors_of(inputs))
        kept = self._kept_features(forward, inputs)
        if limit is not None:
            limit, apart = limit - kept, apart + kept
        plan, model, found = self._search(forward, inputs, device, limit, apart)
        cut = model.configure(forward, found.setting, found.chosen)
        if device.type == "meta":
            return _Planned(plan, cut)
        arena = self._arenas.setdefault(device, Arena(device))
        product = product_bytes(forward.module, device)
        # With room in the budget there is no reason to give pages back and take them anew.
        allowed = max(plan.slab_bytes + plan.own_bytes, limit or 0)
        cut = cut.placed(
            arena, plan.offsets, plan.slab_bytes, allowed, product, temporary_bytes=plan.own_bytes
        )
        # The memory of a request's features waits for the next one, if graphs work in it.
        held = plan.graphs_bytes + kept if plan.graphs_bytes else 0
        return _Planned(plan, cut, held)

    def _graphs_of_others(self, forward: Forward) -> int:
        """What graphs hold while another model runs."""
        return sum(held for path, held in self._held.items() if path != forward.path)

    def _search(
        self,
        forward: Forward,
        inputs: dict[str, Any],
        device: torch.device,
        limit: int | None,
        apart: int,
    ) -> tuple[ComponentPlan, Model, Found]:
        floating = (t.dtype for t in tensors_of(inputs) if t.is_floating_point())
        rates = machine(device, next(floating, torch.float32))
        double, on_meta = self._double(forward), inputs_on_meta(inputs)
        graphs = expected(self.config, forward, device)
        return plan_component(double, on_meta, self.config, rates, device, limit, apart, graphs)

    def _double(self, forward: Forward) -> Forward:
        if id(forward) not in self._doubles:
            self._doubles[id(forward)] = double_of(
                forward.module, forward.family, self.config, forward.path
            )
        return self._doubles[id(forward)].forward

    def _kept_features(self, forward: Forward, inputs: dict[str, Any]) -> int:
        """Bytes that a step policy keeps from step to step, which is not in any plan."""
        if forward.stepper is None:
            return 0
        with torch.no_grad(), MetaKernels():
            return forward.stepper.cache_bytes(self._double(forward), inputs_on_meta(inputs))

    def _look_ahead(self, forward: Forward, inputs: dict[str, Any], graphs: int) -> None:
        """Refuse now what a later model of the same request could not keep.

        A decoder that does not fit would else throw away all denoising steps.

        Args:
            forward: of the model that runs now.
            inputs: of its call.
            graphs: bytes that are held for its CUDA graphs; an earlier plan may count some.
        """
        graphs = max(0, graphs - self._held.get(forward.path, 0))
        shape = forward.family.call_shape(forward.module, inputs)
        if shape is None or self.standalone or self.spec == MIN:
            return
        sample: Tensor = inputs[forward.family.input_name]
        for reference in self._forwards:
            other = reference()
            if other is None or other is forward or other.path.endswith("encoder"):
                continue
            example = other.family.example(other.module, shape, sample.dtype)
            if example is not None:
                limit, apart = self._limit(other, {"like": sample})
                limit, apart = None if limit is None else limit - graphs, apart + graphs
                self._search(other, other.arguments(**example), sample.device, limit, apart)


def signature(value: Any) -> Any:
    """Everything about the arguments of a call that its memory depends on."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(signature(item) for item in value)
    return type(value).__name__ if value is not None else None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def device_of(tensors: Iterator[Tensor] | list[Tensor]) -> torch.device:
    """Where a call runs: the device of its first tensor that is no scalar."""
    found = [t.device for t in tensors if t.dim() > 0]
    return found[0] if found else torch.device("cpu")
