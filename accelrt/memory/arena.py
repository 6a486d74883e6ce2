"""An arena of tensors: one slab per device, with offsets that are planned before the run.

A run on meta tensors records when every buffer is born and dies, the planner turns that
into offsets in one slab, and real runs take their buffers from there::

    dry = Arena("meta")
    with activate(dry):
        model(*meta_inputs)
    plan = dry.recording.plan(alignment_of(device))

    arena = Arena(device)
    arena.reserve(plan.slab_bytes)
    arena.schedule(plan.offsets)
    with activate(arena):
        arena.begin()
        model(*inputs)
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from accelrt import _C

from .heap import HeapKeeper
from .tracker import note_created

# DLPack's device types, and the alignments of the allocators of torch.
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_ALIGNMENTS = {"cpu": 64, "cuda": 512}

# DLPack's (code, bits). Other types come as bytes and are viewed.
_DTYPES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bool: (6, 8),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}
_BYTES = (1, 8)
#: Bytes from which :meth:`Arena.temporary` takes a tensor: the holes of smaller ones are filled.
LEAST_TEMPORARY = 2**16


def alignment_of(device: torch.device | str) -> int:
    """Bytes to which an arena on ``device`` aligns its blocks.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
    """
    kind = torch.device(device).type
    if kind not in _ALIGNMENTS:
        raise ValueError(f"device is '{kind}'; an arena has memory on: {', '.join(_ALIGNMENTS)}")
    return _ALIGNMENTS[kind]


class Recording:
    """Births and deaths of the tensors of a run, for the planner.

    Every birth and every death is one event; a tensor lives until its storage is freed,
    so views keep it alive.

    Attributes:
        live_bytes: of the tensors alive now.
    """

    def __init__(self) -> None:
        self.live_bytes = 0
        self._events = 0
        self._sizes: list[int] = []
        self._firsts: list[int] = []
        self._lasts: list[int | None] = []
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Record the birth of ``tensor`` now, and its death when it comes."""
        storage = tensor.untyped_storage()
        index = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._firsts.append(self._events)
        self._lasts.append(None)
        self._events += 1
        self.live_bytes += storage.nbytes()
        self._references[index] = weakref.ref(storage, lambda _: self._died(index))

    def _died(self, index: int) -> None:
        self._lasts[index] = self._events
        self._events += 1
        self.live_bytes -= self._sizes[index]
        del self._references[index]

    @property
    def lives(self) -> list[tuple[int, int, int]]:
        """``(bytes, first event, last event)`` in order of birth; what lives, lives until now."""
        lasts = (self._events if last is None else last for last in self._lasts)
        return list(zip(self._sizes, self._firsts, lasts, strict=True))

    def plan(self, alignment: int) -> _C.OffsetPlan:
        """Offsets for the recorded tensors, in order of birth.

        Args:
            alignment: bytes; see :func:`alignment_of`.

        Returns:
            ``offsets`` and ``slab_bytes``; ``bound_bytes``, the most bytes alive at once,
            which no plan can do without; ``fragmentation``, the share above it.

        Raises:
            ValueError: the alignment is not positive.
        """
        lives = self.lives
        sizes, firsts, lasts = ([life[i] for life in lives] for i in range(3))
        return _C.plan_offsets(sizes, firsts, lasts, alignment)


class Arena:
    """Tensors out of one slab of a device.

    A tensor's range is free again when its storage dies: views, also those of numpy, keep
    it. What does not fit becomes an ordinary tensor and is counted. On CUDA a range is
    reused without waiting for the device, so an arena serves the work of one stream, or of two
    that wait for each other (:mod:`accelrt.groups.pipelining`).
    :meth:`empty` may be called by several threads; the other methods by one at a time.

    What operators return within a slice comes and goes too often for a schedule. On a CPU it has
    a second slab, :meth:`temporary`, instead of the heap, whose holes would make the process
    hold much more than is alive.

    On the meta device there is no slab: tensors are ordinary and are recorded.

    Args:
        device: a CPU, CUDA or meta device.

    Attributes:
        device: the device, with its index on CUDA.
        busy: held by the thread whose run the schedule serves.
        contended: runs that found it busy, and took their tensors from elsewhere.
        recording: births and deaths since :meth:`begin`; only on the meta device.
        heap: of the process, on a CPU; else ``None``.

    Raises:
        ValueError: another type of device.
    """

    def __init__(self, device: torch.device | str) -> None:
        device = torch.device(device)
        self.device = torch.device(device.type)
        self.busy = threading.Lock()
        self.contended = 0
        self.recording = Recording()
        self._offsets: Sequence[int] = ()
        self._next = 0
        self._core: _C.Arena | None = None
        self._address = 0
        self._temporaries: _C.Arena | None = None
        self._temporaries_address = 0
        self.heap: HeapKeeper | None = None
        if device.type == "meta":
            return
        alignment = alignment_of(device)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.device = torch.device("cuda", index)
        self._core = _C.Arena(_DEVICE_TYPES[device.type], self.device.index or 0, alignment)
        if device.type == "cpu":
            self._temporaries = _C.Arena(_DEVICE_TYPES["cpu"], 0, alignment)
            self.heap = HeapKeeper(self._temporaries.return_free_pages)

    def reserve(self, slab_bytes: int, temporary_bytes: int = 0) -> None:
        """Make the slabs this large, rounded up to the alignment.

        Slabs of other sizes are replaced. Tensors of an old one stay valid and keep it in
        memory; without any, the old one is freed before the new one is made.

        Args:
            slab_bytes: bytes; 0 for none.
            temporary_bytes: of the slab for :meth:`temporary`, on a CPU; 0 for none.

        Raises:
            ValueError: a negative size.
        """
        if slab_bytes < 0 or temporary_bytes < 0:
            raise ValueError(
                f"slab_bytes is {slab_bytes} and temporary_bytes {temporary_bytes}; neither must "
                "be negative"
            )
        core, second = self._core, self._temporaries
        if core is None:
            return
        slab_bytes = -(-slab_bytes // core.alignment) * core.alignment
        temporary_bytes = -(-temporary_bytes // core.alignment) * core.alignment
        if second is None:
            temporary_bytes = 0
        if (slab_bytes, temporary_bytes) == (core.slab_bytes, self.temporary_bytes):
            return
        self.release()
        if self.heap is not None:
            self.heap.rest()  # without what another model's slices left in the heap
        if slab_bytes > 0:
            self._address, owner = _make_slab(slab_bytes, self.device)
            core.set_slab(self._address, slab_bytes, owner)
        if second is not None and temporary_bytes > 0:
            self._temporaries_address, owner = _make_slab(temporary_bytes, self.device)
            second.set_slab(self._temporaries_address, temporary_bytes, owner)

    def release(self) -> None:
        """Forget the slabs; their memory returns when the last tensor of each dies."""
        for core in (self._core, self._temporaries):
            if core is not None:
                core.release()

    def schedule(self, offsets: Sequence[int] | None) -> None:
        """Say where the tensors of a run shall lie.

        Args:
            offsets: in bytes, for the tensors after :meth:`begin` in order; those that come
                later go where they fit best. ``None`` forgets the schedule.
        """
        self._offsets = () if offsets is None else tuple(offsets)
        self._next = 0

    def begin(self) -> None:
        """A run starts: the next tensor is the first of the schedule, or of the recording."""
        self._next = 0
        self.recording = Recording()

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False
    ) -> Tensor:
        """An uninitialised tensor, with the strides that ``torch.empty`` would give it.

        Args:
            shape: its sizes. A tensor without elements takes no place in the schedule.
            dtype: its type.
            channels_last: the layout of an image ``[N, C, H, W]``; else contiguous.

        Raises:
            ValueError: ``channels_last`` for a shape that is not four-dimensional.
        """
        if channels_last and len(shape) != 4:
            raise ValueError(f"shape is {tuple(shape)}; channels_last needs four dimensions")
        elements = math.prod(shape)
        if elements <= 0:
            return _ordinary(self.device, shape, dtype, channels_last)
        core = self._core
        if core is None:
            tensor = _ordinary(self.device, shape, dtype, channels_last)
            self.recording.add(tensor)
            return tensor
        index = self._next
        self._next = index + 1
        preferred = self._offsets[index] if index < len(self._offsets) else -1
        strides = _strides(shape, channels_last)
        block = _block(core, preferred, shape, strides, dtype)
        if block is None:
            return _ordinary(self.device, shape, dtype, channels_last)
        if _on_block is not None:
            _on_block(self, block, block.data_ptr() - self._address)
        return block

    def temporary(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised contiguous tensor for the time of a slice, out of the second slab.

        Args:
            shape: its sizes.
            dtype: its type.

        Returns:
            ``None`` if it does not fit, or is too small to leave a hole worth the while.
        """
        core, elements = self._temporaries, math.prod(shape)
        if core is None or elements * dtype.itemsize < LEAST_TEMPORARY:
            return None
        return _block(core, -1, shape, _strides(shape, False), dtype)

    def is_temporary(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the slab of :meth:`temporary`."""
        if not tensor.is_cpu or self.temporary_bytes == 0:
            return False
        return 0 <= tensor.data_ptr() - self._temporaries_address < self.temporary_bytes

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor that :meth:`empty` gave lies in the slab; on the meta device, all do."""
        if self._core is None:
            return True
        return 0 <= tensor.data_ptr() - self._address < self.reserved_bytes

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive now."""
        if self._core is not None:
            self._core.reset_peak()

    @property
    def address(self) -> int:
        """Of the slab; 0 without one."""
        return self._address if self.reserved_bytes else 0

    @property
    def reserved_bytes(self) -> int:
        """Size of the slab."""
        return 0 if self._core is None else self._core.slab_bytes

    @property
    def temporary_bytes(self) -> int:
        """Size of the slab for :meth:`temporary`."""
        return 0 if self._temporaries is None else self._temporaries.slab_bytes

    @property
    def live_bytes(self) -> int:
        """Aligned bytes of the living tensors of the arena, temporaries apart."""
        return 0 if self._core is None else self._core.live_bytes

    @property
    def peak_bytes(self) -> int:
        """Most ``live_bytes`` so far, or since :meth:`reset_peak`."""
        return 0 if self._core is None else self._core.peak_bytes

    @property
    def misplaced(self) -> int:
        """How many tensors are or were not where the schedule wanted them."""
        return 0 if self._core is None else self._core.misplaced

    @property
    def spills(self) -> int:
        """How many tensors did not fit and became ordinary ones."""
        return 0 if self._core is None else self._core.refused

    @property
    def spilled_bytes(self) -> int:
        """Aligned bytes of those tensors, together."""
        return 0 if self._core is None else self._core.refused_bytes


BlockWatch = Callable[[Arena, Tensor, int], None]
_on_block: BlockWatch | None = None


def watch_blocks(watch: BlockWatch | None) -> None:
    """Tell ``watch`` of every tensor that an arena gives: which arena, the tensor, its offset.

    In any thread; ``None``: nobody is told.
    """
    global _on_block
    _on_block = watch


BirthWatch = Callable[[Tensor, bool], None]


class _Local(threading.local):
    arena: Arena | None = None
    births: BirthWatch | None = None


_local = _Local()


def watch_births(watch: BirthWatch | None) -> None:
    """Tell ``watch`` of every tensor that :func:`empty` makes in this thread; ``None``: nobody.

    Beside the tensor it is told whether that lies in an arena.
    """
    _local.births = watch


def outlives_slice(tensor: Tensor) -> Tensor:
    """Say of a tensor, not from :func:`empty`, that it is made in a slice for later ones too."""
    if _local.births is not None:
        _local.births(tensor, False)
    return tensor


def keep_to_plan() -> None:
    """Between operators of this thread: the heap keeps to the plan of the active arena."""
    arena = None if torch.compiler.is_compiling() else current()
    if arena is not None and arena.heap is not None:
        arena.heap.keep()


@contextmanager
def activate(arena: Arena | None) -> Iterator[Arena | None]:
    """:func:`empty` takes the tensors of this thread from ``arena``; ``None``: from none."""
    outer = current()
    _local.arena = arena
    try:
        yield arena
    finally:
        _local.arena = outer


def current() -> Arena | None:
    """The active arena of this thread."""
    return _local.arena


def empty(
    device: torch.device, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False
) -> Tensor:
    """An uninitialised tensor, from the active arena if that is of this device.

    Args:
        device: where.
        shape: its sizes.
        dtype: its type.
        channels_last: the layout of an image ``[N, C, H, W]``; else contiguous.
    """
    # A traced program must not hold memory of an arena.
    if not torch.compiler.is_compiling():
        arena = current()
        placed = arena is not None and _same(arena.device, device)
        if arena is not None and placed:
            tensor = arena.empty(shape, dtype, channels_last)
        else:
            tensor = _ordinary(device, shape, dtype, channels_last)
        if _local.births is not None:
            _local.births(tensor, arena is not None and placed and arena.owns(tensor))
        return tensor
    return _ordinary(device, shape, dtype, channels_last)


def temporary(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised contiguous tensor, as ``like.new_empty`` makes one, for a slice's time.

    From the active arena, if that has a slab for such tensors; else from the allocator.

    Args:
        like: gives dtype and device.
        shape: its sizes.
    """
    if not torch.compiler.is_compiling():
        arena = current()
        if arena is not None and like.device == arena.device:
            made = arena.temporary(shape, like.dtype)
            if made is not None:
                return made
    return like.new_empty(shape)


def temporary_images(like: Tensor, images: int, channels: int, *sides: int) -> Tensor:
    """The same for images ``[N, C, H, W]``, channels-last."""
    return temporary(like, images, *sides, channels).movedim(-1, 1)


def temporary_as(x: Tensor) -> Tensor:
    """The same with the shape of ``x``, and with its strides where it is dense."""
    if x.is_contiguous():
        return temporary(x, *x.shape)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return temporary_images(x, *x.shape)
    return torch.empty_like(x)


def _same(own: torch.device, device: torch.device) -> bool:
    if own.type != device.type:
        return False
    return own.type != "cuda" or own.index == device.index


def _ordinary(
    device: torch.device, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout)


def _strides(shape: Sequence[int], channels_last: bool) -> list[int]:
    if channels_last:
        _, channels, height, width = shape
        return [height * width * channels, 1, width * channels, channels]
    strides = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return strides[::-1]


def _block(
    core: _C.Arena, preferred: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """A tensor out of a slab, at an offset if that is free; ``None`` if it does not fit."""
    size = math.prod(shape) * dtype.itemsize
    typed = _DTYPES.get(dtype)
    if typed is None:
        capsule = core.allocate(size, preferred, *_BYTES, (size,), (1,))
    else:
        capsule = core.allocate(size, preferred, *typed, shape, strides)
    if capsule is None:
        return None
    tensor = from_dlpack(capsule)
    note_created(tensor)
    return tensor if typed else tensor.view(dtype).as_strided(shape, strides)


def _make_slab(slab_bytes: int, device: torch.device) -> tuple[int, object]:
    """Address and owner. A storage without a tensor: reserved memory, unseen by trackers."""
    if device.type == "cpu":
        return _allocated(slab_bytes, device)
    # A pool of its own: the slab is no part of a segment that others fragment, and its memory
    # goes back to the device. A tuple frees its last entry first: the slab, then the pool.
    with torch.cuda.device(device):
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool, device):
            address, storage = _allocated(slab_bytes, device)
    return address, (pool, storage)


def _allocated(size: int, device: torch.device) -> tuple[int, object]:
    storage = torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]
    return storage.data_ptr(), storage
