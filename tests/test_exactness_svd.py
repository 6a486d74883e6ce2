"""The spatio-temporal UNet: exactness, pipelines, and what other libraries attach to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn
from zoo_svd import (
    CONTEXT_WIDTH,
    deep_svd_unet,
    picture,
    run_svd,
    svd_inputs,
    svd_pipeline,
    tiny_svd_unet,
)

import accelrt

Case = tuple[Callable[[], Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "b2-t7-9x15": (tiny_svd_unet, svd_inputs(2, 7, 9, 15)),
    "b1-t1-9x15": (tiny_svd_unet, svd_inputs(1, 1, 9, 15)),
    "b1-t16-8x8": (tiny_svd_unet, svd_inputs(1, 16, 8, 8)),
    "b2-t14-8x8": (tiny_svd_unet, svd_inputs(2, 14, 8, 8)),
    "tokens-b2-t7-9x15": (tiny_svd_unet, svd_inputs(2, 7, 9, 15, length=5)),
    "deep-b2-t7-9x15": (deep_svd_unet, svd_inputs(2, 7, 9, 15)),
    "b2-t1-36x60": (tiny_svd_unet, svd_inputs(2, 1, 36, 60)),
    "b1-t7-36x60": (tiny_svd_unet, svd_inputs(1, 7, 36, 60)),
}

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "smallest": {"frames_per_slice": 1, "pixels_per_slice": 7, "ff_rows": 5},
    "middle": {"frames_per_slice": 3, "pixels_per_slice": 100, "ff_rows": 64},
    "not-in-place": {"frames_per_slice": 5, "pixels_per_slice": 7, "inplace": False},
    "unfused": {"frames_per_slice": 3, "pixels_per_slice": 100, "ff_rows": 64, "fuse": False},
    "samples": {"samples_per_slice": 1, "pixels_per_slice": 100},
}

_DTYPES = ("float32", "bfloat16", "float16")


def _matrix() -> list[tuple[str, str, str]]:
    """Small cases meet every dtype and one or two configs; large ones a dtype or two."""
    matrix = []
    for i, case in enumerate(CASES):
        for j, dtype in enumerate(_DTYPES):
            if "36x60" in case:
                if dtype != "float16" and ("t7" not in case or dtype == "bfloat16"):
                    matrix.append((case, dtype, ("unfused", "defaults")[j]))
                continue
            names = list(CONFIGS)
            steps = (0,) if dtype == "float16" else (0, 3)  # half precision is slow on a CPU
            matrix += [(case, dtype, names[(2 * i + j + k) % len(names)]) for k in steps]
    return matrix


@functools.cache
def _model(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    return zoo.clone(build(), dtype)


def _call(model: Any, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return model(**zoo.to_dtype(inputs, dtype)).sample


def _wrapped(case: str, dtype: torch.dtype, config: str) -> Tensor:
    build, inputs = CASES[case]
    model = accelrt.wrap(_model(build, dtype), **CONFIGS[config])
    try:
        result = _call(model, inputs, dtype)
        assert not accelrt.summary(model).stock
        return result
    finally:
        accelrt.unwrap(model)


@functools.cache
def _stock(case: str, dtype: torch.dtype) -> Tensor:
    build, inputs = CASES[case]
    return _call(_model(build, dtype), inputs, dtype)


@pytest.mark.parametrize(("case", "dtype", "config"), _matrix())
def test_unet(case: str, dtype: str, config: str) -> None:
    kind = getattr(torch, dtype)
    truth = _stock(case, torch.float64)
    result = _wrapped(case, kind, config)
    assert result.shape == truth.shape
    assert result.dtype == kind
    stock = zoo.relative_error(_stock(case, kind), truth)
    zoo.assert_rule(zoo.relative_error(result, truth), stock)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", ["b2-t7-9x15", "tokens-b2-t7-9x15", "deep-b2-t7-9x15"])
def test_slicing_is_exact_in_float64(case: str, config: str) -> None:
    result = _wrapped(case, torch.float64, config)
    assert zoo.relative_error(result, _stock(case, torch.float64)) < 1e-13


@pytest.mark.parametrize("length", [1, 5])
def test_halves_of_a_guided_batch_keep_their_conditioning(length: int) -> None:
    """Each sample of a batch is what it is alone: nothing leaks between the halves."""
    inputs = zoo.to_dtype(svd_inputs(2, 7, 8, 8, length=length), torch.float64)
    inputs["sample"] = inputs["sample"][:1].expand(2, -1, -1, -1, -1)
    inputs["timestep"] = torch.tensor(0.7)
    model = accelrt.wrap(tiny_svd_unet().double(), frames_per_slice=3, pixels_per_slice=7)
    with torch.no_grad():
        both = model(**inputs).sample
        for i in range(2):
            one = {k: v if v.dim() == 0 else v[i : i + 1] for k, v in inputs.items()}
            assert zoo.relative_error(model(**one).sample, both[i : i + 1]) < 1e-13
    assert zoo.relative_error(both[0], both[1]) > 1e-2


@functools.cache
def _latents_in_float64(frames: int) -> Tensor:
    return run_svd(svd_pipeline(torch.float64), num_frames=frames)


@pytest.mark.parametrize(("dtype", "frames"), [("float32", 7), ("bfloat16", 7), ("float16", 2)])
def test_latents_after_four_steps(dtype: str, frames: int) -> None:
    """The guidance scale grows from frame to frame, as the pipeline's default does."""
    truth = _latents_in_float64(frames)
    pipe = svd_pipeline(getattr(torch, dtype))
    before = run_svd(pipe, num_frames=frames)
    accelrt.wrap(pipe, frames_per_slice=3, pixels_per_slice=100, ff_rows=64)
    wrapped = run_svd(pipe, num_frames=frames)
    assert not accelrt.summary(pipe).stock
    accelrt.unwrap(pipe)
    assert not torch.equal(wrapped, before)  # it did run differently
    assert torch.equal(run_svd(pipe, num_frames=frames), before)
    zoo.assert_rule(zoo.relative_error(wrapped, truth), zoo.relative_error(before, truth))


def test_several_videos_of_several_pictures() -> None:
    options: dict[str, Any] = {
        "image": [picture(8), picture(9)],
        "num_videos_per_prompt": 2,
        "num_inference_steps": 2,
        "num_frames": 3,
    }
    truth = run_svd(svd_pipeline(torch.float64), **options)
    pipe = svd_pipeline(torch.bfloat16)
    before = run_svd(pipe, **options)
    wrapped = run_svd(accelrt.wrap(pipe), **options)
    assert wrapped.shape == (4, 3, 4, 9, 15)
    zoo.assert_rule(zoo.relative_error(wrapped, truth), zoo.relative_error(before, truth))


def test_callbacks_see_the_same_steps() -> None:
    pipe = accelrt.wrap(svd_pipeline())
    seen: list[int] = []

    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> Any:
        assert pipeline is pipe
        assert values["latents"].shape == (1, 3, 4, 9, 15)
        seen.append(step)
        return values

    run_svd(pipe, callback_on_step_end=callback, num_inference_steps=2, num_frames=3)
    assert seen == [0, 1]


# Coexistence, all in float64: what is attached must act as on the stock model.

FRAMES = 3


@pytest.fixture
def unet() -> Any:
    return tiny_svd_unet().double()


def run(model: Any, length: int = 1) -> Tensor:
    return _call(model, svd_inputs(2, FRAMES, 8, 8, length=length), torch.float64)


def statuses(model: Any) -> dict[str, tuple[str, str]]:
    groups = accelrt.summary(model).to_dict()["groups"]
    return {group["group"]: (group["status"], group["reason"]) for group in groups}


def check(model: Any, length: int = 1) -> dict[str, tuple[str, str]]:
    """Stock and wrapped agree; returns the statuses after the wrapped run."""
    before = run(model, length)
    accelrt.wrap(model, frames_per_slice=2, pixels_per_slice=7, ff_rows=64)
    after = run(model, length)
    assert zoo.relative_error(after, before) < 1e-13
    assert not accelrt.summary(model).stock
    result = statuses(model)
    accelrt.unwrap(model)
    assert torch.equal(run(model, length), before)
    return result


def untouched(result: dict[str, tuple[str, str]]) -> set[str]:
    """Groups that ran as they came, except those that always do."""
    usual = {"time_embedding", "down_blocks.0.downsamplers.0"}
    return {name for name, (kind, _) in result.items() if kind == "untouched"} - usual


def test_transformers_are_fused(unet: Any) -> None:
    result = check(unet)
    assert not untouched(result)
    assert result["mid_block.attentions.0"] == ("fused", "then 7/16 pixels")


@pytest.mark.parametrize(
    "target", ["to_q", "to_v", "to_out.0", "ff_in.net.2", "proj_in", "linear_1", "conv1"]
)
def test_lora(unet: Any, target: str) -> None:
    """This UNet has no adapter methods of its own: peft puts the layers in."""
    from peft import LoraConfig, inject_adapter_in_model

    plain = run(unet, 5)
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    inject_adapter_in_model(config, unet)
    unet.double()
    assert zoo.relative_error(run(unet, 5), plain) > 1e-5
    for length in (1, 5):
        result = check(unet, length)
        assert not untouched(result)
        assert result["mid_block.attentions.0"][0] == "fused"


class DoublingProcessor:
    """An attention processor that accelrt does not know."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.inner(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("layer", ["attn1", "attn2"])
@pytest.mark.parametrize("half", ["transformer_blocks", "temporal_transformer_blocks"])
def test_unknown_attention_processors(unet: Any, half: str, layer: str) -> None:
    plain = run(unet, 5)
    processors = {
        name: DoublingProcessor(p) if f".{half}.0.{layer}" in name else p
        for name, p in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    assert zoo.relative_error(run(unet, 5), plain) > 1e-2
    kind, reason = check(unet, 5)["mid_block.attentions.0"]
    temporal = "temporal " if half.startswith("temporal") else ""
    rows = "pixels" if temporal else "images"
    assert kind == "sliced"
    assert reason == (
        f"{temporal}block 0: {layer}: processor DoublingProcessor runs as it came; "
        f"{temporal}block 0: {layer}: DoublingProcessor may mix {rows}, so they pass together"
    )


def test_the_older_attention_processor(unet: Any) -> None:
    unet.set_default_attn_processor()
    assert check(unet, 5)["mid_block.attentions.0"][0] == "fused"


def test_fused_projections(unet: Any) -> None:
    unet.fuse_qkv_projections()
    assert not untouched(check(unet, 5))


@pytest.mark.parametrize("dim", [0, 1])
def test_forward_chunking(unet: Any, dim: int) -> None:
    unet.enable_forward_chunking(1, dim=dim)
    kind, reason = check(unet)["mid_block.attentions.0"]
    assert kind == "fused"
    assert "forward chunking" in reason
    unet.mid_block.attentions[0].transformer_blocks[0].register_forward_hook(lambda *_: None)
    kind, reason = check(unet)["mid_block.attentions.0"]
    assert kind == ("untouched" if dim == 0 else "sliced")


def test_forward_hooks(unet: Any) -> None:
    """Hooks are called, and what they keep is not overwritten by later groups."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        seen.setdefault(name, []).append((value, value.clone()))

    names = [
        "down_blocks.0.attentions.0",
        "down_blocks.1",
        "mid_block.resnets.0",
        "mid_block.attentions.0.norm",
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.time_mixer",
        "mid_block.attentions.0.time_pos_embed",
        "mid_block.attentions.0.temporal_transformer_blocks.0.norm_in",
        "mid_block.attentions.0.temporal_transformer_blocks.0.norm2",
        "mid_block.attentions.0.temporal_transformer_blocks.0.ff_in",
        "mid_block.attentions.0.temporal_transformer_blocks.0.attn2.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.norm2",
        "mid_block.resnets.1.temporal_res_block",
        "mid_block.resnets.1.spatial_res_block.conv2",
        "up_blocks.0.resnets.0.spatial_res_block",
        "up_blocks.0.upsamplers.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.temporal_transformer_blocks.0",
        "up_blocks.1.attentions.1.proj_out",
    ]
    for name in names:
        unet.get_submodule(name).register_forward_hook(functools.partial(keep, name))
    result = check(unet)
    assert set(seen) == set(names)
    assert all(torch.equal(value, copy) for pairs in seen.values() for value, copy in pairs)
    assert untouched(result) == {
        "down_blocks.0.attentions.0",
        "down_blocks.1",
        "mid_block.resnets.0",
        "mid_block.resnets.1.temporal_res_block",
        "up_blocks.0.resnets.0.spatial_res_block",
        "up_blocks.0.upsamplers.0",
    }
    assert result["mid_block.attentions.0"][0] == "sliced"


@pytest.mark.parametrize("where", ["down_blocks.0", "mid_block", "up_blocks.0", "up_blocks.1"])
def test_hooked_blocks(unet: Any, where: str) -> None:
    accelrt.wrap(unet)
    run(unet)
    calls: list[int] = []
    unet.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    inputs = svd_inputs(2, FRAMES, 9, 7)
    ours = _call(unet, inputs, torch.float64)
    assert untouched(statuses(unet)) == {where}
    theirs = _call(accelrt.unwrap(unet), inputs, torch.float64)
    assert zoo.relative_error(ours, theirs) < 1e-13
    assert len(calls) == 2


def test_another_class_of_temporal_block(unet: Any) -> None:
    from diffusers.models.attention import TemporalBasicTransformerBlock

    class Halving(TemporalBasicTransformerBlock):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 0.5 * super().forward(*args, **kwargs)

    unet.mid_block.attentions[0].temporal_transformer_blocks[0].__class__ = Halving
    kind, reason = check(unet, 5)["mid_block.attentions.0"]
    assert (kind, "Halving" in reason) == ("sliced", True)


@pytest.mark.parametrize("strategy", ["learned", "fixed", "learned_with_images"])
@pytest.mark.parametrize("switch", [False, True])
def test_blends(unet: Any, strategy: str, switch: bool) -> None:
    from diffusers.models.resnet import AlphaBlender

    mixer = AlphaBlender(0.3, strategy, switch).double()
    unet.mid_block.attentions[0].time_mixer = mixer
    assert check(unet)["mid_block.attentions.0"][0] == "fused"


@pytest.mark.parametrize("fuse", [True, False])
def test_frames_that_are_images(unet: Any, fuse: bool) -> None:
    """Single images in a batch keep their spatial features."""
    from accelrt.groups import Context, State
    from accelrt.groups.spatio_temporal import SpatioTemporalTransformerGroup

    module = unet.mid_block.attentions[0]
    indicator = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]).double()
    context = zoo.normal(2, 5, CONTEXT_WIDTH).double()
    x = zoo.normal(6, 64, 3, 5).double().contiguous(memory_format=torch.channels_last)
    config = accelrt.Config(frames_per_slice=2, pixels_per_slice=4, fuse=fuse)
    with torch.no_grad():
        rows = context.repeat_interleave(3, dim=0)
        before = module(x, rows, indicator).sample
        state = State({}, frames=3, context=Context(shared=context))
        state.hidden = x.clone()
        state.extras["image_only"] = indicator
        SpatioTemporalTransformerGroup("transformer", module, config)(state)
    assert state.hidden is not None
    assert zoo.relative_error(state.hidden, before) < 1e-13


@pytest.mark.parametrize("first", ["hook", "wrap"])
def test_layerwise_casting(first: str) -> None:
    unet = tiny_svd_unet().to(torch.bfloat16)
    inputs = svd_inputs(1, 2, 8, 8, length=5)

    def cast() -> None:
        unet.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )

    if first == "hook":
        cast()
    accelrt.wrap(unet)
    if first == "wrap":
        cast()
    ours = _call(unet, inputs, torch.bfloat16)
    assert not accelrt.summary(unet).stock
    theirs = _call(accelrt.unwrap(unet), inputs, torch.bfloat16)
    assert zoo.relative_error(ours, theirs.double()) < 0.05


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(unet: Any, kind: str) -> None:
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    result = check(unet)
    if kind == "block_level":
        assert "forward of its own" in result["down_blocks.0"][1]
    else:
        assert result["mid_block.attentions.0"][0] == "sliced"


def test_return_dict_and_positional_arguments(unet: Any) -> None:
    inputs = zoo.to_dtype(svd_inputs(2, FRAMES, 8, 8), torch.float64)
    before = run(unet)
    accelrt.wrap(unet)
    with torch.no_grad():
        result = unet(*inputs.values(), False)
        assert isinstance(result, tuple)
        assert len(result) == 1
        assert zoo.relative_error(result[0], before) < 1e-13
        output = unet(*inputs.values())
    assert type(output).__name__ == "UNetSpatioTemporalConditionOutput"


@pytest.mark.parametrize("timestep", [3, 0.25, torch.tensor(0.25), torch.tensor([0.25])])
def test_kinds_of_time_steps(unet: Any, timestep: Any) -> None:
    inputs = zoo.to_dtype(svd_inputs(2, FRAMES, 8, 8), torch.float64)
    inputs["timestep"] = timestep
    with torch.no_grad():
        before = unet(**inputs).sample
        after = accelrt.wrap(unet)(**inputs).sample
    assert zoo.relative_error(after, before) < 1e-13


def test_inference_mode(unet: Any) -> None:
    before = run(unet)
    accelrt.wrap(unet)
    with torch.inference_mode():
        inputs = zoo.to_dtype(svd_inputs(2, FRAMES, 8, 8), torch.float64)
        for _ in range(2):
            assert zoo.relative_error(unet(**inputs).sample, before) < 1e-13


def test_one_context_for_two_samples_is_left_to_the_stock_model(unet: Any) -> None:
    inputs = zoo.to_dtype(svd_inputs(2, FRAMES, 8, 8), torch.float64)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:1]
    with torch.no_grad():
        with pytest.raises(RuntimeError) as stock:
            unet(**inputs)
        accelrt.wrap(unet)
        with pytest.raises(RuntimeError) as ours:
            unet(**inputs)
    assert str(ours.value) == str(stock.value)
    assert accelrt.summary(unet).stock[""] == "1 contexts for 2 samples"


def test_a_new_hook_on_a_resnet_is_seen(unet: Any) -> None:
    accelrt.wrap(unet)
    run(unet)
    calls: list[int] = []
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    ours = run(unet)
    assert calls == [1]
    assert zoo.relative_error(ours, run(accelrt.unwrap(unet))) < 1e-13
