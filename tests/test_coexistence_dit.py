"""DiT: everything its forward takes, and other libraries on it."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn

import accelrt


@pytest.fixture
def model() -> Any:
    return zoo.tiny_dit().double()


def run(model: Any, **options: Any) -> Tensor:
    inputs = {
        "hidden_states": zoo.normal(2, 4, 8, 8).double(),
        "timestep": torch.tensor([7, 301]),
        "class_labels": torch.tensor([3, 1000]),
    }
    with torch.no_grad():
        return model(**{**inputs, **options}, return_dict=False)[0]


def statuses(model: Any) -> dict[str, tuple[str, str]]:
    groups = accelrt.summary(model).to_dict()["groups"]
    return {group["group"]: (group["status"], group["reason"]) for group in groups}


def check(model: Any, **options: Any) -> tuple[str, str]:
    """Stock and wrapped agree; returns the status of the second block."""
    before = run(model, **options)
    accelrt.wrap(model, samples_per_slice=1, ff_rows=5)
    assert zoo.relative_error(run(model, **options), before) < 1e-13
    assert not accelrt.summary(model).stock
    result = statuses(model)["transformer_blocks.1"]
    accelrt.unwrap(model)
    assert torch.equal(run(model, **options), before)
    return result


@pytest.mark.parametrize("target", ["to_q", "to_out.0", "proj", "ff.net.2", "linear", "proj_out_1"])
def test_lora(model: Any, target: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    plain = run(model)
    config = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    assert zoo.relative_error(run(model), plain) > 1e-4
    assert check(model)[0] == "fused"


def test_fused_projections(model: Any) -> None:
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
        block.attn1.set_processor(FusedAttnProcessor2_0())
    kind, reason = check(model)
    assert kind == "sliced"
    assert "FusedAttnProcessor2_0" in reason


def test_an_unknown_attention_processor_sees_all_samples(model: Any) -> None:
    class Mixing:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = self.inner(attn, hidden_states, *args, **kwargs)
            return 2 * y + y.mean(0, keepdim=True)

    plain = run(model)
    for block in model.transformer_blocks:
        block.attn1.set_processor(Mixing(block.attn1.processor))
    assert zoo.relative_error(run(model), plain) > 1e-2
    kind, reason = check(model)
    assert kind == "sliced"
    assert "Mixing may mix images, so all samples pass together" in reason


def test_cross_attention_kwargs_run_blocks_as_they_came(model: Any) -> None:
    assert check(model, cross_attention_kwargs={"scale": 0.5})[0] == "untouched"


def test_forward_chunking(model: Any) -> None:
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(8, dim=1)
    assert check(model) == ("untouched", "forward chunking is enabled")


@pytest.mark.parametrize("labels", [1, 2])
def test_one_timestep_for_all_samples(model: Any, labels: int) -> None:
    options = {"timestep": torch.tensor([301]), "class_labels": torch.tensor([3, 77][:labels])}
    assert check(model, **options) == ("fused", "")


def test_conditions_of_several_samples_broadcast_one_image(model: Any) -> None:
    """As in the stock model, the image is repeated for every condition."""
    image = zoo.normal(1, 4, 8, 8).double()
    assert run(model, hidden_states=image).shape[0] == 2
    check(model, hidden_states=image)


MISUSES: dict[str, dict[str, Any]] = {
    "no labels": {"class_labels": None},
    "no timestep": {"timestep": None},
    "a scalar timestep": {"timestep": torch.tensor(3)},
    "conditions of another batch": {
        "timestep": torch.tensor([1, 2, 3]),
        "class_labels": torch.tensor([1, 2, 3]),
    },
    "not square": {"hidden_states": zoo.normal(2, 4, 8, 10).double()},
    "no batch": {"hidden_states": zoo.normal(4, 8, 8).double()},
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_raises_what_stock_raises(model: Any, misuse: str) -> None:
    with pytest.raises(Exception) as stock:
        run(model, **MISUSES[misuse])
    accelrt.wrap(model, samples_per_slice=1)
    with pytest.raises(type(stock.value)) as ours:
        run(model, **MISUSES[misuse])
    assert str(ours.value) == str(stock.value)


def test_hooks_may_keep_what_they_saw(model: Any) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.extend((value, value.clone()) for value in (inputs[0], output))

    first, second, _ = model.transformer_blocks
    for module in (model.pos_embed, first, second.attn1.to_out[0], second.ff.net[2]):
        module.register_forward_hook(keep)
    accelrt.wrap(model)
    run(model)
    assert len(kept) >= 8
    assert all(torch.equal(value, copy) for value, copy in kept)


@pytest.mark.parametrize("first", ["hook", "wrap"])
def test_layerwise_casting(first: str) -> None:
    model = zoo.tiny_dit().to(torch.bfloat16)
    image = zoo.normal(2, 4, 8, 8).to(torch.bfloat16)
    if first == "wrap":
        accelrt.wrap(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if first == "hook":
        accelrt.wrap(model)
    ours = run(model, hidden_states=image)
    assert not accelrt.summary(model).stock
    theirs = run(accelrt.unwrap(model), hidden_states=image)
    assert zoo.relative_error(ours, theirs.double()) < 0.05


def test_cached_attention(model: Any) -> None:
    """Hooks that skip attention at some steps count one call of a layer per step."""
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    def steps(model: Any) -> Tensor:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        )
        apply_pyramid_attention_broadcast(model, config)
        x = zoo.normal(2, 4, 8, 8).double()
        for _ in range(4):
            x = x + 0.1 * run(model, hidden_states=x)[:, :4]
        return x

    before = steps(zoo.tiny_dit().double())
    accelrt.wrap(model, samples_per_slice=1)
    assert zoo.relative_error(steps(model), before) < 1e-13
