"""The two LayerNorm operators: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import (
    ODD_SIZES,
    all_devices,
    all_dtypes,
    assert_as_good_as,
    error,
    strided_like,
)
from sim import run_simulator

from accelrt import ops, reference

EPS = 1e-5

# Which of the optional arguments a call has.
PLAIN_FORMS = {
    "bare": (),
    "affine": ("weight", "bias"),
    "modulated": ("scale", "shift"),
    "all": ("weight", "bias", "scale", "shift"),
    "shifted": ("shift",),
}
RESIDUAL_FORMS = {
    "bare": (),
    "gated": ("gate", "scale", "shift"),
    "injected": ("gate", "weight", "bias", "inject"),
    "all": ("gate", "weight", "bias", "scale", "shift", "inject", "inject_scale"),
}


def make(shape, dtype, device="cpu", names=(), offset=0.0):
    """The arguments of a call; those in ``names`` besides x and residual."""
    batch, _, width = shape
    shapes = {
        "x": shape, "residual": shape, "inject": shape,
        "weight": (width,), "bias": (width,), "inject_scale": (width,),
        "gate": (batch, width), "scale": (batch, width), "shift": (batch, width),
    }  # fmt: skip
    return {
        name: (torch.randn(size, device=device) + (offset if name == "x" else 0)).to(dtype)
        for name, size in shapes.items()
        if name in ("x", *names)
    }


def in_float64(arguments):
    return {name: t.double() for name, t in arguments.items()}


def stock_norm(x, weight=None, bias=None, scale=None, shift=None):
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    if scale is not None:
        y = y * (1 + scale[:, None])
    return y if shift is None else y + shift[:, None]


def stock_residual(
    x, residual, gate=None, weight=None, bias=None, scale=None, shift=None, inject=None,
    inject_scale=None,
):  # fmt: skip
    r = residual + (x if gate is None else gate[:, None] * x)
    if inject is not None:
        r = r + (inject if inject_scale is None else inject_scale * inject)
    return stock_norm(r, weight, bias, scale, shift), r


def check_plain(result, arguments):
    truth = reference.layer_norm_modulate(**in_float64(arguments), eps=EPS)
    assert_as_good_as(result, stock_norm(**arguments), truth)


def check_residual(results, arguments):
    truths = reference.gate_residual_layer_norm_modulate(**in_float64(arguments), eps=EPS)
    for ours, stock, truth in zip(results, stock_residual(**arguments), truths, strict=True):
        assert_as_good_as(ours, stock, truth)


@pytest.mark.parametrize("form", PLAIN_FORMS)
@all_dtypes
@all_devices
def test_layer_norm_matches_the_truth(form, dtype, device):
    for width in [*ODD_SIZES, 320]:
        arguments = make((2, 3, width), dtype, device, PLAIN_FORMS[form])
        check_plain(ops.layer_norm_modulate(**arguments, eps=EPS), arguments)


@pytest.mark.parametrize("form", RESIDUAL_FORMS)
@all_dtypes
@all_devices
def test_gate_residual_matches_the_truth(form, dtype, device):
    for width in [*ODD_SIZES, 320]:
        arguments = make((2, 3, width), dtype, device, ("residual", *RESIDUAL_FORMS[form]))
        check_residual(ops.gate_residual_layer_norm_modulate(**arguments, eps=EPS), arguments)


@all_dtypes
def test_every_isa(isa, dtype):
    for width in (5, 333, 1152):
        arguments = make((3, 5, width), dtype, names=PLAIN_FORMS["all"])
        check_plain(ops.layer_norm_modulate(**arguments, eps=EPS), arguments)
        arguments = make((3, 5, width), dtype, names=("residual", *RESIDUAL_FORMS["all"]))
        check_residual(ops.gate_residual_layer_norm_modulate(**arguments, eps=EPS), arguments)


@all_devices
def test_wide_rows_and_many_rows(device):
    for shape, dtype in (
        ((1, 2, 8192), torch.float32),
        ((1, 1, 20_000), torch.bfloat16),
        ((3, 301, 96), torch.float32),
        ((301, 3, 40), torch.bfloat16),
    ):
        arguments = make(shape, dtype, device, ("residual", *RESIDUAL_FORMS["all"]))
        check_residual(ops.gate_residual_layer_norm_modulate(**arguments, eps=EPS), arguments)


@all_devices
def test_a_mean_of_many_standard_deviations(isa, device):
    arguments = make((2, 3, 1152), torch.float32, device, PLAIN_FORMS["all"], offset=3e4)
    truth = reference.layer_norm_modulate(**in_float64(arguments), eps=EPS)
    result = ops.layer_norm_modulate(**arguments, eps=EPS)
    assert float((result.double() - truth).norm() / truth.norm()) < 1e-6


@all_devices
def test_constant_rows(isa, device):
    x = torch.full((1, 2, 37), 1000.1, device=device)
    assert torch.equal(ops.layer_norm_modulate(x), torch.zeros_like(x))


@all_dtypes
@all_devices
def test_layouts_of_the_arguments(dtype, device):
    names = ("residual", *RESIDUAL_FORMS["all"])
    arguments = make((3, 4, 48), dtype, device, names)
    plain = {k: arguments[k] for k in ("x", "weight", "bias", "scale", "shift")}
    expected = ops.layer_norm_modulate(**plain)
    expected_pair = ops.gate_residual_layer_norm_modulate(**arguments)

    padded = {name: strided_like(t) for name, t in arguments.items()}
    swapped = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t
        for name, t in arguments.items()
    }
    for variant in (padded, swapped):
        result = ops.layer_norm_modulate(**{k: variant[k] for k in plain})
        assert torch.allclose(result, expected, rtol=1e-2, atol=1e-2)
        check_plain(ops.layer_norm_modulate(**{k: variant[k] for k in plain}, eps=EPS), plain)
        pair = ops.gate_residual_layer_norm_modulate(**variant)
        check_residual(pair, arguments)
    # One modulation for all samples, and chunks of one projection.
    shared = plain | {k: plain[k][:1].expand(3, -1) for k in ("scale", "shift")}
    copied = plain | {k: plain[k][:1].repeat(3, 1) for k in ("scale", "shift")}
    assert torch.equal(ops.layer_norm_modulate(**shared), ops.layer_norm_modulate(**copied))
    shift, scale = torch.cat([plain["shift"], plain["scale"]], dim=-1).chunk(2, dim=-1)
    assert torch.equal(
        ops.layer_norm_modulate(**plain | {"shift": shift, "scale": scale}), expected
    )
    # Every second row.
    rows = ops.gate_residual_layer_norm_modulate(
        **{name: t[:, ::2] if t.dim() == 3 else t for name, t in arguments.items()}
    )
    for part, whole in zip(rows, expected_pair, strict=True):
        assert torch.equal(part, whole[:, ::2])


@all_dtypes
@all_devices
def test_out_may_be_strided_or_an_input(dtype, device):
    names = ("residual", *RESIDUAL_FORMS["all"])
    arguments = make((2, 5, 64), dtype, device, names)
    plain = {k: arguments[k] for k in ("x", "weight", "bias", "scale", "shift")}
    expected = ops.layer_norm_modulate(**plain)
    normed, new = ops.gate_residual_layer_norm_modulate(**arguments)

    target = strided_like(torch.zeros_like(expected))
    assert ops.layer_norm_modulate(**plain, out=target) is target
    torch.testing.assert_close(target, expected, rtol=1e-2, atol=1e-2)
    in_place = plain | {"x": plain["x"].clone()}
    ops.layer_norm_modulate(**in_place, out=in_place["x"])
    assert torch.equal(in_place["x"], expected)

    for out_name, residual_name in (
        ("x", "residual"), ("residual", "x"), ("x", None), (None, "residual"),
        ("inject", "residual"), ("x", "inject"),
    ):  # fmt: skip
        inputs = {name: t.clone() for name, t in arguments.items()}
        out = inputs.get(out_name, torch.empty_like(normed))
        residual_out = inputs.get(residual_name, torch.empty_like(normed))
        results = ops.gate_residual_layer_norm_modulate(
            **inputs, out=out, residual_out=residual_out
        )
        assert results[0] is out
        assert results[1] is residual_out
        assert torch.equal(out, normed)
        assert torch.equal(residual_out, new)


def test_the_residual_is_not_rounded_before_the_norm():
    names = ("residual", "gate")
    arguments = make((2, 3, 256), torch.bfloat16, names=names)
    normed, new = ops.gate_residual_layer_norm_modulate(**arguments)
    truth = reference.gate_residual_layer_norm_modulate(**in_float64(arguments))[0]
    once = error(truth.to(torch.bfloat16), truth)
    assert error(normed, truth) < 1.01 * once
    assert error(ops.layer_norm_modulate(new), truth) > 1.2 * once


@all_dtypes
def test_empty(dtype):
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        arguments = make(shape, dtype, names=("residual", *RESIDUAL_FORMS["all"]))
        for result in ops.gate_residual_layer_norm_modulate(**arguments):
            assert result.shape == shape
        assert ops.layer_norm_modulate(arguments["x"]).shape == shape


def test_float64_is_computed_by_the_reference():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(ops.layer_norm_modulate(x, eps=EPS), stock_norm(x))


def test_errors_name_the_operator_and_the_value():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*\(2, 3\).*\[B, S, D\]"):
        ops.layer_norm_modulate(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*int32"):
        ops.layer_norm_modulate(x.int())
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*weight.*\(7,\).*\(8,\)"):
        ops.layer_norm_modulate(x, torch.zeros(7))
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*scale.*\(1, 8\).*\(2, 8\)"):
        ops.layer_norm_modulate(x, scale=torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*shift.*bfloat16"):
        ops.layer_norm_modulate(x, shift=torch.zeros(2, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*last stride of x is 3"):
        ops.layer_norm_modulate(torch.zeros(2, 8, 3).transpose(1, 2))
    with pytest.raises(ValueError, match=r"layer_norm_modulate.*last stride of shift is 2"):
        ops.layer_norm_modulate(x, shift=torch.zeros(2, 16)[:, ::2])
    with pytest.raises(ValueError, match=r"gate_residual.*residual.*\(2, 3, 7\).*\(2, 3, 8\)"):
        ops.gate_residual_layer_norm_modulate(x, torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"gate_residual.*gate.*\(8,\).*\(2, 8\)"):
        ops.gate_residual_layer_norm_modulate(x, x, torch.zeros(8))
    with pytest.raises(ValueError, match=r"gate_residual.*residual_out"):
        ops.gate_residual_layer_norm_modulate(x, x, residual_out=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"gate_residual.*inject_scale"):
        ops.gate_residual_layer_norm_modulate(x, x, inject=x, inject_scale=torch.zeros(2, 8))


@all_dtypes
def test_opcheck(dtype):
    a = make((2, 3, 17), dtype, names=("residual", *RESIDUAL_FORMS["all"]))
    modulation = (a["weight"], a["bias"], a["scale"], a["shift"])
    torch.library.opcheck(
        torch.ops.accelrt.layer_norm_modulate.default,
        (a["x"], *modulation, EPS, torch.empty_like(a["x"])),
    )
    torch.library.opcheck(
        torch.ops.accelrt.gate_residual_layer_norm_modulate.default,
        (
            a["x"], a["residual"], a["gate"], *modulation, a["inject"], a["inject_scale"], EPS,
            torch.empty_like(a["x"]), torch.empty_like(a["x"]),
        ),
    )  # fmt: skip


def test_compiles():
    a = make((2, 3, 17), torch.float32, names=("residual", "gate", "scale", "shift"))

    def block(x, residual, gate, scale, shift):
        normed, new = ops.gate_residual_layer_norm_modulate(
            x * 2, residual, gate, scale=scale, shift=shift
        )
        return ops.layer_norm_modulate(normed, scale=scale) + new

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**a), block(**a))


def simulate(binary, arguments, device="cuda"):
    outputs = {"out": torch.zeros_like(arguments["x"])}
    op = "layer_norm_modulate"
    if "residual" in arguments:
        op = "gate_residual_layer_norm_modulate"
        outputs["residual_out"] = torch.zeros_like(arguments["x"])
    results = run_simulator(binary, op, device=device, eps=EPS, **arguments, **outputs)
    return [results[name] for name in outputs]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_dtypes
def test_simulated_cuda_source(sim_dir, variant, dtype):
    binary = sim_dir / f"accelrt_sim_{variant}"
    # A warp per row; a block per row; by element with gaps between the rows.
    for shape, layout in (((2, 3, 64), torch.clone), ((1, 2, 2560), torch.clone)):
        arguments = make(shape, dtype, names=PLAIN_FORMS["all"])
        check_plain(simulate(binary, {k: layout(t) for k, t in arguments.items()})[0], arguments)
    arguments = make((2, 3, 21), dtype, names=PLAIN_FORMS["shifted"])
    check_plain(simulate(binary, {k: strided_like(t) for k, t in arguments.items()})[0], arguments)

    arguments = make((2, 3, 328), dtype, names=("residual", *RESIDUAL_FORMS["all"]))
    check_residual(simulate(binary, arguments), arguments)
    arguments = make((1, 3, 333), dtype, names=("residual", *RESIDUAL_FORMS["all"]))
    check_residual(simulate(binary, arguments), arguments)


@all_dtypes
def test_simulated_cpu_source(sim_dir, dtype):
    for form in RESIDUAL_FORMS.values():
        arguments = make((2, 3, 45), dtype, names=("residual", *form))
        padded = {name: strided_like(t) for name, t in arguments.items()}
        check_residual(simulate(sim_dir / "accelrt_sim_asan", padded, device="cpu"), arguments)
    arguments = make((3, 2, 13), dtype, names=PLAIN_FORMS["all"])
    check_plain(simulate(sim_dir / "accelrt_sim_asan", arguments, device="cpu")[0], arguments)
