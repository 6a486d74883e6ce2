"""group_norm_stats, group_norm_apply: layouts, slices, clips, two sources, ISAs, simulator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as, error
from sim import run_simulator

from accelrt import ops, reference

PLANAR, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
all_layouts = pytest.mark.parametrize("layout", [PLANAR, CHANNELS_LAST], ids=["planar", "last"])

# (N, C, H, W), groups: the odd sizes 1, 7, 19, 111, 989 as channels, as pixels, as images.
SHAPES = [
    ((2, 32, 8, 8), 4),
    ((1, 111, 7, 1), 3),
    ((19, 4, 1, 1), 2),
    ((1, 1, 19, 7), 1),
    ((2, 19, 7, 7), 19),
    ((1, 40, 1, 989), 4),
    ((1, 989, 3, 1), 1),
    ((3, 320, 5, 7), 32),
]


def image(shape, dtype=torch.float32, layout=PLANAR, device="cpu", mean=0.5, std=2.0):
    x = torch.randn(shape, device=device) * std + mean
    return x.to(dtype).contiguous(memory_format=layout)


def vectors(channels, dtype, device="cpu"):
    return (torch.randn(channels, device=device) * 0.5 + 1).to(dtype), torch.randn(
        channels, device=device
    ).to(dtype)


def both(x, groups, weight=None, bias=None, *, eps=1e-5, **options):
    """The two passes one after the other."""
    shared = {k: options[k] for k in ("x2", "add", "frames") if k in options}
    stats = ops.group_norm_stats(x, groups, **shared)
    return ops.group_norm_apply(x, stats, groups, weight, bias, eps=eps, **options)


def truth_of(x, groups, weight=None, bias=None, *, eps=1e-5, **options):
    """The same in float64, by the reference."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    shared = {k: wide[k] for k in ("x2", "add", "frames") if k in wide}
    stats = reference.group_norm_stats(x.double(), groups, **shared)
    affine = [None if t is None else t.double() for t in (weight, bias)]
    return reference.group_norm_apply(x.double(), stats, groups, *affine, eps=eps, **wide)


def stock(x, groups, weight=None, bias=None, *, x2=None, add=None, scale=None, shift=None,
          frames=1, silu=False, eps=1e-5):  # fmt: skip
    """What diffusers does, in the dtype of ``x``."""
    full = x if x2 is None else torch.cat([x, x2], dim=1)
    if add is not None:
        full = full + add[:, :, None, None]
    if frames > 1:
        clips = full.unflatten(0, (-1, frames)).transpose(1, 2)
        y = F.group_norm(clips, groups, weight, bias, eps).transpose(1, 2).flatten(0, 1)
    else:
        y = F.group_norm(full, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None])
    if shift is not None:
        y = y + shift[:, :, None, None]
    return F.silu(y) if silu else y


def assert_stats_close(stats, truth, tolerance=2e-6):
    """Counts equal; mean and M2 within `tolerance` of the deviation and of M2, plus a rounding."""
    stats = stats.double().cpu()
    assert torch.equal(stats[..., 0], truth[..., 0])
    deviation = (truth[..., 2] / truth[..., 0]).sqrt()
    gap = (stats[..., 1] - truth[..., 1]).abs()
    assert bool((gap <= tolerance * deviation + 1.2e-7 * truth[..., 1].abs()).all())
    # What rounding the mean to float32 leaves in M2 is the floor where M2 itself is (almost) 0.
    floor = truth[..., 0] * (1.2e-7 * truth[..., 1]) ** 2
    assert bool(((stats[..., 2] - truth[..., 2]).abs() <= tolerance * truth[..., 2] + floor).all())


@all_layouts
@all_dtypes
@all_devices
@pytest.mark.parametrize("silu", [False, True])
def test_matches_the_truth(layout, dtype, device, silu):
    for shape, groups in SHAPES:
        x = image(shape, dtype, layout, device)
        weight, bias = vectors(shape[1], dtype, device)
        assert_stats_close(
            ops.group_norm_stats(x, groups), reference.group_norm_stats(x.double(), groups).cpu()
        )
        ours = both(x, groups, weight, bias, silu=silu)
        assert ours.stride() == x.stride()
        truth = truth_of(x, groups, weight, bias, silu=silu)
        if x[0].numel() == groups:  # one value per group: torch refuses
            assert_as_good_as(ours, truth.to(dtype), truth)
        else:
            assert_as_good_as(ours, stock(x, groups, weight, bias, silu=silu), truth)


@all_layouts
@all_dtypes
def test_every_isa(isa, layout, dtype):
    x = image((2, 70, 9, 7), dtype, layout)
    x2 = image((2, 26, 9, 7), dtype, layout)
    weight, bias = vectors(96, dtype)
    options = {"x2": x2, "add": torch.randn(2, 96).to(dtype), "silu": True}
    truth = truth_of(x, 6, weight, bias, **options)
    assert_as_good_as(
        both(x, 6, weight, bias, **options), stock(x, 6, weight, bias, **options), truth
    )


@all_dtypes
@all_devices
def test_all_options_together(dtype, device):
    weight, bias = vectors(30, dtype, device)
    # The groups of 5 channels straddle the boundary at 13; the second source is planar once.
    for layout in (PLANAR, CHANNELS_LAST):
        x = image((6, 13, 5, 9), dtype, CHANNELS_LAST, device)
        x2 = image((6, 17, 5, 9), dtype, layout, device, mean=-1)
        options = {
            "x2": x2,
            "add": torch.randn(6, 30, device=device).to(dtype),
            "scale": torch.randn(6, 60, device=device).to(dtype)[:, :30],
            "shift": torch.randn(6, 60, device=device).to(dtype)[:, 30:],
            "frames": 3,
            "silu": True,
        }
        ours = both(x, 6, weight, bias, **options)
        assert ours.is_contiguous(memory_format=CHANNELS_LAST)
        truth = truth_of(x, 6, weight, bias, **options)
        assert_as_good_as(ours, stock(x, 6, weight, bias, **options), truth)


@all_layouts
@pytest.mark.parametrize("mean", [100.0, 1000.0])
@all_devices
def test_mean_much_larger_than_the_deviation(layout, mean, device):
    x = image((2, 64, 24, 24), torch.float32, layout, device, mean, 1.0)
    weight, bias = vectors(64, torch.float32, device)
    assert_stats_close(
        ops.group_norm_stats(x, 8), reference.group_norm_stats(x.double(), 8).cpu(), 1e-5
    )
    truth = truth_of(x, 8, weight, bias)
    ours = both(x, 8, weight, bias)
    assert_as_good_as(ours, stock(x, 8, weight, bias), truth)
    assert error(ours, truth) < 1.2e-7 * mean
    # The first pixels are far from all others: a pivot taken there must not hurt.
    x[:, :, 0] = 0
    assert_stats_close(
        ops.group_norm_stats(x, 8), reference.group_norm_stats(x.double(), 8).cpu(), 1e-5
    )


def test_constant_input():
    for layout in (PLANAR, CHANNELS_LAST):
        x = torch.full((2, 8, 5, 5), 1000.25).contiguous(memory_format=layout)
        assert torch.equal(ops.group_norm_stats(x, 2)[..., 2], torch.zeros(2, 2))
        assert torch.equal(both(x, 2), torch.zeros_like(x))


@all_layouts
@all_dtypes
@all_devices
def test_slices_merge_to_the_whole(layout, dtype, device):
    x = image((4, 24, 10, 6), dtype, layout, device, mean=3)
    truth = reference.group_norm_stats(x.double(), 4, frames=4)
    by_rows = torch.full((1, 4, 3), 7.0, device=device)
    ops.group_norm_stats(x[:, :, :3], 4, frames=4, out=by_rows)
    ops.group_norm_stats(x[:, :, 3:4], 4, frames=4, out=by_rows, accumulate=True)
    ops.group_norm_stats(x[:, :, 4:], 4, frames=4, out=by_rows, accumulate=True)
    ops.group_norm_stats(x[:, :, :0], 4, frames=4, out=by_rows, accumulate=True)
    assert_stats_close(by_rows, truth.cpu())
    by_frames = ops.group_norm_stats(x[:2], 4, frames=2)
    by_frames = ops.group_norm_merge(by_frames, ops.group_norm_stats(x[2:], 4, frames=2))
    assert_stats_close(by_frames, truth.cpu())
    whole = ops.group_norm_apply(x, by_rows, 4, frames=4)
    target = torch.empty_like(x)
    ops.group_norm_apply(x[:, :, :3], by_rows, 4, frames=4, out=target[:, :, :3])
    ops.group_norm_apply(x[:, :, 3:], by_rows, 4, frames=4, out=target[:, :, 3:])
    assert torch.equal(target, whole)


@all_dtypes
@all_devices
def test_strided_views(dtype, device):
    """The same values in other layouts give the same output, up to the order of the sums."""
    x = image((2, 12, 6, 8), dtype, device=device)
    weight, bias = vectors(12, dtype, device)
    stats = ops.group_norm_stats(x, 3)
    expected = ops.group_norm_apply(x, stats, 3, weight, bias, silu=True)
    rows = torch.zeros(2, 100, 12, dtype=dtype, device=device)[:, 11:59]
    rows.copy_(x.flatten(2).transpose(1, 2))
    wide = torch.zeros(2, 12, 6, 11, dtype=dtype, device=device)[..., 2:10]
    wide.copy_(x)
    padded = torch.zeros(2, 6, 9, 15, dtype=dtype, device=device)[:, :, :8, 1:13]
    padded = padded.permute(0, 3, 1, 2)
    padded.copy_(x)
    every_other = torch.zeros(2, 24, 12, 16, dtype=dtype, device=device)[:, ::2, ::2, ::2]
    every_other.copy_(x)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    views = {
        "pixel slice": rows.transpose(1, 2).unsqueeze(3),
        "planar with gaps": wide,
        "channels-last with gaps": padded,
        "no unit stride": every_other,
        "transposed": turned,
        "frames of a video": x.expand(3, 2, 12, 6, 8).transpose(0, 1)[:, 1],
    }
    for name, view in views.items():
        shape = view.shape
        assert_stats_close(
            ops.group_norm_stats(view, 3), reference.group_norm_stats(x.double(), 3).cpu()
        )
        ours = ops.group_norm_apply(view, stats, 3, weight, bias, silu=True)
        assert torch.equal(ours, expected.reshape(shape)), name
        if name == "frames of a video":
            continue
        # Into a view of every layout, and in place.
        for other, target in views.items():
            if target.shape == shape and other not in ("frames of a video", name):
                out = target.clone(memory_format=torch.preserve_format)
                out = torch.as_strided(out, out.shape, out.stride())
                assert ops.group_norm_apply(view, stats, 3, weight, bias, silu=True, out=out) is out
                assert torch.equal(out, expected), (name, other)
    for view in (padded, wide, every_other):
        result = ops.group_norm_apply(view, stats, 3, weight, bias, silu=True, out=view)
        assert result is view
        assert torch.equal(view, expected)


def test_out_of_a_view_leaves_the_rest_alone():
    x = image((2, 20, 3, 5), layout=CHANNELS_LAST)
    stats = ops.group_norm_stats(x, 4)
    board = torch.full((2, 3, 5, 26), 7.0)
    ops.group_norm_apply(x, stats, 4, out=board[..., 3:23].permute(0, 3, 1, 2))
    assert torch.equal(board[..., 3:23].permute(0, 3, 1, 2), ops.group_norm_apply(x, stats, 4))
    assert bool((board[..., :3] == 7).all() and (board[..., 23:] == 7).all())


@all_layouts
@all_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_group_only(layout, dtype, value):
    x = image((2, 32, 5, 7), dtype, layout)
    for pixel in (0, 4):
        poisoned = x.clone(memory_format=torch.preserve_format)
        poisoned[1, 9, pixel, 3] = value
        assert torch.equal(both(poisoned, 4).isnan(), F.group_norm(poisoned, 4).isnan())


def test_large_enough_for_several_chunks():
    for layout in (PLANAR, CHANNELS_LAST):
        x = image((3, 64, 111, 95), torch.bfloat16, layout, mean=30)
        x[1] += 50
        truth = reference.group_norm_stats(x.double(), 4, frames=3)
        stats = ops.group_norm_stats(x, 4, frames=3)
        assert_stats_close(stats, truth)
        assert torch.equal(stats, ops.group_norm_stats(x, 4, frames=3))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(stats, ops.group_norm_stats(x, 4, frames=3))
        finally:
            torch.set_num_threads(threads)


def test_empty():
    assert ops.group_norm_stats(torch.empty(0, 8, 4, 4), 2).shape == (0, 2, 3)
    assert torch.equal(ops.group_norm_stats(torch.empty(2, 8, 0, 4), 2), torch.zeros(2, 2, 3))
    kept = torch.randn(2, 2, 3).abs()
    merged = ops.group_norm_stats(torch.empty(2, 8, 0, 4), 2, out=kept.clone(), accumulate=True)
    torch.testing.assert_close(merged, kept)
    assert ops.group_norm_apply(torch.empty(2, 8, 0, 4), kept, 2).shape == (2, 8, 0, 4)
    assert ops.group_norm_apply(torch.empty(0, 8, 4, 4), kept[:0], 2).shape == (0, 8, 4, 4)
    x = image((2, 8, 3, 3))
    none = torch.empty(2, 0, 3, 3)
    assert torch.equal(ops.group_norm_stats(x, 2, x2=none), ops.group_norm_stats(x, 2))
    assert torch.equal(ops.group_norm_stats(none, 2, x2=x), ops.group_norm_stats(x, 2))


def test_errors_name_the_operator_and_the_value():
    x = torch.zeros(2, 8, 3, 3)
    stats = torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"group_norm_stats.*num_groups 3 .* 8 channels"):
        ops.group_norm_stats(x, 3)
    with pytest.raises(ValueError, match=r"group_norm_stats.*frames 3 .* 2 images"):
        ops.group_norm_stats(x, 2, frames=3)
    with pytest.raises(ValueError, match=r"group_norm_stats.*\(2, 8\)"):
        ops.group_norm_stats(x.flatten(2)[:, :, 0], 2)
    with pytest.raises(ValueError, match=r"group_norm_stats.*accumulate"):
        ops.group_norm_stats(x, 2, accumulate=True)
    with pytest.raises(ValueError, match=r"group_norm_stats.*add.*\(2, 4\).*\(2, 8\)"):
        ops.group_norm_stats(x, 2, add=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"group_norm_apply.*contiguous"):
        ops.group_norm_apply(x, torch.zeros(2, 3, 2).transpose(1, 2), 2)
    with pytest.raises(ValueError, match=r"group_norm_apply.*weight.*\(4,\).*\(8,\)"):
        ops.group_norm_apply(x, stats, 2, torch.zeros(4))
    with pytest.raises(ValueError, match=r"group_norm_apply.*x2.*bfloat16"):
        ops.group_norm_apply(x, stats, 2, x2=x.bfloat16())
    with pytest.raises(ValueError, match=r"group_norm_apply.*out.*\(2, 8, 3, 2\)"):
        ops.group_norm_apply(x, stats, 2, out=x[..., :2])


@all_dtypes
def test_opcheck(dtype):
    x, x2 = image((4, 6, 3, 5), dtype), image((4, 10, 3, 5), dtype, CHANNELS_LAST)
    add = torch.randn(4, 16).to(dtype)
    weight, bias = vectors(16, dtype)
    stats = torch.zeros(2, 4, 3)
    check = torch.library.opcheck
    check_stats = torch.ops.accelrt.group_norm_stats.default
    check_apply = torch.ops.accelrt.group_norm_apply.default
    check(check_stats, (x, x2, add, 4, 2, False, stats))
    check(check_stats, (x, None, None, 3, 1, True, torch.ones(4, 3, 3)))
    stats = ops.group_norm_stats(x, 4, x2=x2, add=add, frames=2)
    out = torch.empty(4, 16, 3, 5, dtype=dtype)
    check(check_apply, (x, x2, add, stats, weight, bias, add, add, 4, 2, 1e-5, True, out))
    bare = (torch.ones(4, 2, 3), None, None, None, None, 2, 1, 1e-5, False, torch.empty_like(x))
    check(check_apply, (x, None, None, *bare))


def test_compiles():
    x = image((2, 8, 3, 5))
    weight, bias = vectors(8, torch.float32)

    def function(t):
        return both(t * 2, 2, weight, bias, silu=True) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))


def simulate(binary, x, groups, *, device="cuda", frames=1, x2=None, add=None, weight=None,
             bias=None, scale=None, shift=None, silu=False, out=None):  # fmt: skip
    """Both passes of the C++ source; the second merges two halves of the rows."""
    common = {"x2": x2, "add": add, "num_groups": groups, "frames": frames}
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    stats = torch.zeros(x.shape[0] // frames, groups, 3)
    stats = run_simulator(
        binary, "group_norm_stats", device, x=x, accumulate=1, out=stats, **common
    )["out"]
    if out is None:
        out = torch.zeros(x.shape[0], channels, *x.shape[2:], dtype=x.dtype)
        out = out.contiguous(memory_format=CHANNELS_LAST if x.stride(1) == 1 else PLANAR)
    y = run_simulator(
        binary, "group_norm_apply", device, x=x, stats=stats, weight=weight, bias=bias,
        scale=scale, shift=shift, eps=1e-5, silu=int(silu), out=out, **common,
    )["out"]  # fmt: skip
    return stats, y


def simulated_cases(dtype):
    weight, bias = vectors(48, dtype)
    add, scale, shift = (torch.randn(4, 48).to(dtype) for _ in range(3))
    last = image((4, 48, 5, 4), dtype, CHANNELS_LAST)
    # Whole vectors, a group across the two sources, clips.
    yield last[:, :32], {
        "x2": image((4, 16, 5, 4), dtype, CHANNELS_LAST), "frames": 2, "add": add, "scale": scale,
        "shift": shift, "weight": weight, "bias": bias, "silu": True,
    }  # fmt: skip
    # Planar; rows with gaps.
    yield image((2, 48, 4, 8), dtype), {"weight": weight, "bias": bias}
    yield image((1, 48, 3, 11), dtype)[..., 2:9], {"silu": True}
    # Every pixel the same memory.
    yield image((2, 48, 1, 1), dtype, CHANNELS_LAST).expand(2, 48, 5, 7), {"silu": True}
    # Mixed layouts, odd channels.
    yield image((1, 13, 3, 3), dtype), {"x2": image((1, 35, 3, 3), dtype, CHANNELS_LAST)}


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@all_dtypes
def test_simulated_cuda_source(sim_dir, variant, dtype):
    cases = list(simulated_cases(dtype))
    if variant == "tsan" and dtype != torch.bfloat16:
        cases = cases[:1]  # races do not depend on the dtype
    for x, options in cases:
        stats, y = simulate(sim_dir / f"accelrt_sim_{variant}", x, 3, **options)
        wide = {k: options.get(k) for k in ("x2", "add")}
        wide = {k: v.double() for k, v in wide.items() if v is not None}
        truth = reference.group_norm_stats(x.double(), 3, frames=options.get("frames", 1), **wide)
        assert_stats_close(stats, truth, 5e-6)
        assert_as_good_as(y, stock(x, 3, **options), truth_of(x, 3, **options))


@all_dtypes
def test_cpu_source_under_asan(sim_dir, dtype):
    for x, options in simulated_cases(dtype):
        _, y = simulate(sim_dir / "accelrt_sim_asan", x, 3, device="cpu", **options)
        assert_as_good_as(y, stock(x, 3, **options), truth_of(x, 3, **options))
