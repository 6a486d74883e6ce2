"""Where a profile listens: methods of a pipeline, its models, their stages and groups.

Everything is set on instances, apart from the ``__call__`` of the pipeline's class, which
Python looks up there. Modules of a wrapped model get no hooks: a module with hooks would run
as it came. Their groups tell an observer.
"""

from __future__ import annotations

import functools
import inspect
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accelrt.groups import Group, State, slicing
from accelrt.memory import arena
from accelrt.models.stages import Observer, Stage
from accelrt.wrap import forwards

from .spans import CALL, COMPONENT, GROUP, PART, STAGE, Recorder

_METHODS = (
    "check_inputs", "encode", "_encode", "get_timesteps", "prepare", "_prepare", "_get_add",
    "_get_time", "decode", "_decode", "postprocess", "run_safety", "maybe_free", "upcast_vae",
    "_apply_free_noise", "numpy_to_pil",
)  # fmt: skip
_SCHEDULER = ("set_timesteps", "scale_model_input", "step", "add_noise")
_PROCESSOR = ("preprocess", "postprocess", "preprocess_video", "postprocess_video")
_CODER = ("encode", "decode")


class Method:
    """Stands in for a method of one object, and writes its range.

    Args:
        recorder: of the profile; once that is closed, calls pass through.
        owner: the object.
        name: of the method.
        kind, label: of the range; without a label there is none.
        before, after: called around the method, ``after`` with its result.
    """

    def __init__(
        self,
        recorder: Recorder,
        owner: Any,
        name: str,
        kind: str,
        label: str,
        before: Callable[[], None] | None = None,
        after: Callable[[Any], Any] | None = None,
    ) -> None:
        inner = getattr(owner, name)
        functools.update_wrapper(self, inner, updated=())
        self.inner = inner
        self._recorder, self._owner, self._name = recorder, weakref.ref(owner), name
        self._kind, self._label = kind, label
        self._before, self._after = before, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, within its range."""
        recorder = self._recorder
        if not recorder.mine():
            return self.inner(*args, **kwargs)
        if self._before is not None:
            self._before()
        index = recorder.open(self._kind, self._label) if self._label else -1
        try:
            result = self.inner(*args, **kwargs)
        finally:
            recorder.close(index)
        return result if self._after is None else self._after(result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Of a copied object: its own method."""
        copied = memo.get(id(self._owner()))
        return self.inner if copied is None else getattr(type(copied), self._name).__get__(copied)

    def __reduce__(self) -> Any:
        return getattr, (self._owner(), self._name)


class GroupObserver:
    """Writes the stages and groups of one wrapped model, and its calls.

    Args:
        recorder: of the profile.
        name: of the model in the pipeline.
        outer: what observed the model before, and goes on doing so.
    """

    def __init__(self, recorder: Recorder, name: str, outer: Observer | None) -> None:
        self.outer = outer
        self._recorder, self._name = recorder, name
        self._calls: list[int] = []
        self._stage: Stage | None = None
        self._stage_span = self._group_span = -1

    def begin(self) -> None:
        """A call of the model begins."""
        if self._recorder.mine():
            self._calls.append(self._recorder.open(COMPONENT, self._name))
            self._stage, self._stage_span = None, -1

    def end(self) -> None:
        """It has ended."""
        if self._recorder.mine() and self._calls:
            self._recorder.close(self._calls.pop())
            self._stage = None

    def enter(self, stage: Stage, group: Group, state: State) -> None:
        """A group begins."""
        recorder = self._recorder
        if recorder.mine():
            if stage is not self._stage:
                if self._stage is not None:
                    recorder.close(self._stage_span)
                self._stage = stage
                self._stage_span = recorder.open(STAGE, stage.name)
            self._group_span = recorder.open(GROUP, group.name)
            note_arena(recorder)
        if self.outer is not None:
            self.outer.enter(stage, group, state)

    def leave(self, stage: Stage, group: Group, state: State) -> None:
        """It has run."""
        if self.outer is not None:
            self.outer.leave(stage, group, state)
        recorder = self._recorder
        if recorder.mine():
            note_arena(recorder)
            recorder.close(self._group_span)
            if group is stage.groups[-1]:
                recorder.close(self._stage_span)
                self._stage = None


def note_arena(recorder: Recorder) -> None:
    """Write down what is alive in the active arena."""
    place = arena.current()
    if place is not None:
        recorder.arena.append((time.perf_counter_ns(), place.live_bytes, place.reserved_bytes))


@contextmanager
def attached(
    recorder: Recorder, target: Any, on_result: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Listen to a pipeline or model; afterwards everything is as it was.

    Args:
        recorder: writes the ranges.
        target: a pipeline or a model, wrapped or not.
        on_result: called with what a call of a pipeline returned.
    """
    with ExitStack() as stack:
        wrapped = dict(forwards(target))
        for name, forward in wrapped.items():
            stack.enter_context(_observed(recorder, name or type(target).__name__, forward))
        stack.enter_context(_space(recorder))
        if isinstance(target, nn.Module):
            if not wrapped:
                _hook_model(stack, recorder, type(target).__name__, target, ())
        else:
            _pipeline(stack, recorder, target, tuple(wrapped), on_result)
        yield


@contextmanager
def _observed(recorder: Recorder, name: str, forward: Any) -> Iterator[None]:
    observer = GroupObserver(recorder, name, forward.observer)
    forward.observer = forward.watcher = observer
    try:
        yield
    finally:
        forward.watcher = None
        if forward.observer is observer:
            forward.observer = observer.outer


@contextmanager
def _space(recorder: Recorder) -> Iterator[None]:
    """Slices, and the tensors that an arena gives."""

    def slice_starts(index: int) -> None:
        if recorder.mine():
            recorder.slices.append((time.perf_counter_ns(), index, recorder.current()))

    def block_made(place: arena.Arena, tensor: Tensor, offset: int) -> None:
        if not recorder.mine():
            return
        storage = tensor.untyped_storage()
        block = [offset, storage.nbytes(), time.perf_counter_ns(), 0]
        recorder.blocks.append(block)
        alive[id(block)] = weakref.ref(storage, lambda _: died(block))

    def died(block: list[int]) -> None:
        block[3] = time.perf_counter_ns()
        alive.pop(id(block), None)

    alive: dict[int, Any] = {}
    slicing.watch_slices(slice_starts)
    arena.watch_blocks(block_made)
    try:
        yield
    finally:
        slicing.watch_slices(None)
        arena.watch_blocks(None)
        alive.clear()


def _pipeline(
    stack: ExitStack,
    recorder: Recorder,
    pipe: Any,
    wrapped: tuple[str, ...],
    on_result: Callable[[Any], None] | None,
) -> None:
    """Its call, its methods, the scheduler, the processors of pictures, and its models."""
    put = functools.partial(_put, stack, recorder)
    stack.enter_context(_calls_of(recorder, pipe, on_result))
    for name in _own_methods(pipe):
        put(pipe, name, PART, name)
    if hasattr(pipe, "progress_bar"):
        put(pipe, "progress_bar", PART, "", before=recorder.begin_loop)
    for name, part in getattr(pipe, "components", {}).items():
        if isinstance(part, nn.Module):
            inside = tuple(path for path in wrapped if path == name or path.startswith(name + "."))
            if name not in inside:
                _hook_model(stack, recorder, name, part, inside)
            for method in _CODER:
                if callable(getattr(type(part), method, None)):
                    put(part, method, COMPONENT, f"{name}.{method}")
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        _scheduler(stack, recorder, scheduler)
    for name, part in vars(pipe).items():
        if name.endswith("_processor") and name in ("image_processor", "video_processor"):
            for method in _PROCESSOR:
                if hasattr(part, method):
                    put(part, method, PART, method)


def _scheduler(stack: ExitStack, recorder: Recorder, scheduler: Any) -> None:
    def has_timesteps(result: Any) -> Any:
        times = getattr(scheduler, "timesteps", None)
        recorder.begin_request(None if times is None else len(times))
        return result

    def stepped(result: Any) -> Any:
        recorder.stepped()
        return result

    after = {"set_timesteps": has_timesteps, "step": stepped}
    for name in _SCHEDULER:
        if hasattr(type(scheduler), name):
            label = f"scheduler.{name}"
            _put(stack, recorder, scheduler, name, COMPONENT, label, after=after.get(name))


def _own_methods(pipe: Any) -> list[str]:
    """Methods of a pipeline that do a part of its call."""
    names = []
    for name in dir(type(pipe)):
        plain = inspect.getattr_static(type(pipe), name, None)
        if name.startswith(_METHODS) and isinstance(plain, types.FunctionType):
            names.append(name)
    return names


def _put(
    stack: ExitStack,
    recorder: Recorder,
    owner: Any,
    name: str,
    kind: str,
    label: str,
    *,
    before: Callable[[], None] | None = None,
    after: Callable[[Any], Any] | None = None,
) -> None:
    """Set a :class:`Method` on an instance, and take it away at the end of ``stack``."""
    missing = object()
    own = owner.__dict__.get(name, missing)
    method = Method(recorder, owner, name, kind, label, before, after)
    owner.__dict__[name] = method

    def undo() -> None:
        if owner.__dict__.get(name) is not method:
            return  # somebody else came after, and keeps ours, which passes through
        if own is missing or getattr(own, "released", False):
            del owner.__dict__[name]  # unwrapped in the meantime, perhaps
        else:
            owner.__dict__[name] = own

    stack.callback(undo)


@contextmanager
def _calls_of(
    recorder: Recorder, pipe: Any, on_result: Callable[[Any], None] | None
) -> Iterator[None]:
    """The calls of a pipeline; other instances of its class pass through."""
    kind: Any = type(pipe)
    stock, missing = kind.__call__, object()
    own = kind.__dict__.get("__call__", missing)

    @functools.wraps(stock)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not pipe or not recorder.mine():
            return stock(self, *args, **kwargs)
        index = recorder.open(CALL, f"call of {kind.__name__}")
        try:
            result = stock(self, *args, **kwargs)
        finally:
            recorder.end_loop()
            recorder.close(index)
        if on_result is not None:
            on_result(result)
        return result

    kind.__call__ = __call__
    try:
        yield
    finally:
        if kind.__dict__.get("__call__") is __call__:
            if own is missing:
                del kind.__call__
            else:
                kind.__call__ = own


# Models that are not wrapped


def _hook_model(
    stack: ExitStack, recorder: Recorder, name: str, model: nn.Module, wrapped: tuple[str, ...]
) -> None:
    """Ranges of a model, its children and theirs, by forward hooks.

    A compiled model gets none: hooks would have it compiled anew.
    """
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        return
    if not wrapped:
        _hook(stack, recorder, model, COMPONENT, name)
    inside = tuple(path[len(name) + 1 :] for path in wrapped)
    path, top = _sole_child(model)
    for stage, child in _children(top, path):
        if _touches(stage, inside):
            continue
        _hook(stack, recorder, child, STAGE, stage)
        for group, grandchild in _children(child, stage):
            _hook(stack, recorder, grandchild, GROUP, group)


def _sole_child(model: nn.Module) -> tuple[str, nn.Module]:
    """Down to the first module that has several children."""
    path = ""
    while True:
        children = list(model.named_children())
        if len(children) != 1 or isinstance(children[0][1], (nn.ModuleList, nn.Sequential)):
            return path, model
        path, model = (f"{path}.{children[0][0]}" if path else children[0][0]), children[0][1]


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Children by their paths, those of a list one by one."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield from _children(child, full)
        else:
            yield full, child


def _touches(path: str, inside: tuple[str, ...]) -> bool:
    """Whether a module is, holds, or is part of a wrapped one."""
    return any(f"{path}.".startswith(f"{p}.") or f"{p}.".startswith(f"{path}.") for p in inside)


def _hook(stack: ExitStack, recorder: Recorder, module: nn.Module, kind: str, name: str) -> None:
    opened: list[int] = []

    def before(*_: Any) -> None:
        if recorder.mine():
            opened.append(recorder.open(kind, name))

    def after(*_: Any) -> None:
        if recorder.mine() and opened:
            recorder.close(opened.pop())

    first = module.register_forward_pre_hook(before, prepend=True)
    last = module.register_forward_hook(after, always_call=True)
    stack.callback(first.remove)
    stack.callback(last.remove)
