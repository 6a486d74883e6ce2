"""CUDA graphs of computed, predicted and feedback passes, recorded on the CPU."""

from __future__ import annotations

from typing import Any

import feedback_common
import pytest
import torch
from graphs_common import backends, report
from model_zoo import one_thread
from recording_backend import RecordingBackend
from steps_common import stepper_of
from torch import Tensor
from zoo_pipelines import FAMILIES, Family

import accelrt
from accelrt.steps import (
    AdamsBashforth,
    Boundary,
    Interval,
    Rehash,
    Reuse,
    Schedule,
    Taylor,
    Threshold,
    Verified,
)
from accelrt.steps.graphs import WARMING

__all__ = ["backends", "one_thread"]

STEPS = 8
FIRST = "the first pass of a form makes the memory of its features"
MIXED = "the policy decides for each sample, from its features"


def requests(
    family: Family, pipe: Any, calls: int = 3, **settings: Any
) -> tuple[list[Tensor], accelrt.report.Summary]:
    """The outputs of requests that differ in their start and prompt, and the summary."""
    accelrt.wrap(pipe, **settings)
    try:
        outputs = []
        for index in range(calls):
            more: dict[str, Any] = {"guidance_scale": 2.0 + index}
            if family is FAMILIES["svd"]:
                more = {"max_guidance_scale": 2.0 + index}
            outputs.append(family.run(pipe, num_inference_steps=STEPS, **more))
        return outputs, accelrt.summary(pipe)
    finally:
        accelrt.unwrap(pipe)


def _component(family: Family, summary: Any) -> Any:
    return next(one for one in summary.graphs if one.component == family.denoiser)


CASES = [
    ("animatediff", Rehash(Interval(3), Reuse())),
    ("svd", Rehash(Interval(3), Reuse())),
    ("unet2d", Rehash(Interval(2), Taylor(2))),
    ("unet2d", Rehash(Interval(2), AdamsBashforth(2), Boundary("out"))),
    ("dit", Rehash(Interval(2), Taylor(2))),
    ("dit", Rehash(Schedule((0, 1, 3, 7)), Taylor(1), feature="hidden")),
    ("dit", Rehash(Interval(3), Taylor(1), Boundary("out"), time="step")),
    ("pixart-alpha", Rehash(Interval(2), Taylor(1))),
    ("pixart-sigma", Rehash(Interval(3), Reuse())),
]


@pytest.mark.parametrize(("name", "rehash"), CASES, ids=lambda value: str(value)[:40])
def test_computed_and_predicted_passes(
    name: str, rehash: Rehash, backends: list[RecordingBackend]
) -> None:
    family = FAMILIES[name]
    pipe = family.build(torch.float32)
    expected, _ = requests(family, pipe, rehash=rehash)
    found, summary = requests(family, pipe, rehash=rehash, cuda_graphs=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    graphs = _component(family, summary)
    # A request's memory goes to the next one, so that each form is captured once.
    assert set(graphs.eager) == {FIRST, WARMING}
    assert graphs.eager[FIRST] <= 2
    assert graphs.captures <= graphs.eager[WARMING] <= 2 * rehash.predictor.points + 2
    assert graphs.replays + sum(graphs.eager.values()) == 3 * STEPS
    assert graphs.replays > STEPS
    assert graphs.dropped == {}
    assert str(summary.steps).count("predicted") > 0


@pytest.mark.parametrize("policy", [Threshold(0.2), Verified(0.3)], ids=str)
@pytest.mark.parametrize("name", ["unet2d", "dit"])
def test_what_each_sample_decides_runs_without(
    name: str, policy: Any, backends: list[RecordingBackend]
) -> None:
    family, rehash = FAMILIES[name], Rehash(policy, Taylor(1))
    pipe = family.build(torch.float32)
    expected, _ = requests(family, pipe, rehash=rehash)
    found, summary = requests(family, pipe, rehash=rehash, cuda_graphs=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    graphs = _component(family, summary)
    assert graphs.eager[MIXED] > 0
    assert graphs.replays > 0  # the first steps and the last are computed whatever comes


@pytest.mark.parametrize("conditioning", ["t", "next"])
@pytest.mark.parametrize("name", feedback_common.NAMES)
def test_passes_with_feedback(
    name: str, conditioning: str, backends: list[RecordingBackend]
) -> None:
    pipe = feedback_common.pipeline(name, torch.float32)
    module = feedback_common.module_for(pipe, conditioning=conditioning)
    outputs = []
    for settings in ({}, {"cuda_graphs": True}):
        accelrt.wrap(pipe, feedback=module, **settings)
        outputs.append([feedback_common.run(name, pipe) for _ in range(3)])
        outputs[-1].append(feedback_common.run(name, pipe, guidance_scale=2.0))
        found = accelrt.summary(pipe).graphs
        accelrt.unwrap(pipe)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    graphs = next(one for one in found if one.component == "transformer")
    first = "a request's first pass makes what its conditioning gives"
    assert graphs.eager == {first: 4, WARMING: 2}
    assert graphs.captures == 2  # with feedback, and without
    assert graphs.replays == 4 * len(feedback_common.TIMES) - 6


def test_changed_feedback_is_captured_anew(backends: list[RecordingBackend]) -> None:
    pipe = feedback_common.pipeline("dit", torch.float32)
    module = feedback_common.module_for(pipe)
    accelrt.wrap(pipe, feedback=module, cuda_graphs=True)
    before = [feedback_common.run("dit", pipe) for _ in range(2)][-1]
    with torch.no_grad():
        module.scales.mul_(3.0)
    after = feedback_common.run("dit", pipe)
    assert report(pipe, "transformer").dropped == {"weights changed": 2}
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, feedback=module)
    assert torch.equal(after, feedback_common.run("dit", pipe))
    assert not torch.equal(after, before)


def test_requests_that_interleave_have_memory_of_their_own(
    backends: list[RecordingBackend],
) -> None:
    family, rehash = FAMILIES["dit"], Rehash(Interval(2), Taylor(1))
    pipe = family.build(torch.float32)
    model = pipe.transformer

    def interleaved() -> list[Tensor]:
        """Two requests, step by step in turn, three times over."""
        schedulers = [type(pipe.scheduler).from_config(pipe.scheduler.config) for _ in range(2)]
        outputs: list[Tensor] = []
        for draw in range(3):
            latents = [
                torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(10 * draw + i))
                for i in range(2)
            ]
            for scheduler in schedulers:
                pipe.scheduler = scheduler
                scheduler.set_timesteps(STEPS)
            for step in range(STEPS):
                for i, scheduler in enumerate(schedulers):
                    pipe.scheduler = scheduler
                    t = scheduler.timesteps[step]
                    x = scheduler.scale_model_input(latents[i], t)
                    with torch.no_grad():
                        noise = model(
                            x, timestep=t.expand(2), class_labels=torch.tensor([3, 77]),
                            return_dict=False,
                        )[0].chunk(2, dim=1)[0]  # fmt: skip
                    latents[i] = scheduler.step(noise, t, latents[i], return_dict=False)[0]
            outputs += latents
        return outputs

    accelrt.wrap(pipe, rehash=rehash)
    expected = interleaved()
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=rehash, cuda_graphs=True)
    found = interleaved()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert report(pipe, "transformer").replays > STEPS


def test_broken_off_requests_and_reset(backends: list[RecordingBackend]) -> None:
    family, rehash = FAMILIES["dit"], Rehash(Interval(2), Taylor(1))
    pipe = family.build(torch.float32)
    expected, _ = requests(family, pipe, calls=1, rehash=rehash)

    class Enough(Exception):
        pass

    accelrt.wrap(pipe, rehash=rehash, cuda_graphs=True)
    for _ in range(3):
        step, count = pipe.scheduler.step, iter(range(STEPS))

        def some_steps(*args: Any, step: Any = step, count: Any = count, **kwargs: Any) -> Any:
            if next(count) == 3:
                raise Enough
            return step(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.scheduler, "step", some_steps)
            with pytest.raises(Enough):
                family.run(pipe, num_inference_steps=STEPS)
    for _ in range(2):
        out = family.run(pipe, num_inference_steps=STEPS, guidance_scale=2.0)
        assert torch.equal(out, expected[0])
        accelrt.reset(pipe)
    captures = report(pipe, "transformer").captures
    out = family.run(pipe, num_inference_steps=STEPS, guidance_scale=2.0)
    assert torch.equal(out, expected[0])
    assert report(pipe, "transformer").captures == captures  # the memory was that of before


def test_calibration_runs_without(backends: list[RecordingBackend]) -> None:
    family, rehash = FAMILIES["dit"], Rehash(Interval(2), Reuse())
    pipe = family.build(torch.float32)
    accelrt.wrap(pipe, rehash=rehash, cuda_graphs=True)
    seen: list[int] = []
    stepper_of(pipe).recorder = lambda step, rows, value: seen.append(step.index)
    family.run(pipe, num_inference_steps=STEPS)
    eager = report(pipe, "transformer").eager
    assert eager["a calibration records features"] == STEPS
    assert len(seen) == sum(rehash.policy.fixed(i, STEPS) is True for i in range(STEPS))


def test_memory_of_a_request_is_not_kept_without_graphs() -> None:
    family = FAMILIES["dit"]
    pipe = family.build(torch.float32)
    accelrt.wrap(pipe, rehash=Rehash(Interval(2), Taylor(1)))
    family.run(pipe, num_inference_steps=STEPS)
    assert len(stepper_of(pipe).memories) == 0
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=Rehash(Interval(2), Taylor(1)), cuda_graphs="auto")
    family.run(pipe, num_inference_steps=STEPS)
    assert len(stepper_of(pipe).memories) == 0  # the CPU has no graphs
