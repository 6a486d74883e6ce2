"""The callable that stands in for a model's forward while it is wrapped."""

from __future__ import annotations

import inspect
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups.slicing import current_probe
from accelrt.memory.arena import Arena, activate
from accelrt.steps.graphs import GraphCache, Graphs, Pass
from accelrt.steps.inner_loop import InnerLoop
from accelrt.steps.session import COMPUTED, Step
from accelrt.steps.stepper import Stepper

from .family import Family, random_modules
from .stages import Observer, Stage, Watcher, execute


@dataclass(frozen=True)
class Cut:
    """How one call is cut along space.

    Args:
        stages: their groups hold the slice lengths.
        config: how the call itself is cut, into passes or images.
        arena: where the buffers of the groups live, or ``None``.
        offsets: of those buffers in the arena, in the order of their making.
        slab_bytes: that the arena needs for them.
        heap_bytes: that the run may hold, the slab among them, before the heap gives pages back.
        product_bytes: that a matrix product takes beside them, and frees again.
        temporary_bytes: that what comes and goes within slices needs.
        step: that the call is of, where steps are cut along time.
    """

    stages: tuple[Stage, ...]
    config: Config
    arena: Arena | None = None
    offsets: tuple[int, ...] = ()
    slab_bytes: int = 0
    heap_bytes: int = 0
    product_bytes: int = 0
    temporary_bytes: int = 0
    step: Step | None = None

    def placed(
        self,
        arena: Arena | None,
        offsets: tuple[int, ...] = (),
        slab_bytes: int = 0,
        heap_bytes: int = 0,
        product_bytes: int = 0,
        temporary_bytes: int = 0,
    ) -> Cut:
        """The same cut with its buffers in ``arena``."""
        return replace(
            self, arena=arena, offsets=offsets, slab_bytes=slab_bytes, heap_bytes=heap_bytes,
            product_bytes=product_bytes, temporary_bytes=temporary_bytes,
        )  # fmt: skip


@contextmanager
def placing(cut: Cut) -> Iterator[None]:
    """Buffers of this thread's groups come from the cut's arena, unless another run has it."""
    arena = cut.arena
    if arena is None:
        yield
        return
    if not arena.busy.acquire(blocking=False):
        arena.contended += 1
        yield
        return
    try:
        arena.reserve(cut.slab_bytes, cut.temporary_bytes)
        arena.schedule(cut.offsets)
        arena.begin()
        if arena.heap is not None:
            arena.heap.begin(cut.heap_bytes, cut.product_bytes, cut.slab_bytes)
        with activate(arena):
            yield
    finally:
        arena.busy.release()


class Planner(Protocol):
    """Gives every call its cut, so that a memory budget is kept."""

    def cut(self, forward: Forward, inputs: dict[str, Any]) -> Cut:
        """How to run ``forward`` on ``inputs``.

        Raises:
            BudgetError: the budget cannot be met.
        """

    def done(self, forward: Forward) -> None:
        """The call has run."""

    def skipped(self, forward: Forward, reason: str) -> None:
        """A call runs without a plan."""

    def report(self, forward: Forward) -> tuple[int | None, int]:
        """Reserved bytes of the last plan, if there was a call; and all buffers without room."""

    def forget(self, forward: Forward) -> None:
        """The module has changed: its plans are void."""

    def release(self) -> None:
        """The module is unwrapped: nothing is needed any more."""


class Forward:
    """Runs a module by its family description; set as the instance's ``forward``.

    The stock forward runs instead, unchanged, where the description does not apply:
    when gradients are needed, when dropout is active, under autocast, for dtypes and
    devices without kernels. ``stock_reason`` says why, for the summary.

    Args:
        module: the module whose forward this is; kept by weak reference.
        family: how to run it.
        config: slice lengths and switches.
        path: of the module in the model, ``""`` for the model itself.
    """

    def __init__(self, module: nn.Module, family: Family, config: Config, path: str) -> None:
        self._module = weakref.ref(module)
        self.family = family
        self.config = config
        self.path = path
        self.observer: Observer | None = None
        self.watcher: Watcher | None = None
        self.stock_reason = ""
        self.replaced: Any = None
        self._structure: tuple[Any, ...] | None = None
        self._stages: tuple[Stage, ...] = ()
        self.planner: Planner | None = None
        self.stepper: Stepper | InnerLoop | None = None
        self.graphs: Graphs | None = None
        self._random: list[nn.Module] = []
        self._signature = inspect.signature(type(module).forward)
        self.__name__ = "forward"
        self.__doc__ = type(module).forward.__doc__

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        module = self._module()
        if module is None:
            raise RuntimeError("the wrapped module no longer exists")
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(self._signature.parameters.values())[1:]
        return self._signature.replace(parameters=parameters)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """A forward for the copy of the module, which is being made."""
        copied = memo.get(id(self.module))
        if copied is None:
            raise RuntimeError("copy the wrapped module, not its forward")
        if self.planner is not None:
            self.planner.skipped(self, "a copy has none; unwrap it and wrap it again")
        made = Forward(copied, self.family, self.config, self.path)
        if self.graphs is not None:
            cache = GraphCache(self.config.max_cuda_graphs)
            made.graphs = Graphs(cache, required=self.graphs.required)
        return made

    def __reduce__(self) -> Any:
        raise pickle.PicklingError(
            f"a wrapped {type(self.module).__name__} cannot be pickled; call accelrt.unwrap first"
        )

    @property
    def is_denoiser(self) -> bool:
        """The module is called once per step; others are called once per request."""
        return type(self.family).call_shape is not Family.call_shape

    def arguments(self, **given: Any) -> dict[str, Any]:
        """All arguments of a call by name, with the defaults of those that are not given."""
        bound = self._signature.bind(self.module, **given)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments.pop("self")
        return arguments

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the module as it is now; the same objects until it changes.

        With a memory budget, those of the last call's plan.
        """
        self._refresh()
        return self._stages

    def _refresh(self) -> None:
        module = self.module
        structure = self.family.structure(module)
        if structure != self._structure:
            self._stages = self.family.stages(module, self.config)
            self._random = random_modules(module)
            self._structure = structure
            if self.planner is not None:
                self.planner.forget(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with its signature and return type."""
        watcher = self.watcher
        if watcher is None:
            return self._call(*args, **kwargs)
        watcher.begin()
        try:
            return self._call(*args, **kwargs)
        finally:
            watcher.end()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        stock = type(module).forward
        try:
            bound = self._signature.bind(module, *args, **kwargs)
        except TypeError:
            return stock(module, *args, **kwargs)  # raises what the stock model raises
        bound.apply_defaults()
        inputs = dict(bound.arguments)
        inputs.pop("self")
        self._refresh()
        self.stock_reason = self._declines(module, inputs)
        if self.stock_reason:
            if self.planner is not None:
                self.planner.skipped(self, self.stock_reason)
            if self.graphs is not None:
                self.graphs.skipped(f"the stock forward ran: {self.stock_reason}")
            return stock(module, *args, **kwargs)
        if self.graphs is not None:
            self.graphs.check(inputs[self.family.input_name].device)
        run = _run if self.family.lora_scale_kwargs is None else _scaled(self.family)
        if self.stepper is not None:
            return self._stepped(run, module, inputs)
        cut = Cut(self._stages, self.config)
        if self.planner is not None and not torch.compiler.is_compiling():
            cut = self.planner.cut(self, inputs)
            self._stages = cut.stages
            try:
                return run(module, self, cut, **inputs)
            finally:
                self.planner.done(self)
        return run(module, self, cut, **inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stepped(self, run: Any, module: nn.Module, inputs: dict[str, Any]) -> Any:
        """The call at its step of a request.

        Not traced: what runs differs from step to step, and the weak references of a
        state that outlives a traced frame are not for Dynamo.
        """
        assert self.stepper is not None
        cut = Cut(self._stages, self.config, step=self.stepper.enter(self, inputs))
        if self.planner is None:
            return run(module, self, cut, **inputs)
        cut = replace(self.planner.cut(self, inputs), step=cut.step)
        self._stages = cut.stages
        try:
            return run(module, self, cut, **inputs)
        finally:
            self.planner.done(self)

    def _declines(self, module: nn.Module, inputs: dict[str, Any]) -> str:
        reason = self.family.declines(module, inputs)
        if not reason and any(m.training for m in self._random):
            reason = "dropout is active"
        if not reason and torch.is_grad_enabled() and _needs_grad(module, inputs):
            reason = "gradients are needed"
        return reason

    def run(self, cut: Cut, inputs: dict[str, Any]) -> Any:
        """Run all stages on ``inputs``, part by part if the family says so."""
        module, family = self.module, self.family
        parts = family.parts(module, inputs, cut.config)
        if len(parts) == 1:
            return family.result(module, inputs, self._part(cut, inputs, 0))
        out: Tensor | None = None
        whole: Tensor = inputs[family.input_name]
        rows = parts[0][family.input_name].shape[0]
        probe = current_probe(whole)
        if probe is not None:  # all passes are alike
            probe.repeats *= len(parts)
            y = self._part(cut, parts[0], 0)
            probe.repeats //= len(parts)
            out = y.new_empty((whole.shape[0], *y.shape[1:]))
            probe.left_out_bytes += out.numel() * out.element_size()
            return family.result(module, inputs, out)
        for index in range(len(parts)):
            y = self._part(cut, parts[index], index * rows)
            if out is None:
                out = y.new_empty((whole.shape[0], *y.shape[1:]))
            out[index * rows : index * rows + y.shape[0]] = y
            del y
        assert out is not None
        return family.result(module, inputs, out)

    def _part(self, cut: Cut, inputs: dict[str, Any], first: int) -> Tensor:
        """The output for one of the calls that a call is cut into, from its row ``first``."""
        module, family = self.module, self.family
        with placing(cut):
            if cut.step is not None and self.stepper is not None:
                return _kept(cut, self.stepper.run(self, cut, inputs, cut.step, first))

            def body(given: dict[str, Any]) -> Tensor:
                state = execute(cut.stages, family.begin(module, given["inputs"]), self.observer)
                return family.finish(module, state)

            if self.graphs is None or torch.compiler.is_compiling():
                return _kept(cut, body({"inputs": inputs}))
            return self.graphs.run(self, cut, Pass(COMPUTED, None, {"inputs": inputs}, body))


def _kept(cut: Cut, result: Tensor) -> Tensor:
    """A result that holds on to none of the memory for temporaries."""
    if cut.arena is not None and cut.arena.is_temporary(result):
        return result.clone()
    return result


def _run(module: nn.Module, forward: Forward, cut: Cut, **inputs: Any) -> Any:
    with torch.no_grad():
        return forward.run(cut, inputs)


def _scaled(family: Family) -> Any:
    """``_run`` with LoRA layers scaled as diffusers does for the stock forward."""
    assert family.lora_scale_kwargs is not None
    return apply_lora_scale(family.lora_scale_kwargs)(_run)


def _needs_grad(module: nn.Module, inputs: dict[str, Any]) -> bool:
    values = inputs.values()
    return any(isinstance(v, Tensor) and v.requires_grad for v in values) or any(
        p.requires_grad for p in module.parameters()
    )
