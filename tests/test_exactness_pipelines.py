"""Whole pipelines, stock and wrapped from the same start."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401

import accelrt

PIPELINES = {
    "animatediff": (zoo.animatediff_pipeline, lambda pipe, _: zoo.run_animatediff(pipe)),
    "animatediff-unguided": (
        zoo.animatediff_pipeline,
        lambda pipe, _: zoo.run_animatediff(pipe, guidance_scale=1.0),
    ),
    "dit": (zoo.dit_pipeline, zoo.run_dit),
    "dit-unguided": (zoo.dit_pipeline, lambda pipe, patch: zoo.run_dit(pipe, patch, 1.0)),
}
_TRUTH: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PIPELINES)
def test_latents_after_four_steps(name: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    build, run = PIPELINES[name]
    if name not in _TRUTH:
        _TRUTH[name] = run(build(torch.float64), monkeypatch)
    truth = _TRUTH[name]
    pipe = build(dtype)
    before = run(pipe, monkeypatch)
    accelrt.wrap(pipe, frames_per_slice=3, pixels_per_slice=100, ff_rows=64, samples_per_slice=1)
    wrapped = run(pipe, monkeypatch)
    accelrt.unwrap(pipe)
    after = run(pipe, monkeypatch)
    assert not torch.equal(wrapped, before)  # it did run differently
    assert torch.equal(after, before)
    zoo.assert_rule(zoo.relative_error(wrapped, truth), zoo.relative_error(before, truth))


def test_decoded_video() -> None:
    pipe = zoo.animatediff_pipeline()
    before = zoo.run_animatediff(pipe, output_type="pt")
    accelrt.wrap(pipe)
    after = zoo.run_animatediff(pipe, output_type="pt")
    assert after.shape == before.shape
    assert zoo.relative_error(after, before.double()) < 1e-4


def test_callbacks_see_the_same_steps() -> None:
    pipe = accelrt.wrap(zoo.animatediff_pipeline())
    seen: list[int] = []

    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> Any:
        assert pipeline is pipe
        assert values["latents"].shape == (1, 4, 7, 9, 15)
        seen.append(step)
        return values

    zoo.run_animatediff(pipe, callback_on_step_end=callback)
    assert seen == [0, 1, 2, 3]
