"""The arena: what is alive is exact, addresses follow the schedule, nothing outlives its owner."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from pathlib import Path

import pytest
import torch
from sim import run_simulator

from accelrt import _C, ops
from accelrt.memory import track_peak
from accelrt.memory.arena import Arena, activate, alignment_of, current, empty

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip
CPU = torch.device("cpu")


def arena_of(slab_bytes: int) -> Arena:
    arena = Arena("cpu")
    arena.reserve(slab_bytes)
    return arena


def take(arena: Arena, size: int) -> torch.Tensor:
    return arena.empty((size,), torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((), False), ((5,), False), ((2, 3, 4), False), ((2, 3, 5, 7), True), ((1, 3, 1, 1), True)],
)
def test_tensors_are_like_those_of_torch(
    dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    arena = arena_of(4096)
    tensor = arena.empty(shape, dtype, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    like = torch.empty(shape, dtype=dtype, memory_format=layout)
    assert tensor.stride() == like.stride()
    assert (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device)
    assert tensor.untyped_storage().nbytes() == like.untyped_storage().nbytes()
    assert tensor.data_ptr() % alignment_of(CPU) == 0
    assert (arena.live_bytes, arena.spills) == (-(-like.untyped_storage().nbytes() // 64) * 64, 0)
    tensor.zero_()
    assert not tensor.to(torch.complex64).any()


def test_tensors_are_outputs_of_operators() -> None:
    arena = arena_of(2**16)
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    out = arena.empty((2, 16, 5, 7), torch.float32, True)
    assert torch.equal(ops.silu(x, out=out), ops.silu(x))
    version = out._version
    torch.add(x, x, out=out)
    assert torch.equal(out, x + x)
    assert out._version > version
    assert out.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        inner = arena.empty((3,), torch.float32)
        assert inner.is_inference()
        assert torch.equal(inner.fill_(2), torch.full((3,), 2.0))


def test_a_range_is_free_when_its_tensor_dies() -> None:
    arena = arena_of(1024)
    first = take(arena, 1024)
    address = first.data_ptr()
    assert arena.live_bytes == 1024
    del first
    assert (arena.live_bytes, arena.peak_bytes) == (0, 1024)
    second = take(arena, 100)
    assert (second.data_ptr(), arena.live_bytes, arena.spills) == (address, 128, 0)
    arena.reset_peak()
    assert arena.peak_bytes == 128


def test_views_keep_the_range() -> None:
    arena = arena_of(1024)
    tensor = arena.empty((4, 64), torch.float32)
    row = tensor[1]
    array = row.fill_(3).numpy()
    del tensor
    assert arena.live_bytes == 1024
    del row
    assert arena.live_bytes == 1024
    assert array.sum() == 3 * 64
    del array
    assert arena.live_bytes == 0


def test_autograd_keeps_the_range() -> None:
    arena = arena_of(1024)
    x = torch.ones(64, requires_grad=True)
    y = (x * arena.empty((64,), torch.float32).fill_(2)).sum()
    assert arena.live_bytes == 256
    y.backward()
    assert torch.equal(x.grad, torch.full((64,), 2.0))
    del y
    assert arena.live_bytes == 0


def test_the_smallest_gap_that_fits_is_taken() -> None:
    arena = arena_of(1024)
    parts = [take(arena, size) for size in (256, 64, 128, 64, 512)]
    base = parts[0].data_ptr()
    parts[0] = parts[2] = torch.empty(0)
    assert take(arena, 100).data_ptr() == base + 320
    parts.clear()
    assert take(arena, 1024).data_ptr() == base  # the gaps have merged


def test_what_does_not_fit_is_an_ordinary_tensor() -> None:
    arena = Arena("cpu")
    assert take(arena, 10).shape == (10,)
    assert (arena.spills, arena.spilled_bytes, arena.reserved_bytes) == (1, 64, 0)
    arena.reserve(1000)
    assert arena.reserved_bytes == 1024
    inside, outside = take(arena, 1000), take(arena, 65)
    base = inside.data_ptr()
    assert not base <= outside.data_ptr() < base + 1024
    outside.zero_()
    assert (arena.spills, arena.spilled_bytes) == (2, 192)
    assert (arena.live_bytes, arena.peak_bytes) == (1024, 1024)


def test_tensors_without_elements_take_nothing() -> None:
    arena = arena_of(64)
    arena.schedule([0])
    assert arena.empty((0, 3), torch.float32).shape == (0, 3)
    assert arena.empty((2, 0, 4, 4), torch.float32, True).numel() == 0
    assert take(arena, 64).numel() == 64
    assert (arena.spills, arena.misplaced, arena.live_bytes) == (0, 0, 0)


def test_a_schedule_gives_every_run_the_same_addresses() -> None:
    arena = arena_of(1024)
    arena.schedule([512, 0, 64])
    base = take(arena, 1).data_ptr() - 512
    for _ in range(3):
        arena.begin()
        offsets = [tensor.data_ptr() - base for tensor in [take(arena, 64) for _ in range(3)]]
        assert offsets == [512, 0, 64]
    assert arena.misplaced == 0
    assert take(arena, 64).data_ptr() == base  # beyond the schedule: where it fits best
    assert arena.misplaced == 0
    arena.schedule(None)
    assert take(arena, 64).data_ptr() == base


def test_an_occupied_place_is_replaced_and_counted() -> None:
    arena = arena_of(1024)
    arena.schedule([0, 64, 32, 4096])
    tensors = [take(arena, 128), take(arena, 64)]  # 64 lies inside the first
    assert tensors[1].data_ptr() == tensors[0].data_ptr() + 128
    assert arena.misplaced == 1
    tensors += [take(arena, 64), take(arena, 64)]  # not aligned; beyond the end
    assert (arena.misplaced, arena.spills) == (3, 0)


def test_growing_keeps_old_tensors() -> None:
    arena = arena_of(64)
    old = take(arena, 64).fill_(7)
    arena.reserve(4096)
    new = take(arena, 4096).fill_(9)
    assert arena.spills == 0
    assert arena.live_bytes == 64 + 4096
    assert old.eq(7).all()
    del old
    assert arena.live_bytes == 4096
    assert take(arena, 64).data_ptr() != new.data_ptr()
    assert arena.spills == 1  # the old slab is not used again


def test_the_slab_dies_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[weakref.ref[object]] = []
    make = torch.UntypedStorage

    def remember(*args: object, **kwargs: object) -> object:
        slab = make(*args, **kwargs)
        slabs.append(weakref.ref(slab))
        return slab

    arena = Arena("cpu")
    monkeypatch.setattr(torch, "UntypedStorage", remember)
    arena.reserve(1024)
    arena.reserve(1000)  # the same after rounding: nothing happens
    tensor = take(arena, 100).fill_(5)
    arena.reserve(2048)
    assert [slab() is not None for slab in slabs] == [True, True]
    arena.release()
    assert (arena.reserved_bytes, arena.live_bytes) == (0, 128)
    assert [slab() is not None for slab in slabs] == [True, False]
    del arena
    gc.collect()
    assert tensor.eq(5).all()
    del tensor
    assert slabs[0]() is None


def test_a_capsule_that_nobody_takes_frees_its_block() -> None:
    storage = torch.UntypedStorage(1024)
    core = _C.Arena(1, 0)
    core.set_slab(storage.data_ptr(), 1024, storage)
    capsule = core.allocate(100, -1, 1, 8, (100,), (1,))
    assert (core.live_bytes, core.blocks) == (128, 1)
    del capsule
    assert (core.live_bytes, core.blocks) == (0, 0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="'xla'"):
        Arena("xla")
    with pytest.raises(ValueError, match="slab_bytes is -1"):
        Arena("cpu").reserve(-1)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        Arena("cpu").empty((2, 3), torch.float32, channels_last=True)
    core = _C.Arena(1, 0)
    with pytest.raises(ValueError, match="0 bytes"):
        core.allocate(0, -1, 1, 8, (), ())
    storage = torch.UntypedStorage(1024)
    with pytest.raises(ValueError, match="not aligned to 64"):
        core.set_slab(storage.data_ptr() + 1, 512, storage)
    core.set_slab(storage.data_ptr(), 1024, storage)
    with pytest.raises(ValueError, match="exceed a block of 64"):
        core.allocate(64, -1, 1, 8, (65,), (1,))
    assert core.blocks == 0
    with pytest.raises(ValueError, match="power of two"):
        _C.Arena(1, 0, 96)
    with pytest.raises(ValueError, match="device type 7"):
        _C.Arena(7, 0)


def test_threads() -> None:
    """Two threads allocate, hand over and free 2000 tensors; no two share a byte."""
    arena = arena_of(2**16)
    failures: list[BaseException] = []
    shared: list[tuple[torch.Tensor, int]] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(2000):
                stamp = draw.randrange(256)
                shared.append((take(arena, draw.randint(1, 6000)).fill_(stamp), stamp))
                if draw.random() < 0.5 or len(shared) > 20:
                    tensor, stamp = shared.pop()
                    assert tensor.eq(stamp).all()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for tensor, stamp in shared:
        assert tensor.eq(stamp).all()
    del tensor
    shared.clear()
    assert arena.live_bytes == 0
    assert take(arena, 2**16).data_ptr() % 64 == 0
    assert arena.peak_bytes <= 2**16


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_core_under_sanitizers(sim_dir: Path, variant: str) -> None:
    run_simulator(
        sim_dir / f"accelrt_sim_{variant}", "arena", "cpu", threads=4, rounds=1500, buffers=300
    )


def test_the_active_arena_is_that_of_the_thread_and_device() -> None:
    arena = arena_of(1024)
    seen: list[Arena | None] = []
    assert current() is None
    with activate(arena):
        assert current() is arena
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        inside = empty(CPU, (64,), torch.uint8)
        elsewhere = empty(torch.device("meta"), (64,), torch.uint8)
        with activate(None):
            outside = empty(CPU, (64,), torch.uint8)
        assert current() is arena
        with pytest.raises(KeyError), activate(arena_of(64)):
            raise KeyError
        assert current() is arena
    assert current() is None
    assert seen == [None]
    assert arena.live_bytes == 64
    assert (inside.device.type, elsewhere.device.type, outside.device.type) == (
        "cpu", "meta", "cpu",
    )  # fmt: skip


def test_compiled_code_holds_no_memory_of_the_arena() -> None:
    def scale(x: torch.Tensor) -> torch.Tensor:
        out = empty(x.device, x.shape, x.dtype, True)
        return out.copy_(x).mul_(2)

    torch._dynamo.reset()
    compiled = torch.compile(scale, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    arena = arena_of(4096)
    with activate(arena):
        assert torch.equal(compiled(x), x * 2)
        assert (arena.live_bytes, arena.peak_bytes) == (0, 0)
        kept = scale(x)
        assert arena.live_bytes == 512
    assert torch.equal(kept, x * 2)
    torch._dynamo.reset()


def test_the_tracker_counts_tensors_but_not_the_slab() -> None:
    with track_peak(record=True) as outer, track_peak() as inner:
        arena = arena_of(2**20)
        assert inner.live_bytes == 0
        images = arena.empty((2, 3, 4, 5), torch.bfloat16, True)
        assert inner.live_bytes == 240
        images.zero_().view(torch.int16)[1].add_(1)
        assert (inner.live_bytes, inner.existing_bytes) == (240, 0)
        viewed = arena.empty((7,), torch.float8_e4m3fn)
        assert (inner.live_bytes, inner.existing_bytes) == (247, 0)
        inner.mark("after")
        del images, viewed
        assert inner.live_bytes == 0
        arena.empty((300,), torch.uint8)
        assert (inner.peak_bytes, inner.peak_label) == (300, "after")
    assert (outer.peak_bytes, outer.existing_bytes) == (300, 0)
    assert outer.timeline[0] == ("created", 240)


def walk(device: torch.device) -> None:
    """Buffers with nested lives, views that outlive, and a dying input."""
    draw = random.Random(3)
    alive: list[torch.Tensor] = []
    for step in range(60):
        shape = (draw.randint(1, 3), 8, draw.randint(1, 9), draw.randint(1, 9))
        buffer = empty(device, shape, torch.bfloat16, True)
        alive.append(buffer[:, :4].zero_())
        del buffer
        if step % 3:
            alive.pop(draw.randrange(len(alive)))


def test_a_recording_on_meta_is_what_the_tracker_counts() -> None:
    dry = Arena("meta")
    dry.reserve(2**30)
    with activate(dry), track_peak() as memory:
        dry.begin()
        walk(torch.device("meta"))
    assert (dry.reserved_bytes, dry.live_bytes, dry.peak_bytes, dry.spills) == (0, 0, 0, 0)
    lives = dry.recording.lives
    assert len(lives) == 60
    assert len({step for _, *steps in lives for step in steps}) == 120
    assert dry.recording.plan(1).bound_bytes == memory.peak_bytes
    dry.begin()
    assert dry.recording.lives == []


def test_a_run_follows_the_plan_of_its_recording() -> None:
    dry = Arena("meta")
    with activate(dry):
        walk(torch.device("meta"))
    plan = dry.recording.plan(alignment_of(CPU))
    arena = arena_of(plan.slab_bytes)
    arena.schedule(plan.offsets)
    with activate(arena):
        for _ in range(2):
            arena.begin()
            walk(CPU)
    assert (arena.misplaced, arena.spills, arena.live_bytes) == (0, 0, 0)
    assert arena.peak_bytes == plan.bound_bytes
    assert arena.reserved_bytes == plan.slab_bytes


def test_what_still_lives_in_a_recording_lives_until_now() -> None:
    dry = Arena("meta")
    kept = take(dry, 100)
    view = kept[:1]
    take(dry, 50)
    assert dry.recording.lives == [(100, 0, 3), (50, 1, 2)]
    del kept
    assert dry.recording.lives[0] == (100, 0, 3)
    del view
    assert dry.recording.lives[0] == (100, 0, 3)
    assert take(dry, 1).is_meta
    assert dry.recording.lives[2][1:] == (4, 5)


def test_on_cuda() -> None:
    """The slab comes from a pool of its own, blocks lie at multiples of 512 bytes."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arena = Arena("cuda")
    assert arena.device.index is not None
    before = torch.cuda.memory_reserved()
    arena.reserve(64 * 2**20)
    assert arena.reserved_bytes == 64 * 2**20
    x = arena.empty((2, 8, 16, 16), torch.bfloat16, True)
    y = arena.empty((5,), torch.float32)
    assert x.device == y.device == arena.device
    assert x.data_ptr() % 512 == y.data_ptr() % 512 == 0
    assert torch.equal(torch.mul(x.fill_(3), 2, out=x), torch.full_like(x, 6))
    with activate(arena):
        assert empty(x.device, (4,), torch.float32).device == x.device
    arena.release()
    assert arena.reserved_bytes == 0
    assert x.float().sum() == 6 * x.numel()
    del x, y
    assert torch.cuda.memory_reserved() < before + 64 * 2**20
