"""When a modulated block runs as one call, and what a dry run makes of it."""

from __future__ import annotations

import dataclasses

import model_zoo as zoo
import pytest
import torch
import zoo_pixart
from diffusers.models.attention import BasicTransformerBlock
from ops_common import assert_as_good_as
from torch.utils.flop_counter import FlopCounterMode

import accelrt
from accelrt import Config, ops
from accelrt.groups.dit_block import AdaLNBlockGroup
from accelrt.groups.pixart_block import AdaLNSingleBlockGroup
from accelrt.groups.state import Context, State
from accelrt.planning.cost import Machine
from accelrt.planning.dryrun import dry_run

WIDTH, HEADS = 48, 3


def make(single=False, device="cpu", **options):
    torch.manual_seed(1)
    settings = {
        "cross_attention_dim": 40 if single else None,
        "activation_fn": "gelu-approximate", "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_type": "ada_norm_single" if single else "ada_norm_zero",
        "num_embeds_ada_norm": None if single else 10,
    }  # fmt: skip
    block = BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, **{**settings, **options})
    return block.to(device).eval().requires_grad_(False)


def run(block, x, config=None):
    """The group's result, and the stock block's, for the same inputs."""
    config = Config() if config is None else config
    batch = x.shape[0]
    torch.manual_seed(2)
    if block.norm_type == "ada_norm_zero":
        arguments = {
            "timestep": torch.arange(batch, device=x.device) * 50,
            "class_labels": torch.arange(batch, device=x.device),
        }
        group, state = AdaLNBlockGroup("block", block, config), State(dict(arguments))
    else:
        context = torch.randn(batch, 9, 40, device=x.device, dtype=x.dtype)
        shared = torch.randn(batch, 6 * WIDTH, device=x.device, dtype=x.dtype)
        arguments = {"encoder_hidden_states": context, "timestep": shared}
        group = AdaLNSingleBlockGroup("block", block, config)
        state = State({}, context=Context(full=context), extras={"modulation": shared})
    stock = block(x, **arguments)
    state.hidden = x
    state.hold(x)
    group(state)
    return state.hidden, stock


@pytest.fixture
def calls(monkeypatch):
    """The streams of the calls of the operator."""
    seen = []
    original = ops.transformer_block

    def spy(stream, *args, **keywords):
        seen.append(tuple(stream.shape))
        return original(stream, *args, **keywords)

    monkeypatch.setattr(ops, "transformer_block", spy)
    return seen


@pytest.mark.parametrize("single", [False, True], ids=["zero", "single"])
@torch.no_grad()
def test_slices_of_samples_are_one_call_each(single, calls):
    x = torch.randn(5, 7, WIDTH)
    before = x.clone()
    result, stock = run(make(single), x, Config(samples_per_slice=2))
    assert calls == [(2, 7, WIDTH), (2, 7, WIDTH), (1, 7, WIDTH)]
    torch.testing.assert_close(result, stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


@torch.no_grad()
def test_bfloat16_is_as_exact_as_the_stock_block(calls):
    block = make().bfloat16()
    x = torch.randn(3, 33, WIDTH).bfloat16()
    result, stock = run(block, x)
    assert len(calls) == 1
    _, truth = run(block.double(), x.double())
    assert_as_good_as(result, stock, truth)


@torch.no_grad()
def test_what_is_not_plain_runs_by_itself(calls):
    x = torch.randn(2, 7, WIDTH)
    hooked = make()
    counted = []
    hooked.attn1.to_q.register_forward_hook(lambda *_: counted.append(1))
    result, stock = run(hooked, x)
    assert len(counted) == 2  # the stock call, and ours
    torch.testing.assert_close(result, stock, rtol=1e-4, atol=1e-5)
    for block, config in (
        (make(activation_fn="linear-silu"), Config()),
        (make(), Config(fuse=False)),
        (make().double(), Config()),
    ):
        mine = x.to(block.attn1.to_q.weight.dtype)
        result, stock = run(block, mine, config)
        torch.testing.assert_close(result, stock, rtol=1e-4, atol=1e-5)
    assert calls == []


@torch.no_grad()
def test_a_weight_that_changes_is_seen(calls):
    block = make().bfloat16()
    x = torch.randn(2, 7, WIDTH).bfloat16()
    first, _ = run(block, x)
    block.ff.net[2].weight.mul_(3)
    second, stock = run(block, x)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, stock, rtol=0.05, atol=0.05)
    assert len(calls) == 2


def test_a_dry_run_counts_the_products_and_the_attention():
    """With nothing but arithmetic to pay, its time is that of the stock block's FLOPs."""
    rate, free = 1e9, float("inf")
    rates = dataclasses.replace(
        Machine(), overhead=0.0, product_overhead=0.0, view_overhead=0.0,
        product_rates=((1, rate),), attention_rates=((1, rate),), bandwidth=free,
        norm_bandwidth=free, weight_bandwidth=free,
    )  # fmt: skip
    for single in (False, True):
        block = make(single, "meta")
        x = torch.empty(3, 16, WIDTH, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run_stock_only(block, x)
        done = dry_run(lambda block=block, x=x: run_group_only(block, x), {}, rates)
        assert done.seconds * rate == pytest.approx(counter.get_total_flops(), rel=1e-6)


def arguments_on_meta(block, x):
    batch = x.shape[0]
    if block.norm_type == "ada_norm_zero":
        steps = torch.empty(batch, dtype=torch.long, device="meta")
        return {"timestep": steps, "class_labels": steps}
    return {
        "encoder_hidden_states": torch.empty(batch, 9, 40, device="meta"),
        "timestep": torch.empty(batch, 6 * WIDTH, device="meta"),
    }


def run_stock_only(block, x):
    return block(x, **arguments_on_meta(block, x))


def run_group_only(block, x):
    given = arguments_on_meta(block, x)
    if block.norm_type == "ada_norm_zero":
        group, state = AdaLNBlockGroup("block", block, Config()), State(given)
    else:
        group = AdaLNSingleBlockGroup("block", block, Config())
        context = Context(full=given["encoder_hidden_states"])
        state = State({}, context=context, extras={"modulation": given["timestep"]})
    state.hidden = x
    group(state)
    return state.hidden


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_flops_of_the_call_are_counted(name: str) -> None:
    """As many as torch's counter finds in the stock model, and the attention that it leaves out."""
    if name == "dit":
        model = zoo.tiny_dit()
        inputs = {
            "hidden_states": zoo.normal(3, 4, 8, 8),
            "timestep": torch.tensor([5, 5, 5]),
            "class_labels": torch.tensor([1, 2, 3]),
        }
    else:
        model, inputs = zoo_pixart.tiny_pixart(), zoo_pixart.inputs(2, 8, 8)

    def flops() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
        return counter.get_total_flops()

    stock = flops()
    accelrt.wrap(model)
    batch, keys = (3, 16) if name == "dit" else (2, 16 + zoo_pixart.CAPTION_LENGTH)
    attention = 3 * 4 * batch * 16 * keys * 24  # blocks, both products, queries, width
    assert flops() == stock + attention
