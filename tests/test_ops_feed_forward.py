"""feed_forward: activations, gates, slices by scratch, layouts, opcheck, the CUDA source."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import run_simulator
from torch.utils.flop_counter import FlopCounterMode

from accelrt import _C, ops, reference
from accelrt.ops.feed_forward import ACTIVATIONS

USES_TILES = True

# rows, channels, hidden channels, channels of the result
SHAPES = [(1, 7, 19, 989), (7, 19, 30, 111), (111, 40, 72, 40), (130, 24, 64, 33)]


def layers(shape, dtype, device="cpu", *, activation="gelu", bias=True):
    rows, depth, hidden, width = shape
    first = 2 * hidden if activation.startswith("geglu") else hidden

    def layer(n, k):
        weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
        return ops.LinearWeights(weight, torch.randn(n, device=device).to(dtype) if bias else None)

    x = torch.randn(rows, depth, device=device).to(dtype)
    return x, ops.FeedForwardWeights(layer(first, depth), layer(width, hidden), activation)


def stock(x, weights):
    y = F.linear(x, *weights.hidden)
    approximate = "tanh" if weights.activation.endswith("tanh") else "none"
    if weights.activation.startswith("geglu"):
        value, gate = y.chunk(2, dim=1)
        y = value * F.gelu(gate, approximate=approximate)
    else:
        y = F.gelu(y, approximate=approximate)
    return F.linear(y, *weights.out)


def widened(weights):
    wide = (
        ops.LinearWeights(w.weight.double(), None if w.bias is None else w.bias.double())
        for w in (weights.hidden, weights.out)
    )
    return ops.FeedForwardWeights(*wide, weights.activation)


def check(result, x, weights, *, gate=None, before=None):
    y = stock(x, weights)
    if before is None:
        assert_as_good_as(result, y, reference.feed_forward(x.double(), widened(weights)))
        return
    wide = None if gate is None else gate.double()
    truth = reference.feed_forward(
        x.double(), widened(weights), gate=wide, add_to=before.double().clone()
    )
    rows = 1 if gate is None else gate.repeat_interleave(len(x) // len(gate), dim=0)
    assert_as_good_as(result, before + rows * y, truth)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@all_dtypes
@all_devices
def test_matches_the_truth(activation, dtype, device):
    for shape in SHAPES:
        for bias in (True, False):
            x, weights = layers(shape, dtype, device, activation=activation, bias=bias)
            check(ops.feed_forward(x, weights), x, weights)
            before = torch.randn(shape[0], shape[3], device=device).to(dtype)
            total = before.clone()
            assert ops.feed_forward(x, weights, add_to=total) is total
            check(total, x, weights, before=before)


@all_dtypes
def test_every_isa(isa, dtype):
    x, weights = layers((111, 40, 72, 40), dtype, activation="geglu")
    check(ops.feed_forward(x, weights), x, weights)


@pytest.mark.parametrize("rows", [1, 7, 10, 19, 20, 33, 57, 1000])
@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
@all_dtypes
def test_slices_with_and_without_gates(rows, activation, dtype):
    """Rows of one sample, one sample, several samples with fewer in the last slice, all."""
    x, weights = layers((60, 24, 40, 16), dtype, activation=activation)
    for samples in (None, 1, 3, 60):
        gate = None if samples is None else torch.randn(samples, 2 * 16).to(dtype)[:, 16:]
        before = torch.randn(60, 16).to(dtype)
        total = before.clone()
        need = ops.feed_forward_scratch(x, weights, rows=rows)
        scratch = torch.full((need + 64,), 7.0, dtype=dtype)
        ops.feed_forward(x, weights, gate=gate, add_to=total, scratch=scratch[:need])
        check(total, x, weights, gate=gate, before=before)
        assert bool((scratch[need:] == 7).all())
    need = ops.feed_forward_scratch(x, weights, rows=rows, add=False)
    y = ops.feed_forward(x, weights, scratch=torch.empty(need, dtype=dtype))
    check(y, x, weights)


def test_scratch_has_a_default_and_a_least():
    x, weights = layers((100, 24, 1024, 16), torch.bfloat16)
    whole = ops.feed_forward_scratch(x, weights)
    assert whole == 100 * (1024 + 16)
    assert ops.feed_forward_scratch(x, weights, rows=1000) == whole
    assert ops.feed_forward_scratch(x, weights, add=False) == 100 * 1024
    many = torch.empty(100_000, 24, dtype=torch.bfloat16, device="meta")
    mib = 64 if _C.active_isa() == "amx" else 8
    assert ops.feed_forward_scratch(many, weights) == mib << 19
    with pytest.raises(ValueError, match="rows is 0"):
        ops.feed_forward_scratch(x, weights, rows=0)
    least = ops.feed_forward_scratch(x, weights, rows=1)
    y = ops.feed_forward(x, weights, scratch=torch.empty(least, dtype=torch.bfloat16))
    check(y, x, weights)
    out = torch.zeros(100, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"too few for the hidden activations of one row"):
        ops.feed_forward(x, weights, out=out, scratch=torch.empty(900, dtype=torch.bfloat16))
    assert not out.any()


@all_dtypes
def test_layouts_and_out(isa, dtype):
    x, weights = layers((29, 37, 44, 21), dtype, activation="geglu_tanh")
    expected = ops.feed_forward(x, weights)
    first, second = (
        ops.LinearWeights(strided_like(w.weight), w.bias) for w in (weights.hidden, weights.out)
    )
    strided = ops.FeedForwardWeights(first, second, weights.activation)
    target = strided_like(torch.zeros(29, 21, dtype=dtype))
    storage = target._base
    assert storage is not None
    assert ops.feed_forward(strided_like(x), strided, out=target) is target
    # oneDNN and MKL may sum in another order for another stride.
    check(target, x, weights)
    assert not storage[:, :2].any()
    assert not storage[:, -1:].any()
    assert ops.feed_forward(x[:0], weights).shape == (0, 21)
    assert expected.shape == (29, 21)


def test_errors_name_the_operator_and_the_value():
    x, weights = layers((6, 8, 12, 4), torch.float32)
    out = torch.zeros(6, 4)

    def refused(match, *, given=x, w=weights, **more):
        with pytest.raises(ValueError, match=match):
            ops.feed_forward(given, w, **more)

    refused(r"feed_forward: activation is 'relu'", w=weights._replace(activation="relu"))
    refused(r"feed_forward: a gate needs add_to", gate=torch.ones(1, 4))
    refused(r"feed_forward: add_to excludes out", add_to=out, out=out)
    refused(r"feed_forward: x has shape \(1, 6, 8\)", given=x[None])
    refused(r"feed_forward: in_weight has shape \(12, 8\); expected \(12, 7\)", given=x[:, :7])
    refused(r"feed_forward: out_weight is torch.bfloat16", w=weights._replace(
        out=ops.LinearWeights(weights.out.weight.bfloat16())))  # fmt: skip
    refused(r"feed_forward: out_bias has shape \(3,\)", w=weights._replace(
        out=ops.LinearWeights(weights.out.weight, torch.zeros(3))))  # fmt: skip
    odd = ops.LinearWeights(weights.hidden.weight[:11])
    refused(
        r"feed_forward: in_weight has 11 rows; geglu",
        w=weights._replace(hidden=odd, activation="geglu"),
    )
    refused(r"feed_forward: gate has shape \(4, 4\).*6 rows", gate=torch.ones(4, 4), add_to=out)
    refused(r"feed_forward: the last stride of x is 6", given=x.t().contiguous().t())
    refused(r"feed_forward: scratch is torch.float16", scratch=torch.zeros(600).half())
    assert not out.any()


@all_dtypes
def test_opcheck(dtype):
    x, weights = layers((6, 8, 12, 4), dtype, activation="geglu")
    zeros = torch.zeros(600, dtype=dtype)
    args = (
        x, *weights.hidden, *weights.out, 2, torch.ones(2, 4, dtype=dtype), 3, True,
        torch.zeros(6, 4, dtype=dtype), zeros,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.accelrt.feed_forward.default, args, test_utils=tests)


def test_compiles_and_is_counted():
    x, weights = layers((6, 8, 12, 4), torch.float32)
    compiled = torch.compile(
        lambda a: ops.feed_forward(a * 2, weights) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.feed_forward(x * 2, weights) + 1)
    with FlopCounterMode(display=False) as counter:
        ops.feed_forward(x, weights)
    assert counter.get_total_flops() == 2 * 6 * (8 * 12 + 12 * 4)


def test_float64_is_the_reference():
    x, weights = layers((6, 8, 12, 4), torch.float64, activation="geglu")
    assert torch.allclose(ops.feed_forward(x, weights), stock(x, weights), rtol=1e-12)


@pytest.mark.parametrize(
    ("sanitizer", "dtype"),
    [("asan", torch.bfloat16), ("asan", torch.float16), ("tsan", torch.bfloat16)],
    ids=["asan-bfloat16", "asan-float16", "tsan"],
)
def test_cuda_source_in_slices(sim_dir, sanitizer, dtype):
    """A sample that the slices do not divide, then whole samples, then no gate."""
    cases = (("geglu", 2, 13), ("gelu_tanh", 3, 28), ("gelu", None, 30))
    for activation, gates, rows in cases if sanitizer == "asan" else cases[:1]:
        x, weights = layers((42, 24, 40, 20), dtype, activation=activation)
        gate = None if gates is None else torch.randn(gates, 20).to(dtype)
        before = torch.randn(42, 20).to(dtype)
        result = run_simulator(
            sim_dir / f"accelrt_sim_{sanitizer}", "feed_forward", x=x,
            in_weight=weights.hidden.weight, in_bias=weights.hidden.bias,
            out_weight=weights.out.weight, out_bias=weights.out.bias,
            activation=ACTIVATIONS[activation], gate=gate, rows=rows,
            rows_per_sample=1 if gates is None else 42 // gates, add=1, out=before,
        )  # fmt: skip
        check(result["out"], x, weights, gate=gate, before=before)
