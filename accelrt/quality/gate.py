"""The quality gate of a wrap: the first approximate request is checked, and must keep a floor.

Python looks ``__call__`` up on the type, so the class of a gated pipeline has a ``__call__`` of
ours for as long as one of its instances is gated; other instances pass straight through.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from accelrt.steps.session import FEEDBACK, PREDICTED, Session, Tracker

_PIECE = 1 << 22


class Gate:
    """Decides once whether the steps of a pipeline may be predicted.

    Args:
        kind: class of the pipeline.
        tracker: follows its requests.
        floor: least PSNR in dB.
    """

    def __init__(self, kind: type, tracker: Tracker, floor: float) -> None:
        self.kind = kind
        self.tracker = tracker
        self.floor = floor
        self.decided = False
        self._lock = threading.Lock()
        self._owner: int | None = None
        tracker.gate = f"not verified yet (floor {floor:g} dB)"

    def run(self, pipe: Any, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One request; the requests of other threads wait until the gate has decided.

        A gate's own runs pass through, also where a subclass calls the ``__call__`` of a gated
        base class.
        """
        if not self.decided and self._owner != threading.get_ident():
            with self._lock:
                if not self.decided:
                    self._owner = threading.get_ident()
                    try:
                        return self._checked(pipe, stock, args, kwargs)
                    finally:
                        self._owner = None
        return stock(pipe, *args, **kwargs)

    def _checked(self, pipe: Any, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run with predicted steps, and, if there were any, again without."""
        draws = _Draws((args, kwargs))
        before = self.tracker.latest
        ours = stock(pipe, *args, **kwargs)
        session = self.tracker.latest
        if session is None or session is before or not _predicted(session):
            return ours  # exact, and no evidence
        draws.restore()
        with self.tracker.paused():
            full = stock(pipe, *args, **kwargs)
        found = decibels(ours, full, latent=_output_type(pipe, stock, args, kwargs) == "latent")
        self.decided = True
        text = "nothing to compare" if found is None else _text(found)
        about = f"{text} on the first request (floor {self.floor:g} dB)"
        if found is not None and found >= self.floor:
            self.tracker.gate = f"verified: {about}"
            return ours
        self.tracker.enabled = False
        self.tracker.gate = f"not kept: {about}; every step is computed"
        if found is None:
            what = f"{type(full).__name__} holds neither pictures nor latents to compare"
        else:
            what = f"the first request is at {text} PSNR from one with every step computed"
        warnings.warn(
            f"{what}; quality_floor is {self.floor:g} dB: every step of {self.kind.__name__} is "
            f"computed from now on",
            stacklevel=4,
        )
        return full


@dataclass(frozen=True)
class _Patch:
    """What the class of a gated pipeline was given, and what it had of its own."""

    wrapper: Any
    own: Any


_lock = threading.RLock()  # a pipeline may die, and call back, while this thread holds it
_gates: dict[int, tuple[weakref.ref[Any], Gate]] = {}
_patches: dict[type, _Patch] = {}


def check_floor(floor: Any, target: Any, *, rehash: bool) -> None:
    """Refuse a floor that cannot be kept or means nothing.

    Args:
        floor: least PSNR in dB.
        target: of the wrap.
        rehash: whether steps are predicted, or have feedback.

    Raises:
        ValueError: no number above 0, no predicted steps, or no pipeline that is called.
    """
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
    if not number or not 0 < floor < math.inf:
        raise ValueError(f"quality_floor is {floor!r}; allowed: a number of dB above 0")
    if not rehash:
        raise ValueError(
            f"quality_floor is {floor!r}, and rehash is None: without it the output is exact; "
            f"allowed: only with rehash or feedback"
        )
    if isinstance(target, nn.Module) or not callable(target):
        raise ValueError(
            f"quality_floor is for pipelines, whose pictures it compares; "
            f"{type(target).__name__} is none"
        )


def install(pipe: Any, tracker: Tracker, floor: float) -> None:
    """Check the first request of a pipeline in which steps are predicted.

    Args:
        pipe: kept by weak reference.
        tracker: of its wrap.
        floor: least PSNR in dB.
    """
    key, kind = id(pipe), type(pipe)
    with _lock:
        _patch(kind)
        _gates[key] = (weakref.ref(pipe, lambda _: _remove(key)), Gate(kind, tracker, floor))


def release(tracker: Tracker) -> None:
    """Take the gate of a wrap away, if it has one."""
    with _lock:
        for key, (_, gate) in list(_gates.items()):
            if gate.tracker is tracker:
                _remove(key)


def _remove(key: int) -> None:
    with _lock:
        found = _gates.pop(key, None)
        if found is None:
            return
        kind = found[1].kind
        if all(gate.kind is not kind for _, gate in _gates.values()):
            _restore(kind)


def _patch(kind: Any) -> None:
    patch = _patches.get(kind)
    if patch is not None and kind.__dict__.get("__call__") is patch.wrapper:
        return
    own = kind.__dict__.get("__call__")
    stock = kind.__call__

    @functools.wraps(stock)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _gates.get(id(self))
        if found is None:
            return stock(self, *args, **kwargs)
        return found[1].run(self, stock, args, kwargs)

    kind.__call__ = __call__
    _patches[kind] = _Patch(__call__, own)


def _restore(kind: Any) -> None:
    patch = _patches.pop(kind, None)
    if patch is None or kind.__dict__.get("__call__") is not patch.wrapper:
        return  # replaced by somebody else, who keeps ours, which passes through
    if patch.own is None:
        del kind.__call__
    else:
        kind.__call__ = patch.own


class _Draws:
    """The states of all random generators that a call may draw from."""

    def __init__(self, arguments: Any) -> None:
        self._generators = [(each, each.get_state()) for each in _generators(arguments)]
        self._cpu = torch.get_rng_state()
        cuda: Any = torch.cuda
        self._cuda = cuda.get_rng_state_all() if cuda.is_initialized() else None

    def restore(self) -> None:
        """Set all of them back."""
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


def _generators(value: Any) -> Iterator[torch.Generator]:
    if isinstance(value, torch.Generator):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _generators(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _generators(item)


def _predicted(session: Session) -> bool:
    return any(
        record.count(PREDICTED) + record.count(FEEDBACK) for record in session.records.values()
    )


def _output_type(pipe: Any, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    bound = inspect.signature(stock).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get("output_type", kwargs.get("output_type"))


def _text(found: float) -> str:
    return "identical" if found == math.inf else f"{found:.1f} dB"


def decibels(output: Any, reference: Any, *, latent: bool) -> float | None:
    """PSNR of what a pipeline returned, whatever its ``output_type`` is.

    Args:
        output, reference: PIL pictures, arrays or tensors, in lists or not, or the output
            object or tuple whose first item they are.
        latent: they are latents: the range of values is that of the reference. So it is of
            numbers that are not in [0, 1], and therefore no pictures.

    Returns:
        Decibels over all values; NaN where one is not finite; ``None`` if there is nothing
        that could be compared.
    """
    ours, full = _values(_content(output)), _values(_content(reference))
    if not ours or not full or [p.numel() for p in ours] != [p.numel() for p in full]:
        return None
    count, error, low, high = 0, 0.0, math.inf, -math.inf
    for some, others in zip(ours, full, strict=True):
        # Piece by piece: a video in float64 may take more than all that the wrap saves.
        for i in range(0, others.numel(), _PIECE):
            x, y = _scaled(some[i : i + _PIECE]), _scaled(others[i : i + _PIECE])
            count += y.numel()
            error += float((x - y).square().sum())
            low, high = min(low, float(y.min())), max(high, float(y.max()))
    if not math.isfinite(error):
        return math.nan
    pictures = not latent and low >= 0 and high <= 1
    width = 1.0 if pictures or low == high else high - low
    return 10 * math.log10(width**2 * count / error) if error else math.inf


def _scaled(values: Tensor) -> Tensor:
    """On the CPU in float64; bytes as [0, 1]."""
    found = values.detach().to("cpu", torch.float64)
    return found / 255 if values.dtype == torch.uint8 else found


def _content(output: Any) -> Any:
    """The pictures of an output: all of it, or its first item."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return output[0] if isinstance(output, tuple) and output else output


def _values(value: Any) -> list[Tensor] | None:
    """All numbers, in rows that are not empty; ``None`` if something else is among them."""
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fu":
            return None
        value = torch.from_numpy(np.array(value))  # a picture's own memory is not writable
    if isinstance(value, Tensor):
        return [value.reshape(-1)] if value.numel() else []
    if not isinstance(value, (list, tuple)):
        return None
    rows: list[Tensor] = []
    for item in value:
        found = _values(item)
        if found is None:
            return None
        rows += found
    return rows
