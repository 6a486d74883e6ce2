"""Free pages of the heap go back when a run holds more than its plan."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from model_zoo import tiny_unet, unet_inputs

import accelrt
from accelrt.groups.slicing import starts
from accelrt.memory import heap
from accelrt.memory.arena import Arena, activate
from accelrt.memory.heap import HeapKeeper, resident_bytes
from accelrt.planning.resident import workspace_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the resident size is Linux's")
MIB = 2**20
SIZE = 64 * 1024  # below the size from which glibc maps memory by itself


@pytest.fixture
def holes():
    """100 MiB of blocks on the heap, of which every second is free; the others are the walls."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this allocator has no malloc_trim")
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(SIZE) for _ in range(100 * MIB // SIZE)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)

    def open_them() -> None:
        for block in blocks[::2]:
            libc.free(block)

    yield open_them
    for block in blocks[1::2]:
        libc.free(block)


def look(keeper: HeapKeeper) -> None:
    keeper._looked = 0.0
    keeper.keep()


def test_gives_back_what_exceeds_the_plan(holes):
    keeper = HeapKeeper()
    keeper.begin(0)
    keeper._limit -= 60 * MIB  # as if the blocks had come since then
    holes()
    before = resident_bytes()
    look(keeper)
    assert resident_bytes() < before - 40 * MIB


def test_what_every_product_frees_is_left_for_the_next(monkeypatch):
    """Given back after each block of a transformer, it took a third more time."""
    tries, held = [], [100 * MIB]
    monkeypatch.setattr(heap, "_PAUSE", 0.0)
    monkeypatch.setattr(heap, "resident_bytes", lambda: held[0])
    monkeypatch.setattr(heap, "return_free_memory", lambda: tries.append(held[0]))
    keeper = HeapKeeper()
    keeper.begin(10 * MIB, product_bytes=20 * MIB)
    tries.clear()
    for resident, expected in ((129, 0), (135, 1), (150, 1), (160, 2)):
        held[0] = resident * MIB  # after the second look the floor is 135, what an attempt left
        keeper.keep()
        assert len(tries) == expected


def test_what_others_took_since_is_not_the_runs(monkeypatch):
    """Another model's slab, made later, had every slice give its pages back and take them anew."""
    tries, held = [], [100 * MIB]
    monkeypatch.setattr(heap, "_PAUSE", 0.0)
    monkeypatch.setattr(heap, "resident_bytes", lambda: held[0])
    monkeypatch.setattr(heap, "return_free_memory", lambda: tries.append(held[0]))
    keeper = HeapKeeper()
    keeper.begin(30 * MIB, slab_bytes=20 * MIB)
    tries.clear()
    # With its slab, then with 80 MiB of others before a run, then 8 of its own, then too much.
    for resident, begins, expected in ((120, 1, 0), (200, 1, 1), (208, 0, 1), (216, 0, 2)):
        held[0] = resident * MIB
        if begins:
            keeper.begin(30 * MIB, slab_bytes=20 * MIB)
        keeper.keep()
        assert len(tries) == expected


def test_the_heap_keeps_what_the_largest_product_frees():
    model = accelrt.wrap(tiny_unet(), memory_budget=2**30)
    with torch.no_grad():
        model(**unet_inputs(2, 3, 8, 8))
    planner = model.forward.planner
    (arena,) = planner.arenas
    largest = max(w.numel() * w.element_size() for w in model.parameters() if w.dim() <= 2)
    assert arena.heap._product == largest > 0


@pytest.mark.parametrize("budget", [2**30, "min"])
def test_the_heap_may_hold_the_budget_not_just_the_plan(budget):
    """Trimmed to the plan, a forward with a loose budget takes its pages anew all the time."""
    model = accelrt.wrap(tiny_unet(), memory_budget=budget)
    with torch.no_grad():
        model(**unet_inputs(2, 3, 8, 8))
    planner = model.forward.planner
    (arena,), (plan,) = planner.arenas, planner.plans.values()
    expected = plan.slab_bytes + plan.own_bytes if budget == "min" else budget
    assert arena.heap._limit - arena.heap._base == expected


def test_leaves_the_heap_alone_within_the_plan(holes, monkeypatch):
    keeper = HeapKeeper()
    keeper.begin(200 * MIB)
    holes()
    monkeypatch.setattr(heap, "return_free_memory", lambda: pytest.fail("was within the plan"))
    look(keeper)


def test_does_not_try_again_in_vain(monkeypatch):
    tries = []
    monkeypatch.setattr(heap, "return_free_memory", lambda: tries.append(1))
    keeper = HeapKeeper()
    keeper.begin(0)
    keeper._limit -= 100 * MIB
    look(keeper)
    look(keeper)
    assert len(tries) == 2  # at rest, and once


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(heap, "_STATM", tmp_path / "none")
    keeper = HeapKeeper()
    keeper.begin(0)
    look(keeper)
    assert resident_bytes() is None


def test_groups_of_a_planned_run_look(monkeypatch):
    looks = []
    monkeypatch.setattr(HeapKeeper, "keep", lambda self: looks.append(self._limit))
    model, inputs = tiny_unet(), unet_inputs(2, 3, 8, 8)
    with torch.no_grad():
        accelrt.wrap(model)
        model(**inputs)
        assert not looks  # without a budget
        accelrt.unwrap(model)
        accelrt.wrap(model, memory_budget="min")
        model(**inputs)
    assert looks
    assert None not in looks


def test_slices_of_a_planned_run_look(monkeypatch):
    """Between slices, not only behind the last one."""
    looks = []
    monkeypatch.setattr(HeapKeeper, "keep", lambda self: looks.append(1))
    like = torch.empty(1)
    assert list(starts(6, 2, like)) == [0, 2, 4]
    assert not looks
    with activate(Arena("cpu")):
        assert list(starts(6, 2, like)) == [0, 2, 4]
    assert len(looks) == 3


def test_copies_of_weights_are_planned_for():
    """A convolution's are copied, reordered, and left in the heap; a product's are reordered."""
    conv, linear = torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(40, 40)
    cpu = torch.device("cpu")
    assert workspace_bytes(conv, cpu) == 4 * 8 * 8 * 9 * 4
    assert workspace_bytes(linear, cpu) == 40 * 40 * 4
    assert workspace_bytes(conv, cpu, 1000) == 4 * 8 * 8 * 9 * 4 + 10
    assert workspace_bytes(conv, torch.device("cuda"), 1000) == 0
