"""A forward on meta tensors: memory and estimated time of every group, in a second or so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accelrt.groups.slicing import Probe, probing
from accelrt.memory.arena import Arena, alignment_of
from accelrt.memory.tracker import PeakTracker

from .block_cost import block_seconds
from .cost import Machine, Weights, attention_seconds, seconds_of, weights_of

if TYPE_CHECKING:
    from accelrt._C import OffsetPlan

#: Fewer queries or keys torch's attention on the CPU does not pack.
FEWEST_PACKED = 64
#: How finely the memory of a model without groups is drawn.
OPERATORS_PER_POINT = 8


@dataclass
class GroupRun:
    """What one group did in a dry run.

    Args:
        name, stage: of the group.
        entry_bytes: live when it began, at most.
        peak_bytes: live at its worst.
        own_bytes: live at its worst, apart from the buffers of the arena.
        entry_own_bytes: those when it began.
        arena_bytes: live in the arena at its worst.
        seconds: the estimate of its time, all passes together.
    """

    name: str
    stage: str
    entry_bytes: int = 0
    peak_bytes: int = 0
    own_bytes: int = 0
    entry_own_bytes: int = 0
    arena_bytes: int = 0
    seconds: float = 0.0

    @property
    def scratch_bytes(self) -> int:
        """What the group makes and frees outside of the arena."""
        return self.own_bytes - self.entry_own_bytes

    @property
    def kept_bytes(self) -> int:
        """What lives beyond a slice, in the arena or found alive.

        Small tensors are made whole, outside of the arena; whether they are depends on
        the option, how much is alive between groups does not.
        """
        return max(self.arena_bytes, self.entry_bytes)


@dataclass
class DryRun:
    """What a forward did.

    Args:
        groups: by name, in order.
        peak_bytes: live activations at the peak, inputs and weights apart.
        own_bytes: the same without the buffers of the arena.
        seconds: the estimate of the forward's time.
        timeline: live bytes at the worst of each group, with its name.
        offsets: of the arena's buffers; ``None`` without one.
        same_from, same_below: bytes; any ``slice_mib`` from the one to below the other runs so.
    """

    groups: dict[str, GroupRun]
    peak_bytes: int
    own_bytes: int
    seconds: float
    timeline: list[tuple[str, int]] = field(default_factory=list)
    offsets: OffsetPlan | None = None
    same_from: float = 0
    same_below: float = math.inf


class MetaKernels(TorchFunctionMode):
    """The large operators on meta tensors: their outputs alone, and the estimate of their time.

    Attention has no matrix of scores, as in fused kernels. The others are here because
    torch's own meta kernels take milliseconds.

    Args:
        rates: of the machine, for :attr:`seconds`.
        probe: counts slices that are left out.
    """

    def __init__(self, rates: Machine | None = None, probe: Probe | None = None) -> None:
        super().__init__()
        self.rates = Machine() if rates is None else rates
        self.probe = Probe() if probe is None else probe
        self.seconds = 0.0
        self.read = Weights()
        self.convolving = False  # an output is made, not a buffer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value")[len(args) :]]
            q, k, v = (*args[:3], *named)
            if q.device.type == "meta":
                return self._attention(q, k, v)
        elif func is F.linear and not kwargs and args[0].device.type == "meta":
            x, weight = args[:2]
            out = x.new_empty((*x.shape[:-1], weight.shape[0]))
            return self._done("linear", (x, weight), out)
        elif func is torch.addmm and set(kwargs) == {"out"} and kwargs["out"].is_meta:
            return self._done("addmm", args, kwargs["out"])
        elif func is F.conv2d and not kwargs and len(args) == 7 and args[0].is_meta:
            x, weight = args[:2]
            if isinstance(args[4], tuple) and x.dim() == 4:
                self.convolving = True
                out = _convolved(x, weight, *args[3:6])
                self.convolving = False
                return self._done("convolution", (x, weight), out)
        return func(*args, **kwargs)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = self._packed(q, k)
        self.seconds += self.probe.repeats * attention_seconds(q, k, self.rates)
        if q.dim() != 4:
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        batch, heads, length, _ = q.shape
        out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
        del packed
        return out

    def _packed(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Keys and values once more: torch's CPU kernel reorders 16-bit ones for its products."""
        reorders = self.rates.device_type == "cpu" and q.element_size() == 2
        if not reorders or min(q.shape[-2], k.shape[-2]) < FEWEST_PACKED:
            return None
        return k.new_empty((2, *k.shape))

    def _done(self, name: str, args: tuple[Any, ...], out: Tensor) -> Tensor:
        self.seconds += self.probe.repeats * self.estimate(name, args, out)
        return out

    def estimate(self, name: str, args: tuple[Any, ...], out: Any) -> float:
        """Seconds of an operator, with what its weight takes longer if it is not in the cache."""
        longer = self.read.seconds(weights_of(name, args), self.rates)
        return longer + seconds_of(name, args, out, self.rates)


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The output of a convolution of ``[N, C, H, W]``, in the layout of its input."""
    sides = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    ]
    layout = torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    shape = (x.shape[0], weight.shape[0], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


class _Recorder(PeakTracker):  # type: ignore[no-untyped-call]
    """The tracker, also per group, with the estimate of time.

    Args:
        rates: of the machine.
        probe: counts slices that are left out.
        kernels: adds the time of large operators.
        arena: of which the buffers are known apart.
    """

    def __init__(
        self, rates: Machine, probe: Probe, kernels: MetaKernels, arena: Arena | None
    ) -> None:
        super().__init__()
        self.rates = rates
        self.probe = probe
        self.kernels = kernels
        self.arena = arena
        self.groups: dict[str, GroupRun] = {}
        self.seconds = 0.0
        self.own_peak = 0
        self.profile: list[tuple[str, int]] = []
        self._points = 0
        self._current: GroupRun | None = None
        self._began = 0.0
        self.beside = 0  # scratch of a slice that would still run
        self._slice_base = self._slice_peak = 0

    def _own(self) -> int:
        return self.live_bytes - (0 if self.arena is None else self.arena.recording.live_bytes)

    def _total_seconds(self) -> float:
        return self.seconds + self.kernels.seconds

    def enter(self, stage: Any, group: Any, state: Any) -> None:
        """A group begins."""
        super().enter(stage, group, state)
        run = self.groups.setdefault(group.name, GroupRun(group.name, stage.name))
        run.entry_bytes = max(run.entry_bytes, self.live_bytes)
        run.entry_own_bytes = max(run.entry_own_bytes, self._own())
        self._current, self._began = run, self._total_seconds()
        self._note(run)

    def leave(self, stage: Any, group: Any, state: Any) -> None:
        """A group has run."""
        assert self._current is not None
        self._current.seconds += self._total_seconds() - self._began
        self._current = None
        super().leave(stage, group, state)

    def slice_begins(self, index: int) -> None:
        """Beside this slice the one before still has its scratch."""
        own = self._own()  # with what that one has not let go of, which counts once
        self.beside = 0 if index == 0 else self._slice_peak - max(self._slice_base, own)
        self._slice_base = self._slice_peak = own

    def outlives(self, nbytes: int) -> None:
        """It counts as alive, not as scratch."""
        self._slice_base += nbytes

    def slices_end(self) -> None:
        """Nothing runs beside any more."""
        self.beside = 0

    def _update_peak(self, operation: Any) -> None:
        live, self.live_bytes = self.live_bytes, self.live_bytes + self.beside
        super()._update_peak(operation)
        self.live_bytes = live

    def _note(self, run: GroupRun) -> None:
        run.peak_bytes = max(run.peak_bytes, self.live_bytes + self.beside)
        run.own_bytes = max(run.own_bytes, self._own() + self.beside)
        if self.arena is not None:
            run.arena_bytes = max(run.arena_bytes, self.arena.recording.live_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        values = (*args, *kwargs.values())
        name = func._schema.name.partition("::")[2]
        if name == "transformer_block":
            names = (argument.name for argument in func._schema.arguments)
            named = dict(zip(names, args, strict=False))
            seconds = block_seconds(named, self.rates, self.kernels.read)
        else:
            seconds = self.kernels.estimate(name, values, result)
        self.seconds += self.probe.repeats * seconds
        if name != "empty" or self.kernels.convolving:
            self._slice_peak = max(self._slice_peak, self._own())
        if name != "empty":  # the arena learns of its buffer after the operator that makes it
            own = self._own()
            self.own_peak = max(self.own_peak, own + self.beside)
            if self._current is not None:
                self._note(self._current)
        self._draw("" if self._current is None else self._current.name)
        return result

    def _draw(self, label: str) -> None:
        """The worst of a group is one point; of a model without groups, of some operators."""
        self._points += 1
        live = self.live_bytes + self.beside
        same = self.profile and self.profile[-1][0] == label
        if same and (label or self._points % OPERATORS_PER_POINT):
            self.profile[-1] = (label, max(live, self.profile[-1][1]))
        else:
            self.profile.append((label, live))


def dry_run(
    run: Any,
    inputs: dict[str, Any],
    rates: Machine,
    *,
    forward: Any = None,
    arena: Arena | None = None,
) -> DryRun:
    """Run a model on meta tensors.

    Args:
        run: called with ``inputs`` as keywords.
        inputs: meta tensors, and what else the call takes.
        rates: of the machine, for the estimate of time.
        forward: ours, which tells about its groups; ``None`` for a stock model.
        arena: a recording one on the meta device, which ``run`` uses.
    """
    with torch.no_grad(), probing(rates.device_type) as probe, MetaKernels(rates, probe) as kernels:
        probe.ledger = recorder = _Recorder(rates, probe, kernels, arena)
        observer = None if forward is None else forward.observer
        if forward is not None:
            forward.observer = recorder
        try:
            with recorder:
                output = run(**inputs)
                del output
        finally:
            if forward is not None:
                forward.observer = observer
    beside = probe.left_out_bytes
    for group in recorder.groups.values():
        group.entry_bytes += beside
        group.peak_bytes += beside
        group.own_bytes += beside
        group.entry_own_bytes += beside
    return DryRun(
        groups=recorder.groups,
        peak_bytes=recorder.peak_bytes + beside,
        own_bytes=recorder.own_peak + beside,
        seconds=recorder._total_seconds(),
        timeline=recorder.profile,
        offsets=None if arena is None else arena.recording.plan(alignment_of("cpu")),
        same_from=probe.same_from,
        same_below=probe.same_below,
    )
