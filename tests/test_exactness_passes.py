"""Passes of samples, recomputed skips and bands: exact on every UNet, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_unet2d
from model_zoo import one_thread  # noqa: F401
from torch import Tensor
from zoo_svd import deep_svd_unet, svd_inputs

import accelrt
from accelrt.groups.skips import RecomputedSkip

UNETS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "motion": (zoo.tiny_unet, zoo.unet_inputs(2, 7, 9, 15)),
    "motion-b3": (
        zoo.unet_variant,
        {**zoo.unet_inputs(3, 2, 9, 15), "timestep": torch.tensor([7.0, 301.0, 11.0])},
    ),
    "svd": (deep_svd_unet, svd_inputs(2, 7, 9, 15)),
    "sd15": (zoo_unet2d.sd15, zoo_unet2d.inputs(3, 9, 15)),
    "sdxl": (zoo_unet2d.sdxl, zoo_unet2d.sdxl_inputs(2, 12, 20)),
}

CONFIGS: dict[str, dict[str, Any]] = {
    "passes": {"samples_per_pass": 1},
    "uneven": {"samples_per_pass": 2, "frames_per_slice": 2},
    "recompute": {"recompute": "always", "frames_per_slice": 2},
    "bands": {"slice_mib": 0.004, "bands": True},
    "all": {"samples_per_pass": 1, "slice_mib": 0.002, "bands": True, "recompute": "always"},
    "not-in-place": {"recompute": "always", "slice_mib": 0.004, "inplace": False},
}


def _call(model: Any, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return model(**zoo.to_dtype(inputs, dtype)).sample


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", UNETS)
def test_float64(name: str, config: str) -> None:
    build, inputs = UNETS[name]
    model = build().double()
    truth = _call(model, inputs, torch.float64)
    accelrt.wrap(model, **CONFIGS[config])
    assert zoo.relative_error(_call(model, inputs, torch.float64), truth) < 1e-13
    assert not accelrt.summary(model).stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["motion", "svd", "sd15"])
def test_rule(name: str, dtype: torch.dtype) -> None:
    build, inputs = UNETS[name]
    truth = _call(build().double(), inputs, torch.float64)
    model = zoo.clone(build(), dtype)
    stock = zoo.relative_error(_call(model, inputs, dtype), truth)
    accelrt.wrap(model, **CONFIGS["all"])
    zoo.assert_rule(zoo.relative_error(_call(model, inputs, dtype), truth), stock)


class _Skips:
    """Counts the kinds of skips that are on the stack after each group."""

    def __init__(self) -> None:
        self.recomputed = 0

    def enter(self, stage: Any, group: Any, state: Any) -> None:
        pass

    def leave(self, stage: Any, group: Any, state: Any) -> None:
        count = sum(isinstance(skip, RecomputedSkip) for skip in state.skips)
        self.recomputed = max(self.recomputed, count)


def test_first_and_downsampled_skips_are_recomputed() -> None:
    model = accelrt.wrap(zoo.tiny_unet().double(), recompute="always")
    model.forward.observer = observer = _Skips()
    _call(model, zoo.unet_inputs(2, 3, 8, 8), torch.float64)
    assert observer.recomputed == 3  # conv_in and both downsamplers


def test_residuals_of_a_controlnet_keep_the_skips() -> None:
    """What is added to a skip cannot be computed again from the model alone."""
    model = zoo_unet2d.sd15().double()
    inputs = zoo_unet2d.inputs(2, 8, 8)
    skips: list[tuple[int, int]] = []

    class Shapes:
        def enter(self, stage: Any, group: Any, state: Any) -> None:
            if group.name == "mid_block.resnets.0" and not skips:
                skips.extend((skip.shape[1], skip.shape[2]) for skip in state.skips)
                skips.append((state.hidden.shape[1], state.hidden.shape[2]))

        def leave(self, stage: Any, group: Any, state: Any) -> None:
            pass

    accelrt.wrap(model)
    model.forward.observer = Shapes()
    _call(model, inputs, torch.float64)
    accelrt.unwrap(model)
    *down, mid = zoo_unet2d.residuals(skips)
    inputs = {
        **inputs,
        "down_block_additional_residuals": tuple(down),
        "mid_block_additional_residual": mid,
    }
    truth = _call(model, inputs, torch.float64)
    accelrt.wrap(model, recompute="always", samples_per_pass=1)
    model.forward.observer = observer = _Skips()
    assert zoo.relative_error(_call(model, inputs, torch.float64), truth) < 1e-13
    assert observer.recomputed == 0


def test_processors_that_may_mix_samples_see_all_of_them() -> None:
    class Mean:
        """Adds the mean over the batch: what perturbed-attention guidance could do."""

        def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states + hidden_states.mean(0, keepdim=True)

    model = zoo_unet2d.sd15().double()
    inputs = zoo_unet2d.inputs(2, 8, 8)
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Mean())
    truth = _call(model, inputs, torch.float64)
    accelrt.wrap(model, samples_per_pass=1)
    assert zoo.relative_error(_call(model, inputs, torch.float64), truth) < 1e-13


def test_ip_adapters_in_passes() -> None:
    model = zoo_unet2d.sd15()
    zoo_unet2d.add_ip_adapters(model)
    model = model.double()
    inputs = {**zoo_unet2d.inputs(2, 8, 8), "added_cond_kwargs": zoo_unet2d.pictures(2)}
    truth = _call(model, inputs, torch.float64)
    accelrt.wrap(model, samples_per_pass=1)
    assert zoo.relative_error(_call(model, inputs, torch.float64), truth) < 1e-13


def test_return_types_of_a_call_in_passes() -> None:
    inputs = zoo_unet2d.inputs(2, 8, 8)
    model = accelrt.wrap(zoo_unet2d.sd15(), samples_per_pass=1)
    with torch.no_grad():
        whole = model(**inputs)
        (sample,) = model(**inputs, return_dict=False)
    assert type(whole).__name__ == "UNet2DConditionOutput"
    assert torch.equal(whole.sample, sample)
