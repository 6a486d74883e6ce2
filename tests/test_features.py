"""What stock pipelines can do works wrapped, family by family, and unwraps bit for bit.

Everything runs in float64, where slicing errors cannot hide behind rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import AnimateDiffPipeline
from model_zoo import one_thread  # noqa: F401
from torch import Tensor
from zoo_pipelines import (
    DTYPE,
    FAMILIES,
    Family,
    ip_adapter_weights,
    text_encoder,
    with_controlnet,
    with_t2i_adapter,
)
from zoo_svd import picture

import accelrt

ANIMATEDIFF = Path(__file__).resolve().parent.parent / "examples/reference_models/animatediff"
SLICES = {
    "frames_per_slice": 3,
    "pixels_per_slice": 50,
    "ff_rows": 32,
    "samples_per_slice": 1,
}
UNETS = ("animatediff", "svd", "unet2d")
TEXT_UNETS = ("animatediff", "unet2d")
TRANSFORMERS = ("dit", "pixart-alpha", "pixart-sigma")


def check(
    name: str, pipe: Any, plain: Any = None, *, may_be_equal: bool = False, **arguments: Any
) -> dict[str, tuple[str, str]]:
    """Compare stock, wrapped and unwrapped runs of one pipeline.

    Args:
        name: of the family.
        pipe: the stock pipeline, the feature on.
        plain: a pipeline without the feature, which must give something else; or ``None``.
        may_be_equal: do not insist that the wrapped run differs in its last bits.
        arguments: of the call.

    Returns:
        Status and reason of each group of the denoiser after the wrapped run.
    """
    family = FAMILIES[name]

    def run() -> Tensor:
        with torch.no_grad():
            return family.run(pipe, **arguments)

    before = run()
    if plain is not None:
        assert zoo.relative_error(before, family.run(plain)) > 1e-6, "the feature does nothing"
    accelrt.wrap(pipe, **SLICES)
    after = run()
    summary = accelrt.summary(pipe)
    accelrt.unwrap(pipe)
    assert before.dtype == DTYPE
    assert may_be_equal or not torch.equal(after, before)  # it did run differently
    assert zoo.relative_error(after, before) < 1e-11
    assert not summary.stock
    assert torch.equal(run(), before)
    return {
        row.group: (row.status, row.reason)
        for row in summary.rows
        if row.component == family.denoiser
    }


def check_seeded(
    name: str, pipe: Any, plain: Any = None, **arguments: Any
) -> dict[str, tuple[str, str]]:
    """:func:`check` of a call that draws noise: every run sees the same."""
    family = FAMILIES[name]

    def run(pipe: Any, **arguments: Any) -> Tensor:
        torch.manual_seed(5)
        return family.run(pipe, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, Family(family.denoiser, family.build, run))
        return check(name, pipe, plain, **arguments)


def assert_sliced(groups: dict[str, tuple[str, str]]) -> None:
    """Nothing ran as it came but what always does."""
    usual = ("an embedding", "a single convolution has no intermediates to slice")
    alone = {
        name: reason
        for name, (kind, reason) in groups.items()
        if kind == "untouched" and reason not in usual
    }
    assert not alone


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_special(name: str) -> None:
    assert_sliced(check(name, FAMILIES[name].pipe()))


@pytest.mark.parametrize("name", TEXT_UNETS)
def test_controlnet(name: str) -> None:
    pipe, arguments = with_controlnet(name)
    assert_sliced(check(name, pipe, FAMILIES[name].pipe(), **arguments))


def test_t2i_adapter() -> None:
    pipe, arguments = with_t2i_adapter()
    assert_sliced(check("unet2d", pipe, FAMILIES["unet2d"].pipe(), **arguments))


@pytest.mark.parametrize("name", TEXT_UNETS)
def test_ip_adapter(name: str) -> None:
    pipe = FAMILIES[name].pipe()
    weights = ip_adapter_weights(pipe.unet)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.to(DTYPE)
    embeds = torch.cat([zoo.normal(1, 1, 12, seed=s).to(DTYPE) for s in (80, 81)])
    groups = check(name, pipe, FAMILIES[name].pipe(), ip_adapter_image_embeds=[embeds])
    assert_sliced(groups)


@pytest.mark.parametrize("name", ["pixart-alpha", "pixart-sigma"])
def test_attention_masks(name: str) -> None:
    """Of the caption, of another length for every sample."""
    family = FAMILIES[name]
    pipe = family.pipe()
    everything = family.run(
        pipe,
        prompt_attention_mask=torch.ones(1, 7, dtype=torch.long),
        negative_prompt_attention_mask=torch.ones(1, 7, dtype=torch.long),
    )
    masked = family.run(pipe)
    assert zoo.relative_error(masked, everything) > 1e-6
    assert_sliced(check(name, pipe))


@pytest.mark.parametrize("name", FAMILIES)
def test_lora(name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    family = FAMILIES[name]
    pipe = family.pipe()
    targets = ["to_q", "to_out.0", "ff.net.2"]
    if name in UNETS:
        targets += ["conv1", "time_emb_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, family.model(pipe), "mine")
    family.model(pipe).to(DTYPE).eval()
    assert_sliced(check(name, pipe, family.pipe()))


@pytest.mark.parametrize("name", TEXT_UNETS)
def test_lora_scale(name: str) -> None:
    """The scale goes through ``cross_attention_kwargs``."""
    from peft import LoraConfig

    pipe = FAMILIES[name].pipe()
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "mine")
    pipe.unet.to(DTYPE)
    pipe.register_modules(text_encoder=text_encoder())
    full = FAMILIES[name].run(pipe)
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    assert zoo.relative_error(FAMILIES[name].run(pipe, **half), full) > 1e-6
    assert_sliced(check(name, pipe, **half))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "dit"])
def test_fused_qkv_projections(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.pipe()
    model = family.model(pipe)
    if not hasattr(model, "fuse_qkv_projections"):
        for module in model.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections(fuse=True)
    else:
        model.fuse_qkv_projections()
    assert_sliced(check(name, pipe))


@pytest.mark.parametrize("name", FAMILIES)
def test_return_tuples(name: str) -> None:
    check(name, FAMILIES[name].pipe(), return_dict=False)


@pytest.mark.parametrize("name", TEXT_UNETS)
def test_freeu(name: str) -> None:
    pipe = FAMILIES[name].pipe()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_sliced(check(name, pipe, FAMILIES[name].pipe()))


@pytest.mark.parametrize("split", [False, True])
def test_free_noise(split: bool) -> None:
    """Motion modules in sliding windows; FreeNoise wants prompts, so a trained pipeline."""
    pipe = AnimateDiffPipeline.from_pretrained(ANIMATEDIFF, dtype=DTYPE)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a handwritten seven moving up",
        "num_frames": 8,
        "height": 24,
        "width": 40,
        "num_inference_steps": 2,
        "output_type": "latent",
    }

    def run(pipe: Any, **_: Any) -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    plain = run(pipe)
    pipe.enable_free_noise(context_length=4, context_stride=2)
    if split:
        pipe.enable_free_noise_split_inference(spatial_split_size=64, temporal_split_size=4)
    assert zoo.relative_error(run(pipe), plain) > 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "animatediff", Family("unet", lambda dtype: pipe, run))
        groups = check("animatediff", pipe)
    kind, reason = groups["mid_block.motion_modules.0"]
    if split:
        assert kind == "untouched"
        assert "projections" in reason
        for part in ("resnets.0", "attentions.0"):
            kind, reason = groups[f"mid_block.{part}"]
            assert kind == "untouched"
            assert "SplitInferenceModule" in reason
    else:
        assert_sliced(groups)
        assert kind == "sliced"
        assert "FreeNoiseTransformerBlock" in reason


def test_free_init() -> None:
    pipe = FAMILIES["animatediff"].pipe()
    pipe.enable_free_init(num_iters=2, use_fast_sampling=False)
    check_seeded("animatediff", pipe, FAMILIES["animatediff"].pipe())


@pytest.mark.parametrize("name", [*TEXT_UNETS, "pixart-alpha", "pixart-sigma"])
@pytest.mark.parametrize("size", [(8, 8), (10, 14), (6, 18)])
def test_odd_sizes(name: str, size: tuple[int, int]) -> None:
    """Latents that are no multiple of what the UNet's levels divide by, or not square."""
    height, width = size
    frames = (7,) if name == "animatediff" else ()
    images = 2 if name.startswith("pixart") else 1
    latents = zoo.normal(images, 4, *frames, height, width).to(DTYPE)
    call = {"height": 8 * height, "width": 8 * width, "latents": latents}
    assert_sliced(check(name, FAMILIES[name].pipe(), **call))


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_and_images_per_prompt(name: str) -> None:
    """Two prompts, two results of each."""
    call: dict[str, Any]
    if name == "dit":
        call = {"class_labels": [3, 77, 5, 3, 9]}
    elif name == "svd":
        call = {"num_videos_per_prompt": 2, "image": [picture(), picture(9)]}
    else:
        width = zoo.CONTEXT_WIDTH if name in TEXT_UNETS else 20
        length = 5 if name in TEXT_UNETS else 7
        kind = "num_videos_per_prompt" if name == "animatediff" else "num_images_per_prompt"
        frames = (3,) if name == "animatediff" else ()
        size = (18, 30) if name.startswith("pixart") else (9, 15)
        call = {
            "prompt_embeds": zoo.normal(2, length, width, seed=4).to(DTYPE),
            "negative_prompt_embeds": zoo.normal(2, length, width, seed=5).to(DTYPE),
            "latents": zoo.normal(4, 4, *frames, *size, seed=6).to(DTYPE),
            kind: 2,
        }
        if name == "animatediff":  # sets its number of videos per prompt to one
            call |= {"num_frames": 3, "latents": call["latents"][:2]}
        if name.startswith("pixart"):
            mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
            call |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.flip(0)}
    assert_sliced(check_seeded(name, FAMILIES[name].pipe(), **call))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "dit"])
def test_callbacks_change_tensors(name: str) -> None:
    """A callback that replaces the latents between two steps."""
    seen: list[int] = []
    if name.startswith("pixart"):
        # Its callbacks see the latents, and may write to them.
        def callback(step: int, timestep: Any, latents: Tensor) -> None:
            seen.append(step)
            latents.mul_(0.9)

        arguments: dict[str, Any] = {"callback": callback, "callback_steps": 1}
    else:

        def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            seen.append(step)
            return {**values, "latents": values["latents"] * 0.9}

        arguments = {
            "callback_on_step_end": on_step,
            "callback_on_step_end_tensor_inputs": ["latents"],
        }
    check(name, FAMILIES[name].pipe(), FAMILIES[name].pipe(), **arguments)
    steps = sorted(set(seen))
    assert seen == steps * 3


class Doubling:
    """An attention processor that nobody knows."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.inner(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_custom_attention_processors(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.pipe()
    layers = [m for m in family.model(pipe).modules() if hasattr(m, "set_processor")]
    attentions = [m for m in layers if hasattr(m, "to_q")]
    for attention in attentions:
        attention.set_processor(Doubling(attention.processor))
    groups = check(name, pipe, family.pipe())
    assert_sliced(groups)
    assert any("Doubling" in reason for kind, reason in groups.values() if kind == "sliced")


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "dit"])  # stock DiT refuses it
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(name: str, kind: str) -> None:
    family = FAMILIES[name]
    pipe = family.pipe()
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    family.model(pipe).enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=kind, **options
    )
    # Blocks that are loaded as such run as they came; so do PixArt's, for their own tables.
    as_they_came = kind == "block_level" or name.startswith("pixart")
    groups = check(name, pipe, may_be_equal=as_they_came)
    if not as_they_came:
        assert_sliced(groups)
    reasons = [reason for status, reason in groups.values() if status == "untouched"]
    assert any("hook" in reason for reason in reasons) == as_they_came


@pytest.mark.parametrize("name", FAMILIES)
def test_layerwise_casting(name: str) -> None:
    """Weights stored in float8, computed in float32."""
    family = FAMILIES[name]
    pipe = family.build(torch.float32)
    plain = family.run(pipe)
    family.model(pipe).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    before = family.run(pipe)
    assert zoo.relative_error(before, plain.double()) > 1e-4
    accelrt.wrap(pipe, **SLICES)
    after = family.run(pipe)
    assert not accelrt.summary(pipe).stock
    accelrt.unwrap(pipe)
    assert not torch.equal(after, before)
    assert zoo.relative_error(after, before.double()) < 1e-4
    assert torch.equal(family.run(pipe), before)
