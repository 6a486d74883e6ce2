"""Peaks of the published UNets at full size, on meta tensors: what the README claims."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import accelrt
from accelrt.benchmarking import models
from accelrt.benchmarking.models import ModelCase
from accelrt.benchmarking.weights import on_meta
from accelrt.config import Config
from accelrt.planning import search

# Target in MiB of live activations, without and with recomputed skips; guidance halves in turn.
TARGETS: dict[str, tuple[Callable[[], ModelCase], dict[str, int], float, float]] = {
    "animatediff-512x512": (
        lambda: models.animatediff(16, 64, 64),
        {"height": 512, "width": 512, "num_frames": 16},
        225,
        165,
    ),
    "animatediff-576x1024": (
        lambda: models.animatediff(16, 72, 128),
        {"height": 576, "width": 1024, "num_frames": 16},
        480,
        350,
    ),
    "svd-14-frames": (
        lambda: models.svd(14, 72, 128),
        {"height": 576, "width": 1024, "num_frames": 14},
        430,
        320,
    ),
    "svd-xt": (
        lambda: models.svd(25, 72, 128),
        {"height": 576, "width": 1024, "num_frames": 25},
        760,
        560,
    ),
}


@pytest.mark.parametrize(
    ("name", "recompute"),
    [  # Each size once, each family in both ways: plans of this size take long.
        ("animatediff-512x512", "never"),
        ("animatediff-576x1024", "allow"),
        ("svd-14-frames", "allow"),
        ("svd-xt", "never"),
    ],
)
def test_smallest_plans(name: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With some of the ways to cut a group: among all of them none is chosen that needs more."""
    monkeypatch.setattr(search, "RUNGS", (4.0, 0.5, search.RUNGS[-1]))
    build, request, kept, recomputed = TARGETS[name]
    model = on_meta(build().build, torch.bfloat16)
    config = Config(recompute=recompute)
    plan = accelrt.plan(model, **request, memory_budget="min", config=config)
    (part,) = plan.components
    assert part.samples_per_pass == 1
    assert part.recompute_skips == (recompute == "allow")
    assert part.fragmentation < 0.01
    assert part.peak_bytes / 2**20 <= (kept if recompute == "never" else recomputed)
