"""Wrapped models whose graphs are recorded on the CPU, and calls of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart
import zoo_svd
import zoo_unet2d
from recording_backend import RecordingBackend
from torch import Tensor

import accelrt
from accelrt.steps import graphs
from accelrt.steps.graphs import GraphsReport

#: Model, and its inputs in a form that does not depend on the draw.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "animatediff": (zoo.tiny_unet, lambda: zoo.unet_inputs(2, 3, 8, 10)),
    "animatediff-frames": (
        zoo.tiny_unet,
        lambda: zoo.unet_inputs(2, 3, 8, 8, per_frame_context=True),
    ),
    "animatediff-variant": (zoo.unet_variant, lambda: zoo.unet_inputs(2, 3, 6, 8)),
    "animatediff-small": (
        lambda: zoo.tiny_unet(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        ),
        lambda: zoo.unet_inputs(2, 5, 4, 6),
    ),
    "svd": (zoo_svd.tiny_svd_unet, lambda: zoo_svd.svd_inputs(2, 3, 8, 8)),
    "unet2d": (zoo_unet2d.sd15, lambda: zoo_unet2d.inputs(2, 8, 8)),
    "unet2d-2": (zoo_unet2d.sd2, lambda: zoo_unet2d.inputs(2, 9, 7)),
    "sdxl": (zoo_unet2d.sdxl, lambda: zoo_unet2d.sdxl_inputs(2, 8, 8)),
    "dit": (
        zoo.tiny_dit,
        lambda: {
            "hidden_states": zoo.normal(3, 4, 8, 8),
            "timestep": torch.tensor([7, 301, 999]),
            "class_labels": torch.tensor([3, 77, 1000]),
        },
    ),
    "pixart": (zoo_pixart.tiny_pixart, lambda: zoo_pixart.inputs(2, 8, 8)),
    "pixart-1024": (
        zoo_pixart.alpha_1024,
        lambda: {**zoo_pixart.inputs(2, 8, 12), "added_cond_kwargs": zoo_pixart.conditions(2)},
    ),
    "pixart-variant": (zoo_pixart.variant, lambda: zoo_pixart.inputs(1, 5, 7)),
}


def drawn(value: Any, seed: int, key: str = "") -> Any:
    """New values in the form of the inputs of a call; other timesteps, the same masks."""
    if isinstance(value, dict):
        return {k: drawn(v, seed, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(drawn(v, seed + i, key) for i, v in enumerate(value))
    if not isinstance(value, Tensor) or "mask" in key:
        return value
    if key == "timestep":
        moved = (value.double() * 0.83 + 17 * seed) % 990
        return moved.to(value.dtype)
    if key == "class_labels":
        return (value + 5 * seed) % 1000
    if not value.is_floating_point():
        return value + seed
    if key == "encoder_hidden_states" and value.dim() == 3 and value.shape[0] > 3:
        # Frames keep sharing their context, or not.
        samples = 1 + int((value[1:] != value[:-1]).flatten(1).any(1).sum())
        one = zoo.normal(samples, *value.shape[1:], seed=700 + seed).to(value.dtype)
        return one.repeat_interleave(value.shape[0] // samples, 0)
    return zoo.normal(*value.shape, seed=500 + seed).to(value.dtype)


def report(target: Any, component: str = "") -> GraphsReport:
    """Of a component of a wrapped object."""
    found = accelrt.summary(target).graphs
    return next(one for one in found if one.component == component)


def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The output of a model."""
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    assert isinstance(out, Tensor)
    return out


def pair(build: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """A model wrapped with graphs, and one without."""
    model = build().to(dtype)
    other = copy.deepcopy(model)
    plain = {k: v for k, v in settings.items() if "graphs" not in k}
    accelrt.wrap(other, **plain)
    return accelrt.wrap(model, **{"cuda_graphs": True, **settings}), other


def dit_inputs(batch: int = 2, side: int = 8) -> dict[str, Tensor]:
    return {
        "hidden_states": zoo.normal(batch, 4, side, side),
        "timestep": torch.tensor([7, 301, 999])[:batch],
        "class_labels": torch.tensor([3, 77, 1000])[:batch],
    }


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[RecordingBackend]:
    """Wraps made from here on record their graphs: the backends of the wraps, in order."""
    made: list[RecordingBackend] = []

    def make() -> RecordingBackend:
        made.append(RecordingBackend())
        return made[-1]

    monkeypatch.setattr(graphs, "default_backend", make)
    return made
