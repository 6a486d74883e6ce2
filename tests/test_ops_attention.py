"""attention: every ISA and device, masks, large scores, layouts, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import SimulatorError, run_simulator

from accelrt import _C, ops, reference

USES_TILES = True

# batch, queries, keys, heads, head dim
SHAPES = [
    (2, 256, 256, 2, 72),
    (2, 111, 300, 2, 40),
    (1, 300, 111, 3, 64),
    (2, 19, 7, 24, 80),
    (3, 7, 19, 16, 72),
    (1, 1, 300, 16, 128),
    (2, 7, 1, 3, 8),
    (1, 19, 1100, 5, 160),
    (1, 20, 530, 4, 256),
    (1, 530, 19, 40, 1),
    (2, 1, 111, 31, 17),
]
NO_KEY = -torch.inf


def inputs(shape, dtype, device="cpu", spread=2.0):
    batch, queries, keys, heads, dim = shape
    return (
        (torch.randn(batch, queries, heads, dim, device=device) * spread).to(dtype),
        torch.randn(batch, keys, heads, dim, device=device).to(dtype),
        torch.randn(batch, keys, heads, dim, device=device).to(dtype),
    )


def biases(shape, dtype, device="cpu"):
    """None, a mask of padding, and additive ones in the other broadcast forms."""
    batch, queries, keys, heads, _ = shape
    padding = torch.zeros(batch, 1, 1, keys, device=device)
    padding[..., keys - keys // 3 :] = NO_KEY
    per_query = torch.randn(1, heads, queries, keys, device=device)
    # Some keys of some queries, never all.
    per_query[..., 1:][torch.rand(1, heads, queries, keys - 1, device=device) < 0.3] = NO_KEY
    per_head = torch.randn(1, heads, 1, keys, device=device)
    full = torch.randn(batch, heads, queries, keys, device=device)
    return [None, *(t.to(dtype) for t in (padding, per_query, per_head, full))]


def stock(q, k, v, bias=None, scale=None):
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=bias, scale=scale).transpose(1, 2)


def check(result, q, k, v, bias=None, scale=None):
    wide = None if bias is None else bias.double()
    truth = reference.attention(q.double(), k.double(), v.double(), bias=wide, scale=scale)
    assert_as_good_as(result, stock(q, k, v, bias, scale), truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@all_dtypes
@all_devices
def test_matches_the_truth(shape, dtype, device):
    q, k, v = inputs(shape, dtype, device)
    for bias in biases(shape, dtype, device):
        check(ops.attention(q, k, v, bias=bias), q, k, v, bias)
    check(ops.attention(q, k, v, scale=0.3), q, k, v, scale=0.3)
    check(ops.attention(q, k, v, scale=-0.2), q, k, v, scale=-0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@all_dtypes
def test_our_kernel_on_a_gpu_matches_the_truth(shape, dtype):
    before = _C.cuda_products()
    _C.set_cuda_products("own")
    try:
        q, k, v = inputs(shape, dtype, "cuda")
        for bias in biases(shape, dtype, "cuda"):
            check(ops.attention(q, k, v, bias=bias), q, k, v, bias)
        check(ops.attention(q, k, v, scale=-0.2), q, k, v, scale=-0.2)
        fresh = q.clone()
        assert torch.equal(ops.attention(fresh, k, v, out=fresh), ops.attention(q, k, v))
    finally:
        _C.set_cuda_products(before)


@all_dtypes
def test_every_isa(isa, dtype):
    for shape in SHAPES:
        q, k, v = inputs(shape, dtype)
        for bias in biases(shape, dtype):
            check(ops.attention(q, k, v, bias=bias), q, k, v, bias)


@all_dtypes
def test_the_error_does_not_grow_with_the_keys(isa, dtype):
    q, k, v = inputs((1, 24, 4096, 2, 72), dtype)
    check(ops.attention(q, k, v), q, k, v)
    check(ops.attention(q / 8, k, v + 1), q / 8, k, v + 1)


@all_dtypes
def test_large_scores(isa, dtype):
    """Small integers, so that scores up to 1e4 are exact: what is left is the exponential."""
    q = torch.randint(-16, 17, (1, 111, 2, 72)).to(dtype)
    k = torch.randint(-9, 10, (1, 600, 2, 72)).to(dtype)
    v = torch.randn(1, 600, 2, 72).to(dtype)
    k[:, 500] = q[:, 3].clamp(-9, 9)  # the maximum comes late and high
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    assert 4e3 < float(scores.abs().max()) < 1.1e4
    result = ops.attention(q, k, v, scale=1.0)
    assert torch.isfinite(result).all()
    check(result, q, k, v, scale=1.0)
    rising = torch.arange(600.0).mul(20).to(dtype).reshape(1, 1, 1, 600)  # every block is higher
    check(ops.attention(q, k, v, bias=rising, scale=0.01), q, k, v, rising, 0.01)


@all_dtypes
def test_a_query_without_keys_gives_what_torch_gives(isa, dtype):
    q, k, v = inputs((2, 19, 600, 2, 40), dtype)
    bias = torch.zeros(2, 1, 19, 600, dtype=dtype)
    bias[0, :, 3] = NO_KEY
    bias[1, :, 5, :590] = NO_KEY  # keys in the last block alone
    bias[1, :, 6, 3:] = NO_KEY  # in the first one alone
    result = ops.attention(q, k, v, bias=bias)
    expected = stock(q, k, v, bias)
    assert torch.equal(result[0, 3], expected[0, 3])
    assert not result[0, 3].any()
    check(result, q, k, v, bias)
    nothing = torch.full((1, 1, 1, 600), NO_KEY, dtype=dtype)
    assert torch.equal(ops.attention(q, k, v, bias=nothing), stock(q, k, v, nothing))


@all_dtypes
def test_special_values_stay_in_their_rows(isa, dtype):
    q, k, v = inputs((1, 19, 111, 2, 24), dtype)
    clean = ops.attention(q, k, v)
    for value in (float("nan"), float("inf")):
        poisoned = q.clone()
        poisoned[0, 3, 1, 5] = value
        result = ops.attention(poisoned, k, v)
        assert torch.isnan(result[0, 3, 1]).all()
        result[0, 3, 1] = clean[0, 3, 1]
        assert torch.equal(result, clean)
    poisoned = v.clone()
    poisoned[0, 7, 1, 5] = float("inf")
    result = ops.attention(q, k, poisoned)
    assert torch.equal(result.isfinite(), stock(q, k, poisoned).isfinite())


@all_dtypes
def test_layouts_out_and_in_place(isa, dtype):
    batch, tokens, heads, dim = 2, 37, 3, 20
    fused = torch.randn(batch, tokens, 3, heads, dim).to(dtype)
    q, k, v = fused.unbind(2)
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous())
    check(expected, q, k, v)
    assert torch.equal(ops.attention(q, k, v), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(ops.attention(*heads_first), expected)
    part = ops.attention(q[:, 5:30], k, v)
    assert torch.equal(part, expected[:, 5:30])
    assert torch.equal(ops.attention(q[:1].expand(2, -1, -1, -1), k, v)[0], expected[0])
    target = torch.zeros(batch, tokens, heads, dim + 3, dtype=dtype)[..., 2:-1]
    assert ops.attention(q, k, v, out=target) is target
    assert torch.equal(target, expected)
    before = fused.clone()
    ops.attention(q, k, v, out=q)
    assert torch.equal(q, expected)
    assert torch.equal(fused[:, :, 1:], before[:, :, 1:])


def test_empty_inputs(isa):
    q, k, v = inputs((2, 5, 7, 3, 8), torch.bfloat16)
    assert ops.attention(q[:0], k[:0], v[:0]).shape == (0, 5, 3, 8)
    assert ops.attention(q[:, :0], k, v).shape == (2, 0, 3, 8)
    assert ops.attention(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 5, 0, 8)


@all_dtypes
def test_the_result_does_not_depend_on_the_threads(dtype):
    q, k, v = inputs((1, 700, 300, 1, 40), dtype)  # one head, cut along the queries
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.attention(q, k, v)
        torch.set_num_threads(2)
        assert torch.equal(one, ops.attention(q, k, v))
    finally:
        torch.set_num_threads(threads)


def test_errors_name_the_operator_and_the_value():
    q, k, v = inputs((2, 4, 6, 3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"attention: q has shape \(4, 3, 8\)"):
        ops.attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"attention: k has shape \(2, 6, 2, 8\).*\(2, 6, 3, 8\)"):
        ops.attention(q, k[:, :, :2], v)
    with pytest.raises(ValueError, match=r"attention: v has shape \(2, 5, 3, 8\)"):
        ops.attention(q, k, v[:, :5])
    with pytest.raises(ValueError, match=r"attention: k has shape \(2, 0, 3, 8\).*at least 1"):
        ops.attention(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r"attention: v is torch.bfloat16"):
        ops.attention(q, k, v.bfloat16())
    with pytest.raises(ValueError, match=r"attention: bias is torch.float16"):
        ops.attention(q, k, v, bias=torch.zeros(1, 1, 1, 6).half())
    with pytest.raises(ValueError, match=r"attention: bias has shape \(2, 1, 1, 5\)"):
        ops.attention(q, k, v, bias=torch.zeros(2, 1, 1, 5))
    with pytest.raises(ValueError, match=r"attention: bias.*\(2, 2, 1, 6\).*\(2, 3, 4, 6\)"):
        ops.attention(q, k, v, bias=torch.zeros(2, 2, 1, 6))
    with pytest.raises(ValueError, match=r"attention: bias's last stride is 0"):
        ops.attention(q, k, v, bias=torch.zeros(2, 1, 1, 1).expand(2, 1, 1, 6))
    with pytest.raises(ValueError, match=r"attention: q's last stride is 2"):
        ops.attention(torch.zeros(2, 4, 3, 16)[..., ::2], k, v)
    wide = torch.zeros(1, 4, 1, 257)
    with pytest.raises(ValueError, match=r"attention: head dim 257 is not within 1 and 256"):
        ops.attention(wide, wide, wide)
    with pytest.raises(ValueError, match=r"attention: out has shape \(2, 4, 3, 7\)"):
        ops.attention(q, k, v, out=torch.zeros(2, 4, 3, 7))
    square = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"attention: out overlaps k or v"):
        ops.attention(square.clone(), square, square, out=square)
    with pytest.raises(ValueError, match=r"attention: q has dtype torch.int32"):
        ops.attention(q.int(), k.int(), v.int())


@all_dtypes
def test_opcheck(dtype):
    shape = (2, 5, 6, 2, 9)
    q, k, v = inputs(shape, dtype)
    for bias in biases(shape, dtype)[:3]:
        args = (q, k, v, bias, 0.3, torch.empty_like(q))
        torch.library.opcheck(torch.ops.accelrt.attention.default, args)


def test_compiles():
    q, k, v = inputs((1, 5, 6, 2, 9), torch.float32)
    compiled = torch.compile(
        lambda a, b, c: ops.attention(a * 2, b, c) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), ops.attention(q * 2, k, v) + 1)


def test_float64_is_the_reference():
    q, k, v = inputs((1, 5, 6, 2, 9), torch.float64)
    assert torch.allclose(ops.attention(q, k, v), stock(q, k, v), rtol=1e-12)


def simulate(binary, q, k, v, bias=None, scale=None, in_place=False):
    """The CUDA source; what it leaves unwritten stays NaN."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = run_simulator(
        binary, "attention", q=q, k=k, v=v, bias=bias, scale=float(scale),
        out=None if in_place else torch.full_like(q, torch.nan),
    )  # fmt: skip
    return result["q" if in_place else "out"]


# All instances, one to four warps and tiles, keys that end within a tile or with it; which bias.
SIMULATED = [
    ((1, 1, 1, 1, 8), torch.bfloat16, 0),
    ((2, 7, 5, 3, 40), torch.float16, 4),
    ((1, 19, 77, 2, 64), torch.bfloat16, 1),
    ((1, 111, 129, 1, 72), torch.bfloat16, 0),
    ((1, 19, 130, 2, 80), torch.float16, 2),
    ((1, 7, 64, 1, 88), torch.bfloat16, 3),
    ((1, 40, 65, 1, 128), torch.float16, 0),
    ((1, 40, 77, 1, 160), torch.bfloat16, 4),
    ((1, 19, 77, 1, 256), torch.float16, 1),
]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize(("shape", "dtype", "kind"), SIMULATED, ids=str)
def test_simulated_cuda_source(sim_dir, variant, shape, dtype, kind):
    q, k, v = inputs(shape, dtype)
    bias = biases(shape, dtype)[kind]
    check(simulate(sim_dir / f"accelrt_sim_{variant}", q, k, v, bias), q, k, v, bias)


def test_simulated_cuda_source_in_place_on_a_fused_projection(sim_dir):
    q, k, v = torch.randn(2, 37, 3, 2, 72).bfloat16().unbind(2)
    for variant in ("asan", "tsan"):
        binary = sim_dir / f"accelrt_sim_{variant}"
        check(simulate(binary, q, k, v, scale=-0.2, in_place=True), q, k, v, scale=-0.2)


def test_simulated_cuda_source_where_keys_are_masked(sim_dir):
    """All of a query, the first tile of another, all but the first key of a third."""
    q, k, v = inputs((1, 19, 150, 2, 24), torch.float16)
    bias = torch.zeros(1, 1, 19, 150, dtype=torch.float16)
    bias[..., 3, :] = bias[..., 5, :70] = bias[..., 7, 1:] = NO_KEY
    result = simulate(sim_dir / "accelrt_sim_asan", q, k, v, bias)
    assert not result[:, 3].any()
    assert torch.equal(result[:, 7], v[:, 0])
    check(result, q, k, v, bias)
    nothing = torch.full((1, 1, 1, 150), NO_KEY, dtype=torch.float16)
    assert not simulate(sim_dir / "accelrt_sim_asan", q, k, v, nothing).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_simulated_cuda_source_of_large_scores(sim_dir, dtype):
    binary = sim_dir / "accelrt_sim_asan"
    q = torch.randint(-16, 17, (1, 19, 1, 40)).to(dtype)
    k = torch.randint(-9, 10, (1, 300, 1, 40)).to(dtype)
    v = torch.randn(1, 300, 1, 40).to(dtype)
    k[:, 250] = q[:, 3].clamp(-9, 9)  # the maximum comes late and high
    check(simulate(binary, q, k, v, scale=1.0), q, k, v, scale=1.0)
    # Every tile is higher, by more than the maximum may lag behind and by less.
    for step in (20.0, 0.1):
        rising = torch.arange(300.0).mul(step).to(dtype).reshape(1, 1, 1, 300)
        check(simulate(binary, q, k, v, rising, 0.01), q, k, v, rising, 0.01)


def test_simulated_cuda_source_keeps_special_values_in_their_rows(sim_dir):
    binary = sim_dir / "accelrt_sim_asan"
    q, k, v = inputs((1, 19, 77, 2, 24), torch.bfloat16)
    clean = simulate(binary, q, k, v)
    for value in (torch.nan, torch.inf):
        poisoned = q.clone()
        poisoned[0, 3, 1, 5] = value
        result = simulate(binary, poisoned, k, v)
        assert torch.isnan(result[0, 3, 1]).all()
        result[0, 3, 1] = clean[0, 3, 1]
        assert torch.equal(result, clean)


def test_simulated_cuda_source_says_what_it_takes(sim_dir):
    def refused(q, k, v):
        with pytest.raises(SimulatorError, match="attention: the CUDA kernel takes"):
            simulate(sim_dir / "accelrt_sim_asan", q, k, v)

    refused(*inputs((1, 2, 3, 1, 8), torch.float32))
    refused(*inputs((1, 2, 3, 1, 20), torch.float16))
    q, k, v = inputs((1, 2, 3, 1, 8), torch.float16)
    refused(q, strided_like(k), v)
    # The stride of a dimension of one does not count.
    one = torch.as_strided(q, (1, 1, 1, 8), (11, 3, 5, 1))
    check(simulate(sim_dir / "accelrt_sim_asan", one, k, v), one, k, v)


@all_dtypes
def test_cpu_source_under_asan(sim_dir, dtype):
    for shape in ((1, 7, 19, 2, 9), (2, 13, 17, 2, 24), (1, 5, 600, 1, 130)):
        q, k, v = inputs(shape, dtype)
        for bias in biases(shape, dtype)[:3]:
            result = run_simulator(
                sim_dir / "accelrt_sim_asan", "attention", "cpu", q=q, k=k, v=v, bias=bias,
                scale=shape[-1] ** -0.5, out=torch.zeros_like(q),
            )  # fmt: skip
            check(result["out"], q, k, v, bias)
