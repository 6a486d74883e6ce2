"""Live activations of the published image transformers, on meta tensors of full size."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from model_zoo import fused_attention  # noqa: F401

import accelrt
from accelrt.benchmarking import models
from accelrt.benchmarking.weights import on_meta
from accelrt.groups.slicing import probing
from accelrt.memory import track_peak
from accelrt.planning import component
from accelrt.planning.plan import ComponentPlan

CASES: dict[str, Any] = {
    "dit-256": functools.partial(models.dit, 32),
    "dit-512": functools.partial(models.dit, 64),
    "pixart-512": functools.partial(models.pixart, 64, 120),
    "pixart-1024": functools.partial(models.pixart, 128, 300),
}

# Case, settings, MiB of live activations at the peak.
LIMITS: list[tuple[str, dict[str, Any], float]] = [
    ("dit-256", {"slice_mib": 0.1}, 2.2),
    ("dit-256", {"slice_mib": 0.1, "samples_per_pass": 1}, 1.6),
    ("dit-512", {"slice_mib": 0.1}, 7.4),
    ("pixart-512", {"slice_mib": 0.1}, 8.5),
    ("pixart-1024", {"slice_mib": 8.0}, 53.0),
    ("pixart-1024", {"slice_mib": 4.0}, 45.0),
    ("pixart-1024", {"slice_mib": 0.1}, 31.5),
    ("pixart-1024", {"slice_mib": 0.1, "samples_per_pass": 1}, 22.2),
]


@functools.cache
def _model(name: str) -> tuple[Any, Any]:
    case = CASES[name]()
    model = on_meta(case.build, torch.bfloat16)
    del model.transformer_blocks[3:]  # all blocks need the same
    return case, model


def _peak(name: str, settings: dict[str, Any] | None, **inputs: Any) -> float:
    case, model = _model(name)
    given = {**case.inputs(torch.bfloat16, "meta"), **inputs}
    if settings is not None:
        accelrt.wrap(model, **settings)
    try:
        with torch.no_grad(), probing(), track_peak() as memory:
            case.run(model, given)
        if settings is not None:
            assert not accelrt.summary(model).stock
    finally:
        if settings is not None:
            accelrt.unwrap(model)
    return memory.peak_bytes / 2**20


@pytest.mark.parametrize(("case", "settings", "limit"), LIMITS)
def test_peak(case: str, settings: dict[str, Any], limit: float) -> None:
    assert _peak(case, settings) < limit


@pytest.mark.parametrize("case", CASES)
def test_smaller_slices_never_need_more(case: str) -> None:
    peaks = [_peak(case, {"slice_mib": mib}) for mib in (64.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.1)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] < 0.75 * _peak(case, None)


def test_the_table_of_another_grid_is_made_in_bands() -> None:
    """The stock model computes it in float64, whole: 36 MiB and more."""
    given = {"hidden_states": torch.empty(2, 4, 96, 168, dtype=torch.bfloat16, device="meta")}
    assert _peak("pixart-1024", {"slice_mib": 0.1}, **given) < 31.5


def test_room_that_a_search_leaves_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is most in one group and scratch in another: together they are no limit."""
    _, model = _model("dit-256")
    limit = int(5.2 * 2**20)

    def planned(loosenings: int) -> ComponentPlan:
        monkeypatch.setattr(component, "LOOSENINGS", loosenings)
        plan = accelrt.plan(model, height=256, width=256, batch=1, memory_budget=limit)
        return plan.components[0]

    without, plan = planned(0), planned(2)
    assert without.needed_bytes < plan.needed_bytes <= limit
    assert plan.seconds < without.seconds
