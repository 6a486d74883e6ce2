"""PixArt: exactness, everything its forward takes, and other libraries on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart as pixart
from diffusers.models.attention_processor import AttnProcessor
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn

import accelrt

NEGATIVE = -10000.0


def _bias(batch: int) -> Tensor:
    """A caption mask as the bias that the model also takes, ``[B, 1, L]``."""
    return ((1 - pixart.caption_mask(batch)) * NEGATIVE)[:, None].float()


def _token_mask(batch: int, tokens: int) -> Tensor:
    """A mask for the self-attention; every sample keeps other tokens."""
    kept = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(4)) < 0.7
    kept[:, 0] = True
    return kept.long()


def _six_heads() -> Any:
    return pixart.tiny_pixart(num_attention_heads=6, attention_head_dim=4)


# Name -> (model, batch, height, width, inputs that differ from the usual ones).
CASES: dict[str, tuple[Callable[[], Any], int, int, int, dict[str, Any]]] = {
    "b2-8": (pixart.tiny_pixart, 2, 8, 8, {}),
    "b1-36x60": (pixart.tiny_pixart, 1, 36, 60, {}),
    "b3-9x15": (pixart.variant, 3, 9, 15, {}),
    "odd-size": (pixart.tiny_pixart, 2, 9, 15, {}),
    "alpha-b3": (pixart.alpha_1024, 3, 10, 6, {"added_cond_kwargs": pixart.conditions(3)}),
    "one-timestep": (
        pixart.alpha_1024, 2, 8, 8,
        {"added_cond_kwargs": pixart.conditions(2), "timestep": torch.tensor([301])},
    ),
    "no-mask": (pixart.tiny_pixart, 2, 8, 12, {"encoder_attention_mask": None}),
    "bias": (pixart.tiny_pixart, 3, 8, 12, {"encoder_attention_mask": _bias(3)}),
    "bias-per-head": (
        pixart.tiny_pixart, 2, 8, 12,
        {"encoder_attention_mask": zoo.normal(4, 24, pixart.CAPTION_LENGTH, seed=5)},
    ),
    "both-masks": (pixart.tiny_pixart, 3, 8, 12, {"attention_mask": _token_mask(3, 24)}),
    "token-bias": (pixart.tiny_pixart, 2, 8, 8, {"attention_mask": zoo.normal(2, 16, 16)}),
    "self-attention-twice": (
        functools.partial(pixart.tiny_pixart, caption_channels=None), 3, 12, 20,
        {"encoder_hidden_states": None, "encoder_attention_mask": _token_mask(3, 60)},
    ),
    "no-cross-attention": (
        functools.partial(pixart.tiny_pixart, cross_attention_dim=None), 2, 8, 8, {}
    ),
    "six-heads": (_six_heads, 2, 12, 20, {"attention_mask": _token_mask(2, 60)}),
    "six-heads-bias": (
        _six_heads, 2, 8, 12,
        {
            "attention_mask": zoo.normal(12, 24, 24, seed=6),
            "encoder_attention_mask": zoo.normal(2, 24, pixart.CAPTION_LENGTH, seed=5),
        },
    ),
    "one-patch": (pixart.tiny_pixart, 40, 3, 2, {}),
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "samples": {"samples_per_slice": 1, "ff_rows": 5},
    "two": {"samples_per_slice": 2, "ff_rows": 64},
    "not-in-place": {"samples_per_slice": 1, "inplace": False},
    "unfused": {"samples_per_slice": 2, "ff_rows": 5, "fuse": False},
    "bands": {"slice_mib": 0.0005},  # of 2 to 11 tokens
    "one-token": {"slice_mib": 1e-6},
    "bands-unfused": {"slice_mib": 0.0005, "fuse": False},
    "one-by-one": {"slice_mib": 0.0003, "samples_per_pass": 1, "inplace": False},
}


def _inputs(case: str) -> dict[str, Any]:
    _, batch, height, width, others = CASES[case]
    return {**pixart.inputs(batch, height, width), **others}


@functools.cache
def _model(build: Callable[[], Any]) -> Any:
    return build()


def _call(model: Any, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return model(**zoo.to_dtype(inputs, dtype)).sample


@functools.cache
def _stock(case: str, name: str) -> tuple[Tensor, float]:
    """The float64 output of the stock model, and its error in a dtype."""
    dtype = getattr(torch, name)
    result = _call(zoo.clone(_model(CASES[case][0]), dtype), _inputs(case), dtype)
    if dtype == torch.float64:
        return result, 0.0
    truth, _ = _stock(case, "float64")
    return truth, zoo.relative_error(result, truth)


@pytest.mark.parametrize(("case", "dtype", "config"), zoo.in_turn(CASES, CONFIGS))
def test_exactness(case: str, dtype: str, config: str) -> None:
    truth, stock = _stock(case, dtype)
    model = zoo.clone(_model(CASES[case][0]), getattr(torch, dtype))
    accelrt.wrap(model, **CONFIGS[config])
    result = _call(model, _inputs(case), getattr(torch, dtype))
    assert result.shape == truth.shape
    assert not accelrt.summary(model).stock
    assert not untouched(model)
    error = zoo.relative_error(result, truth)
    if dtype == "float64":
        assert error < 1e-13
    else:
        zoo.assert_rule(error, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [pixart.sigma_pipeline, pixart.alpha_pipeline])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_pipeline(build: Any, dtype: torch.dtype, guidance: float) -> None:
    truth = _pipeline_truth(build, guidance)
    pipe = build(dtype)
    before = pixart.run(pipe, guidance_scale=guidance)
    accelrt.wrap(pipe, samples_per_slice=1, ff_rows=64)
    wrapped = pixart.run(pipe, guidance_scale=guidance)
    assert not untouched(pipe.transformer)
    accelrt.unwrap(pipe)
    assert torch.equal(pixart.run(pipe, guidance_scale=guidance), before)
    assert not torch.equal(wrapped, before)  # it did run differently
    zoo.assert_rule(zoo.relative_error(wrapped, truth), zoo.relative_error(before, truth))


@functools.cache
def _pipeline_truth(build: Any, guidance: float) -> Tensor:
    return pixart.run(build(torch.float64), guidance_scale=guidance)


def test_pipeline_with_a_callback_and_decoded_images() -> None:
    pipe = pixart.sigma_pipeline()
    before = pixart.run(pipe, output_type="pt")
    accelrt.wrap(pipe)
    seen: list[Any] = []

    def callback(step: int, timestep: Tensor, latents: Tensor) -> None:
        seen.append((step, latents.shape))

    after = pixart.run(pipe, output_type="pt", callback=callback)
    assert seen == [(step, (2, 4, 18, 30)) for step in range(4)]
    assert after.shape == (2, 3, 144, 240)
    assert zoo.relative_error(after, before.double()) < 1e-4


def test_perturbed_attention_guidance() -> None:
    """Its processors split the batch by kind of guidance, so they must see all of it."""
    from diffusers import PixArtSigmaPAGPipeline

    plain = pixart.sigma_pipeline(torch.float64)
    pipe = PixArtSigmaPAGPipeline(**plain.components, pag_applied_layers=["blocks.1"])
    pipe.set_progress_bar_config(disable=True)
    before = pixart.run(pipe, pag_scale=2.0)
    assert zoo.relative_error(pixart.run(plain), before) > 1e-3
    accelrt.wrap(pipe, samples_per_slice=1)
    assert zoo.relative_error(pixart.run(pipe, pag_scale=2.0), before) < 1e-12


@pytest.fixture
def model() -> Any:
    return pixart.tiny_pixart().double()


def run(model: Any, **options: Any) -> Tensor:
    inputs = zoo.to_dtype(pixart.inputs(2, 8, 12), torch.float64)
    with torch.no_grad():
        return model(**{**inputs, **options}).sample


def statuses(model: Any) -> dict[str, tuple[str, str]]:
    groups = accelrt.summary(model).to_dict()["groups"]
    return {group["group"]: (group["status"], group["reason"]) for group in groups}


def untouched(model: Any) -> set[str]:
    """Groups that ran as they came, except the embeddings, which always do."""
    usual = {"pos_embed", "adaln_single", "caption_projection"}
    return {name for name, (kind, _) in statuses(model).items() if kind == "untouched"} - usual


def check(model: Any, **options: Any) -> tuple[str, str]:
    """Stock and wrapped agree, in bands too; returns the status of the second block."""
    before = run(model, **options)
    accelrt.wrap(model, slice_mib=0.0005, samples_per_pass=1)
    assert zoo.relative_error(run(model, **options), before) < 1e-13
    accelrt.unwrap(model)
    accelrt.wrap(model, samples_per_slice=1, ff_rows=5)
    assert zoo.relative_error(run(model, **options), before) < 1e-13
    assert not accelrt.summary(model).stock
    result = statuses(model)["transformer_blocks.1"]
    accelrt.unwrap(model)
    assert torch.equal(run(model, **options), before)
    return result


def test_everything_is_fused_at_the_published_configurations() -> None:
    from diffusers import PixArtTransformer2DModel

    for size, conditioned in ((128, True), (64, False)):
        with torch.device("meta"):
            model = PixArtTransformer2DModel(
                sample_size=size, caption_channels=4096, use_additional_conditions=conditioned
            ).eval()
        accelrt.wrap(model)
        kinds = {kind for name, (kind, _) in statuses(model).items() if "blocks" in name}
        assert kinds == {"fused"}
        assert not untouched(model)


def test_returns_a_tuple(model: Any) -> None:
    inputs = zoo.to_dtype(pixart.inputs(2, 8, 12), torch.float64)
    before = run(model)
    accelrt.wrap(model)
    with torch.no_grad():
        result = model(**inputs, return_dict=False)
    assert isinstance(result, tuple)
    assert len(result) == 1
    assert zoo.relative_error(result[0], before) < 1e-13


def test_inputs_stay_as_they_were(model: Any) -> None:
    inputs = zoo.to_dtype(pixart.inputs(2, 8, 12), torch.float64)
    inputs["encoder_attention_mask"] = _bias(2).double()
    kept = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    accelrt.wrap(model)
    with torch.no_grad():
        model(**inputs)
    assert all(torch.equal(value, inputs[name]) for name, value in kept.items())


MISUSES: dict[str, dict[str, Any]] = {
    "no conditions": {"added_cond_kwargs": None},
    "empty conditions": {"added_cond_kwargs": {}},
    "no caption": {"encoder_hidden_states": None},
    "no timestep": {"timestep": None},
    "a scalar timestep": {"timestep": torch.tensor(3)},
    "timesteps of another batch": {"timestep": torch.tensor([1, 2, 3])},
    "a mask of another length": {"encoder_attention_mask": torch.ones(2, 5)},
    "a mask of another batch": {"encoder_attention_mask": torch.ones(1, 7)},
    "a token mask of another length": {"attention_mask": torch.ones(2, 25)},
    "a wide bias": {"encoder_attention_mask": torch.zeros(2, 3, 7, dtype=torch.float64)},
    "no batch": {"hidden_states": zoo.normal(4, 8, 12).double()},
    "other channels": {"hidden_states": zoo.normal(2, 3, 8, 12).double()},
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("build", [pixart.tiny_pixart, pixart.alpha_1024])
@pytest.mark.parametrize(
    "config",
    [{"samples_per_slice": 1}, {"slice_mib": 0.0005}, {"slice_mib": 1e-6, "samples_per_pass": 1}],
)
def test_raises_what_stock_raises(config: dict[str, Any], build: Any, misuse: str) -> None:
    model = build().double()
    conditioned = build is pixart.alpha_1024
    given = {"added_cond_kwargs": pixart.conditions(2) if conditioned else None}
    options = {**given, **MISUSES[misuse]}
    try:
        before: Any = run(model, **options)
    except Exception as error:
        before = error
    accelrt.wrap(model, **config)
    if isinstance(before, Tensor):
        assert zoo.relative_error(run(model, **options), before) < 1e-13
        return
    with pytest.raises(type(before)) as ours:
        run(model, **options)
    assert str(ours.value) == str(before)


@pytest.mark.parametrize("batch", [1, 4])
def test_caption_of_another_batch_is_dealt_out_as_in_stock(model: Any, batch: int) -> None:
    """The stock model views the projected caption as one row per sample."""
    caption = zoo.normal(batch, 8, pixart.CAPTION_WIDTH).double()
    check(model, encoder_hidden_states=caption, encoder_attention_mask=None)


def test_caption_of_another_batch_without_projection() -> None:
    model = pixart.variant().double()
    caption = zoo.normal(1, 7, pixart.CAPTION_WIDTH).double()
    options = {"encoder_hidden_states": caption, "encoder_attention_mask": None}
    with pytest.raises(RuntimeError) as stock:
        run(model, **options)
    accelrt.wrap(model)
    with pytest.raises(RuntimeError) as ours:
        run(model, **options)
    assert str(ours.value) == str(stock.value)


def test_a_mask_that_leaves_nothing(model: Any) -> None:
    mask = torch.zeros(2, pixart.CAPTION_LENGTH)
    assert check(model, encoder_attention_mask=mask) == ("fused", "")


def test_a_boolean_mask(model: Any) -> None:
    check(model, encoder_attention_mask=pixart.caption_mask(2).bool())
    check(model, encoder_attention_mask=pixart.caption_mask(2).bool()[:, None])


def test_cross_attention_kwargs_run_blocks_as_they_came(model: Any) -> None:
    kind, reason = check(model, cross_attention_kwargs={"scale": 0.5})
    assert kind == "untouched"
    assert "cross_attention_kwargs" in reason
    assert check(model, cross_attention_kwargs={}) == ("fused", "")


@pytest.mark.parametrize(
    "target", ["to_q", "to_k", "to_out.0", "proj", "ff.net.2", "linear_1", "linear", "proj_out"]
)
def test_lora(model: Any, target: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    plain = run(model)
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    assert zoo.relative_error(run(model), plain) > 1e-4
    assert check(model)[0] == "fused"


def test_lora_around_a_wrapped_model(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    accelrt.wrap(model, samples_per_slice=1)
    run(model)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    around = get_peft_model(model, config)
    ours = run(around)
    assert not untouched(model)
    assert zoo.relative_error(ours, run(accelrt.unwrap(model))) < 1e-13


def test_fused_projections(model: Any) -> None:
    model.fuse_qkv_projections()
    kind, reason = check(model)
    assert kind == "sliced"
    assert "FusedAttnProcessor2_0" in reason
    check(model, attention_mask=_token_mask(2, 24))
    model.unfuse_qkv_projections()
    assert check(model)[0] == "fused"


def test_the_older_attention_processor(model: Any) -> None:
    model.set_default_attn_processor()
    assert check(model, attention_mask=_token_mask(2, 24)) == ("fused", "")
    per_head = zoo.normal(4, 24, pixart.CAPTION_LENGTH, seed=5).double()
    assert check(model, encoder_attention_mask=per_head) == ("fused", "")


def test_the_older_attention_processor_and_a_mask_of_another_dtype(model: Any) -> None:
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(RuntimeError) as stock:
        run(model, encoder_attention_mask=_bias(2))
    accelrt.wrap(model)
    with pytest.raises(RuntimeError) as ours:
        run(model, encoder_attention_mask=_bias(2))
    assert str(ours.value) == str(stock.value)


class MixingProcessor:
    """An attention processor that accelrt does not know: samples see each other."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.inner(attn, hidden_states, *args, **kwargs)
        return 2 * y + y.mean(0, keepdim=True)


@pytest.mark.parametrize("layer", ["attn1", "attn2"])
def test_unknown_attention_processors(model: Any, layer: str) -> None:
    plain = run(model)
    for block in model.transformer_blocks:
        attn = getattr(block, layer)
        attn.set_processor(MixingProcessor(attn.processor))
    assert zoo.relative_error(run(model), plain) > 1e-2
    kind, reason = check(model)
    assert kind == "sliced"
    assert f"{layer}: MixingProcessor may mix images, so all samples pass together" in reason


def test_forward_chunking(model: Any) -> None:
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(12, dim=1)
    assert check(model) == ("untouched", "forward chunking is enabled")


def test_a_feed_forward_of_another_class(model: Any) -> None:
    class Mixing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x.mean(0, keepdim=True)

    block = model.transformer_blocks[1]
    block.ff = Mixing(block.ff)
    kind, reason = check(model)
    assert kind == "sliced"
    assert "Mixing is not a plain FeedForward" in reason


@pytest.mark.parametrize("replaced", ["norm1", "norm2", "norm_out"])
def test_a_norm_of_another_class(model: Any, replaced: str) -> None:
    from diffusers.models.normalization import RMSNorm

    owner = model if replaced == "norm_out" else model.transformer_blocks[1]
    setattr(owner, replaced, RMSNorm(24, eps=1e-6, elementwise_affine=False))
    before = run(model)
    accelrt.wrap(model, samples_per_slice=1)
    assert zoo.relative_error(run(model), before) < 1e-13
    group = "norm_out" if replaced == "norm_out" else "transformer_blocks.1"
    assert statuses(model)[group] == ("sliced", f"{replaced}: RMSNorm runs as it came")


def test_hooks_on_leaves_and_blocks(model: Any) -> None:
    seen: dict[str, int] = {}

    def hook(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = seen.get(name, 0) + 1

    blocks = model.transformer_blocks
    hooked = {
        "block": blocks[0],
        "norm": blocks[1].norm1,
        "attention": blocks[1].attn2,
        "caption": model.caption_projection,
        "timestep": model.adaln_single,
    }
    handles = [
        module.register_forward_hook(functools.partial(hook, name))
        for name, module in hooked.items()
    ]
    before = run(model)
    accelrt.wrap(model, samples_per_slice=1)
    assert zoo.relative_error(run(model), before) < 1e-13
    assert untouched(model) == {"transformer_blocks.0"}
    kind, reason = statuses(model)["transformer_blocks.1"]
    assert kind == "sliced"
    assert "norm1: LayerNorm runs as it came" in reason
    assert seen == dict.fromkeys(hooked, 2)  # the hooked attention sees whole batches
    for handle in handles:
        handle.remove()
    accelrt.unwrap(model)
    assert check(model)[0] == "fused"


@pytest.mark.parametrize("config", [{}, {"slice_mib": 0.0005}])
@pytest.mark.parametrize("batch", [1, 2])
def test_hooks_may_keep_what_they_saw(model: Any, batch: int, config: dict[str, Any]) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.extend((value, value.clone()) for value in (*inputs, output))

    first, second, _ = model.transformer_blocks
    for module in (model.pos_embed, first, second.attn1.to_out[0], second.attn2.to_q,
                   second.attn2.to_out[0], second.ff.net[0], second.ff.net[2]):  # fmt: skip
        module.register_forward_hook(keep)
    accelrt.wrap(model, **config)
    inputs = zoo.to_dtype(pixart.inputs(batch, 8, 12), torch.float64)
    with torch.no_grad():
        model(**inputs)
    assert len(kept) >= 14
    assert all(torch.equal(value, copy) for value, copy in kept)


def test_a_replaced_module_is_seen(model: Any) -> None:
    accelrt.wrap(model)
    run(model)
    other = zoo.randomise(pixart.tiny_pixart(), seed=5).double()
    model.transformer_blocks[1] = other.transformer_blocks[1]
    model.scale_shift_table = other.scale_shift_table
    ours = run(model)
    assert zoo.relative_error(ours, run(accelrt.unwrap(model))) < 1e-13


@pytest.mark.parametrize("first", ["hook", "wrap"])
def test_layerwise_casting(first: str) -> None:
    model = pixart.alpha_1024().to(torch.bfloat16)
    inputs = {**pixart.inputs(2, 8, 12), "added_cond_kwargs": pixart.conditions(2)}
    if first == "wrap":
        accelrt.wrap(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if first == "hook":
        accelrt.wrap(model)
    ours = _call(model, inputs, torch.bfloat16)
    assert not accelrt.summary(model).stock
    assert not untouched(model)
    theirs = _call(accelrt.unwrap(model), inputs, torch.bfloat16)
    assert zoo.relative_error(ours, theirs.double()) < 0.05


@pytest.mark.parametrize("first", ["hook", "wrap"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(model: Any, kind: str, first: str) -> None:
    before = run(model)
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    if first == "wrap":
        accelrt.wrap(model)
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    if first == "hook":
        accelrt.wrap(model)
    assert zoo.relative_error(run(model), before) < 1e-13
    # Of either kind: a block has a parameter of its own, which its hook loads.
    status, reason = statuses(model)["transformer_blocks.1"]
    assert status == "untouched"
    assert "forward of its own" in reason
    accelrt.unwrap(model)
    assert torch.equal(run(model), before)


def test_offloaded_leaves(model: Any) -> None:
    from accelerate import cpu_offload

    before = run(model)
    accelrt.wrap(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert zoo.relative_error(run(model), before) < 1e-13


def test_cached_attention(model: Any) -> None:
    """Hooks that skip attention at some steps count one call of a layer per step."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    def steps(model: Any) -> Tensor:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(0, 1000),
            cross_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        )
        apply_pyramid_attention_broadcast(model, config)
        x = zoo.normal(2, 4, 8, 12, seed=3).double()
        for _ in range(4):
            x = x + 0.1 * run(model, hidden_states=x)[:, :4]
        return x

    before = steps(pixart.tiny_pixart().double())
    accelrt.wrap(model, samples_per_slice=1)
    assert zoo.relative_error(steps(model), before) < 1e-13


def test_stock_runs_when_gradients_or_dropout_are_needed(model: Any) -> None:
    accelrt.wrap(model)
    inputs = zoo.to_dtype(pixart.inputs(2, 8, 12), torch.float64)
    model(**inputs).sample.sum().backward()
    assert model.scale_shift_table.grad is not None
    assert accelrt.summary(model).stock == {"": "gradients are needed"}
    run(model)
    assert not accelrt.summary(model).stock


def test_stages() -> None:
    model = accelrt.wrap(pixart.tiny_pixart())
    names = [stage.name for stage in model.forward.stages()]
    assert names == ["embed", "blocks.0", "blocks.1", "blocks.2", "out"]
