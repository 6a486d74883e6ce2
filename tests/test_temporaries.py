"""What comes and goes within slices lies in the arena's second slab, not in holes of the heap."""

from __future__ import annotations

import sys

import pytest
import torch
from model_zoo import tiny_unet, unet_inputs
from torch import Tensor

import accelrt
from accelrt import ops
from accelrt.memory import arena as arena_module
from accelrt.memory.arena import (
    LEAST_TEMPORARY,
    Arena,
    activate,
    temporary,
    temporary_as,
    temporary_images,
)  # fmt: skip
from accelrt.memory.heap import resident_bytes

MIB = 2**20
SIZE = LEAST_TEMPORARY


def arena_of(temporary_bytes: int) -> Arena:
    arena = Arena("cpu")
    arena.reserve(4096, temporary_bytes)
    return arena


def take(arena: Arena, size: int) -> Tensor | None:
    return arena.temporary((size,), torch.uint8)


def test_a_range_is_free_again_when_its_tensor_dies() -> None:
    arena = arena_of(2 * SIZE)
    first, second = take(arena, SIZE), take(arena, SIZE)
    assert first is not None
    assert second is not None
    assert take(arena, SIZE) is None  # full
    address = first.data_ptr()
    del first
    again = take(arena, SIZE)
    assert again is not None
    assert again.data_ptr() == address
    assert arena.is_temporary(again)
    assert not arena.owns(again)
    assert not arena.is_temporary(arena.empty((64,), torch.uint8))
    assert not arena.is_temporary(torch.empty(64))


def test_small_ones_and_arenas_without_the_slab_give_none() -> None:
    assert take(arena_of(2 * SIZE), SIZE - 1) is None
    assert take(arena_of(0), SIZE) is None
    assert Arena("meta").temporary((SIZE,), torch.uint8) is None


def test_the_slabs_are_replaced_and_released_together() -> None:
    arena = arena_of(SIZE)
    kept = take(arena, SIZE)
    assert kept is not None
    kept.fill_(7)
    arena.reserve(4096, 3 * SIZE)
    assert arena.temporary_bytes == 3 * SIZE
    assert take(arena, 3 * SIZE) is not None
    arena.release()
    assert (arena.reserved_bytes, arena.temporary_bytes) == (0, 0)
    assert take(arena, SIZE) is None
    assert bool((kept == 7).all())  # it keeps its slab
    with pytest.raises(ValueError, match="temporary_bytes -1"):
        arena.reserve(0, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_layouts_are_those_of_torch(dtype: torch.dtype) -> None:
    like = torch.empty(2, 64, 32, 32, dtype=dtype)
    images = like.contiguous(memory_format=torch.channels_last)
    odd = torch.empty(64, 2, 32, 32, dtype=dtype).transpose(0, 1)
    arena = arena_of(4 * MIB)
    with activate(arena):
        made = (
            (temporary(like, 2, 64, 32, 32), like),
            (temporary_images(like, 2, 64, 32, 32), images),
            (temporary_as(like), like),
            (temporary_as(images), images),
        )
        other = temporary_as(odd)
    for tensor, model in made:
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (
            model.shape, model.stride(), model.dtype,
        )  # fmt: skip
        assert arena.is_temporary(tensor)
    assert other.stride() == torch.empty_like(odd).stride()
    assert not arena.is_temporary(temporary_as(like))  # without an active arena


def test_operators_return_temporaries() -> None:
    x = torch.randn(2, 128, 128)
    weight = torch.randn(128, 128)
    expected = ops.linear(ops.layer_norm_modulate(x).flatten(0, 1), weight, None)
    arena = arena_of(4 * MIB)
    with activate(arena):
        normed = ops.layer_norm_modulate(x)
        y = ops.linear(normed.flatten(0, 1), weight, None)
    assert arena.is_temporary(normed)
    assert arena.is_temporary(y)
    assert torch.equal(y, expected)


def _run(budget: int | str, least: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Arena]:
    monkeypatch.setattr(arena_module, "LEAST_TEMPORARY", least)
    model = accelrt.wrap(tiny_unet(), memory_budget=budget)
    with torch.no_grad():
        out = model(**unet_inputs(2, 3, 8, 8)).sample
    (arena,) = model.forward.planner.arenas
    (plan,) = model.forward.planner.plans.values()
    assert arena.temporary_bytes == -(-plan.own_bytes // 64) * 64
    return out, arena


@pytest.mark.parametrize("budget", [2**30, "min"])
def test_a_planned_run_is_the_same_and_stays_within_the_plan(
    budget: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    expected, unused = _run(budget, 2**60, monkeypatch)
    torch.manual_seed(0)
    out, arena = _run(budget, 1, monkeypatch)
    assert torch.equal(out, expected)
    assert unused._temporaries is not None
    assert unused._temporaries.peak_bytes == 0
    assert arena._temporaries is not None
    assert 0 < arena._temporaries.peak_bytes <= arena.temporary_bytes
    assert not arena.is_temporary(out)
    del out
    assert arena._temporaries.live_bytes == 0  # nothing of a run stays


def test_a_result_is_copied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep the slab in memory, and the next run short of it."""
    monkeypatch.setattr(arena_module, "LEAST_TEMPORARY", 1)
    model = accelrt.wrap(tiny_unet(), memory_budget=2**30)
    family = type(model.forward.family)
    finish = family.finish
    made: list[bool] = []

    def finished(self: object, module: object, state: object) -> Tensor:
        y = finish(self, module, state)
        result = temporary(y, *y.shape).fill_(3.0)
        current = arena_module.current()
        made.append(current is not None and current.is_temporary(result))
        return result

    monkeypatch.setattr(family, "finish", finished)
    with torch.no_grad():
        out = model(**unet_inputs(2, 3, 8, 8)).sample
    assert made[-1]
    (arena,) = model.forward.planner.arenas
    assert not arena.is_temporary(out)
    assert bool((out == 3.0).all())


@pytest.mark.skipif(sys.platform != "linux", reason="the resident size is Linux's")
def test_pages_of_free_ranges_go_back_and_those_of_living_ones_stay() -> None:
    arena = arena_of(96 * MIB)
    first, middle, last = (take(arena, 32 * MIB) for _ in range(3))
    assert first is not None
    assert middle is not None
    assert last is not None
    for value, tensor in enumerate((first, middle, last)):
        tensor.fill_(value + 1)
    del first, last, tensor
    before = resident_bytes()
    assert before is not None
    assert arena._temporaries is not None
    assert arena._temporaries.return_free_pages() >= 63 * MIB
    after = resident_bytes()
    assert after is not None
    assert after < before - 60 * MIB
    assert bool((middle == 2).all())
    assert take(arena, 32 * MIB) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the resident size is Linux's")
def test_the_heap_keeper_gives_them_back_too() -> None:
    arena = arena_of(64 * MIB)
    assert arena.heap is not None
    arena.heap.begin(MIB)
    tensor = take(arena, 64 * MIB)
    assert tensor is not None
    tensor.fill_(1)
    del tensor
    before = resident_bytes()
    arena.heap._looked = 0.0
    arena.heap.keep()
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after < before - 60 * MIB
