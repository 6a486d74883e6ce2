"""Wrapped models are no further from float64 than the stock models are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from torch import Tensor

import accelrt

Case = tuple[Callable[[], Any], dict[str, Any]]

UNET_CASES: dict[str, Case] = {
    "b2-t7-9x15": (zoo.tiny_unet, zoo.unet_inputs(2, 7, 9, 15)),
    "b1-t1-9x15": (zoo.tiny_unet, zoo.unet_inputs(1, 1, 9, 15)),
    "b1-t16-9x15": (zoo.tiny_unet, zoo.unet_inputs(1, 16, 9, 15)),
    "b2-t1-36x60": (zoo.tiny_unet, zoo.unet_inputs(2, 1, 36, 60)),
    "b1-t3-36x60": (zoo.unet_variant, zoo.unet_inputs(1, 3, 36, 60)),
    "variant-b2-t7-9x15": (zoo.unet_variant, zoo.unet_inputs(2, 7, 9, 15)),
    "context-per-frame": (zoo.tiny_unet, zoo.unet_inputs(2, 7, 8, 8, per_frame_context=True)),
    "text-time": (
        zoo.unet_text_time,
        {
            **zoo.unet_inputs(2, 7, 9, 15),
            "timestep_cond": zoo.normal(2, 8, seed=9),
            "added_cond_kwargs": {
                "text_embeds": zoo.normal(2, 12, seed=8),
                "time_ids": torch.arange(12).view(2, 6),
            },
        },
    ),
}

UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "smallest": {"frames_per_slice": 1, "pixels_per_slice": 7, "ff_rows": 5},
    "middle": {"frames_per_slice": 3, "pixels_per_slice": 100, "ff_rows": 64},
    "not-in-place": {"frames_per_slice": 5, "ff_rows": 64, "inplace": False},
    "unfused": {"frames_per_slice": 3, "pixels_per_slice": 100, "ff_rows": 64, "fuse": False},
}


def _unet_matrix() -> list[tuple[str, str, str]]:
    """Every case meets every dtype, and every config meets every dtype and most cases."""
    matrix = []
    for i, case in enumerate(UNET_CASES):
        for j, dtype in enumerate(("float32", "bfloat16", "float16")):
            small = case.endswith("9x15") and (i + j) % 3 == 0
            configs = {list(UNET_CONFIGS)[(i + j) % 5], "smallest" if small else "middle"}
            if "36x60" in case:  # thousands of pixels: one config, and not the smallest slices
                configs = {("middle", "defaults", "not-in-place")[j]}
            matrix += [(case, dtype, config) for config in sorted(configs)]
    return matrix


DIT_CASES: dict[str, Case] = {
    "b2-8": (zoo.tiny_dit, {"hidden_states": zoo.normal(2, 4, 8, 8)}),
    "b1-9": (functools.partial(zoo.tiny_dit, 9, 1), {"hidden_states": zoo.normal(1, 4, 9, 9)}),
    "b2-36": (functools.partial(zoo.tiny_dit, 36), {"hidden_states": zoo.normal(2, 4, 36, 36)}),
    "b3-other-size": (zoo.tiny_dit, {"hidden_states": zoo.normal(3, 4, 10, 10)}),
    "not-square": (zoo.tiny_dit, {"hidden_states": zoo.normal(2, 4, 8, 18)}),
    "erf-gelu": (
        functools.partial(zoo.tiny_dit, activation_fn="geglu", norm_elementwise_affine=True),
        {"hidden_states": zoo.normal(2, 4, 8, 8)},
    ),
    "eight-heads": (
        functools.partial(zoo.tiny_dit, num_attention_heads=8, attention_head_dim=3),
        {"hidden_states": zoo.normal(2, 4, 12, 12)},
    ),
}

DIT_CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "samples": {"samples_per_slice": 1, "ff_rows": 5},
    "rows": {"samples_per_slice": 2, "ff_rows": 64, "inplace": False},
    "bands": {"slice_mib": 0.0005},  # of 4 to 16 tokens
    "one-by-one": {"slice_mib": 1e-6, "samples_per_pass": 1},
    "unfused": {"samples_per_slice": 1, "ff_rows": 64, "fuse": False},
}

VAE_CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two": {"vae_images": 2},
    "all": {"vae_images": None, "frames_per_slice": 2},
    "unfused": {"fuse": False},
}


@functools.cache
def _model(build: Callable[[], Any]) -> Any:
    return build()


def _call(model: Any, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return model(**zoo.to_dtype(inputs, dtype)).sample


def _dit_inputs(case: str) -> dict[str, Any]:
    inputs = DIT_CASES[case][1]
    batch = inputs["hidden_states"].shape[0]
    return {
        **inputs,
        "timestep": torch.tensor([7, 301, 999])[:batch],
        "class_labels": torch.tensor([3, 1000, 77])[:batch],
    }


@functools.cache
def _stock(family: str, case: str, name: str) -> tuple[Tensor, float]:
    """The float64 stock output of a case, and the error of the stock model in a dtype."""
    build, inputs = (UNET_CASES if family == "unet" else DIT_CASES)[case]
    inputs = inputs if family == "unet" else _dit_inputs(case)
    dtype = getattr(torch, name)
    if dtype == torch.float64:
        return _call(zoo.clone(_model(build), dtype), inputs, dtype), 0.0
    truth, _ = _stock(family, case, "float64")
    result = _call(zoo.clone(_model(build), dtype), inputs, dtype)
    return truth, zoo.relative_error(result, truth)


@pytest.mark.parametrize(("case", "dtype", "config"), _unet_matrix())
def test_unet_motion(case: str, dtype: str, config: str) -> None:
    truth, stock = _stock("unet", case, dtype)
    build, inputs = UNET_CASES[case]
    model = accelrt.wrap(zoo.clone(_model(build), getattr(torch, dtype)), **UNET_CONFIGS[config])
    result = _call(model, inputs, getattr(torch, dtype))
    assert not accelrt.summary(model).stock
    assert result.shape == truth.shape
    zoo.assert_rule(zoo.relative_error(result, truth), stock)


@pytest.mark.parametrize("config", UNET_CONFIGS)
@pytest.mark.parametrize("case", ["b2-t7-9x15", "variant-b2-t7-9x15", "text-time"])
def test_unet_slicing_is_exact_in_float64(case: str, config: str) -> None:
    truth, _ = _stock("unet", case, "float64")
    build, inputs = UNET_CASES[case]
    model = accelrt.wrap(zoo.clone(_model(build), torch.float64), **UNET_CONFIGS[config])
    assert zoo.relative_error(_call(model, inputs, torch.float64), truth) < 1e-13


@pytest.mark.parametrize(("case", "dtype", "config"), zoo.in_turn(DIT_CASES, DIT_CONFIGS))
def test_dit(case: str, dtype: str, config: str) -> None:
    truth, stock = _stock("dit", case, dtype)
    model = zoo.clone(_model(DIT_CASES[case][0]), getattr(torch, dtype))
    accelrt.wrap(model, **DIT_CONFIGS[config])
    result = _call(model, _dit_inputs(case), getattr(torch, dtype))
    assert result.shape == truth.shape
    error = zoo.relative_error(result, truth)
    if dtype == "float64":
        assert error < 1e-13
    else:
        zoo.assert_rule(error, stock)


def test_dit_raises_what_stock_raises() -> None:
    model = zoo.tiny_dit()
    inputs = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([3])}
    x = zoo.normal(1, 4, 8, 10)
    with torch.no_grad(), pytest.raises(RuntimeError) as stock:
        model(x, **inputs)
    accelrt.wrap(model)
    with torch.no_grad(), pytest.raises(RuntimeError) as ours:
        model(x, **inputs)
    assert str(ours.value) == str(stock.value)


_SMALL, _LARGE = (9, 15), (36, 60)
_VAE_DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("size", "dtype", "config"),
    [
        *((_SMALL, dtype, config) for dtype in _VAE_DTYPES for config in VAE_CONFIGS),
        *zoo.in_turn([_LARGE], ("defaults", "two")),
    ],
)
def test_vae(size: tuple[int, int], dtype: str, config: str) -> None:
    latents = zoo.normal(3, 4, *size)
    images = zoo.normal(3, 3, 2 * size[0], 2 * size[1])
    target = getattr(torch, dtype)

    def run(model: Any, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            decoded = model.decode(latents.to(kind)).sample
            return decoded, model.encode(images.to(kind)).latent_dist.mean

    truth = _vae_truth(run, size)
    model = zoo.clone(_model(zoo.tiny_vae), target)
    stock = run(model, target)
    accelrt.wrap(model, **VAE_CONFIGS[config])
    wrapped = run(model, target)
    for ours, theirs, exact in zip(wrapped, stock, truth, strict=True):
        error = zoo.relative_error(ours, exact)
        if dtype == "float64":
            assert error < 1e-13
        else:
            zoo.assert_rule(error, zoo.relative_error(theirs, exact))


_VAE_TRUTH: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _vae_truth(run: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if size not in _VAE_TRUTH:
        _VAE_TRUTH[size] = run(zoo.clone(_model(zoo.tiny_vae), torch.float64), torch.float64)
    return _VAE_TRUTH[size]


@pytest.mark.parametrize("option", ["tiling", "slicing", "both"])
def test_vae_tiling_and_slicing_stay_stock(option: str) -> None:
    vae = zoo.clone(_model(zoo.tiny_vae), torch.float64)
    if option != "slicing":
        vae.enable_tiling()
    if option != "tiling":
        vae.enable_slicing()
    latents, images = zoo.normal(2, 4, 18, 24).double(), zoo.normal(2, 3, 36, 48).double()
    with torch.no_grad():
        before = vae.decode(latents).sample, vae.encode(images).latent_dist.mean
        accelrt.wrap(vae)
        after = vae.decode(latents).sample, vae.encode(images).latent_dist.mean
    for ours, theirs in zip(after, before, strict=True):
        assert zoo.relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_naive_slicing_of_the_motion_module_fails_the_rule(dtype: torch.dtype) -> None:
    """Statistics per slice, as if a slice were the whole, change the result."""
    unet = _model(zoo.tiny_unet)
    module = unet.down_blocks[0].motion_modules[0]
    x = zoo.normal(7, 16, 8, 12)
    x = x + 2 * torch.linspace(-1, 1, 12)  # a picture is not the same everywhere

    def stock(kind: torch.dtype) -> Tensor:
        with torch.no_grad():
            return zoo.clone(module, kind)(x.to(kind), num_frames=7)

    truth = stock(torch.float64)
    with torch.no_grad():
        copy = zoo.clone(module, dtype)
        naive = torch.cat([copy(part.to(dtype), num_frames=7) for part in x.split(3, -1)], -1)
    error, bound = zoo.relative_error(naive, truth), zoo.relative_error(stock(dtype), truth)
    assert error > 1.1 * bound + 1e-6
    assert error > 0.01
