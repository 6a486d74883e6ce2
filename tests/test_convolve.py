"""Convolutions of groups by our kernel: the modules around one, what is left alone, whole models.

Whether ours is the faster one depends on the processor; here it serves everywhere.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from model_zoo import assert_rule, one_thread, relative_error  # noqa: F401
from ops_common import assert_as_good_as
from torch import nn
from zoo_pipelines import FAMILIES

import accelrt
from accelrt import _C
from accelrt.groups import convolve as ours
from accelrt.groups.convolve import along_frames, convolve, enlarge

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Shapes of the weights of the calls of our kernel, which serves every dtype."""
    seen: list[tuple[int, ...]] = []
    kernel = ours.ops.conv2d

    def watched(x, weight, *rest, **given):
        seen.append(tuple(weight.shape))
        return kernel(x, weight, *rest, **given)

    monkeypatch.setattr(ours, "conv_is_ours", lambda dtype: True)
    monkeypatch.setattr(ours.ops, "conv2d", watched)
    with torch.no_grad():
        yield seen


def images(channels: int, *, side: int = 9, dtype: torch.dtype = BF16) -> torch.Tensor:
    x = torch.randn(3, channels, side, side + 2).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def test_the_policy_is_that_of_the_processor(isa):
    native = isa == _C.best_isa() and isa in ("avx2", "avx512bf16")
    assert _C.own_conv_is_faster("bfloat16") == native
    assert not _C.own_conv_is_faster("float32")
    if isa == "generic":
        assert not _C.own_conv_is_faster("float16")


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.Conv2d(8, 12, 3, stride=2),
        Downsample2D(8, use_conv=True, out_channels=6, padding=1),
        Downsample2D(8, use_conv=True, out_channels=6, padding=0),
    ],
    ids=["3x3", "1x1", "stride", "down", "down with padding at the far ends"],
)
def test_modules_of_one_convolution(calls, module):
    x = images(8)
    module = module.to(BF16)
    y = convolve(module, x)
    assert len(calls) == 1
    assert_as_good_as(y, module(x), module.double()(x.double()))
    module.to(BF16)
    calls.clear()
    assert torch.equal(convolve(module, x, fuse=False), module(x))
    assert not calls


@pytest.mark.parametrize("size", [None, (17, 23)], ids=["twice", "given"])
def test_upsamplers(calls, size):
    module = Upsample2D(8, use_conv=True, out_channels=6).to(BF16)
    x = images(8)
    y = enlarge(module, x, size)
    assert len(calls) == 1
    assert_as_good_as(y, module(x, size), module.double()(x.double(), size))
    without = Upsample2D(8, use_conv=False)
    assert torch.equal(enlarge(without, x, size), without(x, size))
    assert len(calls) == 1


@pytest.mark.parametrize("taps", [1, 3, 5])
def test_convolutions_along_frames(calls, taps):
    conv = nn.Conv3d(8, 6, (taps, 1, 1), padding=(taps // 2, 0, 0)).to(BF16)
    x = torch.randn(2 * 7, 10, 8).to(BF16)
    y = along_frames(conv, x, 7)
    assert calls == [(6, 8, taps, 1)]
    assert y.is_contiguous()
    clips = x.view(2, 7, 1, 10, 8).permute(0, 4, 1, 2, 3)
    truth = F.conv3d(clips.double(), conv.weight.double(), conv.bias.double(), padding=conv.padding)
    back = truth.permute(0, 2, 3, 4, 1).reshape(14, 10, 6)
    stock = conv(clips).permute(0, 2, 3, 4, 1).reshape(14, 10, 6)
    assert_as_good_as(y, stock, back)


def test_what_is_not_known_runs_as_it_came(calls):
    x = images(8)
    watched = nn.Conv2d(8, 8, 3, padding=1).to(BF16)
    seen = []
    watched.register_forward_hook(lambda *_: seen.append(1))
    others = [
        watched,
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        Downsample2D(8, use_conv=False),
    ]
    for module in others:
        module.to(BF16)
        assert torch.equal(convolve(module, x), module(x))
    assert seen == [1, 1]
    plain = nn.Conv2d(8, 8, 3).to(BF16)
    assert torch.equal(convolve(plain, x.contiguous()), plain(x.contiguous()))  # channels first
    dilated = nn.Conv3d(8, 8, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)).to(BF16)
    assert along_frames(dilated, torch.randn(5, 4, 8).to(BF16), 5).shape == (5, 4, 8)
    assert not calls


@pytest.mark.parametrize("bands", [False, True], ids=["slices", "bands"])
@pytest.mark.parametrize("name", ["animatediff", "svd"])
def test_whole_pipelines(calls, name, bands):
    """UNet and VAE: as exact as with the library's convolutions."""
    family = FAMILIES[name]
    truth = family.run(family.pipe(), output_type="pt")
    pipe = family.build(torch.float32)
    stock = family.run(pipe, output_type="pt")
    assert not calls
    accelrt.wrap(pipe, bands=bands, frames_per_slice=1, slice_mib=0.01)
    wrapped = family.run(pipe, output_type="pt")
    assert len(calls) > 100
    assert {weight[2:] for weight in calls} >= {(3, 3), (1, 1)}
    assert ((3, 1) in {weight[2:] for weight in calls}) == (name == "svd")
    assert_rule(relative_error(wrapped, truth), relative_error(stock, truth))
