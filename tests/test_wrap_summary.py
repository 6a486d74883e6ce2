"""Summaries at stock configurations, and the stage interface."""

from __future__ import annotations

import io
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNetMotionModel
from model_zoo import one_thread  # noqa: F401
from rich.console import Console

import accelrt
from accelrt.models import execute


def on_meta(cls: Any, **settings: Any) -> Any:
    with torch.device("meta"):
        return cls(**settings).eval()


def stock_models() -> dict[str, Any]:
    """AnimateDiff (v1.5 width), DiT-XL/2 and the VAE of both, without weights."""
    return {
        "unet": on_meta(UNetMotionModel, cross_attention_dim=768),
        "dit": on_meta(DiTTransformer2DModel, out_channels=8),
        "vae": on_meta(
            AutoencoderKL,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
    }


def test_nothing_is_untouched_at_stock_configurations() -> None:
    for name, model in stock_models().items():
        for group in accelrt.summary(accelrt.wrap(model)).to_dict()["groups"]:
            usual = ("embed", "samplers")
            allowed = any(part in group["group"] for part in usual)
            assert group["status"] == "fused" or allowed, (name, group)


def test_meta_tensors_run_through_every_group() -> None:
    """Shapes and lifetimes can be had without memory or weights."""
    unet = accelrt.wrap(stock_models()["unet"].to(torch.float16))
    sample = torch.empty(2, 4, 4, 32, 32, dtype=torch.float16, device="meta")
    context = torch.empty(8, 77, 768, dtype=torch.float16, device="meta")
    with torch.no_grad():
        result = unet(sample, torch.ones(2, device="meta"), context).sample
    assert result.shape == sample.shape
    assert not accelrt.summary(unet).stock


def test_summary_before_and_after_a_call() -> None:
    unet = accelrt.wrap(zoo.tiny_unet(), pixels_per_slice=7)
    before = {g["group"]: g for g in accelrt.summary(unet).to_dict()["groups"]}
    assert before["mid_block.motion_modules.0"]["length"] == 7
    assert before["mid_block.resnets.0"]["length"] is None
    assert before["mid_block.resnets.0"]["total"] is None
    with torch.no_grad():
        unet(**zoo.unet_inputs(1, 2, 8, 8))
    summary = accelrt.summary(unet)
    after = {g["group"]: g for g in summary.to_dict()["groups"]}
    assert after["down_blocks.0.motion_modules.0"]["length"] == 7
    assert after["down_blocks.0.motion_modules.0"]["total"] == 64
    assert after["mid_block.resnets.0"]["total"] == 2
    text = str(summary)
    assert "7/64 pixels" in text
    assert "an embedding" in text
    counts = summary.counts()
    assert f"{counts['fused']} fused" in text.splitlines()[-1]


def test_rich_prints_summary_and_plan_as_print_does() -> None:
    model = accelrt.wrap(zoo.tiny_dit())
    plan = accelrt.plan(zoo.tiny_dit().to("meta"), memory_budget="min")
    for shown in (accelrt.summary(model), plan):
        text = io.StringIO()
        Console(file=text, width=300).print(shown)
        assert text.getvalue().rstrip("\n") == str(shown).rstrip("\n")


def test_unfused_says_so() -> None:
    groups = accelrt.summary(accelrt.wrap(zoo.tiny_dit(), fuse=False)).to_dict()["groups"]
    assert ("sliced", "fuse is False") in {(g["status"], g["reason"]) for g in groups}


def test_stages_are_named_and_stable() -> None:
    unet = accelrt.wrap(zoo.tiny_unet())
    stages = unet.forward.stages()
    assert unet.forward.stages() is stages
    assert [stage.name for stage in stages] == [
        "embed", "conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block",
        "up_blocks.0", "up_blocks.1", "up_blocks.2", "out",
    ]  # fmt: skip
    dit = accelrt.wrap(zoo.tiny_dit())
    names = [stage.name for stage in dit.forward.stages()]
    assert names == ["embed", "blocks.0", "blocks.1", "blocks.2", "out"]


def test_stages_can_be_run_apart_and_repeated() -> None:
    """The state between two stages is all that the rest of the model needs."""
    model = accelrt.wrap(zoo.tiny_dit().double())
    x = zoo.normal(2, 4, 8, 8).double()
    arguments = {"timestep": torch.tensor([5, 9]), "class_labels": torch.tensor([3, 4])}
    with torch.no_grad():
        whole = model(x, **arguments).sample
        forward = model.forward
        stages = forward.stages()
        inputs = {"hidden_states": x, **arguments, "cross_attention_kwargs": None}
        state = forward.family.begin(model, {**inputs, "return_dict": False})
        execute(stages[:2], state)
        kept = state.hidden
        state.hold(kept)
        copy = kept.clone()
        for _ in range(2):  # the rest, twice from the same features
            state.hidden = kept
            execute(stages[2:], state)
            result = forward.family.finish(model, state)
            assert zoo.relative_error(result, whole) < 1e-13
        assert torch.equal(kept, copy)


def test_observers_are_told_every_group_in_order() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.events: list[tuple[str, str, str]] = []

        def enter(self, stage: Any, group: Any, state: Any) -> None:
            self.events.append(("enter", stage.name, group.name))

        def leave(self, stage: Any, group: Any, state: Any) -> None:
            assert state.hidden is not None or stage.name == "embed"
            self.events.append(("leave", stage.name, group.name))

    unet = accelrt.wrap(zoo.tiny_unet())
    recorder = Recorder()
    unet.forward.observer = recorder
    with torch.no_grad():
        unet(**zoo.unet_inputs(1, 2, 8, 8))
    expected = [
        (kind, stage.name, group.name)
        for stage in unet.forward.stages()
        for group in stage.groups
        for kind in ("enter", "leave")
    ]
    assert recorder.events == expected


@pytest.mark.parametrize("frames", [1, 7])
def test_slice_lengths_reach_the_groups(frames: int) -> None:
    unet = accelrt.wrap(zoo.tiny_unet(), slice_mib=0.01)
    with torch.no_grad():
        unet(**zoo.unet_inputs(2, frames, 9, 15))
    for group in accelrt.summary(unet).to_dict()["groups"]:
        if group["axis"] == "pixels":
            assert 1 <= group["length"] <= group["total"]
    first = next(
        g for g in accelrt.summary(unet).to_dict()["groups"] if g["group"].endswith("resnets.0")
    )
    # 16 channels, 9 x 15 pixels, 4 bytes: one image is 8.4 KiB, the slice 10.2 KiB
    assert first["length"] == 1
