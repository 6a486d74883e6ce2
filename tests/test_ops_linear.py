"""linear: every ISA and device, epilogues, layouts, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import run_simulator

from accelrt import ops, reference

# rows, columns, depth: multiples of the tile and not, one and several panels and chunks
SHAPES = [
    (1, 1, 1),
    (7, 19, 111),
    (12, 32, 64),
    (13, 33, 65),
    (120, 96, 96),
    (36, 160, 2048),
    (989, 40, 72),
    (1500, 70, 48),
]


def inputs(shape, dtype, device="cpu"):
    rows, columns, depth = shape
    return (
        torch.randn(rows, depth, device=device).to(dtype),
        (torch.randn(columns, depth, device=device) / depth**0.5).to(dtype),
        torch.randn(columns, device=device).to(dtype),
    )


def stock(x, weight, bias, activation=None):
    y = F.linear(x, weight, bias)
    if activation is None:
        return y
    if activation.startswith("geglu"):
        value, gate = y.chunk(2, dim=1)
        return value * F.gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none")
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def check(result, x, weight, bias, activation=None):
    bias64 = None if bias is None else bias.double()
    truth = reference.linear(x.double(), weight.double(), bias64, activation=activation)
    assert_as_good_as(result, stock(x, weight, bias, activation), truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@all_dtypes
@all_devices
def test_matches_the_truth(shape, dtype, device):
    x, weight, bias = inputs(shape, dtype, device)
    check(ops.linear(x, weight, bias), x, weight, bias)
    check(ops.linear(x, weight), x, weight, None)
    for activation in ("gelu", "gelu_tanh", *(("geglu",) if shape[1] % 2 == 0 else ())):
        y = ops.linear(x, weight, bias, activation=activation)
        check(y, x, weight, bias, activation)


@all_dtypes
def test_every_isa(isa, dtype):
    for shape in SHAPES:
        x, weight, bias = inputs(shape, dtype)
        check(ops.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("activation", ["geglu", "geglu_tanh"])
@all_dtypes
def test_geglu(isa, dtype, activation):
    for rows, columns, depth in ((1, 1, 1), (13, 33, 65), (7, 16, 31), (29, 49, 64)):
        x, weight, bias = inputs((rows, 2 * columns, depth), dtype)
        y = ops.linear(x, weight, bias, activation=activation)
        assert y.shape == (rows, columns)
        check(y, x, weight, bias, activation)
        check(ops.linear(x, weight, activation=activation), x, weight, None, activation)


@all_dtypes
def test_gated_sum(isa, dtype):
    x, weight, bias = inputs((42, 37, 50), dtype)
    for samples in (None, 1, 3, 42):
        gate = None if samples is None else torch.randn(samples, 2 * 37).to(dtype)[:, ::1][:, 37:]
        before = torch.randn(42, 37).to(dtype)
        wide = None if gate is None else gate.double()
        truth = reference.linear(
            x.double(), weight.double(), bias.double(), gate=wide, add_to=before.double()
        )
        y = F.linear(x, weight, bias)
        rows = 1 if gate is None else gate.repeat_interleave(42 // samples, dim=0)
        total = before.clone()
        assert ops.linear(x, weight, bias, gate=gate, add_to=total) is total
        assert_as_good_as(total, before + rows * y, truth)


@all_dtypes
def test_layouts_and_out(isa, dtype):
    x, weight, bias = inputs((29, 45, 77), dtype)
    expected = ops.linear(x, weight, bias)
    assert torch.equal(ops.linear(strided_like(x), strided_like(weight), bias), expected)
    target = strided_like(torch.zeros(29, 45, dtype=dtype))
    storage = target._base
    assert storage is not None
    assert ops.linear(x, weight, bias, out=target) is target
    assert torch.equal(target, expected)
    assert not storage[:, :2].any()
    assert not storage[:, -1:].any()
    assert ops.linear(x[:0], weight, bias).shape == (0, 45)
    nothing = ops.linear(x[:, :0], weight[:, :0], bias)
    assert torch.equal(nothing, bias.expand(29, 45))


def test_values_beside_the_matrices_are_not_read(isa):
    """Past an odd depth, and past the last rows, lies what is no number."""
    for depth in (1, 31, 33):
        padded = torch.full((20, depth + 7), float("nan"), dtype=torch.bfloat16)
        x, weight = padded[:13, :depth], padded.clone()[:19, :depth]
        x.normal_()
        weight.normal_()
        assert not ops.linear(x, weight).isnan().any()
    x, weight, _ = inputs((5, 6, 8), torch.bfloat16)
    x[3, 2] = float("nan")
    bad = ops.linear(x, weight).isnan()
    assert bad[3].all()
    assert int(bad.sum()) == 6


def test_the_result_does_not_depend_on_the_threads(isa):
    x, weight, bias = inputs((1500, 200, 64), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.linear(x, weight, bias)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)


def test_errors_name_the_operator_and_the_value():
    x, weight, bias = inputs((6, 4, 8), torch.float32)
    with pytest.raises(ValueError, match=r"linear.*weight has shape \(4, 7\)"):
        ops.linear(x, weight[:, :7], bias)
    with pytest.raises(ValueError, match=r"linear.*bias has shape \(3,\)"):
        ops.linear(x, weight, bias[:3])
    with pytest.raises(ValueError, match=r"linear.*weight is torch.bfloat16"):
        ops.linear(x, weight.bfloat16(), bias)
    with pytest.raises(ValueError, match=r"linear.*x has shape \(1, 6, 8\)"):
        ops.linear(x[None], weight, bias)
    with pytest.raises(ValueError, match=r"linear.*last stride of x is 6"):
        ops.linear(x.t().contiguous().t(), weight, bias)
    with pytest.raises(ValueError, match=r"linear.*activation is 'relu'"):
        ops.linear(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match=r"linear.*weight has 3 rows; geglu needs an even"):
        ops.linear(x, weight[:3], activation="geglu")
    with pytest.raises(ValueError, match=r"linear.*gate needs add_to"):
        ops.linear(x, weight, bias, gate=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"linear.*add_to excludes"):
        ops.linear(x, weight, bias, add_to=torch.ones(6, 4), out=torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"linear.*gate has shape \(4, 4\).*6 rows"):
        ops.linear(x, weight, bias, gate=torch.ones(4, 4), add_to=torch.ones(6, 4))


@all_dtypes
def test_opcheck(dtype):
    x, weight, bias = inputs((6, 4, 8), dtype)
    args = (x, weight, bias, 3, torch.ones(2, 4, dtype=dtype), 3, torch.zeros(6, 4, dtype=dtype))
    torch.library.opcheck(torch.ops.accelrt.linear.default, args)


@all_dtypes
def test_cpu_source_under_asan(sim_dir, dtype):
    for shape in ((1, 1, 1), (13, 33, 65), (7, 8, 32)):
        x, weight, bias = inputs(shape, dtype)
        result = run_simulator(
            sim_dir / "accelrt_sim_asan", "linear", "cpu", x=x, weight=weight, bias=bias,
            epilogue=0, rows_per_sample=1, out=torch.zeros(shape[:2], dtype=dtype), gate=None,
        )  # fmt: skip
        check(result["out"], x, weight, bias)
