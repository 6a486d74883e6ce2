"""linear: every ISA and device, epilogues, layouts, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import SimulatorError, run_simulator

from accelrt import ops, reference

USES_TILES = True

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


EPILOGUES = {None: 0, "gelu": 1, "gelu_tanh": 2, "add": 3, "geglu": 4, "geglu_tanh": 5}
low_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


@pytest.fixture(params=["small", "large"])
def tile(request, monkeypatch) -> str:
    """The launcher's choice: on many multiprocessors the small tile, on one the large one where
    the result nearly fills it."""
    count = {"small": 1000, "large": 1}[request.param]
    monkeypatch.setenv("ACCELRT_SIM_MULTIPROCESSORS", str(count))
    return request.param


def simulate(sim_dir, x, weight, bias, epilogue, out, gate=None, *, sanitizer="asan"):
    return run_simulator(
        sim_dir / f"accelrt_sim_{sanitizer}", "linear", x=x, weight=weight, bias=bias, gate=gate,
        epilogue=EPILOGUES[epilogue], out=out,
        rows_per_sample=1 if gate is None else len(x) // len(gate),
    )["out"]  # fmt: skip


def check_cuda(sim_dir, shape, epilogue, dtype, **options):
    """Of a product whose result is of this shape."""
    rows, columns, depth = shape
    doubled = epilogue is not None and epilogue.startswith("geglu")
    x, weight, bias = inputs((rows, 2 * columns if doubled else columns, depth), dtype)
    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    result = simulate(sim_dir, x, weight, bias, epilogue, out, **options)
    check(result, x, weight, bias, epilogue)


@low_dtypes
def test_cuda_source(sim_dir, tile, dtype):
    """Tails of both tiles; rows of the result that are aligned and not; a last group of columns."""
    cases = {
        "small": [
            ((1, 8, 8), None), ((7, 24, 40), "gelu"), ((19, 100, 72), "geglu"),
            ((111, 130, 328), "gelu_tanh"), ((130, 8, 72), "geglu_tanh"), ((130, 600, 8), None),
            ((70, 33, 40), "geglu"), ((130, 24, 0), "gelu"),
        ],
        "large": [
            ((111, 100, 8), "gelu"), ((111, 100, 40), "geglu"), ((111, 100, 328), None),
            ((250, 240, 40), "gelu_tanh"), ((97, 111, 72), "geglu_tanh"),
        ],
    }  # fmt: skip
    for shape, epilogue in cases[tile][:: 1 if dtype == torch.bfloat16 else 2]:
        check_cuda(sim_dir, shape, epilogue, dtype)


@low_dtypes
def test_cuda_source_of_a_gated_sum(sim_dir, tile, dtype):
    x, weight, bias = inputs((111, 104, 40), dtype)
    y = F.linear(x, weight, bias)
    # Aligned rows of 16 bytes, and rows at 3 elements more.
    for samples, padding in ((None, 0), (3, 8), (37, 3)):
        before = torch.randn(111, 104 + padding).to(dtype)[:, :104]
        gate = None
        if samples is not None:
            gate = torch.randn(samples, 104 + padding).to(dtype)[:, :104]
        wide = None if gate is None else gate.double()
        truth = reference.linear(
            x.double(), weight.double(), bias.double(), gate=wide, add_to=before.double().clone()
        )
        rows = 1 if gate is None else gate.repeat_interleave(111 // samples, dim=0)
        result = simulate(sim_dir, x, weight, bias, "add", before, gate)
        assert_as_good_as(result, before + rows * y, truth)


@low_dtypes
def test_cuda_source_of_rows_with_gaps(sim_dir, tile, dtype):
    """What lies between the rows is no number: it is neither read nor written."""

    def with_gaps(t, gap):
        padded = torch.full((t.shape[0], t.shape[1] + gap), float("nan"), dtype=dtype)
        padded[:, : t.shape[1]] = t
        return padded[:, : t.shape[1]]

    x, weight, _ = inputs((111, 100, 72), dtype)
    for gap in (8, 5):
        out = with_gaps(torch.zeros(111, 100, dtype=dtype), gap)
        result = simulate(sim_dir, with_gaps(x, 8), with_gaps(weight, 16), None, None, out)
        check(result, x, weight, None)
        beside = torch.as_strided(result, (110, gap), (100 + gap, 1), 100)
        assert bool(beside.isnan().all())


def test_cuda_source_without_races(sim_dir, tile):
    cases = {
        "small": [((19, 24, 328), "geglu"), ((130, 100, 40), "gelu")],
        "large": [((111, 100, 136), None), ((111, 100, 40), "geglu_tanh")],
    }
    for shape, epilogue in cases[tile]:
        check_cuda(sim_dir, shape, epilogue, torch.bfloat16, sanitizer="tsan")


def test_cuda_source_declines(sim_dir):
    """By name: other dtypes, and rows that are not aligned to 16 bytes."""
    allowed = "multiple of 8 and rows aligned to 16 bytes"
    for dtype, depth, gap in (
        (torch.float32, 8, 0), (torch.bfloat16, 12, 0), (torch.float16, 8, 4)
    ):  # fmt: skip
        _, weight, bias = inputs((6, 4, depth), dtype)
        x = torch.zeros(6, depth + gap, dtype=dtype)[:, :depth]
        with pytest.raises(SimulatorError, match=f"no {str(dtype)[6:]} .6, {depth}.*{allowed}"):
            simulate(sim_dir, x, weight, bias, None, torch.zeros(6, 4, dtype=dtype))
