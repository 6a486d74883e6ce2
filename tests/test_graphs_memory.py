"""CUDA graphs under a memory budget: in the arena's slab, and in the plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graphs_common import MODELS, backends, call, drawn, report
from model_zoo import one_thread
from recording_backend import RecordingBackend
from torch import Tensor
from zoo_pipelines import FAMILIES

import accelrt
from accelrt.steps import Interval, Rehash, Taylor
from accelrt.wrap import forwards

__all__ = ["backends", "one_thread"]

MOVED = "the arena's slab moved"


def _arena(model: Any) -> Any:
    ((_, forward),) = forwards(model)
    (arena,) = forward.planner.arenas
    return arena


@pytest.mark.parametrize("name", ["animatediff-small", "svd", "unet2d", "dit", "pixart"])
def test_replays_in_the_slab(name: str, backends: list[RecordingBackend]) -> None:
    build, inputs = MODELS[name]
    model = build()
    eager = copy.deepcopy(model)
    accelrt.wrap(eager, memory_budget="min")
    accelrt.wrap(model, memory_budget="min", cuda_graphs=True)
    for draw in range(4):
        given = drawn(inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
    found = report(model)
    assert found.captures == 1
    assert found.replays >= 3  # of every part of a call
    arena = _arena(model)
    assert arena.spills == arena.misplaced == arena.live_bytes == 0


def test_a_slab_that_moves_drops_its_graphs(backends: list[RecordingBackend]) -> None:
    build, inputs = MODELS["dit"]
    model = build()
    eager = copy.deepcopy(model)
    accelrt.wrap(eager, memory_budget="min")
    accelrt.wrap(model, memory_budget="min", cuda_graphs=True)
    blockers: list[Tensor] = []
    for draw in range(9):
        given = drawn(inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
        if draw % 3 == 2:
            arena = _arena(model)
            reserved = arena.reserved_bytes
            arena.release()
            blockers.append(torch.empty(reserved, dtype=torch.uint8))  # takes its place
    found = report(model)
    assert found.captures == 1 + found.dropped.get(MOVED, 0)
    assert found.dropped.get(MOVED, 0) >= 1
    assert found.kept == 1


def test_a_kept_buffer_of_the_arena_is_not_written_over(backends: list[RecordingBackend]) -> None:
    build, inputs = MODELS["dit"]
    model = accelrt.wrap(build(), memory_budget="min", cuda_graphs=True)
    for _ in range(2):
        call(model, inputs())
    arena = _arena(model)
    before = report(model).replays
    kept = arena.empty((4,), torch.float32)
    kept.fill_(3.0)
    with pytest.warns(UserWarning, match="no room"):
        call(model, inputs())
    assert kept.tolist() == [3.0] * 4
    assert report(model).eager["something kept a buffer of the arena"] >= 1
    assert report(model).replays == before
    del kept
    call(model, inputs())
    assert report(model).replays > before


def test_pipelines_under_a_budget(backends: list[RecordingBackend]) -> None:
    """The VAE has the slab in between, so that it may come back elsewhere."""
    family = FAMILIES["dit"]
    pipe = family.build(torch.float32)
    outputs = []
    for settings in ({}, {"cuda_graphs": True}):
        accelrt.wrap(pipe, memory_budget="min", rehash=Rehash(Interval(2), Taylor(1)), **settings)
        outputs.append([family.run(pipe, num_inference_steps=7) for _ in range(3)])
        found = accelrt.summary(pipe).graphs
        accelrt.unwrap(pipe)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    graphs = next(one for one in found if one.component == "transformer")
    assert graphs.replays > 3


def test_a_failed_capture_makes_its_buffers_again(backends: list[RecordingBackend]) -> None:
    build, inputs = MODELS["dit"]
    model = build()
    eager = copy.deepcopy(model)
    accelrt.wrap(eager, memory_budget="min")
    accelrt.wrap(model, memory_budget="min", cuda_graphs=True)

    def fail() -> None:
        from accelrt.memory import arena

        place = arena.current()
        assert place is not None
        place.empty((4,), torch.float32)  # as if some of the pass had run
        raise RuntimeError("no capture")

    backends[0].inside = fail
    for draw in range(3):
        given = drawn(inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert _arena(model).spills == _arena(model).misplaced == 0


def test_the_plan_counts_the_pool(backends: list[RecordingBackend]) -> None:
    pipe = FAMILIES["dit"].build(torch.float32)
    size = {"height": 64, "width": 64, "memory_budget": "256MiB"}
    plain = accelrt.plan(pipe, **size)
    graphs = accelrt.plan(pipe, config=accelrt.Config(cuda_graphs=True), **size)
    before = {part.path: part for part in plain.components}
    after = {part.path: part for part in graphs.components}
    assert list(before) == list(after)
    denoiser = after["transformer"]
    pool = denoiser.own_bytes
    assert pool > 0
    assert denoiser.graphs_bytes == pool
    assert denoiser.total_bytes == before["transformer"].total_bytes + pool
    # It is held while the decoder runs.
    assert after["vae.decoder"].graphs_bytes == 0
    grown = after["vae.decoder"].reserve_bytes - before["vae.decoder"].reserve_bytes
    assert grown == pool
    assert "CUDA graphs of transformer" in str(graphs)
    assert "CUDA graphs" not in str(plain)


def test_a_budget_must_have_room_for_the_pool(backends: list[RecordingBackend]) -> None:
    build, inputs = MODELS["unet2d"]
    smallest = {}
    for graphs in (False, True):
        model = accelrt.wrap(build(), memory_budget=1, cuda_graphs=graphs)
        with pytest.raises(accelrt.BudgetError) as caught:
            call(model, inputs())
        smallest[graphs] = caught.value.smallest_bytes
    assert smallest[True] > smallest[False]
    model = accelrt.wrap(build(), memory_budget=smallest[True], cuda_graphs=True)
    for _ in range(3):
        call(model, inputs())
    ((_, forward),) = forwards(model)
    plan = forward.planner.plans[""]
    assert plan.needed_bytes <= smallest[True]
    assert report(model).replays >= 2  # of every part of a call


def test_graphs_expect_the_device_that_has_them() -> None:
    pipe = FAMILIES["dit"].build(torch.float32)
    config = accelrt.Config(cuda_graphs="auto")
    plan = accelrt.plan(pipe, height=64, width=64, memory_budget="256MiB", config=config)
    assert all(part.graphs_bytes == 0 for part in plan.components)  # the CPU has none


def test_the_zoo_is_complete() -> None:
    """Every denoiser family has a model among those that are recorded."""
    classes = {type(build()).__name__ for build, _ in MODELS.values()}
    from accelrt.models import supported

    denoisers = {name for name in supported() if not name.startswith("Autoencoder")}
    assert classes == denoisers
