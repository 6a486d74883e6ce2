"""geglu: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import ODD_SIZES, all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import run_simulator

from accelrt import ops, reference

APPROXIMATIONS = {"none": 1, "tanh": 2}
all_approximations = pytest.mark.parametrize("approximate", APPROXIMATIONS)


def inputs(shape, dtype, device="cpu"):
    """x [..., 2 D] and its bias [2 D], from the shape of the output [..., D]."""
    x = (torch.randn(*shape[:-1], 2 * shape[-1], device=device) * 3).to(dtype)
    return x, torch.randn(2 * shape[-1], device=device).to(dtype)


def stock(x, bias, approximate):
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate=approximate)


def truth(x, bias, approximate):
    bias = None if bias is None else bias.double()
    return reference.geglu(x.double(), bias, approximate=approximate)


@all_approximations
@all_dtypes
@all_devices
def test_matches_the_truth(approximate, dtype, device):
    for width in ODD_SIZES:
        x, bias = inputs((2, 3, width), dtype, device)
        for b in (None, bias):
            assert_as_good_as(
                ops.geglu(x, b, approximate=approximate),
                stock(x, b, approximate),
                truth(x, b, approximate),
            )


@all_approximations
@all_dtypes
def test_every_isa(isa, approximate, dtype):
    x, bias = inputs((5, 333), dtype)
    assert_as_good_as(
        ops.geglu(x, bias, approximate=approximate),
        stock(x, bias, approximate),
        truth(x, bias, approximate),
    )
    across = x.transpose(0, 1).contiguous().transpose(0, 1)  # the last stride is not one
    result = ops.geglu(across, bias, approximate=approximate)
    assert_as_good_as(result, stock(x, bias, approximate), truth(x, bias, approximate))


def test_left_tail_of_the_gate_keeps_relative_accuracy(isa):
    gate = torch.linspace(-9, 6, 50_001)
    result = ops.geglu(torch.cat([torch.ones_like(gate), gate])).double()
    expected = 0.5 * gate.double() * torch.special.erfc(-gate.double() / 2**0.5)
    assert float(((result - expected).abs() / expected.abs().clamp(min=1e-25)).max()) < 3e-6


def test_many_rows_are_shared_by_the_threads():
    x, bias = inputs((517, 96), torch.bfloat16)
    assert_as_good_as(ops.geglu(x, bias), stock(x, bias, "none"), truth(x, bias, "none"))
    x, bias = inputs((1, 40_000), torch.float32)  # one row of several pieces
    assert_as_good_as(ops.geglu(x, bias), stock(x, bias, "none"), truth(x, bias, "none"))


@all_dtypes
def test_layouts_and_out(dtype):
    x, bias = inputs((4, 6, 19), dtype)
    expected = ops.geglu(x, bias)
    assert expected.shape == (4, 6, 19)
    assert torch.equal(ops.geglu(strided_like(x), bias), expected)
    assert torch.equal(ops.geglu(x.transpose(0, 1), bias), expected.transpose(0, 1))
    assert torch.equal(ops.geglu(x[:, 1:4:2], bias), expected[:, 1:4:2])
    assert torch.equal(ops.geglu(x[:1].expand(4, -1, -1), bias), expected[:1].expand(4, -1, -1))
    target = strided_like(torch.zeros_like(expected))
    assert ops.geglu(x, bias, out=target) is target
    assert torch.equal(target, expected)
    across = x.transpose(1, 2).contiguous().transpose(1, 2)  # the last stride is not one
    assert torch.equal(ops.geglu(across), ops.geglu(x))
    assert torch.equal(ops.geglu(across, bias), expected)
    assert torch.equal(ops.geglu(x[0, 0], bias), expected[0, 0])
    assert ops.geglu(torch.empty(0, 10, dtype=dtype)).shape == (0, 5)
    assert ops.geglu(torch.empty(3, 0, dtype=dtype)).shape == (3, 0)


@all_dtypes
def test_in_place_over_the_value(isa, dtype):
    x, bias = inputs((40, 989), dtype)
    expected = ops.geglu(x, bias)
    gate = x[:, 989:].clone()
    ops.geglu(x, bias, out=x[:, :989])
    assert torch.equal(x[:, :989], expected)
    assert torch.equal(x[:, 989:], gate)


def test_special_values():
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, nan, 100.0, -100.0, 0.0, -0.0, 1e30, -1e30])
    result = ops.geglu(torch.cat([torch.full_like(gate, 2.0), gate]))
    assert torch.equal(result[[0, 2, 6]], torch.tensor([inf, 200.0, 2e30]))
    assert torch.isnan(result[1])
    assert torch.equal(result[[3, 4, 5, 7]], torch.zeros(4))


def test_float64_is_computed_by_the_reference():
    x, bias = inputs((3, 5), torch.float64)
    torch.testing.assert_close(ops.geglu(x, bias), stock(x, bias, "none"))


def test_errors_name_the_operator_and_the_value():
    with pytest.raises(ValueError, match=r"geglu.*int64"):
        ops.geglu(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"geglu.*\(2, 3\).*even"):
        ops.geglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"geglu.*'sigmoid'.*'none', 'tanh'"):
        ops.geglu(torch.zeros(2, 4), approximate="sigmoid")
    with pytest.raises(ValueError, match=r"geglu.*bias.*\(2,\).*\(4,\)"):
        ops.geglu(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"geglu.*out.*\(2, 4\).*\(2, 2\)"):
        ops.geglu(torch.zeros(2, 4), out=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"geglu.*bias.*bfloat16"):
        ops.geglu(torch.zeros(2, 4), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"geglu: kind 0 is no gelu"):
        torch.ops.accelrt.geglu(torch.zeros(2, 4), None, 0, torch.zeros(2, 2))


@all_dtypes
def test_opcheck(dtype):
    x, bias = inputs((3, 17), dtype)
    for kind in APPROXIMATIONS.values():
        args = (x, bias, kind, torch.empty(3, 17, dtype=dtype))
        torch.library.opcheck(torch.ops.accelrt.geglu.default, args)


def test_compiles():
    x, bias = inputs((3, 17), torch.float32)
    compiled = torch.compile(
        lambda t, b: ops.geglu(t * 2, b) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, bias), ops.geglu(x * 2, bias) + 1)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_approximations
@all_dtypes
def test_simulated_cuda_source(sim_dir, variant, approximate, dtype):
    binary = sim_dir / f"accelrt_sim_{variant}"
    kind = APPROXIMATIONS[approximate]
    # Width 7 goes by element, 64 in vectors; the second layout has gaps between the rows.
    for shape, layout in (((3, 7), torch.clone), ((5, 64), torch.clone), ((5, 64), strided_like)):
        x, bias = inputs(shape, dtype)
        result = run_simulator(
            binary, "geglu", x=layout(x), bias=bias, kind=kind,
            out=torch.zeros(shape, dtype=dtype),
        )["out"]  # fmt: skip
        assert_as_good_as(result, stock(x, bias, approximate), truth(x, bias, approximate))


@all_dtypes
def test_simulated_cpu_source(sim_dir, dtype):
    for x, bias in (inputs((3, 37), dtype), (inputs((37, 3), dtype)[0].t(), None)):
        if x.shape[-1] % 2:
            x = x[:, 1:]
        out = torch.zeros(x.shape[0], x.shape[1] // 2, dtype=dtype)
        result = run_simulator(
            sim_dir / "accelrt_sim_asan", "geglu", device="cpu", x=x, bias=bias, kind=1, out=out
        )["out"]
        assert_as_good_as(result, stock(x, bias, "none"), truth(x, bias, "none"))
