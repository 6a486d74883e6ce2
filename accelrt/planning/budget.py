"""Keeps the memory budget of a wrapped pipeline: plans every new call before it runs."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelrt.errors import BudgetError
from accelrt.memory.arena import Arena
from accelrt.memory.sizes import AUTO, MIN, bytes_text
from accelrt.memory.tracker import storage_bytes, weight_bytes

from .clone import inputs_on_meta, meta_clone
from .cost import machine
from .plan import ComponentPlan

if TYPE_CHECKING:
    from accelrt.config import Config
    from accelrt.models.forward import Cut, Forward

#: Share of the free memory that "auto" leaves free.
AUTO_MARGIN = 0.1


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` can take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    import psutil

    return int(psutil.virtual_memory().available)


def workspace_bytes(model: nn.Module, device: torch.device) -> int:
    """What the library takes inside of its operators beside their outputs.

    On the CPU oneDNN holds the weights of the running convolution or product a second
    time, in its own order.
    """
    if device.type == "cuda":
        return 0  # in the device's own pools, which torch reserves once
    largest = max((p.numel() * p.element_size() for p in model.parameters()), default=0)
    return largest


@dataclass
class _Planned:
    """One call's plan, and the cut that runs it."""

    plan: ComponentPlan
    cut: Cut


class BudgetPlanner:
    """Plans calls and keeps their plans: one per wrapped pipeline or model.

    The budget of a pipeline is for the whole call: the weights of all components, the
    activations of the one that runs, and what the library needs. That of a single model
    is for what its forward allocates.

    Args:
        spec: what :func:`parse_budget` returned.
        config: what the user configured.
        modules: all modules of the pipeline, wrapped or not, by component name.
        standalone: a single model, whose weights are not counted.
    """

    def __init__(
        self, spec: int | str, config: Config, modules: dict[str, nn.Module], *, standalone: bool
    ) -> None:
        self.spec = spec
        self.config = config
        self.standalone = standalone
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}
        self._forwards: list[weakref.ref[Forward]] = []
        self._planned: dict[tuple[Any, ...], _Planned] = {}
        self._checked: set[tuple[Any, ...]] = set()
        self._clones: dict[int, Any] = {}
        self._arenas: dict[torch.device, Arena] = {}
        self._lock = threading.RLock()
        self._told = False
        self.plans: dict[str, ComponentPlan] = {}

    def check_weights(self) -> None:
        """Refuse a budget that the weights alone exceed.

        Raises:
            BudgetError: naming what the weights need.
        """
        if not isinstance(self.spec, int):
            return
        weights = self.resident_bytes()
        if weights >= self.spec:
            raise BudgetError(
                f"memory_budget {bytes_text(self.spec)} cannot be met: the weights alone are "
                f"{bytes_text(weights)}; weights bind",
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
        key = (id(forward), signature(inputs))
        with self._lock:
            planned = self._planned.get(key)
            if planned is None:
                planned = self._plan(forward, inputs)
                self._planned[key] = planned
                self._look_ahead(forward, inputs)
                self._clones.clear()
            self.plans[forward.path] = planned.plan
            arena = planned.cut.arena
            if arena is not None:
                arena.reserve(planned.plan.slab_bytes)
                self._tell(arena)
            return planned.cut

    def done(self, forward: Forward) -> None:
        """Give the slab back after a VAE: pictures are made next, by nobody's plan.

        A denoiser's slab stays for its next step.
        """
        if not forward.is_denoiser:
            with self._lock:
                for arena in self._arenas.values():
                    arena.release()

    def forget(self, forward: Forward) -> None:
        """The module has changed: plan its calls anew."""
        with self._lock:
            for key in [key for key in self._planned if key[0] == id(forward)]:
                del self._planned[key]
            self._checked.clear()
            self._clones.clear()

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

    def exceeded(self) -> int:
        """Allocations that found no room in the arena: the runs that exceeded their plans."""
        return sum(arena.spills for arena in self._arenas.values())

    def _tell(self, arena: Arena) -> None:
        if arena.spills and not self._told:
            self._told = True
            warnings.warn(
                f"{arena.spills} buffers ({bytes_text(arena.spilled_bytes)}) found no room in the "
                f"planned arena: something keeps features alive, and the run exceeds its plan",
                stacklevel=4,
            )

    def _arena(self, device: torch.device) -> Arena:
        if device not in self._arenas:
            self._arenas[device] = Arena(device)
        return self._arenas[device]

    def resident_bytes(self, forward: Forward | None = None) -> int:
        """Weights on the device while ``forward`` runs: all but those that are offloaded."""
        if self.standalone:
            return 0
        kept = []
        for reference in self._modules.values():
            module = reference()
            if module is None:
                continue
            running = forward is not None and any(m is forward.module for m in module.modules())
            if running or not _is_offloaded(module):
                kept.append(module)
        return weight_bytes(*kept)

    def limit(self, forward: Forward, inputs: dict[str, Any]) -> tuple[int | None, int]:
        """What the activations of a call may take, or ``None``; and what is set apart."""
        if self.spec == MIN:
            return None, 0
        tensors = list(_tensors(inputs))
        device = _device(tensors)
        if self.standalone:
            apart = 0
        else:
            apart = workspace_bytes(forward.module, device) + storage_bytes(tensors)
            apart += self.resident_bytes(forward)
        if self.spec == AUTO:
            arena = self._arenas.get(device)
            held = 0 if arena is None else arena.reserved_bytes
            free = int((free_bytes(device) + held) * (1 - AUTO_MARGIN))
            return free - workspace_bytes(forward.module, device), 0
        assert isinstance(self.spec, int)
        return self.spec - apart, apart

    def _plan(self, forward: Forward, inputs: dict[str, Any]) -> _Planned:
        limit, apart = self.limit(forward, inputs)
        plan, model, found = self._search(forward, inputs_on_meta(inputs), limit, apart, inputs)
        device = _device(list(_tensors(inputs)))
        cut = model.configure(forward, found.setting, found.chosen)
        arena = None if device.type == "meta" else self._arena(device)
        return _Planned(plan, cut.placed(arena, plan.offsets))

    def _search(
        self,
        forward: Forward,
        on_meta: dict[str, Any],
        limit: int | None,
        apart: int,
        inputs: dict[str, Any],
    ) -> Any:
        from .component import plan_component

        tensors = list(_tensors(inputs))
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        device = _device(tensors)
        rates = machine(device, dtype)
        clone = self._clone(forward)
        return plan_component(clone, on_meta, self.config, rates, device, limit, apart)

    def _clone(self, forward: Forward) -> Forward:
        from accelrt.models.forward import Forward as Fresh

        if id(forward) not in self._clones:
            module = meta_clone(forward.module)
            module.__dict__.pop("forward", None)
            self._clones[id(forward)] = (
                Fresh(module, forward.family, self.config, forward.path),
                module,
            )
        clone: Forward = self._clones[id(forward)][0]
        return clone

    def _look_ahead(self, forward: Forward, inputs: dict[str, Any]) -> None:
        """Refuse now what a later model of the same request could not keep.

        A decoder that does not fit would else throw away all denoising steps.
        """
        shape = forward.family.call_shape(forward.module, inputs)
        if shape is None or self.standalone or self.spec == MIN:
            return
        sample: Tensor = inputs[forward.family.input_name]
        for reference in self._forwards:
            other = reference()
            if other is None or other is forward or other.path.endswith("encoder"):
                continue
            example = other.family.example(other.module, shape, sample.dtype)
            key = (id(other), shape)
            if example is None or key in self._checked:
                continue
            arguments = other.arguments(**example)
            limit, apart = self.limit(other, {"like": sample})
            self._search(other, arguments, limit, apart, {"like": sample})
            self._checked.add(key)


def signature(value: Any) -> Any:
    """Everything about the arguments of a call that its memory depends on."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(signature(item) for item in value)
    return type(value).__name__ if value is not None else None


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _device(tensors: Iterable[Tensor]) -> torch.device:
    found = [t.device for t in tensors if t.dim() > 0]
    return found[0] if found else torch.device("cpu")


def _is_offloaded(module: nn.Module) -> bool:
    """A hook brings the weights when the module runs, and takes them away after it."""
    hooks = ("_hf_hook", "_diffusers_hook")
    return any(name in part.__dict__ for part in module.modules() for name in hooks)


def refuse(smallest_bytes: int, apart: int, limit: int, path: str, binding: str) -> BudgetError:
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
