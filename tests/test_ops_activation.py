"""silu, gelu, gelu_tanh: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import ODD_SIZES, all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import run_simulator

from accelrt import ops, reference

FUNCTIONS = {
    "silu": (0, F.silu),
    "gelu": (1, F.gelu),
    "gelu_tanh": (2, lambda x: F.gelu(x, approximate="tanh")),
}

# In float64, and in forms that do not cancel on the left tail as torch's own do.
TAIL_TRUTHS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
    "gelu_tanh": lambda x: (
        x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * x * (1 + 0.044715 * x * x))
    ),
}


def inputs(shape, dtype, device="cpu"):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    return x, torch.randn(shape[-1], device=device).to(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
@all_dtypes
@all_devices
def test_matches_the_truth(name, dtype, device):
    stock = FUNCTIONS[name][1]
    for width in ODD_SIZES:
        x, bias = inputs((2, 3, width), dtype, device)
        for b in (None, bias):
            truth = getattr(reference, name)(x.double(), None if b is None else b.double())
            expected = stock(x if b is None else x + b)
            assert_as_good_as(getattr(ops, name)(x, b), expected, truth)


@pytest.mark.parametrize("name", FUNCTIONS)
@all_dtypes
def test_every_isa(isa, name, dtype):
    x, bias = inputs((5, 333), dtype)
    truth = getattr(reference, name)(x.double(), bias.double())
    assert_as_good_as(getattr(ops, name)(x, bias), FUNCTIONS[name][1](x + bias), truth)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy_over_the_whole_range(isa, name):
    x = torch.cat([torch.linspace(-30, 30, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    truth = TAIL_TRUTHS[name](x.double())
    result = getattr(ops, name)(x).double()
    relative = ((result - truth).abs() / truth.abs().clamp(min=1e-30))[truth.abs() > 1e-25]
    assert float(relative.max()) < 2e-5  # the far left tail; 1e-6 elsewhere
    centre = (x.abs() < 4) & (truth.abs() > 1e-25)
    gap = (result - truth).abs()[centre] / truth.abs()[centre]
    assert float(gap.max()) < 2e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_bfloat16(isa, name):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    truth = TAIL_TRUTHS[name](x.double())
    result = getattr(ops, name)(x).double()
    relative = ((result - truth).abs() / truth.abs())[truth.abs() > 1e-34]
    assert float(relative.max()) < 1.06 * 2**-8  # the rounding alone: 2^-8
    assert float(result[truth.abs() <= 1e-34].abs().max()) < 2e-34


def test_special_values():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 88.0, -88.0, 1e4, -1e4])
    result = ops.silu(x)
    assert result[0] == float("inf")
    assert torch.isnan(result[2])
    torch.testing.assert_close(result[3:], F.silu(x[3:]), rtol=1e-6, atol=1e-30)


@all_dtypes
def test_layouts_and_out(dtype):
    x, bias = inputs((4, 6, 19), dtype)
    expected = ops.silu(x, bias)
    assert torch.equal(ops.silu(strided_like(x), bias), expected)
    assert torch.equal(ops.silu(x.transpose(0, 1), bias), expected.transpose(0, 1))
    target = strided_like(torch.zeros_like(x))
    assert ops.silu(x, bias, out=target) is target
    assert torch.equal(target, expected)
    last = x.transpose(1, 2)  # the last stride is not one
    assert torch.equal(ops.silu(last), ops.silu(x).transpose(1, 2))
    in_place = x.clone()
    ops.silu(in_place, bias, out=in_place)
    assert torch.equal(in_place, expected)
    image = torch.randn(2, 7, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    result = ops.silu(image)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, ops.silu(image.contiguous()))
    assert ops.silu(torch.empty(0, 5, dtype=dtype)).shape == (0, 5)


def test_errors_name_the_operator_and_the_value():
    with pytest.raises(ValueError, match=r"silu.*int64"):
        ops.silu(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"silu.*bias.*\(4,\).*\(3,\)"):
        ops.silu(torch.zeros(2, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"gelu.*out"):
        ops.gelu(torch.zeros(2, 3), out=torch.zeros(2, 4))


@all_dtypes
def test_opcheck(dtype):
    x, bias = inputs((3, 17), dtype)
    for kind in range(3):
        args = (x, bias, kind, torch.empty_like(x))
        torch.library.opcheck(torch.ops.accelrt.activation.default, args)


def test_compiles():
    x, bias = inputs((3, 17), torch.float32)
    compiled = torch.compile(
        lambda t, b: ops.gelu(t * 2, b) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, bias), ops.gelu(x * 2, bias) + 1)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("name", FUNCTIONS)
@all_dtypes
def test_simulated_cuda_source(sim_dir, variant, name, dtype):
    kind, stock = FUNCTIONS[name]
    for width in (7, 128):
        x, bias = inputs((3, width), dtype)
        for source in (x, strided_like(x)):
            result = run_simulator(
                sim_dir / f"accelrt_sim_{variant}", "activation",
                x=source, bias=bias, kind=kind, out=torch.zeros_like(x),
            )["out"]  # fmt: skip
            truth = getattr(reference, name)(x.double(), bias.double())
            assert_as_good_as(result, stock(x + bias), truth)
