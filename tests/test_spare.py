"""Buffers for slices: planned, in the arena of a budget, and of no influence on any result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

import accelrt
from accelrt import _C
from accelrt.benchmarking import models
from accelrt.benchmarking.weights import on_meta
from accelrt.groups import convolve, products
from accelrt.groups.resnet import ResnetGroup
from accelrt.groups.spare import Spare
from accelrt.memory import track_peak
from accelrt.planning import cost, resident
from accelrt.planning.dryrun import MetaKernels

MIB = 2**20
GIB = 2**30


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions and projections by our kernels, whatever the processor."""
    monkeypatch.setattr(convolve, "conv_is_ours", lambda dtype: True)
    monkeypatch.setattr(products, "linear_is_ours", lambda dtype, depth: True)


@pytest.fixture(autouse=True)
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on the machine."""
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())


def decoder(**settings: Any) -> AutoencoderKL:
    vae = zoo.tiny_vae(block_out_channels=(32, 64), norm_num_groups=8, **settings)
    return zoo.clone(vae, torch.bfloat16)  # type: ignore[no-any-return]


def test_one_tensor_at_a_time_in_memory_that_is_made_once() -> None:
    spare = Spare(torch.empty(3, 5, dtype=torch.bfloat16), 2 * 3 * 4 * 5)
    images = spare.images(2, 3, 4, 5)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    rows = spare.rows(7, 2)
    assert rows.is_contiguous()
    assert rows.data_ptr() == images.data_ptr()


@pytest.mark.parametrize("budget", [140 * MIB, 200 * MIB])
def test_slices_of_a_decoder_leave_nothing_to_the_heap(ours: None, budget: int) -> None:
    """An image of 512 x 512: ordinary tensors of its slices were 28 and 96 MiB at once.

    What is left is attention's output, and its keys and values in torch's order.
    """
    case = models.vae(1, 64)
    model: Any = accelrt.wrap(on_meta(case.build, torch.bfloat16), memory_budget=budget)
    with torch.no_grad():
        case.run(model, case.inputs(torch.bfloat16, "meta"))
    plan = model.decoder.forward.planner.plans["decoder"]
    assert plan.own_bytes <= 17 * MIB
    assert plan.reserved_bytes <= budget
    for group in plan.groups:
        if group.name != "mid_block.attentions.0":
            assert group.own_bytes <= 8 * MIB, group.name


@pytest.mark.parametrize("budget", ["min", 2 * MIB, 16 * MIB])
def test_a_decoder_makes_what_its_plan_says(ours: None, budget: int | str) -> None:
    model = accelrt.wrap(decoder(), memory_budget=budget)
    z = zoo.normal(2, 4, 7, 6).bfloat16()
    with torch.no_grad():
        for _ in range(2):  # the first run plans
            with track_peak() as memory:
                model.decode(z)
    planner: Any = model.decoder.forward.planner
    plan = planner.plans["decoder"]
    assert memory.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.03)
    assert all(arena.spills == arena.misplaced == 0 for arena in planner.arenas)


@pytest.mark.parametrize("size", [(9, 6), (8, 8)])
@pytest.mark.parametrize("images", [None, 1, 2])
def test_results_are_those_of_tensors_of_their_own(
    ours: None, images: int | None, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without spares where slices may overlap on a GPU, which changes nothing here."""
    results = []
    spared = []
    made = ResnetGroup._spares

    def watched(self: ResnetGroup, *args: Any) -> Any:
        spares = made(self, *args)
        spared.append(spares.first is not None)
        return spares

    monkeypatch.setattr(ResnetGroup, "_spares", watched)
    z = zoo.normal(3, 4, *size).bfloat16()
    for without in (True, False):
        spared.clear()
        # One slice that is all has buffers in an arena alone.
        settings = {"frames_per_slice": images, "memory_budget": GIB}
        model = accelrt.wrap(decoder(), pipeline_slices=without, **settings)
        with torch.no_grad():
            results.append(model.decode(z).sample)
        assert spared
        assert all(spared) != without
    assert torch.equal(*results)


def test_one_slice_without_an_arena_holds_no_more_than_with_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Buffers beside the output of a block were a sixth more."""

    def peak() -> int:
        vae = accelrt.wrap(on_meta(decoder, torch.bfloat16))
        with torch.no_grad(), MetaKernels(), track_peak() as memory:
            vae.decode(torch.empty(2, 4, 64, 64, dtype=torch.bfloat16, device="meta"))
        return memory.peak_bytes

    monkeypatch.setattr(convolve, "conv_is_ours", lambda dtype: False)
    library = peak()
    monkeypatch.setattr(convolve, "conv_is_ours", lambda dtype: True)
    assert peak() <= library


@pytest.mark.parametrize("processor", ["avx2", "amx", "amx_emulated"])
def test_a_convolution_of_ours_is_planned_for(
    processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile and its sums per thread; with tile registers larger ones, and packed weights."""
    monkeypatch.setattr(resident, "conv_is_ours", lambda dtype: True)
    monkeypatch.setattr(_C, "active_isa", lambda: processor)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cpu, tile = torch.device("cpu"), 3 * MIB + 640 * 2**10

    def taken(outputs: int, inputs: int, kernel: int, dtype: torch.dtype) -> int:
        conv = nn.Conv2d(inputs, outputs, kernel, device="meta", dtype=dtype)
        return resident.workspace_bytes(conv, cpu)

    assert taken(40, 33, 3, torch.float32) == 3 * tile
    if processor == "avx2":
        assert taken(40, 33, 3, torch.bfloat16) == 3 * tile
        return
    assert taken(40, 33, 3, torch.bfloat16) == 6 * tile + 2 * 9 * 64 * 32 * 2
    panel = 9 * 2560 * 32 * 2
    assert taken(1280, 2560, 3, torch.bfloat16) == 6 * tile + 16 * MIB // panel * panel
    panel = 9 * 51200 * 32 * 2  # larger than what is packed at a time
    assert taken(64, 51200, 3, torch.bfloat16) == 6 * tile + panel


def test_a_linear_layer_on_tile_registers_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows or packed weights for all threads; panels or a chunk of the rows, and sums, for each."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cpu = torch.device("cpu")

    def taken(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> int:
        layer = nn.Linear(inputs, outputs, device="meta", dtype=dtype)
        assert resident.product_bytes(layer, cpu) == resident.workspace_bytes(layer, cpu)
        return resident.workspace_bytes(layer, cpu)

    before = _C.active_isa()
    try:
        _C.set_isa("amx_emulated")
    except RuntimeError as reason:
        pytest.skip(str(reason))
    try:
        assert taken(320, 1280, torch.float16) == 320 * 1280 * 2
        each = 5 * 2**18 + 512 * 2**10
        assert taken(320, 70) == 8 * MIB + 3 * each
        panel = 64 * 2016  # with its padding
        assert taken(4000, 2000) == 125 * panel + 3 * each
        assert taken(5000, 2000) == 16 * MIB // panel * panel + 3 * each
        panel = 64 * 4608
        each = 256 * (2 * 4608 + 64) + 512 * 2**10
        assert taken(1152, 4608) == 36 * panel + 3 * each
        assert taken(18432, 4608) == 18432 * 4608 * 2  # as the library's, which has few rows
        each = 512 * (2 * 10240 + 64) + 512 * 2**10
        assert taken(320, 10240) == 8 * MIB + 3 * each
        _C.set_isa("avx512bf16")
        assert taken(320, 70) == 320 * 70 * 2
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "copies"),
    [
        (torch.bfloat16, 100, 64, 2),
        (torch.float32, 100, 64, 0),
        (torch.bfloat16, 100, 63, 0),
        (torch.bfloat16, 63, 100, 0),
    ],
)
def test_packed_keys_and_values_are_planned_for(
    dtype: torch.dtype, queries: int, keys: int, copies: int
) -> None:
    q = torch.empty(2, 3, queries, 8, dtype=dtype, device="meta")
    k = torch.empty(2, 3, keys, 8, dtype=dtype, device="meta")
    with torch.no_grad(), MetaKernels(), track_peak() as memory:
        F.scaled_dot_product_attention(q, k, k)
    assert memory.peak_bytes == (q.numel() + copies * k.numel()) * q.element_size()
