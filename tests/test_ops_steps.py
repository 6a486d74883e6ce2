"""guided_step, feature_delta: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
from ops_common import ODD_SIZES, all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import run_simulator

from accelrt import ops, reference

COEFFICIENTS = {"sample_coef": 1.0213, "eps_coef": -0.347}
OPTIONAL = [(False, False), (True, False), (False, True), (True, True)]


def step_inputs(shape, dtype, uncond, history, device="cpu"):
    def noise():
        return torch.randn(shape, device=device).to(dtype)

    arguments = {"sample": noise(), "cond": noise(), **COEFFICIENTS}
    if uncond:
        arguments.update(uncond=noise(), guidance_scale=7.5)
    if history:
        arguments.update(history=noise(), history_coef=0.211)
    return arguments


def stock_step(arguments):
    """The separate torch operations of guidance and scheduler."""
    eps = arguments["cond"]
    if "uncond" in arguments:
        eps = arguments["uncond"] + arguments["guidance_scale"] * (eps - arguments["uncond"])
    result = arguments["sample_coef"] * arguments["sample"] + arguments["eps_coef"] * eps
    if "history" in arguments:
        result = result + arguments["history_coef"] * arguments["history"]
    return result, eps


def in_float64(arguments):
    return {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def check_step(result, eps, arguments):
    wide = in_float64(arguments)
    true_eps = torch.empty_like(wide["sample"])
    truth = reference.guided_step(**wide, eps_out=true_eps)
    expected, expected_eps = stock_step(arguments)
    assert_as_good_as(result, expected, truth)
    if eps is not None:
        assert_as_good_as(eps, expected_eps, true_eps)


@pytest.mark.parametrize(("uncond", "history"), OPTIONAL)
@all_dtypes
@all_devices
def test_step_matches_the_truth(uncond, history, dtype, device):
    for width in ODD_SIZES:
        for shape in ((width,), (2, 3, width), (2, 2, 3, 2, width)):
            arguments = step_inputs(shape, dtype, uncond, history, device)
            eps = torch.zeros_like(arguments["sample"])
            check_step(ops.guided_step(**arguments, eps_out=eps), eps, arguments)


@pytest.mark.parametrize(("uncond", "history"), OPTIONAL)
@all_dtypes
def test_step_every_isa(isa, uncond, history, dtype):
    for shape in ((5, 333), (1, 4, 99, 101)):
        arguments = step_inputs(shape, dtype, uncond, history)
        check_step(ops.guided_step(**arguments), None, arguments)


@all_dtypes
def test_step_layouts_out_and_in_place(isa, dtype):
    arguments = step_inputs((2, 4, 6, 19), dtype, True, True)
    expected = ops.guided_step(**arguments)
    last = torch.channels_last
    for change in (strided_like, lambda t: t.to(memory_format=last)):
        same = {k: change(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
        assert torch.equal(ops.guided_step(**same), expected)
        mixed = {**arguments, "cond": change(arguments["cond"])}
        eps, target = strided_like(torch.zeros_like(expected)), change(torch.zeros_like(expected))
        assert ops.guided_step(**mixed, out=target, eps_out=eps) is target
        assert torch.equal(target, expected)
        check_step(target, eps, arguments)
    halves = torch.cat([arguments["uncond"], arguments["cond"]])
    uncond, cond = halves.chunk(2)
    batched = {**arguments, "uncond": uncond, "cond": cond}
    assert torch.equal(ops.guided_step(**batched), expected)
    for name in ("sample", "cond", "uncond", "history"):
        copies = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
        ops.guided_step(**copies, out=copies[name])
        assert torch.equal(copies[name], expected)
    empty = torch.empty(0, 4, dtype=dtype)
    assert ops.guided_step(empty, empty, **COEFFICIENTS).shape == (0, 4)


def test_step_errors_name_the_operator_and_the_value():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"guided_step.*cond has shape \(3,\)"):
        ops.guided_step(x, torch.zeros(3), **COEFFICIENTS)
    with pytest.raises(ValueError, match=r"guided_step.*history.*float16"):
        ops.guided_step(x, x, history=x.half(), **COEFFICIENTS)
    with pytest.raises(ValueError, match=r"guided_step.*eps_out has shape"):
        ops.guided_step(x, x, eps_out=torch.zeros(2, 4), **COEFFICIENTS)


@all_dtypes
def test_step_opcheck(dtype):
    for uncond, history in OPTIONAL:
        a = step_inputs((3, 17), dtype, uncond, history)
        eps = torch.empty_like(a["sample"]) if uncond else None
        args = (
            a["sample"], a["cond"], a.get("uncond"), a.get("history"), 7.5, 1.0, -0.5, 0.2,
            torch.empty_like(a["sample"]), eps,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.accelrt.guided_step.default, args)


def test_step_compiles():
    a = step_inputs((3, 17), torch.float32, True, False)
    compiled = torch.compile(
        lambda x, c, u: ops.guided_step(x * 2, c, u, guidance_scale=3.0, **COEFFICIENTS) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    expected = ops.guided_step(
        a["sample"] * 2, a["cond"], a["uncond"], guidance_scale=3.0, **COEFFICIENTS
    )
    assert torch.equal(compiled(a["sample"], a["cond"], a["uncond"]), expected + 1)


def simulate_step(binary, arguments, device="cuda"):
    filled = {"guidance_scale": 1.0, "history_coef": 0.0, **arguments}
    zeros = torch.zeros_like(arguments["sample"])
    result = run_simulator(
        binary, "guided_step", device, **filled, out=zeros, eps_out=zeros.clone()
    )
    return result["out"], result["eps_out"]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_dtypes
def test_step_simulated_cuda_source(sim_dir, variant, dtype):
    binary = sim_dir / f"accelrt_sim_{variant}"
    for shape, optional in (
        ((3, 16), (True, True)),
        ((3, 7), (True, False)),
        ((2, 64), (False,) * 2),
    ):
        arguments = step_inputs(shape, dtype, *optional)
        check_step(*simulate_step(binary, arguments), arguments)
    arguments = step_inputs((2, 4, 3, 16), dtype, True, True)
    mixed = {**arguments, "cond": arguments["cond"].to(memory_format=torch.channels_last)}
    check_step(*simulate_step(binary, mixed), arguments)


@all_dtypes
def test_step_cpu_source_under_asan(sim_dir, dtype):
    arguments = step_inputs((2, 4, 3, 19), dtype, True, True)
    mixed = {**arguments, "cond": arguments["cond"].to(memory_format=torch.channels_last)}
    for given in (arguments, mixed):
        check_step(*simulate_step(sim_dir / "accelrt_sim_asan", given, "cpu"), arguments)


# ---- feature_delta ---------------------------------------------------------------------------


def delta_inputs(shape, dtype, device="cpu"):
    b = torch.randn(shape, device=device)
    a = b + 0.1 * torch.randn(shape, device=device)
    return a.to(dtype), b.to(dtype)


def stock_delta(a, b, p):
    a, b = a.float().flatten(1), b.float().flatten(1)
    if p == 1:
        return (a - b).abs().sum(1) / b.abs().sum(1)
    return (a - b).square().sum(1).sqrt() / b.square().sum(1).sqrt()


def check_delta(result, a, b, p):
    truth = reference.feature_delta(a.double(), b.double(), p=p)
    assert_as_good_as(result, stock_delta(a, b, p), truth)


@pytest.mark.parametrize("p", [1, 2])
@all_dtypes
@all_devices
def test_delta_matches_the_truth(p, dtype, device):
    for width in ODD_SIZES:
        for shape in ((3, width), (2, 3, width), (2, 2, 3, 2, width), (width, 5)):
            a, b = delta_inputs(shape, dtype, device)
            check_delta(ops.feature_delta(a, b, p=p), a, b, p)


@pytest.mark.parametrize("p", [1, 2])
@all_dtypes
def test_delta_every_isa(isa, p, dtype):
    for shape in ((5, 333), (1, 100_001), (3, 17, 2000), (2, 20_000, 3)):
        a, b = delta_inputs(shape, dtype)
        check_delta(ops.feature_delta(a, b, p=p), a, b, p)


@pytest.mark.parametrize("p", [1, 2])
def test_delta_is_accurate_for_millions_of_elements(isa, p):
    b = torch.rand(1, 5_000_000) + 1  # positive terms of one size: naive sums drift
    a = b + 0.5
    truth = reference.feature_delta(a.double(), b.double(), p=p)
    result = ops.feature_delta(a, b, p=p)
    assert abs(float(result) / float(truth) - 1) < 3e-7


@pytest.mark.parametrize("p", [1, 2])
@all_dtypes
def test_delta_layouts_and_out(isa, p, dtype):
    a, b = delta_inputs((3, 4, 5, 19), dtype)
    for change in (
        strided_like,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        check_delta(ops.feature_delta(change(a), change(b), p=p), a, b, p)
        check_delta(ops.feature_delta(change(a), b, p=p), a, b, p)
    check_delta(ops.feature_delta(a[:, :, 1:3, ::2], b[:, :, 1:3, ::2], p=p), a[:, :, 1:3, ::2],
                b[:, :, 1:3, ::2], p)  # fmt: skip
    target = torch.zeros(6)[::2]
    assert ops.feature_delta(a, b, p=p, out=target) is target
    check_delta(target, a, b, p)


def test_delta_special_values():
    one, zero = torch.ones(2, 5), torch.zeros(2, 5)
    assert torch.equal(ops.feature_delta(zero, zero), torch.zeros(2))
    assert (ops.feature_delta(one, zero) > 1e30).all()
    assert torch.equal(ops.feature_delta(one[:, :0], one[:, :0]), torch.zeros(2))
    assert ops.feature_delta(one[:0], one[:0]).shape == (0,)
    one[1, 2] = float("nan")
    assert torch.equal(torch.isnan(ops.feature_delta(one, one)), torch.tensor([False, True]))


def test_delta_does_not_depend_on_the_threads():
    a, b = delta_inputs((2, 300_000), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.feature_delta(a, b)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.feature_delta(a, b))
    finally:
        torch.set_num_threads(threads)


def test_delta_errors_name_the_operator_and_the_value():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"feature_delta.*p is 3"):
        ops.feature_delta(x, x, p=3)
    with pytest.raises(ValueError, match=r"feature_delta.*b has shape \(2, 4\)"):
        ops.feature_delta(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"feature_delta.*out.*float16"):
        ops.feature_delta(x, x, out=torch.zeros(2).half())


@all_dtypes
def test_delta_opcheck(dtype):
    a, b = delta_inputs((3, 17), dtype)
    for p in (1, 2):
        args = (a, b, p, torch.empty(3))
        torch.library.opcheck(torch.ops.accelrt.feature_delta.default, args)


def test_delta_compiles():
    a, b = delta_inputs((3, 17), torch.float32)
    compiled = torch.compile(
        lambda x, y: ops.feature_delta(x * 2, y, p=2) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(a, b), ops.feature_delta(a * 2, b, p=2) + 1)


def simulate_delta(binary, a, b, p, device="cuda"):
    out = torch.full((a.shape[0],), -1.0)
    return run_simulator(binary, "feature_delta", device, a=a, b=b, p=p, out=out)["out"]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_dtypes
def test_delta_simulated_cuda_source(sim_dir, variant, dtype):
    binary = sim_dir / f"accelrt_sim_{variant}"
    for p, shape in ((1, (2, 8192)), (2, (1, 9001))):
        a, b = delta_inputs(shape, dtype)
        check_delta(simulate_delta(binary, a, b, p), a, b, p)
    a, b = delta_inputs((2, 3, 5, 16), dtype)
    last = torch.channels_last
    check_delta(simulate_delta(binary, a.to(memory_format=last), b, 1), a, b, 1)
    check_delta(simulate_delta(binary, strided_like(a), strided_like(b), 2), a, b, 2)


def test_delta_simulated_cuda_source_of_empty_samples(sim_dir):
    empty = torch.zeros(3, 0)
    result = simulate_delta(sim_dir / "accelrt_sim_asan", empty, empty, 1)
    assert torch.equal(result, torch.zeros(3))


@all_dtypes
def test_delta_cpu_source_under_asan(sim_dir, dtype):
    a, b = delta_inputs((2, 4, 3, 19), dtype)
    binary = sim_dir / "accelrt_sim_asan"
    check_delta(simulate_delta(binary, a, b, 1, "cpu"), a, b, 1)
    last = torch.channels_last
    check_delta(simulate_delta(binary, a.to(memory_format=last), b, 2, "cpu"), a, b, 2)
