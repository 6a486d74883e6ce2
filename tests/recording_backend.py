"""CUDA graphs without CUDA: every operator of a capture is recorded, and called again on the same
memory.

A replay has the properties of a graph's: it works at the addresses of the capture and nowhere
else, the Python values of the capture are part of it, what the host decided is not decided
again, and it computes nothing that was not launched. What a graph may not do (wait for the
device, copy from ordinary memory of the host) is refused as CUDA refuses it.

It is stricter than a device in one point: memory that a capture allocated is filled with NaN
before every replay of the pool's graphs, and so is the slab of an arena. Whoever reads a
result later than it may, or keeps a tensor that was made inside, sees NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from accelrt.memory import arena as arenas

# What waits for the device, or copies from memory that is not pinned (torch.tensor).
REFUSED = {
    "aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::lift_fresh",
    "aten::is_nonzero", "aten::masked_select", "aten::_unique2",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put_"}
# Allocations: a graph does not repeat them.
_NO_KERNEL = {
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
    "aten::new_empty_strided", "aten::detach", "aten::alias",
}  # fmt: skip


class Refused(RuntimeError):
    """A capture reached what CUDA would not capture."""


@dataclass(frozen=True)
class Place:
    """A tensor by its memory: a storage that is kept, or the address of one that is not."""

    storage: Any
    address: int
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        storage = self.storage
        if storage is None:
            raw = (ctypes.c_char * self.nbytes).from_address(self.address)
            storage = torch.frombuffer(raw, dtype=torch.uint8).untyped_storage()
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=self.dtype)
            return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass
class Graph:
    """What was launched, in order."""

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Place | None]]] = field(
        default_factory=list
    )
    made: dict[int, Any] = field(default_factory=dict)
    arenas: list[Any] = field(default_factory=list)
    released: bool = False


class Recorder(TorchDispatchMode):
    """Records into a graph. CUDA does not run what it captures: writes are undone at the end."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self._known: set[int] = set()
        self._before: dict[int, tuple[Any, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in REFUSED:
            raise Refused(f"{name} during a capture")
        if name in _INDEXING and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        ):
            raise Refused(f"{name} by a mask during a capture")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        for tensor in inputs:
            self._note(tensor)
        self._save_written(func, args, kwargs)
        places = tree_map_only(Tensor, self._place, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known and not _in_arena(storage.data_ptr()):
                self.graph.made[storage.data_ptr()] = storage
        if name not in _NO_KERNEL:
            where = [self._place(t) for t in outputs]
            self.graph.calls.append((func, places[0], places[1], where))
        return result

    def _note(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.graph.made:
            self._known.add(address)

    def _save_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(tensor, Tensor):
                    continue
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                new = address in self._known and address not in self._before
                if new and not _in_arena(address):
                    self._before[address] = (storage, _bytes(storage).clone())

    def undo(self) -> None:
        """What was written outside of the capture is as it was before."""
        for storage, values in self._before.values():
            _bytes(storage).copy_(values)

    def _place(self, tensor: Tensor) -> Place:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        found = arenas.current()
        if found is not None and found not in self.graph.arenas:
            self.graph.arenas.append(found)
        # Blocks of an arena are given back when their last tensor goes: none is kept here.
        held = None if _in_arena(address) else storage
        return Place(
            held, address, storage.nbytes(), tensor.dtype, tuple(tensor.shape),
            tuple(tensor.stride()), int(tensor.storage_offset()),
        )  # fmt: skip


def _in_arena(address: int) -> bool:
    place = arenas.current()
    return place is not None and place.address <= address < place.address + place.reserved_bytes


def _bytes(storage: Any) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


class RecordingBackend:
    """A :class:`accelrt.steps.graph_backend.GraphBackend` on the CPU.

    Attributes:
        graphs: by pool.
        captures, replays, resets: how many.
        inside: called in a capture, before what is captured.
        events: what was asked, in order.
    """

    device_type = "cpu"

    def __init__(self) -> None:
        self.graphs: dict[int, list[Graph]] = {}
        self.captures = self.replays = self.resets = 0
        self.depth = 0
        self.is_current = False  # the capturing stream
        self.inside: Callable[[], None] = lambda: None
        self.events: list[str] = []

    def pool(self, device: torch.device) -> int:
        number = len(self.graphs)
        self.graphs[number] = []
        return number

    def pool_bytes(self, pool: int, device: torch.device) -> int:
        return sum(s.nbytes() for graph in self.graphs[pool] for s in graph.made.values())

    @contextmanager
    def warm_up(self, device: torch.device) -> Iterator[None]:
        self.events.append("warm-up")
        yield

    @contextmanager
    def capture(self, pool: int, device: torch.device) -> Iterator[Graph]:
        graph = Graph()
        recorder = Recorder(graph)
        self.events.append("capture")
        self.is_current = True
        try:
            with recorder:
                self.inside()
                yield graph
        finally:
            self.is_current = False
            recorder.undo()
        self.captures += 1
        self.graphs[pool].append(graph)

    def replay(self, graph: Graph) -> None:
        assert not graph.released
        assert self.depth == 1, "a replay outside of its turn"
        self.replays += 1
        self.events.append("replay")
        pool = next(graphs for graphs in self.graphs.values() if graph in graphs)
        for other in pool:
            for storage in other.made.values():
                _bytes(storage).fill_(255)  # NaN in every floating dtype
        place = arenas.current()
        for arena in graph.arenas:
            assert arena is place
            assert arena.live_bytes == 0
            if arena.reserved_bytes == 0:
                continue
            raw = (ctypes.c_char * arena.reserved_bytes).from_address(arena.address)
            torch.frombuffer(raw, dtype=torch.uint8).fill_(255)
        with torch.no_grad():
            for func, args, kwargs, outputs in graph.calls:
                given = tree_map_only(Place, Place.tensor, (args, kwargs))
                result = func(*given[0], **given[1])
                found = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
                for value, place_ in zip(found, outputs, strict=True):
                    target = place_.tensor()
                    if value.numel() and value.data_ptr() != target.data_ptr():
                        target.copy_(value)

    def reset(self, graph: Graph) -> None:
        self.resets += 1
        graph.released = True
        for graphs in self.graphs.values():
            if graph in graphs:
                graphs.remove(graph)

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def is_capturing(self) -> bool:
        return False

    def stream(self, device: torch.device) -> int:
        return 0
