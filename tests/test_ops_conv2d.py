"""conv2d: every ISA and device, geometries that cut tiles, layouts, the simulator, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_common import all_devices, all_dtypes, assert_as_good_as
from sim import run_simulator

from accelrt import ops, reference

USES_TILES = True

# images, channels, height, width, output channels, kernel, stride, padding
GEOMETRIES = [
    (1, 1, 1, 1, 1, (1, 1), 1, 0),
    (2, 3, 5, 7, 4, (3, 3), 1, 1),
    (3, 20, 16, 16, 33, (3, 3), 1, 1),
    (1, 512, 9, 13, 16, (3, 3), 2, 1),  # pixels that crowd each other out
    (2, 24, 25, 300, 20, (3, 1), 1, (1, 0)),  # along frames: a tile has some columns
    (40, 16, 4, 4, 8, (3, 3), 1, 1),  # many images in a tile
    (1, 6, 40, 700, 5, (1, 3), (2, 3), (0, 1)),  # several tiles in a row
    (1, 1000, 6, 6, 18, (3, 3), 1, 1),  # several panels of channels
    (1, 999, 6, 6, 18, (3, 3), 1, 1),  # the same, the last pair is half
    (1, 1024, 5, 7, 16, (3, 3), 1, 1),  # pairs of channels whose pixels crowd each other out
    (3, 33, 5, 3, 20, (3, 3), 1, 1),  # narrow: two rows at a time, the last alone
    (2, 17, 12, 8, 8, (3, 3), 2, 1),  # narrow, of a larger input
    (1, 40, 19, 11, 70, (2, 5), (3, 2), (4, 7)),  # windows that see padding alone
]


def inputs(geometry, dtype, device="cpu"):
    n, c, h, w, o, kernel, stride, padding = geometry
    x = torch.randn(n, h, w, c, device=device).to(dtype).permute(0, 3, 1, 2)
    fan_in = c * kernel[0] * kernel[1]
    weight = (torch.randn(o, c, *kernel, device=device) / fan_in**0.5).to(dtype)
    bias = torch.randn(o, device=device).to(dtype)
    return x, weight, bias, {"stride": stride, "padding": padding}


def check(result, x, weight, bias, given):
    wide = None if bias is None else bias.double()
    truth = reference.conv2d(x.double(), weight.double(), wide, **given)
    assert_as_good_as(result, F.conv2d(x, weight, bias, **given), truth)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@all_dtypes
@all_devices
def test_matches_the_truth(geometry, dtype, device):
    x, weight, bias, given = inputs(geometry, dtype, device)
    y = ops.conv2d(x, weight, bias, **given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    check(y, x, weight, bias, given)
    check(ops.conv2d(x, weight, **given), x, weight, None, given)


@all_dtypes
def test_every_isa(isa, dtype):
    for geometry in GEOMETRIES:
        x, weight, bias, given = inputs(geometry, dtype)
        y = ops.conv2d(x, weight, bias, **given)
        check(y, x, weight, bias, given)
        last = weight.contiguous(memory_format=torch.channels_last)
        assert torch.equal(ops.conv2d(x, last, bias, **given), y)


def test_every_size_of_a_row(isa):
    """Every way in which a row of output pixels is cut into blocks."""
    for width in range(1, 40):
        x, weight, bias, given = inputs((1, 5, 3, width, 6, (3, 3), 1, 1), torch.bfloat16)
        check(ops.conv2d(x, weight, bias, **given), x, weight, bias, given)


@all_dtypes
def test_layouts_and_out(isa, dtype):
    x, weight, bias, given = inputs((3, 20, 9, 13, 33, (3, 3), 1, 1), dtype)
    expected = ops.conv2d(x, weight, bias, **given)
    wide = torch.full((3, 11, 15, 27), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    inner = wide[:, 4:24, 1:10, 1:14]
    inner.copy_(x)  # what lies around the image is no number
    assert torch.equal(ops.conv2d(inner, weight, bias, **given), expected)
    room = torch.zeros(3, 11, 15, 40, dtype=dtype).permute(0, 3, 1, 2)
    target = room[:, 3:36, 1:10, 1:14]
    assert ops.conv2d(x, weight, bias, out=target, **given) is target
    assert torch.equal(target, expected)
    target.zero_()
    assert not room.any()
    assert ops.conv2d(x[:0], weight, bias, **given).shape == (0, 33, 9, 13)
    assert ops.conv2d(x, weight[:0], bias[:0], **given).shape == (3, 0, 9, 13)
    nothing = ops.conv2d(x[:, :0], weight[:, :0], bias, **given)
    assert torch.equal(nothing, bias.view(1, -1, 1, 1).expand(3, 33, 9, 13))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_convolution_along_frames_is_one_of_images(layout):
    """As ``Conv3d`` with a kernel of (3, 1, 1)."""
    video = torch.randn(2, 12, 7, 4, 5).to(torch.bfloat16)  # [B, C, T, H, W]
    weight = (torch.randn(9, 12, 3, 1, 1) / 6).to(torch.bfloat16)
    images = video.flatten(3).contiguous(memory_format=torch.channels_last)
    plane = weight.squeeze(-1)
    if layout == "channels-last":
        plane = plane.contiguous(memory_format=torch.channels_last)
    y = ops.conv2d(images, plane, padding=(1, 0)).unflatten(3, (4, 5))
    truth = F.conv3d(video.double(), weight.double(), padding=(1, 0, 0))
    assert_as_good_as(y, F.conv3d(video, weight, padding=(1, 0, 0)), truth)


def test_threads_do_not_change_the_result():
    """A thread begins in the middle of a tile, and of its panels."""
    threads = torch.get_num_threads()
    x, weight, bias, given = inputs((5, 48, 20, 28, 80, (3, 3), 1, 1), torch.bfloat16)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.conv2d(x, weight, bias, **given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_simulator(sim_dir, dtype):
    """Under AddressSanitizer: no access beyond the tensors and the tile."""
    for geometry in GEOMETRIES[:2] + GEOMETRIES[5:6] + GEOMETRIES[8:]:
        x, weight, bias, given = inputs(geometry, dtype)
        stride, padding = ((v, v) if isinstance(v, int) else v for v in given.values())
        expected = ops.conv2d(x, weight, bias, **given)
        result = run_simulator(
            sim_dir / "accelrt_sim_asan", "conv2d", "cpu",
            x=x.permute(0, 2, 3, 1), weight=weight, bias=bias,
            stride_height=stride[0], stride_width=stride[1],
            padding_height=padding[0], padding_width=padding[1],
            out=torch.zeros_like(expected.permute(0, 2, 3, 1)),
        )  # fmt: skip
        got = result["out"].permute(0, 3, 1, 2)
        truth = reference.conv2d(x.double(), weight.double(), bias.double(), **given)
        assert_as_good_as(got, expected, truth)


def test_opcheck():
    x, weight, bias, _ = inputs(GEOMETRIES[1], torch.float32)
    out = torch.zeros(2, 5, 7, 4)
    args = (x.permute(0, 2, 3, 1), weight, bias, 1, 1, 1, 1, out)
    torch.library.opcheck(torch.ops.accelrt.conv2d.default, args)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias, given = inputs(GEOMETRIES[3], torch.float32)
    counts = []
    for run in (ops.conv2d, F.conv2d):
        with FlopCounterMode(display=False) as counter:
            run(x, weight, bias, **given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_float64_is_the_reference():
    x, weight, bias, given = inputs(GEOMETRIES[1], torch.float64)
    expected = F.conv2d(x, weight, bias, **given)
    torch.testing.assert_close(ops.conv2d(x, weight, bias, **given), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, r"x has shape \(3, 4, 5\)"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "channels of x have stride 64"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, r"weight has shape \(4, 2, 3, 3\)"),
        ({"weight": torch.zeros(3, 3, 3, 4).permute(3, 2, 1, 0)}, "weight has strides"),
        ({"weight": torch.zeros(4, 3, 9, 9)}, "does not fit"),
        ({"weight": torch.zeros(4, 3, 3, 3).half()}, "weight is torch.float16"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\)"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": (1, -1)}, r"padding is \(1, -1\)"),
        ({"padding": (1, 1, 1)}, r"padding is \(1, 1, 1\)"),
        ({"out": torch.zeros(1, 4, 8, 8)}, r"out has shape \(1, 4, 8, 8\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {
        "x": torch.zeros(1, 8, 8, 3).permute(0, 3, 1, 2),
        "weight": torch.zeros(4, 3, 3, 3),
        "bias": torch.zeros(4),
        **change,
    }
    with pytest.raises(ValueError, match=f"accelrt.ops.conv2d: .*{message}"):
        ops.conv2d(**given)
