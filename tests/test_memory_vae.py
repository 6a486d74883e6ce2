"""Peaks of the VAEs at full size, on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import fused_attention  # noqa: F401

import accelrt
from accelrt.benchmarking import models
from accelrt.benchmarking.models import ModelCase
from accelrt.benchmarking.weights import on_meta
from accelrt.groups.slicing import probing
from accelrt.memory import track_peak
from accelrt.planning import cost

MIB = 2**20
BANDS: dict[str, Any] = {"bands": True, "slice_mib": 2.0}
LEAST: dict[str, Any] = {"bands": True, "slice_mib": 1.0, "recompute": "always"}


def peak(case: ModelCase, *, every_slice: bool = False, **settings: Any) -> float:
    """Peak of one decode in MiB."""
    model, inputs = on_meta(case.build, torch.bfloat16), case.inputs(torch.bfloat16, "meta")
    accelrt.wrap(model, **settings)
    with torch.no_grad(), track_peak() as tracker:
        if every_slice:
            case.run(model, inputs)
        else:
            with probing():
                case.run(model, inputs)
    return tracker.peak_bytes / MIB


@pytest.mark.parametrize(
    ("settings", "most"),
    [(BANDS, 205), ({**BANDS, "slice_mib": 4.0}, 205), (LEAST, 110)],
    ids=["bands", "longer-bands", "recompute"],
)
def test_image_vae(settings: dict[str, Any], most: float) -> None:
    """An image of 512 x 512: the output of a block is 64 MiB, its enlarged input 128."""
    assert peak(models.vae(1, 64), **settings) <= most


def test_image_vae_takes_the_images_one_after_the_other() -> None:
    one, many = (peak(models.vae(images, 64), **LEAST) for images in (1, 16))
    output = 16 * 3 * 512 * 512 * 2 / MIB
    assert many <= one + output


@pytest.mark.parametrize(
    ("frames", "settings", "most"),
    [
        (14, {"slice_mib": 8.0}, 4100),
        (14, {**BANDS, "slice_mib": 8.0}, 4100),
        (14, LEAST, 2500),
        (25, LEAST, 4200),
    ],
    ids=["14", "14-bands", "14-recompute", "25-recompute"],
)
def test_video_vae(frames: int, settings: dict[str, Any], most: float) -> None:
    """Frames of 576 x 1024: 144 MiB each in the last block."""
    assert peak(models.svd_vae(frames, 72, 128), **settings) <= most


@pytest.mark.parametrize("settings", [BANDS, LEAST], ids=["bands", "recompute"])
@pytest.mark.parametrize(
    "case", [models.vae(1, 36), models.svd_vae(5, 9, 16)], ids=["image", "video"]
)
def test_a_probe_sees_the_peak_of_all_slices(case: ModelCase, settings: dict[str, Any]) -> None:
    assert peak(case, **settings) == peak(case, every_slice=True, **settings)


def test_smaller_slices_are_less_memory() -> None:
    peaks = [
        peak(models.vae(1, 64), bands=True, slice_mib=mib, recompute="always")
        for mib in (0.001, 0.5, 1.0, 2.0, 4.0, 16.0)
    ]
    assert peaks == sorted(peaks)


def test_the_smallest_plan_computes_little_twice_but_a_number_may_ask_for_it() -> None:
    case = models.vae(1, 64)

    def decoder(budget: int | str) -> Any:
        model = accelrt.wrap(on_meta(case.build, torch.bfloat16), memory_budget=budget)
        with torch.no_grad():
            case.run(model, case.inputs(torch.bfloat16, "meta"))
        return model.decoder.forward.planner.plans["decoder"]

    smallest = decoder("min")
    assert smallest.peak_bytes / MIB <= 205
    assert smallest.seconds <= 1.1 * smallest.fastest_seconds
    tight = decoder(130 * MIB)  # as much as that is used, where it buys time
    assert tight.peak_bytes <= tight.reserved_bytes <= 130 * MIB
    assert any(group.recompute for group in tight.groups)
    assert tight.seconds > smallest.seconds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_live_activations_within_the_smallest_number(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a decode of 512 x 512 makes within the smallest budget that can be met."""
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())
    case = models.vae(1, 64)
    inputs = case.inputs(dtype, "meta")

    def within(budget: int) -> Any:
        model = accelrt.wrap(on_meta(case.build, dtype), memory_budget=budget)
        with torch.no_grad():
            case.run(model, inputs)
        return model

    with pytest.raises(accelrt.BudgetError) as refused:
        within(1)
    smallest = refused.value.smallest_bytes
    model = within(smallest)  # which plans; only what runs after it is measured
    with torch.no_grad(), track_peak() as tracker:
        case.run(model, inputs)
    assert 95 * MIB <= tracker.peak_bytes <= 110 * MIB  # the output of a block is 64
    planner = model.decoder.forward.planner
    plan = planner.plans["decoder"]
    assert plan.reserved_bytes <= smallest
    assert tracker.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.01)
    assert all(arena.spills == arena.misplaced == 0 for arena in planner.arenas)
