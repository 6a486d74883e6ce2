"""Inner Loop Feedback: the runtime against hooks on the stock model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import feedback_common as common
import model_zoo as zoo
import pytest
import torch
import zoo_pixart
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from feedback_common import (
    MASK,
    NAMES,
    STANDS_FOR,
    TIMES,
    Box,
    model_and_inputs,
    module_for,
    pipeline,
    wrapped,
)  # fmt: skip
from model_zoo import one_thread  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import accelrt
from accelrt.quality import compare
from accelrt.steps.ahead import AheadOutputs
from accelrt.wrap import forwards

# The runtime


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"passes": 2},
        {"start": 0, "length": 3},
        {"length": 2, "enters": "first", "scale_shape": "block"},
        {"start": 2, "scale_shape": "scalar"},
    ],
    ids=str,
)
def test_it_equals_hooks_on_the_stock_model(name: str, settings: dict[str, Any]) -> None:
    pipe = pipeline(name)
    module = module_for(pipe, **settings)
    expected = common.truth(name, pipe, module)
    found = wrapped(name, pipe, module)
    assert zoo.relative_error(found, expected) < 1e-9
    plain = module_for(pipe, 0.0, **settings)
    assert zoo.relative_error(wrapped(name, pipe, plain), expected) > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_of_zero_equal_the_backbone_bit_for_bit(
    name: str, dtype: torch.dtype, passes: int
) -> None:
    pipe = pipeline(name, dtype)
    module = module_for(pipe, 0.0, passes=passes, length=2)
    found = wrapped(name, pipe, module)
    accelrt.wrap(pipe)
    with common.outer_steps(pipe):
        assert torch.equal(common.run(name, pipe), found)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("conditioning", ["t", "ahead", "next"])
def test_low_precision_is_as_close_to_float64_as_the_stock_modules_are(
    name: str, dtype: torch.dtype, conditioning: str, batch: int
) -> None:
    model, inputs = model_and_inputs(name, batch)
    schedules = common.schedule(ahead=0.5)
    module = module_for(Box(model), length=2, conditioning=conditioning, schedules=schedules)
    inputs["timestep"] = torch.full((batch,), 700)
    # Half way from 700 to 420, or there.
    ahead = torch.full((batch,), {"t": 700, "ahead": 560, "next": 420}[conditioning])

    def hooks(dtype: torch.dtype) -> Tensor:
        copy, own = zoo.clone(model, dtype), zoo.clone(module, dtype)
        with torch.no_grad(), own.applied(copy, ahead):
            return copy(**zoo.to_dtype(inputs, dtype)).sample

    truth, stock = hooks(torch.float64), hooks(dtype)
    copy = zoo.clone(model, dtype)
    accelrt.wrap(copy, feedback=zoo.clone(module, dtype))
    with torch.no_grad():
        found = copy(**zoo.to_dtype(inputs, dtype)).sample
    zoo.assert_rule(zoo.relative_error(found, truth), zoo.relative_error(stock, truth))


@pytest.mark.parametrize("name", NAMES)
def test_samples_may_pass_one_by_one(name: str) -> None:
    pipe = pipeline(name)
    module = module_for(pipe)
    expected = wrapped(name, pipe, module)
    found = wrapped(name, pipe, module, samples_per_pass=1, samples_per_slice=1, ff_rows=5)
    assert zoo.relative_error(found, expected) < 1e-12


def test_a_scheduler_may_keep_its_own_spacing() -> None:
    pipe = pipeline("dit")
    pipe.scheduler = DDIMScheduler()  # takes no timesteps
    module = module_for(pipe, schedules=common.schedule(None))
    expected = common.truth("dit", pipe, module, None)
    found = wrapped("dit", pipe, module)
    assert zoo.relative_error(found, expected) < 1e-9


def test_unwrapping_restores_model_and_scheduler() -> None:
    pipe = pipeline("dit")
    before = common.run("dit", pipe)
    attributes = set(pipe.scheduler.__dict__)
    wrapped("dit", pipe, module_for(pipe))
    assert torch.equal(common.run("dit", pipe), before)
    assert not {"step", "set_timesteps", "scale_model_input"} & set(pipe.scheduler.__dict__)
    assert attributes <= set(pipe.scheduler.__dict__)


def test_the_summary_says_what_stands_for_what() -> None:
    pipe = pipeline("dit")
    accelrt.wrap(pipe, feedback=module_for(pipe, length=2))
    assert "no step has run" in str(accelrt.summary(pipe))
    common.run("dit", pipe)
    summary = accelrt.summary(pipe)
    steps = summary.to_dict()["steps"]
    assert (steps["stands_for"], len(steps["rows"])) == (STANDS_FOR, len(MASK))
    assert steps["feedback_steps"] == sum(MASK)
    assert steps["blocks_run"] == 5 * 3 + 4 * 3
    assert steps["blocks_stood_for"] == STANDS_FOR * 3
    assert steps["cache_bytes"] > 0
    assert "last request: 5 steps for 8, 4 with feedback; 27 blocks for 24" in str(summary)
    assert "FFCFF" in str(summary)
    (row,) = (row for row in summary.rows if row.stage == "feedback")
    assert row.status == next(r.status for r in summary.rows if r.stage == "blocks.1") == "fused"


def test_requests_that_take_turns_keep_their_own_outputs() -> None:
    """Outputs ahead of their step are those of one request, also while another begins."""
    pipe = pipeline("dit")
    accelrt.wrap(pipe, feedback=module_for(pipe, schedules=common.schedule(ahead=0.5)))
    alone = common.run("dit", pipe)
    tracker = next(f.stepper.tracker for _, f in forwards(pipe) if f.stepper is not None)
    begin, other, passes = tracker.begin, [], [0]

    def step(pipe: Any, *_: Any, **__: Any) -> None:
        passes[0] += 1
        if passes[0] == 3:  # a request of another scheduler begins in the middle of this one
            other.append(copy.deepcopy(pipe.scheduler))
            other[0].set_timesteps(timesteps=list(TIMES))
            tracker._hooked.add(other[0])
            session, current = tracker._latest, tracker._local.current
            begin(other[0])
            tracker._latest, tracker._local.current = session, current

    stepped = pipe.transformer.register_forward_hook(lambda *_: step(pipe))
    try:
        assert torch.equal(common.run("dit", pipe), alone)
    finally:
        stepped.remove()
    assert other


# What is made once


class Products(TorchDispatchMode):
    """Counts the products with some weights."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.addresses = {w.data_ptr() for w in weights}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [a for a in args if isinstance(a, Tensor)]
        products = ("addmm", "mm", "bmm", "linear", "block_projection")
        used = func.overloadpacket.__name__ in products
        self.count += used and any(a.data_ptr() in self.addresses for a in flat)
        return func(*args, **(kwargs or {}))


def test_keys_and_values_of_the_caption_are_made_once_per_prompt() -> None:
    pipe = pipeline("pixart-sigma", torch.float32)
    attn = pipe.transformer.transformer_blocks[1].attn2
    projection = pipe.transformer.caption_projection.linear_1
    accelrt.wrap(pipe, feedback=module_for(pipe))
    for times in (1, 2):  # another request makes them anew
        with Products(attn.to_k.weight, projection.weight) as counted:
            for _ in range(times):
                common.run("pixart-sigma", pipe)
        assert counted.count == 2 * times


def test_modulations_are_made_once_for_all_steps() -> None:
    pipe = pipeline("dit", torch.bfloat16)
    linear = pipe.transformer.transformer_blocks[2].norm1.linear
    module = module_for(pipe, start=2)
    with Products(linear.weight) as stock:
        common.run("dit", pipe)
    assert stock.count == STANDS_FOR
    accelrt.wrap(pipe, feedback=module)
    with Products(linear.weight) as counted:
        common.run("dit", pipe)
    assert counted.count == 1


def test_a_changed_caption_is_noticed_within_a_request() -> None:
    pipe = pipeline("pixart-sigma")
    module = module_for(pipe)

    model, inputs = pipe.transformer, zoo_pixart.inputs(2, 8, 8)
    inputs = zoo.to_dtype(inputs, torch.float64)
    accelrt.wrap(model, feedback=module)
    with torch.no_grad():
        for time in TIMES[:2]:
            model(**{**inputs, "timestep": torch.full((2,), time)})
        inputs["encoder_hidden_states"].mul_(-1.0)  # in place: the same tensor, another caption
        found = model(**{**inputs, "timestep": torch.full((2,), TIMES[2])}).sample
        accelrt.unwrap(model)
        expected = model(**{**inputs, "timestep": torch.full((2,), TIMES[2])}).sample
    assert not MASK[2]
    assert zoo.relative_error(found, expected) < 1e-9


# Times


def linear_model(scheduler: Any, time: float) -> Tensor:
    """A predicted sample that is a line over the log of the signal-to-noise ratio."""
    products = scheduler.alphas_cumprod.double()
    sigmas = ((1 - products) / products).sqrt()
    low = min(int(time), len(sigmas) - 2)
    sigma = sigmas[low] + (time - low) * (sigmas[low + 1] - sigmas[low])
    return torch.full((1, 1, 2, 2), 0.7 - 0.3 * -math.log(float(sigma)), dtype=torch.float64)


@pytest.mark.parametrize("ahead", [0.0, 0.25, 0.5, 0.9])
def test_outputs_count_at_the_time_that_they_stand_for(ahead: float) -> None:
    def rollout(ahead: float) -> list[Tensor]:
        scheduler = DPMSolverMultistepScheduler()
        scheduler.set_timesteps(timesteps=list(TIMES))
        past = AheadOutputs()
        x, states = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64), []
        for index, time in enumerate(TIMES):
            following = TIMES[index + 1] if index + 1 < len(TIMES) else 0
            # The first step has no history: only its own time is right there.
            at = time - ahead * (time - following) if index else float(time)
            sigma = float(scheduler.sigmas[index])
            alpha = 1 / math.sqrt(1 + sigma * sigma)
            output = (x - alpha * linear_model(scheduler, at)) / (sigma * alpha)
            handed = past.fitted(scheduler, index, at, output, x)
            x = scheduler.step(handed, torch.tensor(time), x).prev_sample
            states.append(x)
        return states[:-1]  # the last step is of first order

    expected = rollout(0.0)
    for found, wanted in zip(rollout(ahead), expected, strict=True):
        assert torch.allclose(found, wanted, atol=2e-5)


def test_outputs_for_their_own_time_are_handed_on_unchanged() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(timesteps=list(TIMES))
    past, x = AheadOutputs(), zoo.normal(1, 4, 2, 2)
    for index, time in enumerate(TIMES):
        output = zoo.normal(1, 4, 2, 2, seed=index)
        handed = past.fitted(scheduler, index, float(time), output, x)
        assert torch.allclose(handed, output, atol=1e-4)
        x = scheduler.step(output, torch.tensor(time), x).prev_sample


def test_outputs_ahead_of_their_step_run_in_a_pipeline() -> None:
    pipe = pipeline("dit")
    here = wrapped("dit", pipe, module_for(pipe))
    there = wrapped("dit", pipe, module_for(pipe, schedules=common.schedule(ahead=0.5)))
    assert torch.isfinite(there).all()
    assert zoo.relative_error(there, here) > 1e-3


# Refusals


def test_a_number_of_steps_without_a_schedule_is_refused() -> None:
    pipe = pipeline("dit")
    accelrt.wrap(pipe, feedback=module_for(pipe))
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"num_inference_steps is 5; allowed .* 8"):
        common.run("dit", pipe, num_inference_steps=5)
    assert not calls


@pytest.mark.parametrize(
    ("scheduler", "settings", "match"),
    [
        (DDIMScheduler, {}, "DDIMScheduler.set_timesteps does not take"),
        (
            DDIMScheduler,
            {"scheduler_class": "DPMSolverMultistepScheduler"},
            "trained for DPMSolverMultistepScheduler, not DDIMScheduler",
        ),
        (
            DPMSolverMultistepScheduler,
            {"scheduler_config": {"solver_order": 3}},
            "with solver_order 3, not 2",
        ),
        (
            DDPMScheduler,
            {"schedules": common.schedule(None, ahead=0.5)},
            "DDPMScheduler cannot be given an output that stands for a later time",
        ),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(
    scheduler: Any, settings: dict[str, Any], match: str
) -> None:
    pipe = pipeline("dit")
    pipe.scheduler = scheduler()
    accelrt.wrap(pipe, feedback=module_for(pipe, **settings))
    with pytest.raises(ValueError, match=match):
        common.run("dit", pipe)


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    pipe = pipeline("dit")
    module = module_for(pipe)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        accelrt.wrap(pipe, feedback=tmp_path)
    with pytest.raises(ValueError, match="feedback is int"):
        accelrt.wrap(pipe, feedback=3)
    with pytest.raises(ValueError, match="rehash and feedback were both given"):
        accelrt.wrap(pipe, feedback=module, rehash="auto")
    with pytest.raises(ValueError, match="has no list of like blocks"):
        accelrt.wrap(zoo.animatediff_pipeline(), feedback=module)
    assert not accelrt.is_wrapped(pipe)


def test_a_folder_will_do(tmp_path: Path) -> None:
    pipe = pipeline("dit", torch.float32)
    module = module_for(pipe)
    module.save_pretrained(tmp_path)
    expected = wrapped("dit", pipe, module)
    accelrt.wrap(pipe, feedback=tmp_path)
    assert torch.equal(common.run("dit", pipe), expected)


# With the rest


def test_the_quality_floor_compares_with_all_steps() -> None:
    pipe = pipeline("dit", torch.float32)

    def images() -> Any:
        return pipe(
            class_labels=[3],
            num_inference_steps=STANDS_FOR,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    full = images()
    accelrt.wrap(pipe, feedback=module_for(pipe, 3.0), quality_floor=60.0)
    with pytest.warns(UserWarning, match="quality_floor is 60"):
        found = images()
    assert abs(found - full).max() < 1e-3


def test_it_is_compared_with_the_steps_that_it_stands_for() -> None:
    pipe = pipeline("dit", torch.float32)
    module = module_for(pipe)
    call = {"class_labels": [3], "num_inference_steps": STANDS_FOR}
    found = compare(pipe, call, feedback=module, repeats=1)
    assert found.restored
    assert found.feedback == {
        "loop": [1, 2], "passes": 1, "stands_for": STANDS_FOR, "outer_steps": 5,
        "feedback_steps": 4,
    }  # fmt: skip
    assert found.computed_stages == pytest.approx((5 * 3 + 4 * 2) / (STANDS_FOR * 3))
    assert found.latent_error is not None
    assert found.latent_error > 1e-3
    assert found.to_dict()["rehash"] is None
    with pytest.raises(ValueError, match="num_inference_steps is 5"):
        compare(pipe, {**call, "num_inference_steps": 5}, feedback=module)
    assert not accelrt.is_wrapped(pipe)


def test_a_module_gives_the_scheduler_that_it_was_trained_for() -> None:
    pipe = pipeline("dit")
    made = {"scheduler_class": "DDIMScheduler", "scheduler_config": {"beta_end": 0.03}}
    scheduler = module_for(pipe, **made).scheduler()
    assert type(scheduler) is DDIMScheduler
    assert scheduler.config.beta_end == 0.03
    with pytest.raises(ValueError, match="does not say what scheduler"):
        module_for(pipe).scheduler()


@pytest.mark.parametrize("name", ["dit", "pixart-sigma"])
def test_a_memory_budget_counts_what_the_loop_holds(name: str) -> None:
    model, inputs = model_and_inputs(name, 2)
    inputs["timestep"] = torch.full((2,), TIMES[0])
    limits = []
    for settings in ({}, {"feedback": module_for(Box(model))}):
        accelrt.wrap(model, memory_budget="64MiB", **settings)
        with torch.no_grad():
            out = model(**inputs).sample
        ((_, forward),) = forwards(model)
        (plan,) = forward.planner.plans.values()
        limits.append(plan.limit_bytes)
        assert forward.planner.exceeded() == 0
        accelrt.unwrap(model)
    stream = 2 * 16 * 24 * 4
    assert limits[1] <= limits[0] - stream
    assert torch.isfinite(out).all()


def test_it_can_be_observed_group_by_group() -> None:
    pipe = pipeline("dit")
    accelrt.wrap(pipe, feedback=module_for(pipe, length=2))
    (_, forward), *_ = forwards(pipe)
    seen: list[str] = []

    class Observer:
        def enter(self, stage: Any, group: Any, state: Any) -> None:
            seen.append(group.name)

        def leave(self, stage: Any, group: Any, state: Any) -> None:
            pass

    forward.observer = Observer()
    common.run("dit", pipe)
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    one = ["pos_embed", *blocks, "feedback", *blocks[1:], "norm_out"]
    assert seen[: len(one)] == one
