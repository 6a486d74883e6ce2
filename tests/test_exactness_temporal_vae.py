"""The video VAE: all frames together, in slices, no further from float64 than stock is."""

from __future__ import annotations

import functools
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn

import accelrt

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "uneven": {"frames_per_slice": 3, "pixels_per_slice": 100},
    "smallest": {"frames_per_slice": 1, "pixels_per_slice": 7, "samples_per_slice": 1},
    "rows": {"slice_mib": 0.01, "vae_images": None},
    "not-in-place": {"frames_per_slice": 5, "pixels_per_slice": 50, "inplace": False},
    "bands": {"bands": True, "slice_mib": 0.02},
    "recompute": {"bands": True, "slice_mib": 0.02, "recompute": "always"},
    "least": {"bands": True, "slice_mib": 1e-4, "recompute": "always", "vae_images": None},
    "recompute-not-in-place": {
        "bands": True,
        "slice_mib": 0.1,
        "recompute": "always",
        "inplace": False,
    },
    "recompute-unfused": {
        "pixels_per_slice": 50,
        "frames_per_slice": 1,
        "recompute": "always",
        "fuse": False,
    },
    "unfused": {"frames_per_slice": 3, "pixels_per_slice": 100, "fuse": False},
}
# Videos, frames, height and width of the latents.
SHAPES = {
    "b1-t7-9x15": (1, 7, 9, 15),
    "b2-t5-9x15": (2, 5, 9, 15),
    "b1-t1-9x15": (1, 1, 9, 15),
    "b1-t16-8x8": (1, 16, 8, 8),
    "b1-t2-36x60": (1, 2, 36, 60),
}


@functools.cache
def tiny() -> AutoencoderKLTemporalDecoder:
    """Two levels, with attention in the middle and blends that are no halves."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=2,
    )
    return zoo.randomise(vae)


def decode(vae: Any, shape: tuple[int, ...], chunk: int | None = None) -> Tensor:
    """Decode random latents, ``chunk`` frames at a time as the pipeline does."""
    videos, frames, height, width = shape
    dtype = next(vae.parameters()).dtype
    latents = zoo.normal(videos * frames, 4, height, width).to(dtype)
    parts = latents.split(chunk or frames) if videos == 1 else [latents]
    with torch.no_grad():
        return torch.cat(
            [vae.decode(part, num_frames=part.shape[0] // videos).sample for part in parts]
        )


@functools.cache
def stock(case: str, name: str) -> tuple[Tensor, float]:
    """The float64 truth of a case, and the error of the stock model in a dtype."""
    result = decode(zoo.clone(tiny(), getattr(torch, name)), SHAPES[case])
    if name == "float64":
        return result, 0.0
    truth, _ = stock(case, "float64")
    return truth, zoo.relative_error(result, truth)


def _matrix() -> list[tuple[str, str, str]]:
    large = zoo.in_turn(["b1-t2-36x60"], ("defaults", "uneven", "recompute"))
    return zoo.in_turn((case for case in SHAPES if "36x60" not in case), CONFIGS) + large


@pytest.mark.parametrize(("case", "dtype", "config"), _matrix())
def test_decode(case: str, dtype: str, config: str) -> None:
    truth, error = stock(case, dtype)
    vae = accelrt.wrap(zoo.clone(tiny(), getattr(torch, dtype)), **CONFIGS[config])
    result = decode(vae, SHAPES[case])
    assert not accelrt.summary(vae).stock
    assert result.shape == truth.shape
    ours = zoo.relative_error(result, truth)
    if dtype == "float64":
        assert ours < 1e-13
    else:
        zoo.assert_rule(ours, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_slices_are_exact_and_chunks_of_frames_are_not(dtype: str, chunk: int) -> None:
    """``decode_chunk_size`` normalises and convolves over the frames of a chunk only."""
    case = "b1-t16-8x8"
    truth, error = stock(case, dtype)
    vae = zoo.clone(tiny(), getattr(torch, dtype))
    chunked = zoo.relative_error(decode(vae, SHAPES[case], chunk), truth)
    accelrt.wrap(vae, frames_per_slice=chunk, pixels_per_slice=100)
    sliced = zoo.relative_error(decode(vae, SHAPES[case]), truth)
    bound = 1.1 * error + 1e-6
    message = f"sliced {sliced:.2e}, in chunks of {chunk} {chunked:.2e}, bound {bound:.2e}"
    assert sliced <= bound, message
    assert chunked > bound, message
    assert chunked > 0.05, message


def test_a_chunked_decode_stays_that_of_the_stock_model() -> None:
    """Who asks for chunks gets the result of chunks."""
    vae = zoo.clone(tiny(), torch.float64)
    before = decode(vae, (1, 16, 8, 8), 3)
    accelrt.wrap(vae)
    assert zoo.relative_error(decode(vae, (1, 16, 8, 8), 3), before) < 1e-13
    accelrt.unwrap(vae)
    assert torch.equal(decode(vae, (1, 16, 8, 8), 3), before)


def test_encode() -> None:
    vae = zoo.clone(tiny(), torch.float64)
    images = zoo.normal(3, 3, 18, 30).double()
    with torch.no_grad():
        before = vae.encode(images).latent_dist.mean
        accelrt.wrap(vae)
        assert zoo.relative_error(vae.encode(images).latent_dist.mean, before) < 1e-13


def test_single_images_have_no_temporal_part() -> None:
    """The indicator of single images goes where the blend asks for it."""
    vae = zoo.clone(tiny(), torch.float64)
    for module in vae.decoder.modules():
        if hasattr(module, "merge_strategy"):
            module.merge_strategy = "learned_with_images"
    latents = zoo.normal(6, 4, 8, 8).double()
    indicator = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    arguments = {"image_only_indicator": indicator, "num_frames": 3}
    with torch.no_grad():
        before = vae.decoder(latents, **arguments)
        none = vae.decoder(latents, torch.zeros_like(indicator), num_frames=3)
        accelrt.wrap(vae, pixels_per_slice=9, vae_images=3)
        after = vae.decoder(latents, **arguments)
    assert zoo.relative_error(before, none) > 1e-3
    assert zoo.relative_error(after, before) < 1e-13


@pytest.mark.parametrize("where", ["resnet", "temporal", "mid", "up", "attention"])
def test_hooks_leave_their_part_alone(where: str) -> None:
    vae = zoo.clone(tiny(), torch.float64)
    decoder = vae.decoder
    resnet = decoder.up_blocks[0].resnets[1]
    module, names = {
        "resnet": (resnet, {"up_blocks.0.resnets.1"}),
        "temporal": (resnet.temporal_res_block, {"up_blocks.0.resnets.1.temporal_res_block"}),
        "mid": (decoder.mid_block, {"mid_block"}),
        "up": (decoder.up_blocks[1], {"up_blocks.1"}),
        "attention": (decoder.mid_block.attentions[0], {"mid_block.attentions.0"}),
    }[where]
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append((output, output.clone()))

    before = decode(vae, (2, 3, 8, 8))
    accelrt.wrap(vae, frames_per_slice=2, pixels_per_slice=9, vae_images=None)
    handle = module.register_forward_hook(keep)  # seen although it came after the wrap
    assert zoo.relative_error(decode(vae, (2, 3, 8, 8)), before) < 1e-13
    rows = accelrt.summary(vae).to_dict()["groups"]
    alone = {r["group"] for r in rows if r["component"] == "decoder" and r["status"] == "untouched"}
    assert alone == names
    assert len(kept) == 1
    assert torch.equal(*kept[0])
    handle.remove()
    accelrt.unwrap(vae)
    assert torch.equal(decode(vae, (2, 3, 8, 8)), before)


@pytest.mark.parametrize("part", ["time_mixer", "temporal_res_block.norm1"])
def test_hooks_on_parts_that_treat_pixels_alone(part: str) -> None:
    """Only the part with the hook runs as it came."""
    vae = zoo.clone(tiny(), torch.float64)
    module = vae.decoder.up_blocks[0].resnets[1].get_submodule(part)
    before = decode(vae, (2, 3, 8, 8))
    handle = module.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    hooked = decode(vae, (2, 3, 8, 8))
    assert zoo.relative_error(hooked, before) > 1e-3
    accelrt.wrap(vae, pixels_per_slice=9, vae_images=None)
    assert zoo.relative_error(decode(vae, (2, 3, 8, 8)), hooked) < 1e-13
    rows = {r.group: r for r in accelrt.summary(vae).rows if r.component == "decoder"}
    row = rows["up_blocks.0.resnets.1.temporal_res_block"]
    assert row.status == "sliced"
    assert part.rpartition(".")[2] in row.reason
    handle.remove()
    assert zoo.relative_error(decode(vae, (2, 3, 8, 8)), before) < 1e-13


def test_lora_on_temporal_convolutions() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    vae = zoo.clone(tiny(), torch.float32)
    plain = decode(vae, (1, 7, 8, 8))
    config = LoraConfig(r=4, target_modules=["conv1", "conv2"], init_lora_weights=False)
    inject_adapter_in_model(config, vae.decoder)
    vae = vae.double().eval()
    before = decode(vae, (1, 7, 8, 8))
    assert zoo.relative_error(before, plain.double()) > 1e-3
    accelrt.wrap(vae, pixels_per_slice=9)
    assert zoo.relative_error(decode(vae, (1, 7, 8, 8)), before) < 1e-13
    rows = {r["group"]: r["status"] for r in accelrt.summary(vae).to_dict()["groups"]}
    assert rows["up_blocks.0.resnets.1.temporal_res_block"] == "fused"


def three_levels(**overrides: Any) -> AutoencoderKLTemporalDecoder:
    """A chain of transitions of different sizes."""
    settings: dict[str, Any] = {"block_out_channels": (32, 64, 64), "layers_per_block": 1}
    settings.update(overrides)
    count = len(settings["block_out_channels"])
    vae = AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * count, **settings)
    return zoo.randomise(vae)


@pytest.mark.parametrize("config", ["smallest", "bands", "recompute", "least"])
@pytest.mark.parametrize("channels", [(32, 64, 64), (32, 32, 32), (64, 32, 96), (96, 32, 32, 64)])
def test_outputs_over_dead_inputs(channels: tuple[int, ...], config: str) -> None:
    """Whatever the sizes of the transitions, one storage or several."""
    vae = three_levels(block_out_channels=channels).double()
    before = decode(vae, (2, 5, 3, 5))
    accelrt.wrap(vae, **CONFIGS[config])
    assert zoo.relative_error(decode(vae, (2, 5, 3, 5)), before) < 1e-13


@pytest.mark.parametrize("config", ["smallest", "bands", "recompute"])
@pytest.mark.parametrize("keep", [1, 3, 4])
def test_who_holds_hidden_states_keeps_them(keep: int, config: str) -> None:
    """Outputs go over dead inputs, not over those that an observer holds."""

    class Keeper:
        def __init__(self) -> None:
            self.kept: list[tuple[Tensor, Tensor]] = []
            self.seen = 0

        def enter(self, stage: Any, group: Any, state: Any) -> None:
            self.seen += 1

        def leave(self, stage: Any, group: Any, state: Any) -> None:
            if self.seen % keep == 0:
                state.hold(state.hidden)
                self.kept.append((state.hidden, state.hidden.clone()))

    vae = three_levels().double()
    before = decode(vae, (1, 5, 3, 5))
    accelrt.wrap(vae, **CONFIGS[config])
    forward: Any = vae.decoder.forward
    forward.observer = keeper = Keeper()
    assert zoo.relative_error(decode(vae, (1, 5, 3, 5)), before) < 1e-13
    assert len(keeper.kept) > 3
    assert all(torch.equal(tensor, copy) for tensor, copy in keeper.kept)


@pytest.mark.parametrize("where", ["", "spatial_res_block", "temporal_res_block"])
def test_a_hook_that_keeps_its_inputs(where: str) -> None:
    """What a module with a hook has seen is not written over."""
    vae = three_levels().double()
    before = decode(vae, (1, 5, 3, 5))
    accelrt.wrap(vae, **CONFIGS["least"])
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append((inputs[0], inputs[0].clone()))

    resnet = vae.decoder.up_blocks[1].resnets[1]
    module: nn.Module = resnet.get_submodule(where)

    def keep_named(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(module, args or tuple(kwargs.values()))

    module.register_forward_pre_hook(keep_named, with_kwargs=True)
    assert zoo.relative_error(decode(vae, (1, 5, 3, 5)), before) < 1e-13
    assert len(kept) == 1
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_frames_that_make_no_videos_raise_what_stock_raises() -> None:
    vae = zoo.clone(tiny(), torch.float32)
    latents = zoo.normal(7, 4, 8, 8)
    with torch.no_grad(), pytest.raises(RuntimeError) as theirs:
        vae.decode(latents, num_frames=3)
    accelrt.wrap(vae)
    with torch.no_grad(), pytest.raises(RuntimeError) as ours:
        vae.decode(latents, num_frames=3)
    assert str(ours.value) == str(theirs.value)


def test_peak_memory_is_less_than_half_of_stock() -> None:
    """Live activations of a decode at the size of real videos, on meta tensors."""
    from accelrt.memory import track_peak

    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
    )
    vae = vae.eval().to(device="meta", dtype=torch.bfloat16)
    latents = torch.empty(14, 4, 72, 128, dtype=torch.bfloat16, device="meta")

    def peak() -> int:
        with torch.no_grad(), track_peak() as tracker:
            vae.decode(latents, num_frames=14)
        return tracker.peak_bytes

    before = peak()
    accelrt.wrap(vae)
    assert peak() < before / 2
