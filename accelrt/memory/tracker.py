"""Peak of live tensor memory, exact to the storage, on any device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_local = threading.local()


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive while the context is open.

    A storage counts from the operation that made it until it is freed, once, however
    many views it has. Storages that existed before (weights, inputs) are counted
    apart, when an operation first reads them. What operators allocate inside
    themselves and free before they return (a convolution's workspace) is not seen.
    Works on the CPU, CUDA and meta tensors; only operations of the thread that opened
    the context are seen.

    Args:
        record: keep :attr:`timeline`.

    Example::

        with track_peak() as memory:
            pipe(...)
        print(memory.peak_bytes / 2**20, "MiB")
    """

    def __init__(self, *, record: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.existing_bytes = 0
        self.peak_label = ""
        self.record = record
        self.timeline: list[tuple[str, int]] = []
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._before: set[int] = set()
        self._label = ""

    def mark(self, label: str) -> None:
        """Name what runs from here on; shown in the timeline and as ``peak_label``."""
        self._label = label

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive now."""
        self.peak_bytes = self.live_bytes
        self.peak_label = self._label

    def enter(self, stage: Any, group: Any, state: Any) -> None:
        """Observer protocol of :mod:`accelrt.models`: label by stage and group."""
        self.mark(group.name)

    def leave(self, stage: Any, group: Any, state: Any) -> None:
        """Observer protocol of :mod:`accelrt.models`."""
        self.mark(stage.name)

    def _watch(self, tensor: Tensor, *, existed: bool) -> None:
        if tensor.layout is not torch.strided:
            for part in _strided_parts(tensor):
                self._watch(part, existed=existed)
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._references.get(key)
        if known is not None and known() is storage:
            if key not in self._before and size != self._sizes[key]:  # resized in place
                self.live_bytes += size - self._sizes[key]
                self._sizes[key] = size
            return
        self._references[key] = weakref.ref(storage, lambda _: self._freed(key))
        self._sizes[key] = size
        if existed:
            self._before.add(key)
            self.existing_bytes += size
        else:
            self.live_bytes += size

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        del self._references[key]
        if key in self._before:
            self._before.discard(key)
            self.existing_bytes -= size
        else:
            self.live_bytes -= size

    def existing(self, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors`` (weights, inputs) as existing before, without using them."""
        for tensor in tensors:
            self._watch(tensor, existed=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator, and what it read and made.

        Subclasses call it in place of ``super().__torch_dispatch__``, which torch wraps.
        """
        self._watch_all(args, existed=True)
        if kwargs:
            self._watch_all(kwargs.values(), existed=True)
        result = func(*args, **kwargs)
        self._watch_all((result,), existed=False)
        self._update_peak(func)
        return result

    def _watch_all(self, values: Iterable[Any], *, existed: bool) -> None:
        """The tensors among arguments or results of an operator, in lists and tuples too."""
        for value in values:
            if isinstance(value, Tensor):
                self._watch(value, existed=existed)
            elif isinstance(value, (list, tuple)):
                self._watch_all(value, existed=existed)

    def _update_peak(self, operation: Any) -> None:
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_label = self._label or str(operation)
        if self.record:
            self.timeline.append((self._label or str(operation), self.live_bytes))

    def created(self, tensor: Tensor) -> None:
        """Count ``tensor``, which was made without an operator; see :func:`note_created`."""
        self._watch(tensor, existed=False)
        self._update_peak("created")

    def __enter__(self) -> PeakTracker:
        super().__enter__()  # type: ignore[no-untyped-call]
        _local.trackers = (*_trackers(), self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        _local.trackers = tuple(t for t in _trackers() if t is not self)
        # Storages outlive the context; their size must not change the result any more.
        self._references.clear()


def track_peak(*, record: bool = False) -> PeakTracker:
    """A context manager that measures the peak of live tensor bytes.

    Args:
        record: also keep a timeline of ``(label, live bytes)`` after every operation.

    Returns:
        A :class:`PeakTracker`, to be entered; its ``peak_bytes`` and ``live_bytes`` do
        not include ``existing_bytes``, what was there before.
    """
    return PeakTracker(record=record)


def _trackers() -> tuple[PeakTracker, ...]:
    trackers: tuple[PeakTracker, ...] = getattr(_local, "trackers", ())
    return trackers


def note_created(tensor: Tensor) -> None:
    """Tell the open trackers of this thread of a tensor that no operator made.

    Without this a tensor over foreign memory (an arena's) counts as one that existed before.
    """
    for tracker in _trackers():
        tracker.created(tensor)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return storage_bytes(tensors)


def _strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the memory of a sparse one; an opaque one (oneDNN's) shows none."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()
