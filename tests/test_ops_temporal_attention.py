"""temporal_attention: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as
from sim import run_simulator

from accelrt import ops, reference

# batch, query frames, key frames, pixels, heads, head dim
SHAPES = [
    (2, 16, 16, 5, 8, 40),
    (1, 16, 16, 3, 2, 160),
    (1, 14, 14, 2, 5, 64),
    (1, 25, 25, 2, 3, 72),
    (2, 1, 1, 3, 2, 7),
    (1, 7, 19, 2, 3, 24),
    (1, 19, 7, 3, 1, 1),
    (1, 33, 64, 1, 2, 80),
    (1, 64, 64, 2, 1, 256),
    (1, 8, 8, 111, 1, 17),
]


def inputs(shape, dtype, device="cpu"):
    batch, frames, keys, pixels, heads, dim = shape
    channels = heads * dim
    return (
        torch.randn(batch, frames, pixels, channels, device=device).to(dtype),
        (torch.randn(batch, keys, pixels, channels, device=device) * 2).to(dtype),
        torch.randn(batch, keys, pixels, channels, device=device).to(dtype),
    )


def stock(q, k, v, heads, scale=None):
    """The permute copies and scaled_dot_product_attention, as diffusers does it."""
    batch, frames, pixels, channels = q.shape

    def rows(t):
        t = t.permute(0, 2, 1, 3).reshape(batch * pixels, t.shape[1], heads, channels // heads)
        return t.transpose(1, 2)

    result = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), scale=scale)
    result = result.transpose(1, 2).reshape(batch, pixels, frames, channels)
    return result.permute(0, 2, 1, 3)


def check(result, q, k, v, heads, scale=None):
    truth = reference.temporal_attention(q.double(), k.double(), v.double(), heads, scale=scale)
    assert_as_good_as(result, stock(q, k, v, heads, scale), truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@all_dtypes
@all_devices
def test_matches_the_truth(shape, dtype, device):
    q, k, v = inputs(shape, dtype, device)
    check(ops.temporal_attention(q, k, v, shape[4]), q, k, v, shape[4])
    check(ops.temporal_attention(q, k, v, shape[4], scale=0.7), q, k, v, shape[4], 0.7)


@all_dtypes
def test_every_isa(isa, dtype):
    for shape in SHAPES:
        q, k, v = inputs(shape, dtype)
        check(ops.temporal_attention(q, k, v, shape[4]), q, k, v, shape[4])


def test_large_scores_and_special_values(isa):
    q, k, v = inputs((1, 16, 16, 3, 2, 40), torch.float32)
    check(ops.temporal_attention(q * 30, k * 30, v, 2), q * 30, k * 30, v, 2)
    poisoned = q.clone()
    poisoned[0, 3, 1, 5] = float("nan")
    result = ops.temporal_attention(poisoned, k, v, 2)
    bad = torch.isnan(result)
    assert bad[0, 3, 1, :40].all()
    assert int(bad.sum()) == 40
    poisoned = q.clone()
    poisoned[0, 3, 1, 5] = float("inf")  # an infinite score: NaN, as torch has it
    assert torch.isnan(ops.temporal_attention(poisoned, k, v, 2)[0, 3, 1, :40]).all()


@all_dtypes
def test_layouts_out_and_in_place(isa, dtype):
    batch, frames, pixels, heads, dim = 2, 16, 6, 4, 24
    channels = heads * dim
    fused = torch.randn(batch, frames, pixels, 3 * channels).to(dtype)
    q, k, v = fused.chunk(3, dim=-1)
    expected = ops.temporal_attention(q.contiguous(), k.contiguous(), v.contiguous(), heads)
    assert torch.equal(ops.temporal_attention(q, k, v, heads), expected)
    part = ops.temporal_attention(q[:, :, 1:4], k[:, :, 1:4], v[:, :, 1:4], heads)
    assert torch.equal(part, expected[:, :, 1:4])
    # [B * T, H * W, C] and [B, P, T, C] storages
    by_pixel = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.temporal_attention(by_pixel, k, v, heads), expected)
    target = torch.zeros(batch, frames, pixels, channels + 3, dtype=dtype)[..., 2:-1]
    assert ops.temporal_attention(q, k, v, heads, out=target) is target
    assert torch.equal(target, expected)
    before = fused.clone()
    ops.temporal_attention(q, k, v, heads, out=q)
    assert torch.equal(q, expected)
    assert torch.equal(fused[..., channels:], before[..., channels:])
    assert ops.temporal_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], heads).numel() == 0
    assert ops.temporal_attention(q[:, :0], k, v, heads).shape == (batch, 0, pixels, channels)


def test_the_result_does_not_depend_on_the_threads():
    q, k, v = inputs((2, 16, 16, 61, 8, 40), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.temporal_attention(q, k, v, 8)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.temporal_attention(q, k, v, 8))
    finally:
        torch.set_num_threads(threads)


def test_errors_name_the_operator_and_the_value():
    x = torch.zeros(1, 4, 2, 12)
    with pytest.raises(ValueError, match=r"temporal_attention.*num_heads 5.*12"):
        ops.temporal_attention(x, x, x, 5)
    with pytest.raises(ValueError, match=r"temporal_attention.*k has shape \(1, 4, 2, 6\)"):
        ops.temporal_attention(x, x[..., :6], x, 2)
    with pytest.raises(ValueError, match=r"temporal_attention.*v.*bfloat16"):
        ops.temporal_attention(x, x, x.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"temporal_attention.*65 query"):
        ops.temporal_attention(torch.zeros(1, 65, 1, 4), x, x, 2)
    with pytest.raises(ValueError, match=r"temporal_attention.*stride is 2"):
        ops.temporal_attention(torch.zeros(1, 4, 2, 24)[..., ::2], x, x, 2)
    wide = torch.zeros(1, 4, 2, 257)
    with pytest.raises(ValueError, match=r"temporal_attention.*head dim 257"):
        ops.temporal_attention(wide, wide, wide, 1)


@all_dtypes
def test_opcheck(dtype):
    q, k, v = inputs((1, 5, 6, 2, 2, 9), dtype)
    args = (q, k, v, 2, 0.3, torch.empty_like(q))
    torch.library.opcheck(torch.ops.accelrt.temporal_attention.default, args)


def test_compiles():
    q, k, v = inputs((1, 5, 6, 2, 2, 9), torch.float32)
    compiled = torch.compile(
        lambda a, b, c: ops.temporal_attention(a * 2, b, c, 2) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(q, k, v), ops.temporal_attention(q * 2, k, v, 2) + 1)


def simulate(binary, q, k, v, heads, device="cuda", in_place=False):
    result = run_simulator(
        binary, "temporal_attention", device, q=q, k=k, v=v, num_heads=heads,
        scale=(q.shape[-1] // heads) ** -0.5, out=None if in_place else torch.zeros_like(q),
    )  # fmt: skip
    return result["q" if in_place else "out"]


# On matrix primitives: all numbers of keys, one to four warps, whole and half steps of channels.
# Then those that stay scalar: all tile sizes, one and several chunks of channels, idle slots.
SIMULATED = [
    ((1, 16, 16, 2, 3, 40), torch.bfloat16),
    ((1, 7, 19, 1, 2, 8), torch.float16),
    ((1, 25, 19, 1, 3, 56), torch.float16),
    ((2, 33, 45, 1, 1, 80), torch.bfloat16),
    ((1, 64, 64, 1, 1, 256), torch.float16),
    ((1, 1, 1, 2, 3, 72), torch.bfloat16),
    ((1, 7, 9, 1, 2, 7), torch.float32),
    ((1, 25, 19, 1, 3, 50), torch.bfloat16),
    ((1, 33, 49, 1, 1, 50), torch.float32),
    ((1, 64, 64, 1, 1, 100), torch.float16),
]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize(("shape", "dtype"), SIMULATED, ids=str)
def test_simulated_cuda_source(sim_dir, variant, shape, dtype):
    q, k, v = inputs(shape, dtype)
    result = simulate(sim_dir / f"accelrt_sim_{variant}", q, k, v, shape[4])
    check(result, q, k, v, shape[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_simulated_cuda_source_in_place_on_a_fused_projection(sim_dir, dtype):
    fused = torch.randn(1, 18, 3, 3 * 48).to(dtype)
    q, k, v = fused.chunk(3, dim=-1)
    for variant in ("asan", "tsan"):
        result = simulate(sim_dir / f"accelrt_sim_{variant}", q, k, v, 2, in_place=True)
        check(result, q, k, v, 2)


def test_simulated_cuda_source_of_large_scores_and_special_values(sim_dir):
    binary = sim_dir / "accelrt_sim_asan"
    q, k, v = inputs((1, 16, 16, 2, 2, 40), torch.bfloat16)
    check(simulate(binary, q * 30, k * 30, v, 2), q * 30, k * 30, v, 2)
    clean = simulate(binary, q, k, v, 2)
    for value in (torch.nan, torch.inf):
        poisoned = q.clone()
        poisoned[0, 3, 1, 5] = value
        result = simulate(binary, poisoned, k, v, 2)
        assert torch.isnan(result[0, 3, 1, :40]).all()
        result[0, 3, 1, :40] = clean[0, 3, 1, :40]
        assert torch.equal(result, clean)


@all_dtypes
def test_cpu_source_under_asan(sim_dir, dtype):
    for shape in ((1, 16, 16, 2, 3, 40), (2, 7, 19, 3, 2, 7), (1, 33, 3, 1, 2, 24)):
        q, k, v = inputs(shape, dtype)
        check(simulate(sim_dir / "accelrt_sim_asan", q, k, v, shape[4], "cpu"), q, k, v, shape[4])
