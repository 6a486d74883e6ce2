"""CUDA graphs of a denoiser: one for each kind of pass and form of call, captured once.

A pass that ran before is captured the next time: what it launches is recorded with the
addresses that it works on, and from then on launched at once. So whatever changes from call to
call must come from memory that stays, and whatever the host decides from values must be decided
outside: arguments are copied into static buffers, weights of predictors and modulations of
timesteps are arguments too, and the result is a copy. A pass that cannot be captured runs
as if there were no graphs, and :class:`GraphsReport` says why.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accelrt.groups.capture import NotCapturable, capturing
from accelrt.memory import arena as arenas
from accelrt.memory.sizes import bytes_text

from .graph_backend import CudaBackend, GraphBackend
from .graph_guard import ModelGuard
from .static_inputs import StaticInputs, described

if TYPE_CHECKING:
    from accelrt.config import Config
    from accelrt.groups import Group
    from accelrt.models.forward import Cut, Forward

#: Calls of one form that run as they are before one is captured.
WARM_UPS = 1
#: Forms of calls that are remembered, for each graph that is kept.
REMEMBERED = 8
WARMING, CAPTURED = "before the capture", "captured"

Body = Callable[[dict[str, Any]], Tensor]

# Torch allows one capture at a time in a process.
_capturing = threading.Lock()


def default_backend() -> GraphBackend:
    """That of a new wrap."""
    return CudaBackend()


def expected(config: Config, forward: Forward, device: torch.device) -> bool:
    """Whether a model's passes on a device become graphs, as far as its settings tell."""
    wanted = config.cuda_graphs is not False and forward.is_denoiser
    return wanted and device.type == default_backend().device_type


@dataclass(frozen=True)
class GraphsReport:
    """What became of the passes of a denoiser.

    Args:
        component: name of the wrapped part.
        kept: graphs that exist now.
        captures, replays: so far.
        dropped: graphs that were let go, with the reasons.
        eager: passes that ran without a graph, by reason.
        pool_bytes: of the pool that the graphs of the wrap share.
        static_bytes: of the buffers for arguments and results.
    """

    component: str
    kept: int
    captures: int
    replays: int
    dropped: dict[str, int]
    eager: dict[str, int]
    pool_bytes: int
    static_bytes: int

    def __str__(self) -> str:
        name = self.component or "the model"
        lines = [
            f"CUDA graphs of {name}: {self.kept} kept, {self.captures} captured, "
            f"{self.replays} replays; pool {bytes_text(self.pool_bytes)}, arguments and results "
            f"{bytes_text(self.static_bytes)}"
        ]
        lines += [f"  {count} dropped: {reason}" for reason, count in self.dropped.items()]
        lines += [f"  {count} ran without: {reason}" for reason, count in self.eager.items()]
        return "\n".join(lines)


@dataclass
class _Entry:
    """One form of call."""

    seen: int = 0
    failed: str = ""
    graph: Any = None
    inputs: StaticInputs | None = None
    output: Tensor | None = None
    kept: tuple[Any, ...] = ()  # what the key tells by identity

    @property
    def bytes(self) -> int:
        output = self.output
        result = 0 if output is None else output.numel() * output.element_size()
        return result + (0 if self.inputs is None else self.inputs.bytes)


class GraphCache:
    """The graphs of one wrap: they share a pool per device, so one runs at a time.

    Args:
        most: graphs that are kept; the least recently used goes first.
        backend: of the device; by default CUDA's.
    """

    def __init__(self, most: int, backend: GraphBackend | None = None) -> None:
        self.most = most
        self.backend = default_backend() if backend is None else backend
        self.busy = threading.Lock()
        self.entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._pools: dict[torch.device, Any] = {}

    def pool(self, device: torch.device) -> Any:
        """The pool of a device."""
        if device not in self._pools:
            self._pools[device] = self.backend.pool(device)
        return self._pools[device]

    def pool_bytes(self) -> int:
        """Of all devices."""
        pools = self._pools.items()
        return sum(self.backend.pool_bytes(pool, device) for device, pool in pools)

    def abandon(self, device: torch.device) -> None:
        """Capture into another pool from now on: a capture into this one was broken off."""
        self._pools.pop(device, None)

    def drop(self, keys: Sequence[tuple[Any, ...]]) -> int:
        """Forget some forms of calls; how many of them had graphs."""
        count = 0
        for key in keys:
            entry = self.entries.pop(key)
            if entry.graph is not None:
                self.backend.reset(entry.graph)
                count += 1
            entry.graph = entry.output = entry.inputs = None
        if count and not any(entry.graph is not None for entry in self.entries.values()):
            self._pools.clear()  # an empty pool may still hold its memory
        return count

    def make_room(self) -> int:
        """For one more graph; how many went."""
        held = [key for key, entry in self.entries.items() if entry.graph is not None]
        return self.drop(held[: max(0, len(held) - self.most + 1)])

    def remembered(self, key: tuple[Any, ...]) -> _Entry:
        """What is known of a form of call, now the latest."""
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = _Entry()
            idle = [k for k, e in self.entries.items() if e.graph is None]
            self.drop(idle[: max(0, len(self.entries) - REMEMBERED * self.most)])
        if key in self.entries:
            self.entries.move_to_end(key)
        return entry


@dataclass
class Pass:
    """What a graph is of.

    Args:
        kind: ``"computed"``, ``"predicted"``, ``"feedback"``, ``"plain"``.
        key: what of it is decided on the host.
        given: its arguments: nests of tensors and plain values.
        body: runs it on arguments; may be called once for each call of the model.
        replayed: does on the host what the body does there, where a graph runs instead.
        fixed: names among ``given`` whose tensors nobody writes to.
        kept: objects whose identity is part of ``key``.
    """

    kind: str
    key: Hashable
    given: dict[str, Any]
    body: Body
    replayed: Callable[[], None] | None = None
    fixed: tuple[str, ...] = ()
    kept: tuple[Any, ...] = ()


@dataclass
class _Tally:
    captures: int = 0
    replays: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)


class Graphs:
    """Runs the passes of one denoiser, by graphs where it can.

    Args:
        cache: of the wrap.
        required: a call on a device without graphs is an error.
    """

    def __init__(self, cache: GraphCache, *, required: bool) -> None:
        self.cache = cache
        self.required = required
        self._tally = _Tally()
        self._counting = threading.Lock()
        self._guard: ModelGuard | None = None
        self._guarded: tuple[int, ...] = ()
        self._deciding: tuple[Any, tuple[Group, ...]] = (None, ())

    def check(self, device: torch.device) -> None:
        """Refuse a call that could never be captured.

        Raises:
            ValueError: graphs are required and the device has none.
        """
        if self.required and not self.serves(device) and device.type != "meta":
            raise ValueError(
                f"cuda_graphs is True, but the call is on {device}; allowed there: False, 'auto'"
            )

    def serves(self, device: torch.device) -> bool:
        """Whether calls on a device may have graphs."""
        return device.type == self.cache.backend.device_type

    def skipped(self, reason: str) -> None:
        """Count a pass that runs without a graph."""
        with self._counting:
            self._tally.eager[reason] += 1

    def run(self, forward: Forward, cut: Cut, what: Pass) -> Tensor:
        """The output of a pass: by its graph, or by its body."""
        backend, cache = self.cache.backend, self.cache
        x: Tensor = what.given["inputs"][forward.family.input_name]
        reason = _outside(forward, cut, x, backend)
        if reason or not cache.busy.acquire(blocking=False):
            self.skipped(reason or "another thread's call was running")
            return what.body(what.given)
        try:
            found = self._found(forward, cut, what, x)
            if isinstance(found, str):
                reason = found
            elif found.graph is not None:
                with backend.in_turn(x.device):
                    assert found.inputs is not None
                    found.inputs.fill(what.given)
                    if what.replayed is not None:
                        what.replayed()
                    return self._launched(found)
            elif found.seen < WARM_UPS:
                found.seen += 1
                self.skipped(WARMING)
                with backend.in_turn(x.device):
                    with backend.warm_up(x.device):
                        output = what.body(what.given)
                    return output.clone()  # its memory is the other stream's
            else:
                output_or_reason = self._captured(forward, cut, what, found, x.device)
                if isinstance(output_or_reason, Tensor):
                    return output_or_reason
                reason = output_or_reason
        finally:
            cache.busy.release()
        self.skipped(reason)
        return what.body(what.given)

    def _launched(self, entry: _Entry) -> Tensor:
        """Launch a graph whose arguments are in place; a copy of its result."""
        self.cache.backend.replay(entry.graph)
        self._tally.replays += 1
        assert entry.output is not None
        return entry.output.clone()

    def _found(self, forward: Forward, cut: Cut, what: Pass, x: Tensor) -> _Entry | str:
        """What is known of a form of call, or why it has no graph."""
        self._watch(forward)
        assert self._guard is not None
        if self._guard.reason:
            return self._guard.reason
        inputs = what.given["inputs"]
        try:
            form = described(what.given)
        except NotCapturable as error:
            return str(error)
        frames = forward.family.frames_of(inputs)
        seen = tuple(group.decided(inputs, frames) for group in self._deciders(cut))
        place = arenas.current()
        where = None if place is None else (id(place), place.address, place.reserved_bytes)
        if where is not None:
            self._forget_slabs(where)
        key = (
            id(self), what.kind, what.key, form, seen, where, cut.config, forward.config,
            id(cut.stages), x.device, _switches(),
        )  # fmt: skip
        entry = self.cache.remembered(key)
        entry.kept = (cut.stages, place, *what.kept)
        return entry.failed or entry

    def _watch(self, forward: Forward) -> None:
        """Drop all graphs if the model is not what it was."""
        stepper: Any = forward.stepper
        module = getattr(stepper, "module", None)
        roots = [forward.module, *([module] if isinstance(module, nn.Module) else [])]
        ids = tuple(map(id, roots))
        changed = "modules" if ids != self._guarded else ""
        if self._guard is not None and not changed:
            changed = self._guard.changed()
        if self._guard is None or changed:
            if self._guard is not None:
                self._drop(f"{changed} changed", lambda key: True)
            self._guard, self._guarded = ModelGuard(roots), ids

    def _forget_slabs(self, where: tuple[Any, ...]) -> None:
        """Drop the graphs that work in a slab which is no more."""
        self._drop(
            "the arena's slab moved",
            lambda key: key[5] is not None and key[5][0] == where[0] and key[5] != where,
        )

    def _drop(self, reason: str, chosen: Callable[[tuple[Any, ...]], bool]) -> None:
        keys = [key for key in self.cache.entries if key[0] == id(self) and chosen(key)]
        if keys:
            count = self.cache.drop(keys)
            if count:
                self._tally.dropped[reason] += count

    def _deciders(self, cut: Cut) -> tuple[Group, ...]:
        """Groups that decide by the values of a call."""
        stages, groups = self._deciding
        if stages is not cut.stages:
            groups = tuple(g for stage in cut.stages for g in stage.groups if g.decides)
            self._deciding = (cut.stages, groups)
        return groups

    def _captured(
        self, forward: Forward, cut: Cut, what: Pass, entry: _Entry, device: torch.device
    ) -> Tensor | str:
        """Capture a pass and launch it; or why that failed, which it does once."""
        cache, backend = self.cache, self.cache.backend
        self._tally.dropped["more than are kept"] += cache.make_room()
        self._tally.dropped += Counter()  # leaves out what is zero
        try:
            with _capturing, backend.in_turn(device):
                inputs = StaticInputs(what.given, device, what.fixed)
                inputs.fill(what.given)
                given = inputs.given()
                frames = forward.family.frames_of(what.given["inputs"])
                for group in self._deciders(cut):
                    group.decide_alike(what.given["inputs"], given["inputs"], frames)
                with capturing(), backend.capture(cache.pool(device), device) as graph:
                    output = what.body(given)
                del given
                entry.graph, entry.inputs, entry.output = graph, inputs, output
                self._tally.captures += 1
                return self._launched(entry)
        except Exception as error:
            entry.graph = entry.inputs = entry.output = None
            entry.failed = f"{what.kind}: the capture failed: {type(error).__name__}: {error}"
            entry.failed = entry.failed.partition("\n")[0]
            cache.abandon(device)
            place = arenas.current()
            if place is not None:  # the buffers are made again, from the first
                place.schedule(cut.offsets)
                place.begin()
            return entry.failed
        except BaseException:
            cache.abandon(device)
            raise

    def report(self, component: str) -> GraphsReport:
        """So far."""
        with self.cache.busy:
            mine = [entry for key, entry in self.cache.entries.items() if key[0] == id(self)]
            kept = [entry for entry in mine if entry.graph is not None]
            return GraphsReport(
                component=component,
                kept=len(kept),
                captures=self._tally.captures,
                replays=self._tally.replays,
                dropped=dict(self._tally.dropped),
                eager=dict(self._tally.eager),
                pool_bytes=self.cache.pool_bytes() if kept else 0,
                static_bytes=sum(entry.bytes for entry in kept),
            )

    def held_bytes(self) -> int:
        """What the graphs hold while something else runs."""
        report = self.report("")
        return report.pool_bytes + report.static_bytes

    def release(self) -> None:
        """Let go of everything."""
        with self.cache.busy:
            self._drop("released", lambda key: True)
            self._guard = None


def _outside(forward: Forward, cut: Cut, x: Tensor, backend: GraphBackend) -> str:
    """Why a call has nothing to do with graphs; empty if it may."""
    if x.device.type != backend.device_type:
        return f"the call was on {x.device.type}"
    if not forward.is_denoiser:
        return "not a denoiser: it runs once per request"
    if forward.observer is not None or forward.watcher is not None:
        return "profiled or observed"
    if torch.compiler.is_compiling():
        return "part of a compiled program"
    if backend.is_capturing():
        return "inside of a capture"
    place = arenas.current()
    if cut.arena is not None and place is None:
        return "another run had the arena"
    if place is not None and place.live_bytes:
        return "something kept a buffer of the arena"
    return ""


def _switches() -> tuple[Any, ...]:
    """What of torch's global settings decides which kernels run."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    return (
        # The older names of these raise once the newer ones were used.
        cuda.matmul.fp32_precision, cudnn.conv.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cudnn.benchmark, cudnn.deterministic, cudnn.enabled,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
