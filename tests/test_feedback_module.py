"""Inner Loop Feedback: the module by itself, on the stock model, and its schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart
from feedback_common import NAMES, Box, model_and_inputs, module_for
from model_zoo import one_thread  # noqa: F401

import accelrt
from accelrt.feedback import FeedbackModule, FeedbackSchedule
from accelrt.feedback.schedule import shrinking
from accelrt.steps.conditions import rows_of_times

# The module


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("enters", ["every", "first"])
def test_scales_of_zero_leave_the_stock_model_as_it_is(name: str, passes: int, enters: str) -> None:
    model, inputs = model_and_inputs(name, 3)
    module = module_for(Box(model), 0.0, length=2, passes=passes, enters=enters)
    with torch.no_grad():
        before = model(**inputs).sample
        with module.applied(model):
            found = model(**inputs).sample
        assert torch.equal(before, found)
        module.scales += 0.5
        with module.applied(model):
            assert not torch.equal(before, model(**inputs).sample)
        assert torch.equal(before, model(**inputs).sample)  # the hooks are gone


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_only_the_feedback_block_and_its_scales(name: str) -> None:
    model, inputs = model_and_inputs(name, 2)
    module = module_for(Box(model))
    model.requires_grad_(False)
    with module.applied(model):
        model(**inputs).sample.square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert module.scales.grad is not None
    assert module.scales.grad.abs().sum() > 0
    assert module.block.ff.net[2].weight.grad.abs().sum() > 0


def test_without_learned_scales_the_feedback_begins_at_its_last_layer() -> None:
    model, inputs = model_and_inputs("dit", 2)
    module = FeedbackModule.from_backbone(model, start=0, length=2, learned_scale=False)
    assert not any(name == "scales" for name, _ in module.named_parameters())
    assert not module.block.ff.net[2].weight.any()
    with torch.no_grad(), module.applied(model):
        assert torch.isfinite(model(**inputs).sample).all()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = model_and_inputs("pixart-sigma", 2)
    module = module_for(Box(model), length=2, conditioning="ahead", scale_shape="block")
    module.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = FeedbackModule.from_pretrained(tmp_path)
    assert again.schedules == module.schedules
    assert again.scales.shape == (2, 1)
    again.check(model)
    with torch.no_grad():
        with module.applied(model):
            expected = model(**inputs).sample
        with again.applied(model):
            assert torch.equal(model(**inputs).sample, expected)


def test_another_model_is_refused() -> None:
    model, _ = model_and_inputs("dit", 1)
    module = module_for(Box(model))
    with pytest.raises(ValueError, match="DiTTransformer2DModel, not PixArtTransformer2DModel"):
        module.check(zoo_pixart.tiny_pixart())
    with pytest.raises(ValueError, match="another DiTTransformer2DModel"):
        module.check(zoo.tiny_dit(num_layers=4))
    other = zoo.clone(model, torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.5
    with pytest.raises(ValueError, match="with other weights"):
        module.check(other)
    module.check(zoo.clone(model, torch.bfloat16))
    with pytest.raises(ValueError, match="with other weights"):
        accelrt.wrap(other, feedback=module)
    assert not accelrt.is_wrapped(other)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"start": 3}, "do not fit in 3 blocks"),
        ({"start": 0, "length": 4}, "do not fit in 3 blocks"),
        ({"length": 0}, "do not fit"),
        ({"copy_block": 3}, "copy_block is 3; allowed: 0 to 2"),
        ({"passes": 0}, "passes is 0"),
        ({"enters": "middle"}, "enters is 'middle'; allowed: every, first"),
        ({"scale_shape": "row"}, "scale_shape is 'row'"),
        ({"conditioning": "t-1"}, "conditioning is 't-1'; allowed: t, ahead, next"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    model, _ = model_and_inputs("dit", 1)
    with pytest.raises(ValueError, match=match):
        FeedbackModule.from_backbone(model, **settings)


def test_models_without_like_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="UNetMotionModel has no list of like blocks"):
        FeedbackModule.from_backbone(zoo.tiny_unet())


# Schedules


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"feedback": ()}, "feedback is"),
        ({"feedback": (True, 1)}, "feedback is"),
        ({"feedback": (True, True), "timesteps": (5,)}, "1 timesteps for 2"),
        ({"feedback": (True, True), "timesteps": (5, 5)}, "falling"),
        ({"feedback": (True, True), "timesteps": (5, -1)}, "none below 0"),
        ({"feedback": (True,), "ahead": 1.0}, "ahead is 1.0"),
        ({"feedback": (True,), "stands_for": 0}, "stands_for is 0"),
    ],
)
def test_wrong_schedules_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FeedbackSchedule(**{"stands_for": 20, **values})


def test_schedules_are_made_and_read() -> None:
    made = FeedbackSchedule(20, (True, False, True), (900, 500, 31), 0.5)
    assert FeedbackSchedule.from_dict(20, made.to_dict()) == made
    with pytest.raises(ValueError, match="unknown key 'steps'"):
        FeedbackSchedule.from_dict(20, {"steps": 3})
    times = (900.0, 500.0, 31.0)
    assert [made.stands_at(times, i) for i in range(3)] == [700.0, 265.5, 15.5]
    assert [made.runs_at(times, i, "next") for i in range(3)] == [500.0, 31.0, 0.0]
    assert [made.runs_at(times, i, "t") for i in range(3)] == list(times)
    rows = rows_of_times([265.5, 15.5], 2, torch.tensor([3]))
    assert rows.tolist() == [266, 266, 16, 16]
    assert rows_of_times([265.5], 1, torch.tensor([3.0])).tolist() == [265.5]


def test_jumps_shrink_to_the_floor() -> None:
    times = shrinking(999, 10)
    jumps = [a - b for a, b in zip(times, [*times[1:], 0], strict=True)]
    assert times[0] == 999
    assert jumps == sorted(jumps, reverse=True)
    assert min(jumps) >= 10
    assert sum(jumps) == 999
    assert shrinking(30, 3) == (30, 20, 10)
    with pytest.raises(ValueError, match="allowed: at most 29"):
        shrinking(29, 3)
