"""weighted_sum: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
from ops_common import ODD_SIZES, all_devices, all_dtypes, assert_as_good_as
from sim import run_simulator

from accelrt import ops, reference


def inputs(slots, shape, dtype, device="cpu", with_base=True):
    features = torch.randn(slots, *shape, device=device).to(dtype)
    weights = torch.randn(shape[0], slots, device=device)
    base = torch.randn(shape, device=device).to(dtype) if with_base else None
    return features, weights, base


def stock(features, weights, base):
    """The separate torch operations, in the dtype of the features."""
    result = torch.zeros_like(features[0]) if base is None else base
    for k, feature in enumerate(features):
        weight = weights[:, k].to(feature.dtype).reshape(-1, *([1] * (feature.dim() - 1)))
        result = result + weight * feature
    return result


def check(result, features, weights, base):
    wide = None if base is None else base.double()
    truth = reference.weighted_sum(features.double(), weights.double(), base=wide)
    assert_as_good_as(result, stock(features, weights, base), truth)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 6])
@all_dtypes
@all_devices
def test_matches_the_truth(slots, dtype, device):
    for width in ODD_SIZES:
        for shape in ((1, width), (2, 3, width), (3, 2, 2, 3, width), (4, width), (5, width)):
            for with_base in (False, True):
                given = inputs(slots, shape, dtype, device, with_base)
                check(ops.weighted_sum(given[0], given[1], base=given[2]), *given)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 6, 16])
@all_dtypes
def test_every_isa(isa, slots, dtype):
    for shape in ((5, 333), (1, 100_001), (2, 40_000), (1, 64)):
        for with_base in (False, True):
            given = inputs(slots, shape, dtype, with_base=with_base)
            check(ops.weighted_sum(given[0], given[1], base=given[2]), *given)


@all_dtypes
@all_devices
def test_vectors_and_unaligned_rows(dtype, device):
    """Rows of whole 16-byte accesses, longer than one tile, and the same from an odd address."""
    for slots in (1, 2, 3, 4, 7):
        for width in (64, 8192, 20_000):
            features, weights, base = inputs(slots, (2, width), dtype, device)
            expected = ops.weighted_sum(features, weights, base=base)
            check(expected, features, weights, base)
            storage = torch.zeros(features.numel() + 1, dtype=dtype, device=device)
            shifted = storage[1:].view_as(features).copy_(features)
            assert torch.equal(ops.weighted_sum(shifted, weights, base=base), expected)


@all_dtypes
@all_devices
def test_a_slot_of_weight_zero_is_not_read(dtype, device):
    for slots in (1, 3, 6):
        features, weights, base = inputs(slots, (3, 1000), dtype, device)
        weights[1, slots - 1] = 0.0
        weights[2] = torch.tensor([0.0, -0.0] * 8, device=device)[:slots]
        for chosen in (base, None):
            expected = ops.weighted_sum(features, weights, base=chosen)
            holes = features.clone()
            holes[slots - 1, 1] = float("nan")
            holes[:, 2] = float("nan")
            for op in (ops.weighted_sum, reference.weighted_sum):
                assert torch.equal(
                    op(holes, weights, base=chosen), op(features, weights, base=chosen)
                )
            assert torch.equal(ops.weighted_sum(holes, weights, base=chosen), expected)
            untouched = torch.zeros_like(base[2]) if chosen is None else base[2]
            assert torch.equal(expected[2], untouched)


@all_devices
def test_nan_in_what_is_read_stays(device):
    features, weights, base = inputs(2, (2, 40), torch.float32, device)
    weights[0, 1] = float("nan")
    features[0, 1, 7] = float("nan")
    bad = torch.isnan(ops.weighted_sum(features, weights, base=base))
    assert bad[0].all()
    assert bad[1].nonzero().tolist() == [[7]]


@all_dtypes
@all_devices
def test_reuse_is_exact(dtype, device):
    features, _, base = inputs(1, (3, 111), dtype, device)
    one = torch.ones(3, 1, device=device)
    assert torch.equal(ops.weighted_sum(features, one), features[0])
    assert torch.equal(ops.weighted_sum(features, one, base=base), base + features[0])


@all_dtypes
@all_devices
def test_out_and_in_place(dtype, device):
    features, weights, base = inputs(3, (2, 5, 989), dtype, device)
    expected = ops.weighted_sum(features, weights, base=base)
    for target in (torch.full_like(base, float("nan")), base.clone()):
        assert ops.weighted_sum(features, weights, base=base, out=target) is target
        assert torch.equal(target, expected)
    in_place = base.clone()
    assert ops.weighted_sum(features, weights, base=in_place, out=in_place) is in_place
    assert torch.equal(in_place, expected)
    for k in range(3):
        ring = features.clone()
        ops.weighted_sum(ring, weights, base=base, out=ring[k])
        assert torch.equal(ring[k], expected)
        others = [i for i in range(3) if i != k]
        assert torch.equal(ring[others], features[others])


@all_devices
def test_empty(device):
    for shape in ((0, 4), (3, 0)):
        given = inputs(2, shape, torch.float32, device)
        assert ops.weighted_sum(given[0], given[1], base=given[2]).shape == shape


def test_float64_is_the_reference():
    features, weights, base = inputs(3, (2, 19), torch.float64)
    expected = base + torch.einsum("bk,kbm->bm", weights.double(), features)
    torch.testing.assert_close(ops.weighted_sum(features, weights, base=base), expected)
    assert ops.weighted_sum(features, weights, base=base, out=base) is base
    torch.testing.assert_close(base, expected)


def test_does_not_depend_on_the_threads():
    features, weights, base = inputs(3, (1, 300_000), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.weighted_sum(features, weights, base=base)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.weighted_sum(features, weights, base=base))
    finally:
        torch.set_num_threads(threads)


def test_errors_name_the_operator_and_the_value():
    x, w = torch.zeros(3, 2, 8), torch.zeros(2, 3)
    wrong = [
        (r"17 slots; allowed: 1 to 16", (torch.zeros(17, 2, 8), torch.zeros(2, 17)), {}),
        (r"0 slots; allowed: 1 to 16", (torch.zeros(0, 2, 8), torch.zeros(2, 0)), {}),
        (r"features has 1 dimensions", (torch.zeros(3), w), {}),
        (r"features has dtype torch.int32", (x.int(), w), {}),
        (r"features.*strides \(16, 1, 2\)", (torch.zeros(3, 8, 2).transpose(1, 2), w), {}),
        (r"weights has shape \(3, 2\); expected \(2, 3\)", (x, w.t()), {}),
        (r"weights is torch.float16", (x, w.half()), {}),
        (r"weights.*must be contiguous", (x, torch.zeros(3, 2).t()), {}),
        (r"base has shape \(2, 7\); expected \(2, 8\)", (x, w), {"base": torch.zeros(2, 7)}),
        (r"base.*bfloat16", (x, w), {"base": torch.zeros(2, 8).bfloat16()}),
        (r"base.*must be contiguous", (x, w), {"base": torch.zeros(2, 16)[:, ::2]}),
        (r"out has shape \(8,\)", (x, w), {"out": torch.zeros(8)}),
        (r"out.*must be contiguous", (x, w), {"out": torch.zeros(8, 2).t()}),
    ]
    for message, args, keywords in wrong:
        with pytest.raises(ValueError, match=rf"weighted_sum: .*{message}"):
            ops.weighted_sum(*args, **keywords)
    target = torch.ones(2, 8)
    with pytest.raises(ValueError, match="weighted_sum"):
        ops.weighted_sum(x, w.t(), out=target)
    assert torch.equal(target, torch.ones(2, 8))


@all_dtypes
def test_opcheck(dtype):
    for slots in (1, 3, 6):
        for with_base in (False, True):
            features, weights, base = inputs(slots, (3, 17), dtype, with_base=with_base)
            args = (features, weights, base, torch.empty(3, 17, dtype=dtype))
            torch.library.opcheck(torch.ops.accelrt.weighted_sum.default, args)


def test_meta_tensors_give_the_shape():
    features = torch.empty(3, 2, 4, 5, dtype=torch.bfloat16, device="meta")
    weights = torch.empty(2, 3, device="meta")
    result = ops.weighted_sum(features, weights)
    assert result.is_meta
    assert (result.shape, result.dtype) == ((2, 4, 5), torch.bfloat16)
    with pytest.raises(ValueError, match=r"weighted_sum.*weights has shape \(3, 2\)"):
        ops.weighted_sum(features, torch.empty(3, 2, device="meta"))


def test_compiles():
    features, weights, base = inputs(3, (2, 17), torch.float32)

    def fresh(f, w, b):
        return ops.weighted_sum(f * 2, w, base=b) + 1

    def in_place(f, w, b):
        total = b * 2
        ops.weighted_sum(f, w, base=total, out=total)
        return total + b

    for function in (fresh, in_place):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(features, weights, base), function(features, weights, base))


def simulate(binary, features, weights, base, device="cuda"):
    out = torch.full_like(features[0], float("nan"))
    return run_simulator(
        binary, "weighted_sum", device, features=features, weights=weights, base=base, out=out
    )["out"]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_dtypes
def test_simulated_cuda_source(sim_dir, variant, dtype):
    binary = sim_dir / f"accelrt_sim_{variant}"
    # Scalar and 16-byte accesses; whole tiles, a rest, several blocks per row and several rows.
    for slots, shape, with_base in (
        (1, (2, 8192), True),
        (1, (1, 9000), False),
        (2, (2, 7), True),
        (2, (1, 4400), False),
        (3, (3, 16), True),
        (4, (2, 2056), True),
        (4, (1, 2051), False),
        (6, (2, 24), True),
        (6, (1, 1111), False),
    ):
        given = inputs(slots, shape, dtype, with_base=with_base)
        check(simulate(binary, *given), *given)


@all_dtypes
def test_simulated_cuda_source_skips_slots(sim_dir, dtype):
    for slots, width in ((2, 2048), (6, 40), (3, 7)):
        features, weights, base = inputs(slots, (2, width), dtype)
        weights[0, 1] = weights[1, 0] = 0.0
        expected = ops.weighted_sum(features, weights, base=base)
        features[1, 0] = features[0, 1] = float("nan")
        result = simulate(sim_dir / "accelrt_sim_asan", features, weights, base)
        torch.testing.assert_close(result, expected)


@all_dtypes
def test_cpu_source_under_asan(sim_dir, dtype):
    for slots, shape in ((1, (2, 4, 989)), (3, (3, 64)), (5, (1, 16_390)), (16, (2, 19))):
        given = inputs(slots, shape, dtype)
        check(simulate(sim_dir / "accelrt_sim_asan", *given, "cpu"), *given)
