"""residual_blend: every ISA and device, the simulated CUDA source, opcheck."""

from __future__ import annotations

import pytest
import torch
from ops_common import ODD_SIZES, all_devices, all_dtypes, assert_as_good_as, strided_like
from sim import run_simulator

from accelrt import ops, reference

SCALE = 1 / 2**0.5


def inputs(shape, dtype, device="cpu"):
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, y


def stock(x, y, alpha, scale):
    if alpha is None:
        return (x + y) * scale
    weight = alpha.to(x.dtype).reshape(-1, *([1] * (x.dim() - 1)))
    return (weight * x + (1 - weight) * y) * scale


def check(result, x, y, alpha, scale):
    wide = None if alpha is None else alpha.double()
    truth = reference.residual_blend(x.double(), y.double(), alpha=wide, scale=scale)
    assert_as_good_as(result, stock(x, y, alpha, scale), truth)


def alphas(count, device="cpu"):
    return None, torch.rand(1, device=device), torch.rand(count, device=device)


@all_dtypes
@all_devices
def test_matches_the_truth(dtype, device):
    for width in ODD_SIZES:
        for shape in ((width,), (3, width), (3, 2, 5, width), (2, 2, 3, 2, width)):
            x, y = inputs(shape, dtype, device)
            for alpha in alphas(shape[0], device):
                for scale in (1.0, SCALE):
                    result = ops.residual_blend(x, y, alpha=alpha, scale=scale)
                    check(result, x, y, alpha, scale)


@all_dtypes
def test_every_isa(isa, dtype):
    for shape in ((5, 333), (2, 40_000), (3, 4, 5, 19)):
        x, y = inputs(shape, dtype)
        for alpha in alphas(shape[0]):
            check(ops.residual_blend(x, y, alpha=alpha, scale=SCALE), x, y, alpha, SCALE)


@all_dtypes
def test_the_plain_sum_is_exact(dtype):
    x, y = inputs((7, 111), dtype)
    assert torch.equal(ops.residual_blend(x, y), x + y)
    assert torch.equal(ops.residual_blend(x, y, alpha=torch.ones(1)), x)
    assert torch.equal(ops.residual_blend(x, y, alpha=torch.zeros(7)), y)


@all_dtypes
def test_layouts(isa, dtype):
    x, y = inputs((4, 6, 7, 19), dtype)
    last = torch.channels_last
    for alpha in alphas(4):
        expected = ops.residual_blend(x, y, alpha=alpha)
        images = x.to(memory_format=last), y.to(memory_format=last)
        result = ops.residual_blend(*images, alpha=alpha)
        assert result.is_contiguous(memory_format=last)
        assert torch.equal(result, expected)
        mixed = ops.residual_blend(images[0], y, alpha=alpha)
        assert torch.equal(mixed, expected)
        assert torch.equal(ops.residual_blend(strided_like(x), y, alpha=alpha), expected)
        rows = ops.residual_blend(images[0][:, :, 2:5], images[1][:, :, 2:5], alpha=alpha)
        assert torch.equal(rows, expected[:, :, 2:5])
    wide = y[:, :1].expand(4, 6, 7, 19)
    assert torch.equal(ops.residual_blend(x, wide), ops.residual_blend(x, wide.contiguous()))
    video = torch.randn(2, 3, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last_3d)
    alpha = torch.rand(4)[::2]  # strided
    expected = ops.residual_blend(video.contiguous(), video.flip(0), alpha=alpha.clone())
    assert torch.equal(ops.residual_blend(video, video.flip(0), alpha=alpha), expected)


@all_dtypes
def test_out(dtype):
    x, y = inputs((4, 6, 19), dtype)
    for alpha in alphas(4):
        expected = ops.residual_blend(x, y, alpha=alpha, scale=SCALE)
        target = strided_like(torch.zeros_like(x))
        assert ops.residual_blend(x, y, alpha=alpha, scale=SCALE, out=target) is target
        assert torch.equal(target, expected)
        for in_place in (0, 1):
            pair = [x.clone(), y.clone()]
            ops.residual_blend(*pair, alpha=alpha, scale=SCALE, out=pair[in_place])
            assert torch.equal(pair[in_place], expected)
    empty = torch.empty(0, 5, dtype=dtype)
    assert ops.residual_blend(empty, empty, alpha=torch.ones(0)).shape == (0, 5)


def test_errors_name_the_operator_and_the_value():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"residual_blend.*y has shape \(2, 4\)"):
        ops.residual_blend(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"residual_blend.*y.*float16"):
        ops.residual_blend(x, x.half())
    with pytest.raises(ValueError, match=r"residual_blend.*alpha has shape \(3,\)"):
        ops.residual_blend(x, x, alpha=torch.zeros(3))
    with pytest.raises(ValueError, match=r"residual_blend.*alpha.*bfloat16"):
        ops.residual_blend(x, x, alpha=torch.zeros(1).bfloat16())
    with pytest.raises(ValueError, match=r"residual_blend.*6 dimensions"):
        ops.residual_blend(torch.zeros(1, 1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, 1))


@all_dtypes
def test_opcheck(dtype):
    x, y = inputs((3, 17), dtype)
    for alpha in alphas(3):
        args = (x, y, alpha, 0.5, torch.empty_like(x))
        torch.library.opcheck(torch.ops.accelrt.residual_blend.default, args)


def test_compiles():
    x, y = inputs((3, 17), torch.float32)
    alpha = torch.rand(3)
    compiled = torch.compile(
        lambda a, b, w: ops.residual_blend(a * 2, b, alpha=w) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x, y, alpha), ops.residual_blend(x * 2, y, alpha=alpha) + 1)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_dtypes
def test_simulated_cuda_source(sim_dir, variant, dtype):
    x, y = inputs((3, 2, 5, 16), dtype)
    last = torch.channels_last
    cases = (
        (x, y, None),
        (x.to(memory_format=last), y.to(memory_format=last), torch.rand(3)),
        (strided_like(x), y, torch.rand(3)),
        (x.to(memory_format=last), y, torch.rand(1)),
    )
    for a, b, alpha in cases:
        result = run_simulator(
            sim_dir / f"accelrt_sim_{variant}", "residual_blend",
            x=a, y=b, alpha=alpha, scale=SCALE, out=torch.zeros_like(b),
        )["out"]  # fmt: skip
        check(result, x, y, alpha, SCALE)


@all_dtypes
def test_cpu_source_under_asan(sim_dir, dtype):
    x, y = inputs((3, 2, 5, 19), dtype)
    alpha = torch.rand(3)
    for source in (x, strided_like(x), x.transpose(1, 3).contiguous().transpose(1, 3)):
        result = run_simulator(
            sim_dir / "accelrt_sim_asan", "residual_blend", "cpu",
            x=source, y=y, alpha=alpha, scale=SCALE,
        )["x"]  # fmt: skip
        check(result, x, y, alpha, SCALE)
