"""Drawn shapes and settings: a wrapped model is exact wherever the stock model runs at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_svd
import zoo_unet2d
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import one_thread  # noqa: F401
from torch import Tensor

import accelrt
from accelrt.planning import cost

# The same examples in every run.
FUZZ = settings(
    max_examples=7, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

# In float64. Norms over a handful of values, as these sizes have them, amplify rounding a
# thousandfold; a slice that misses a neighbour is wrong by more than 1e-3.
EXACT = 1e-10

length = st.none() | st.integers(1, 9)
configs = st.fixed_dictionaries(
    {},
    optional={
        "frames_per_slice": length, "samples_per_slice": length, "samples_per_pass": length,
        "pixels_per_slice": st.none() | st.integers(1, 70),
        "ff_rows": st.none() | st.integers(1, 70),
        "vae_images": length,
        "slice_mib": st.none() | st.sampled_from([0.001, 0.01, 0.1, 64.0]),
        "recompute": st.sampled_from(["allow", "always", "never"]),
        "bands": st.booleans(), "inplace": st.booleans(), "fuse": st.booleans(),
    },
)  # fmt: skip
# Each new size is planned before it runs: quick for a model as small as DiT's.
budgets = st.sampled_from([None, None, "min", "64MiB"])
batch = st.integers(1, 2)
side = st.integers(1, 11)


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on the machine."""
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())


@functools.cache
def model_of(build: Callable[[], Any]) -> Any:
    return zoo.clone(build(), torch.float64)


def unet_motion(draw: Any) -> dict[str, Any]:
    return zoo.unet_inputs(draw(batch), draw(st.integers(1, 7)), draw(side), draw(side))


def unet_spatio_temporal(draw: Any) -> dict[str, Any]:
    return zoo_svd.svd_inputs(draw(batch), draw(st.integers(1, 7)), draw(side), draw(side))


def unet_2d(draw: Any) -> dict[str, Any]:
    return zoo_unet2d.inputs(draw(st.integers(1, 3)), draw(side), draw(side))


def dit(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 5))
    return {
        "hidden_states": zoo.normal(count, 4, 8, 8, seed=3),
        "timestep": torch.arange(count) * 90,
        "class_labels": torch.arange(count),
    }


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
    "unet_motion": (zoo.tiny_unet, unet_motion),
    "unet_spatio_temporal": (zoo_svd.tiny_svd_unet, unet_spatio_temporal),
    "unet_2d": (zoo_unet2d.sd15, unet_2d),
    "dit": (zoo.tiny_dit, dit),
}


def attempt(model: Any, inputs: dict[str, Any]) -> Tensor | str:
    """The output, or what the model raises."""
    try:
        with torch.no_grad():
            result: Tensor = model(**zoo.to_dtype(inputs, torch.float64)).sample
            return result
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", CASES)
@FUZZ
@given(data=st.data())
def test_any_shape_and_any_setting(name: str, data: st.DataObject) -> None:
    build, draw = CASES[name]
    model, inputs, config = model_of(build), draw(data.draw), data.draw(configs)
    if name == "dit":
        config["memory_budget"] = data.draw(budgets)
    stock = attempt(model, inputs)
    accelrt.wrap(model, **config)
    try:
        ours = attempt(model, inputs)
    finally:
        accelrt.unwrap(model)
    if isinstance(stock, str):  # a few sizes of one pixel; ours may take more
        assert attempt(model, inputs) == stock
        return
    if isinstance(ours, str):
        # torch's own norm, which only these settings use, refuses a slice of one pixel.
        assert not config.get("fuse", True), f"{ours} for {config}"
        assert "Expected more than 1 value per channel" in ours
        return
    assert ours.shape == stock.shape
    assert zoo.relative_error(ours, stock) < EXACT
    after = attempt(model, inputs)
    assert not isinstance(after, str)
    assert torch.equal(after, stock)


@FUZZ
@given(st.integers(1, 3), side, side, configs)
def test_decodes_of_any_shape(images: int, height: int, width: int, config: dict[str, Any]) -> None:
    vae = model_of(zoo.tiny_vae)
    latents = zoo.normal(images, 4, height, width).double()
    with torch.no_grad():
        stock = vae.decode(latents).sample
        accelrt.wrap(vae, **config)
        try:
            ours = vae.decode(latents).sample
        finally:
            accelrt.unwrap(vae)
        assert zoo.relative_error(ours, stock) < EXACT
        assert torch.equal(vae.decode(latents).sample, stock)
