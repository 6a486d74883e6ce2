"""transformer_block against the stock block: forms, dtypes, masks, memory, opcheck."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from ops_common import all_devices, all_dtypes, assert_as_good_as
from sim import run_simulator

from accelrt import ops, reference

USES_TILES = True

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu-approximate", "geglu": "geglu"}


def linear_of(layer):
    return ops.LinearWeights(
        layer.weight.detach(), layer.bias.detach() if layer.bias is not None else None
    )


def attention_of(attn):
    layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    return ops.AttentionWeights(*map(linear_of, layers), attn.heads)


def norm_of(norm):
    weight = None if norm.weight is None else norm.weight.detach()
    bias = None if norm.bias is None else norm.bias.detach()
    return ops.NormWeights(weight, bias, norm.eps)


def weights_of(block, activation="gelu_tanh"):
    zero = block.norm_type == "ada_norm_zero"
    norms = (block.norm1.norm, block.norm3) if zero else (block.norm1, block.norm2)
    ff = ops.FeedForwardWeights(
        linear_of(block.ff.net[0].proj), linear_of(block.ff.net[2]), activation
    )
    cross = None if block.attn2 is None else attention_of(block.attn2)
    return ops.BlockWeights(
        norm_of(norms[0]), attention_of(block.attn1), norm_of(norms[1]), ff, cross
    )


def widened(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, tuple):
        parts = [widened(item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def make_block(
    dtype, device="cpu", *, single, heads=3, dim=24, activation="gelu_tanh", affine=False
):
    torch.manual_seed(3)
    width = heads * dim
    block = BasicTransformerBlock(
        width, heads, dim, cross_attention_dim=40 if single else None,
        activation_fn=ACTIVATIONS[activation], attention_bias=True,
        norm_elementwise_affine=affine, norm_type="ada_norm_single" if single else "ada_norm_zero",
        num_embeds_ada_norm=None if single else 10,
    )  # fmt: skip
    return block.to(device, dtype).eval().requires_grad_(False)


def random(*shape, dtype, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


def stock_and_ours(block, batch, tokens, dtype, device="cpu", *, activation="gelu_tanh", **options):
    """The stock block's result, the arguments of ours, for one set of random inputs."""
    width = block.attn1.to_q.in_features
    x = random(batch, tokens, width, dtype=dtype, device=device)
    weights = weights_of(block, activation)
    if block.norm_type == "ada_norm_zero":
        timestep = torch.arange(batch, device=device) * 100
        labels = torch.arange(batch, device=device) % 10
        norm1 = block.norm1
        emb = norm1.emb(timestep, labels, hidden_dtype=dtype)
        modulation = norm1.linear(norm1.silu(emb)).view(batch, 6, width)
        return block(x, timestep=timestep, class_labels=labels), (x, modulation, weights), {}
    shared = random(batch, 6 * width, dtype=dtype, device=device)
    context = random(batch, 11, 40, dtype=dtype, device=device)
    modulation = block.scale_shift_table[None] + shared.view(batch, 6, width)
    masks, stock_masks = {}, {}
    if options.get("masked"):
        kept = torch.rand(batch, 1, 11, device=device) < 0.6
        kept[..., 0] = True
        stock_masks["encoder_attention_mask"] = (1 - kept.to(dtype)) * -10000.0
        stock_masks["attention_mask"] = random(batch, 1, tokens, dtype=dtype, device=device)
        masks = {
            "cross_mask": stock_masks["encoder_attention_mask"][:, None],
            "mask": stock_masks["attention_mask"][:, None],
        }
    y = block(x, encoder_hidden_states=context, timestep=shared, **stock_masks)
    return y, (x, modulation, weights), {"context": context, **masks}


def truth_of(args, keywords):
    wide = [widened(a) for a in args]
    return reference.transformer_block(*wide, **{k: widened(v) for k, v in keywords.items()})


def check(stock, args, keywords, **more):
    truth = truth_of(args, keywords)
    stream = args[0].clone()
    result = ops.transformer_block(stream, *args[1:], **keywords, **more)
    assert result is stream
    assert_as_good_as(result, stock, truth)


@pytest.mark.parametrize("single", [False, True], ids=["zero", "single"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
@all_devices
@torch.no_grad()
def test_matches_the_stock_block(single, activation, dtype, device):
    block = make_block(dtype, device, single=single, activation=activation)
    for batch, tokens in ((1, 1), (2, 19), (3, 64)):
        stock, args, keywords = stock_and_ours(
            block, batch, tokens, dtype, device, activation=activation
        )
        check(stock, args, keywords)


@all_dtypes
@torch.no_grad()
def test_every_isa(isa, dtype):
    for single in (False, True):
        block = make_block(dtype, single=single, heads=2, dim=20, affine=single)
        check(*stock_and_ours(block, 2, 37, dtype, masked=True))


@all_dtypes
@all_devices
@torch.no_grad()
def test_masks_of_both_attentions(dtype, device):
    block = make_block(dtype, device, single=True)
    check(*stock_and_ours(block, 3, 33, dtype, device, masked=True))


@pytest.mark.parametrize("rows", [1, 7, 19, 30, 38, 57, 1000])
@all_dtypes
@torch.no_grad()
def test_pieces_of_the_feed_forward(rows, dtype):
    """Tokens of one sample, one sample, several samples with fewer in the last piece, all."""
    for activation in ("gelu_tanh", "geglu"):
        block = make_block(dtype, single=False, activation=activation)
        found = stock_and_ours(block, 3, 19, dtype, activation=activation)
        check(*found, ff_rows=rows)


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 9])
@all_dtypes
@torch.no_grad()
def test_heads_in_slices(heads, dtype):
    """Slices of the same length, a shorter last one, all; projections apart and fused."""
    for single in (False, True):
        block = make_block(dtype, single=single, heads=5, dim=12)
        stock, args, keywords = stock_and_ours(block, 2, 19, dtype, masked=True)
        check(stock, args, keywords, heads_per_slice=heads)
        x, modulation, weights = args
        fused = weights._replace(attention=fused_projection(weights.attention))
        check(stock, (x, modulation, fused), keywords, heads_per_slice=heads)


@torch.no_grad()
def test_slices_of_heads_take_their_part_of_a_mask():
    block = make_block(torch.float32, single=True, heads=5, dim=12)
    _, args, keywords = stock_and_ours(block, 2, 19, torch.float32)
    keywords["mask"] = torch.randn(2, 5, 19, 19) * 3
    whole = ops.transformer_block(args[0].clone(), *args[1:], **keywords)
    some = ops.transformer_block(args[0].clone(), *args[1:], **keywords, heads_per_slice=2)
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole, truth_of(args, keywords).float(), rtol=1e-4, atol=1e-5)


def fused_projection(a: ops.AttentionWeights) -> ops.AttentionWeights:
    assert a.k is not None
    assert a.v is not None
    fused = ops.LinearWeights(
        torch.cat([a.q.weight, a.k.weight, a.v.weight]),
        None if a.q.bias is None else torch.cat([a.q.bias, a.k.bias, a.v.bias]),
    )
    return a._replace(q=fused, k=None, v=None)


@all_dtypes
@torch.no_grad()
def test_one_projection_for_queries_keys_and_values(isa, dtype):
    block = make_block(dtype, single=False)
    stock, (x, modulation, weights), keywords = stock_and_ours(block, 2, 19, dtype)
    weights = weights._replace(attention=fused_projection(weights.attention))
    check(stock, (x, modulation, weights), keywords)


@all_dtypes
@torch.no_grad()
def test_keys_and_values_that_are_made(dtype):
    block = make_block(dtype, single=True)
    stock, args, keywords = stock_and_ours(block, 2, 19, dtype, masked=True)
    context = keywords.pop("context")
    both = torch.cat([block.attn2.to_k(context), block.attn2.to_v(context)], -1)
    keys, values = both.view(2, 11, 2, 3, 24).unbind(2)  # views with gaps between the tokens
    truth = truth_of(args, {**keywords, "context": context})
    result = ops.transformer_block(args[0].clone(), *args[1:], context=(keys, values), **keywords)
    assert_as_good_as(result, stock, truth)


@all_dtypes
@torch.no_grad()
def test_workspace_is_what_is_asked_for(dtype):
    """One element less is refused, and nothing beside it is written."""
    for single, rows, heads in (
        (False, None, None), (True, None, None), (False, 5, None), (False, 5, 1), (True, 5, 2),
    ):  # fmt: skip
        block = make_block(dtype, single=single, heads=3, dim=10)
        _, args, keywords = stock_and_ours(block, 2, 7, dtype)
        slices = {"ff_rows": rows, "heads_per_slice": heads}
        need = ops.transformer_block_workspace(
            args[0], args[2], context=keywords.get("context"), **slices
        )
        memory = torch.full((need + 64,), 7.0, dtype=dtype)
        expected = ops.transformer_block(args[0].clone(), *args[1:], **keywords, **slices)
        stream = args[0].clone()
        ops.transformer_block(stream, *args[1:], **keywords, **slices, workspace=memory[:need])
        assert torch.equal(stream, expected)
        assert bool((memory[need:] == 7).all())
        stream = args[0].clone()
        with pytest.raises(RuntimeError, match=r"workspace has \d+ bytes, expected at least"):
            ops.transformer_block(
                stream, *args[1:], **keywords, **slices, workspace=memory[: need - 1]
            )
        assert torch.equal(stream, args[0])


@torch.no_grad()
def test_modulation_by_stride_and_shared(isa):
    dtype = torch.bfloat16
    block = make_block(dtype, single=False)
    _, (x, modulation, weights), _ = stock_and_ours(block, 3, 9, dtype)
    first = modulation[:1]
    expected = ops.transformer_block(x.clone(), first.repeat(3, 1, 1), weights)
    shared = ops.transformer_block(x.clone(), first.expand(3, -1, -1), weights)
    assert torch.equal(shared, expected)
    padded = torch.zeros(3, 6, modulation.shape[2] + 5, dtype=dtype)[..., 3:-2]
    padded.copy_(first.expand(3, -1, -1))
    assert torch.equal(ops.transformer_block(x.clone(), padded, weights), expected)
    empty = x[:0].clone()
    assert ops.transformer_block(empty, modulation[:0], weights).shape == (0, 9, x.shape[2])


@torch.no_grad()
def test_the_result_does_not_depend_on_the_threads():
    block = make_block(torch.bfloat16, single=True)
    _, args, keywords = stock_and_ours(block, 4, 130, torch.bfloat16, masked=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.transformer_block(args[0].clone(), *args[1:], **keywords)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.transformer_block(args[0].clone(), *args[1:], **keywords))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_errors_name_the_operator_and_the_value():
    dtype = torch.float32
    block = make_block(dtype, single=True)
    _, (x, modulation, weights), keywords = stock_and_ours(block, 2, 19, dtype)

    def refused(match, *, stream=x, mod=modulation, w=weights, **more):
        before = stream.clone()
        with pytest.raises(ValueError, match=match):
            ops.transformer_block(stream, mod, w, **{**keywords, **more})
        assert torch.equal(stream, before)

    refused(r"transformer_block.*stream has shape \(19, 72\)", stream=x[0])
    refused(r"transformer_block.*stream has strides", stream=x.transpose(0, 1))
    refused(r"transformer_block.*modulation has shape \(2, 5, 72\)", mod=modulation[:, :5])
    refused(r"transformer_block.*modulation is torch.bfloat16", mod=modulation.bfloat16())
    refused(r"transformer_block.*ff_rows is 0", ff_rows=0)
    refused(r"transformer_block.*heads_per_slice is 0", heads_per_slice=0)
    refused(r"transformer_block.*context go together", context=None)
    refused(r"transformer_block.*context has shape \(1, 11, 40\)", context=keywords["context"][:1])
    refused(r"transformer_block.*mask has shape \(2, 1, 1, 18\)", mask=torch.zeros(2, 1, 1, 18))
    refused(r"transformer_block.*cross_mask has shape", cross_mask=torch.zeros(2, 2, 1, 11))
    heads = weights.attention._replace(heads=5)
    refused(r"transformer_block.*heads is 5.*72", w=weights._replace(attention=heads))
    ff = weights.feed_forward
    refused(
        r"transformer_block.*activation is 'relu'",
        w=weights._replace(feed_forward=ff._replace(activation="relu")),
    )
    short = ops.LinearWeights(ff.out.weight[:, 1:], ff.out.bias)
    refused(
        r"transformer_block.*ff_out_weight has shape \(72, 287\)",
        w=weights._replace(feed_forward=ff._replace(out=short)),
    )


def native_arguments(args, keywords, monkeypatch):
    """What the public function hands to the operator."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "accelrt.ops.block.native",
            type("Native", (), {"transformer_block": lambda _, *a: seen.append(a)})(),
        )
        ops.transformer_block(*args, **keywords)
    return seen[0]


@all_dtypes
@torch.no_grad()
def test_opcheck(dtype, monkeypatch):
    for single in (False, True):
        block = make_block(dtype, single=single, heads=2, dim=8)
        _, args, keywords = stock_and_ours(block, 2, 5, dtype, masked=True)
        native = native_arguments(args, keywords, monkeypatch)
        native[-1].zero_()  # an operator's check compares what it was given, NaN or not
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.accelrt.transformer_block.default, native, test_utils=tests)


@all_dtypes
def test_opcheck_of_keys_made_ahead(dtype):
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((5, 24), (16, 24), (16,)))
    torch.library.opcheck(
        torch.ops.accelrt.block_projection.default,
        (x, weight, bias, torch.zeros(5, 16, dtype=dtype)),
    )


@torch.no_grad()
def test_compiles():
    block = make_block(torch.float32, single=True)
    _, args, keywords = stock_and_ours(block, 2, 9, torch.float32)
    compiled = torch.compile(
        lambda x: ops.transformer_block(x * 2, *args[1:], **keywords) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = ops.transformer_block(args[0] * 2, *args[1:], **keywords) + 1
    assert torch.equal(compiled(args[0]), expected)


def run_without_torch(sim_dir, sanitizer, device, args, keywords, monkeypatch):
    """The block in the simulator's process, with our products."""
    values = native_arguments(args, keywords, monkeypatch)
    schema = torch.ops.accelrt.transformer_block.default._schema
    named = {a.name: v for a, v in zip(schema.arguments, values, strict=True)}
    for name in ("workspace", "keys", "values", "cross_heads", "cross_scale"):
        del named[name]
    named |= {k: v.contiguous() for k, v in named.items() if isinstance(v, torch.Tensor)}
    named = {k: v for k, v in named.items() if v is not None}
    binary = sim_dir / f"accelrt_sim_{sanitizer}"
    return run_simulator(binary, "transformer_block", device, **named)["stream"]


@all_dtypes
@torch.no_grad()
def test_without_torch_under_asan(sim_dir, dtype, monkeypatch):
    for single, rows, heads in ((False, 4, None), (True, None, None), (True, 4, 1)):
        block = make_block(dtype, single=single, heads=2, dim=12)
        stock, args, keywords = stock_and_ours(block, 2, 9, dtype, masked=True)
        truth = truth_of(args, keywords)
        options = {**keywords, "ff_rows": rows, "heads_per_slice": heads}
        result = run_without_torch(sim_dir, "asan", "cpu", args, options, monkeypatch)
        assert_as_good_as(result, stock, truth)


def check_cuda_sources(
    sim_dir, sanitizer, monkeypatch, *, dim, batch, rows, activation, heads_at_once=None, **form
):
    dtype = torch.bfloat16
    block = make_block(dtype, dim=dim, activation=activation, **form)
    stock, args, keywords = stock_and_ours(
        block, batch, 9, dtype, activation=activation, masked=True
    )
    truth = truth_of(args, keywords)
    options = {**keywords, "ff_rows": rows, "heads_per_slice": heads_at_once}
    result = run_without_torch(sim_dir, sanitizer, "cuda", args, options, monkeypatch)
    assert_as_good_as(result, stock, truth)


@torch.no_grad()
def test_cuda_sources_of_the_whole_block(sim_dir, monkeypatch):
    """Every kernel of the block in the simulator, one after the other, with nothing of torch."""
    for single, rows, activation in ((False, 4, "gelu_tanh"), (True, None, "geglu")):
        check_cuda_sources(
            sim_dir, "asan", monkeypatch, single=single, heads=2, dim=24, batch=2, rows=rows,
            activation=activation, heads_at_once=None if single else 1,
        )  # fmt: skip


@torch.no_grad()
def test_cuda_sources_of_the_whole_block_without_races(sim_dir, monkeypatch):
    check_cuda_sources(
        sim_dir, "tsan", monkeypatch, single=True, heads=1, dim=16, batch=1, rows=5,
        activation="geglu",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (7, 40), (120, 1152)])
def test_keys_made_ahead_are_those_of_the_call(dtype: torch.dtype, tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def linear(rows: int, columns: int) -> ops.LinearWeights:
        return ops.LinearWeights(random(rows, columns), random(rows))

    wide = 24
    layers = [linear(wide, wide) for _ in range(4)]
    cross = ops.AttentionWeights(
        linear(wide, wide), linear(wide, width), linear(wide, width), linear(wide, wide), 2
    )
    weights = ops.BlockWeights(
        ops.NormWeights(), ops.AttentionWeights(*layers, 2), ops.NormWeights(),
        ops.FeedForwardWeights(linear(48, wide), linear(wide, 48), "gelu_tanh"), cross,
    )  # fmt: skip
    context, stream = random(2, tokens, width), random(2, 5, wide)
    modulation = random(2, 6, wide)
    expected = ops.transformer_block(stream.clone(), modulation, weights, context=context)
    keys = ops.context_keys(context, cross)
    assert keys[0].shape == (2, tokens, 2, 12)
    found = ops.transformer_block(stream.clone(), modulation, weights, context=keys)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.context_keys(context[0], cross)
    with pytest.raises(ValueError, match="must be given apart"):
        ops.context_keys(context, cross._replace(k=None))
