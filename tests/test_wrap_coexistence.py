"""Hooks, adapters and options of other libraries on a wrapped model."""

from __future__ import annotations

import functools
from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn

import accelrt

FRAMES = 3


@pytest.fixture
def unet() -> Any:
    return zoo.tiny_unet().double()


def run(model: Any, **options: Any) -> Tensor:
    inputs = zoo.to_dtype(zoo.unet_inputs(2, FRAMES, 8, 8), torch.float64)
    with torch.no_grad():
        return model(**{**inputs, **options}).sample


def statuses(model: Any) -> dict[str, tuple[str, str]]:
    groups = accelrt.summary(model).to_dict()["groups"]
    return {group["group"]: (group["status"], group["reason"]) for group in groups}


def check(model: Any, **options: Any) -> dict[str, tuple[str, str]]:
    """Stock and wrapped agree; returns the statuses after the wrapped run."""
    before = run(model, **options)
    accelrt.wrap(model, frames_per_slice=2, pixels_per_slice=7, ff_rows=64)
    after = run(model, **options)
    assert zoo.relative_error(after, before) < 1e-13
    result = statuses(model)
    accelrt.unwrap(model)
    assert torch.equal(run(model, **options), before)
    return result


def untouched(result: dict[str, tuple[str, str]]) -> set[str]:
    """Groups that ran as they came, except those that always do."""
    usual = ("time_embedding", "down_blocks.0.downsamplers.0", "down_blocks.1.downsamplers.0")
    return {name for name, (kind, _) in result.items() if kind == "untouched"} - set(usual)


def test_nothing_is_untouched_but_embeddings_and_samplers(unet: Any) -> None:
    assert not untouched(check(unet))


def test_controlnet_residuals(unet: Any) -> None:
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4), (32, 2), (32, 2)]
    residuals = tuple(
        zoo.normal(2 * FRAMES, c, s, s, seed=i).double() for i, (c, s) in enumerate(shapes)
    )
    kept = [r.clone() for r in residuals]
    mid = zoo.normal(2 * FRAMES, 32, 2, 2, seed=20).double()
    options = {
        "down_block_additional_residuals": residuals,
        "mid_block_additional_residual": mid,
    }
    assert zoo.relative_error(run(unet, **options), run(unet)) > 1e-3
    assert not untouched(check(unet, **options))
    assert all(torch.equal(a, b) for a, b in zip(kept, residuals, strict=True))


def test_freeu(unet: Any) -> None:
    plain = run(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert zoo.relative_error(run(unet), plain) > 1e-3
    assert not untouched(check(unet))


@pytest.mark.parametrize("older", [False, True])
def test_attention_mask(older: bool) -> None:
    """A mask of the stock UNet is one of the self-attention, so sizes must agree."""
    model = zoo.tiny_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
    ).double()
    if older:
        model.set_default_attn_processor()
    mask = (zoo.normal(2 * FRAMES, 64) > 0).double()
    assert zoo.relative_error(run(model, attention_mask=mask), run(model)) > 1e-3
    assert check(model, attention_mask=mask)["mid_block.attentions.0"][0] == "fused"


def test_a_mask_of_the_wrong_size_raises_what_stock_raises(unet: Any) -> None:
    mask = torch.ones(2 * FRAMES, 64, dtype=torch.float64)
    with pytest.raises(RuntimeError) as stock:
        run(unet, attention_mask=mask)
    accelrt.wrap(unet)
    with pytest.raises(RuntimeError) as ours:
        run(unet, attention_mask=mask)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("target", ["to_q", "conv1", "ff.net.2", r".*attentions.*proj_in"])
def test_lora(unet: Any, target: str) -> None:
    from peft import LoraConfig

    plain = run(unet)
    modules = target if ".*" in target else [target]
    config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    unet.add_adapter(config, "mine")
    assert zoo.relative_error(run(unet), plain) > 1e-4
    assert not untouched(check(unet))
    scaled = run(unet, cross_attention_kwargs={"scale": 0.5})
    assert zoo.relative_error(scaled, run(unet)) > 1e-4
    assert not untouched(check(unet, cross_attention_kwargs={"scale": 0.5}))


def test_lora_added_after_wrap(unet: Any) -> None:
    from peft import LoraConfig

    accelrt.wrap(unet)
    run(unet)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "mine")
    ours = run(unet)
    assert zoo.relative_error(ours, run(accelrt.unwrap(unet))) < 1e-13


class DoublingProcessor:
    """An attention processor that accelrt does not know."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.inner(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("everywhere", [True, False])
def test_unknown_attention_processors(unet: Any, everywhere: bool) -> None:
    plain = run(unet)
    processors = {
        name: DoublingProcessor(p) if everywhere or "motion" in name else p
        for name, p in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    assert zoo.relative_error(run(unet), plain) > 1e-2
    result = check(unet)
    kind, reason = result["mid_block.motion_modules.0"]
    assert kind == "sliced"
    assert "DoublingProcessor" in reason
    assert result["mid_block.attentions.0"][0] == ("sliced" if everywhere else "fused")


class CrossFrameProcessor:
    """Every image looks at the keys of the first: slices of images would change that."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first = hidden_states[:1].expand_as(hidden_states)
        return self.inner(attn, hidden_states, encoder_hidden_states=first)


def test_processors_that_mix_images_see_all_of_them(unet: Any) -> None:
    plain = run(unet)
    processors = {
        name: CrossFrameProcessor(p) if "motion" not in name and "attn1" in name else p
        for name, p in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    assert zoo.relative_error(run(unet), plain) > 1e-2
    kind, reason = check(unet)["mid_block.attentions.0"]
    assert kind == "sliced"
    assert "CrossFrameProcessor may mix images" in reason


def test_perturbed_attention_guidance(unet: Any) -> None:
    """Its processor tells three branches of the batch apart by their place."""
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    assert "may mix images" in check(unet)["mid_block.attentions.0"][1]


def test_hooks_that_keep_a_state_see_all_images(unet: Any) -> None:
    """A cache of attention outputs would count slices as steps."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Cache(ModelHook):
        def __init__(self) -> None:
            super().__init__()
            self.kept: Any = None

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.kept is None:
                self.kept = self.fn_ref.original_forward(*args, **kwargs)
            return self.kept

    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Cache(), "cache")
    run(unet)  # fills the cache
    result = check(unet, timestep=torch.tensor([3.0, 40.0]))
    assert "a hook of Attention may want all images" in result["mid_block.attentions.0"][1]


def test_the_older_attention_processor(unet: Any) -> None:
    unet.set_default_attn_processor()
    assert all(kind == "fused" or "sampl" in name or "embed" in name
               for name, (kind, _) in check(unet).items())  # fmt: skip


def test_fused_projections(unet: Any) -> None:
    unet.fuse_qkv_projections()
    assert "FusedAttnProcessor2_0" in check(unet)["mid_block.attentions.0"][1]


def test_forward_chunking(unet: Any) -> None:
    unet.enable_forward_chunking(1, dim=1)
    result = check(unet)
    for name in ("mid_block.attentions.0", "mid_block.motion_modules.0"):
        assert result[name] == ("fused", "ff_rows in place of forward chunking")
    unet.enable_forward_chunking(7, dim=1)  # divides nothing
    with pytest.raises(ValueError, match="divisible by chunk size"):
        run(unet)
    chunked = run(accelrt.wrap(unet))
    unet.disable_forward_chunking()
    assert zoo.relative_error(chunked, run(unet)) < 1e-13


def test_forward_hooks_on_leaves_and_containers(unet: Any) -> None:
    seen: dict[str, int] = {}

    def hook(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = seen.get(name, 0) + 1

    down = unet.down_blocks[0]
    hooked = {
        "norm": down.resnets[0].norm1,
        "resnet": unet.mid_block.resnets[0],
        "transformer": unet.mid_block.attentions[0],
        "motion": unet.mid_block.motion_modules[0],
        "block": unet.up_blocks[1],
        "down": unet.down_blocks[1],
    }
    handles = [
        module.register_forward_hook(functools.partial(hook, name))
        for name, module in hooked.items()
    ]
    result = check(unet)
    assert result["down_blocks.0.resnets.0"][0] == "sliced"
    assert untouched(result) == {
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.motion_modules.0",
        "up_blocks.1",
        "down_blocks.1",
    }
    assert seen["block"] == 3  # once in each of the three runs of check
    for handle in handles:
        handle.remove()
    assert not untouched(check(unet))


def test_hooks_may_keep_what_they_saw(unet: Any) -> None:
    """Activations that a hook keeps are not overwritten by later groups."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        kept.append((value, value.clone()))

    block = unet.mid_block
    for module in (
        block.resnets[0],
        block.resnets[0].conv2,
        block.attentions[0],
        block.motion_modules[0],
        unet.down_blocks[0].resnets[0].conv1,
        unet.down_blocks[0].attentions[0].proj_in,
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_out[0],
        unet.down_blocks[0].motion_modules[0].proj_in,
        unet.down_blocks[0].downsamplers[0],
    ):
        module.register_forward_hook(keep)
    accelrt.wrap(unet)
    run(unet)
    assert len(kept) >= 9
    assert all(torch.equal(value, copy) for value, copy in kept)


def test_a_replaced_module_is_seen(unet: Any) -> None:
    accelrt.wrap(unet)
    run(unet)
    other = zoo.tiny_unet()
    zoo.randomise(other, seed=5)
    unet.mid_block.resnets[1] = other.double().mid_block.resnets[1]
    ours = run(unet)
    assert zoo.relative_error(ours, run(accelrt.unwrap(unet))) < 1e-13


def test_context_of_the_wrong_batch_raises_what_stock_raises(unet: Any) -> None:
    context = zoo.normal(2, 5, zoo.CONTEXT_WIDTH).double()
    with pytest.raises(RuntimeError) as stock:
        run(unet, encoder_hidden_states=context)
    accelrt.wrap(unet)
    with pytest.raises(RuntimeError) as ours:
        run(unet, encoder_hidden_states=context)
    assert str(ours.value) == str(stock.value)


def test_more_frames_than_positions(unet: Any) -> None:
    inputs = zoo.to_dtype(zoo.unet_inputs(1, 17, 8, 8), torch.float64)
    accelrt.wrap(unet)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match"):
        unet(**inputs)


def test_shared_context_follows_the_tensor(unet: Any) -> None:
    """The verdict that all frames share a context is dropped when the tensor changes."""
    accelrt.wrap(unet)
    inputs = zoo.to_dtype(zoo.unet_inputs(2, FRAMES, 8, 8), torch.float64)
    context = inputs["encoder_hidden_states"]
    with torch.no_grad():
        unet(**inputs)
        context[1] += 1.0
        ours = unet(**inputs).sample
        theirs = accelrt.unwrap(unet)(**inputs).sample
    assert zoo.relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize("first", ["hook", "wrap"])
def test_accelerate_hooks(unet: Any, first: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    before = run(unet)
    hook = Counting()
    for step in (first, "wrap" if first == "hook" else "hook"):
        if step == "hook":
            add_hook_to_module(unet, hook)
        else:
            accelrt.wrap(unet)
    assert accelrt.is_wrapped(unet)
    assert zoo.relative_error(run(unet), before) < 1e-13
    assert not torch.equal(run(unet), before)
    assert hook.calls == 2
    accelrt.unwrap(unet)
    assert not accelrt.is_wrapped(unet)
    assert torch.equal(run(unet), before)
    assert hook.calls == 3
    remove_hook_from_module(unet)
    assert torch.equal(run(unet), before)
    assert hook.calls == 3


def test_accelerate_hook_removed_while_wrapped(unet: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    before = run(unet)
    add_hook_to_module(unet, ModelHook())
    accelrt.wrap(unet)
    remove_hook_from_module(unet)
    assert accelrt.is_wrapped(unet)
    assert zoo.relative_error(run(unet), before) < 1e-13
    accelrt.unwrap(unet)
    assert torch.equal(run(unet), before)


def test_offloaded_leaves(unet: Any) -> None:
    from accelerate import cpu_offload

    before = run(unet)
    accelrt.wrap(unet)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert zoo.relative_error(run(unet), before) < 1e-13


@pytest.mark.parametrize("first", ["hook", "wrap"])
def test_layerwise_casting(first: str) -> None:
    unet = zoo.tiny_unet().to(torch.bfloat16)
    inputs = zoo.to_dtype(zoo.unet_inputs(1, 2, 8, 8), torch.bfloat16)

    def cast() -> None:
        unet.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )

    with torch.no_grad():
        if first == "hook":
            cast()
        accelrt.wrap(unet)
        if first == "wrap":
            cast()
        ours = unet(**inputs).sample
        assert not accelrt.summary(unet).stock
        theirs = accelrt.unwrap(unet)(**inputs).sample
    assert zoo.relative_error(ours, theirs.double()) < 0.05


def test_diffusers_hook_on_the_model(unet: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    before = run(unet)
    hook = Counting()
    registry = HookRegistry.check_if_exists_or_initialize(unet)
    registry.register_hook(hook, "counting")
    accelrt.wrap(unet)
    assert accelrt.is_wrapped(unet)
    assert zoo.relative_error(run(unet), before) < 1e-13
    assert hook.calls == 1
    accelrt.unwrap(unet)
    assert torch.equal(run(unet), before)
    assert hook.calls == 2
    registry.remove_hook("counting")
    assert torch.equal(run(unet), before)


def test_a_foreign_forward_is_refused(unet: Any) -> None:
    unet.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward that is not its own"):
        accelrt.wrap(unet)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(unet: Any, kind: str) -> None:
    before = run(unet)
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    accelrt.wrap(unet)
    assert zoo.relative_error(run(unet), before) < 1e-13
    result = statuses(unet)
    if kind == "block_level":
        assert "forward of its own" in result["down_blocks.0"][1]
    else:
        assert result["mid_block.resnets.0"][0] == "sliced"
    accelrt.unwrap(unet)
    assert torch.equal(run(unet), before)


def test_ip_adapter(unet: Any) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    class Projection(nn.Module):
        def forward(self, embeds: list[Tensor]) -> list[Tensor]:
            return [e.unsqueeze(1) for e in embeds]

    unet.encoder_hid_proj = Projection()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.endswith("attn2.processor") and "motion" not in name:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = IPAdapterAttnProcessor2_0(
                layer.inner_dim, zoo.CONTEXT_WIDTH, num_tokens=(1,), scale=1.0
            ).double()
    unet.set_attn_processor(processors)
    images = {"image_embeds": [zoo.normal(2, 1, zoo.CONTEXT_WIDTH).double()]}
    result = check(unet, added_cond_kwargs=images)
    kind, reason = result["mid_block.attentions.0"]
    assert kind == "sliced"
    assert "attn2: processor IPAdapterAttnProcessor2_0 runs as it came" in reason
    assert not untouched(result)
    assert result["mid_block.motion_modules.0"][0] == "fused"


def test_inference_mode(unet: Any) -> None:
    before = run(unet)
    accelrt.wrap(unet)
    with torch.inference_mode():
        inputs = zoo.to_dtype(zoo.unet_inputs(2, FRAMES, 8, 8), torch.float64)
        for _ in range(2):
            assert zoo.relative_error(unet(**inputs).sample, before) < 1e-13


def test_threads_share_a_wrapped_model(unet: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs = [
        zoo.to_dtype(zoo.unet_inputs(2, FRAMES, 8, 8, per_frame_context=i % 2 == 1), torch.float64)
        for i in range(4)
    ]

    def one(arguments: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return unet(**arguments).sample

    before = [one(arguments) for arguments in inputs]
    accelrt.wrap(unet)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            after = list(pool.map(one, inputs))
            for ours, theirs in zip(after, before, strict=True):
                assert zoo.relative_error(ours, theirs) < 1e-13
