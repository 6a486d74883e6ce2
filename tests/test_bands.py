"""Bands of rows, upsamplers inside ResNet groups, and outputs over dead inputs."""

from __future__ import annotations

import functools
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn

import accelrt
from accelrt.config import Config
from accelrt.groups.resnet import ResnetGroup
from accelrt.groups.sampling import UpsampleGroup
from accelrt.groups.skips import RecomputedSkip
from accelrt.groups.state import State, channels_last

BANDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "images": {"frames_per_slice": 2},
    "smallest": {"bands": True, "slice_mib": 1e-6},
    "uneven": {"bands": True, "slice_mib": 0.02},
    "recompute": {"bands": True, "slice_mib": 1e-6, "recompute": "always"},
    "uneven-recompute": {"bands": True, "slice_mib": 0.02, "recompute": "always"},
    "not-in-place": {"bands": True, "slice_mib": 0.02, "inplace": False},
    "recompute-not-in-place": {
        "bands": True,
        "slice_mib": 1e-6,
        "recompute": "always",
        "inplace": False,
    },
    "unfused": {"bands": True, "slice_mib": 1e-6, "fuse": False},
}
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Images, height and width of the input, and of the skip.
SIZES = {
    "n2-5x7": (2, (5, 7), (10, 14)),
    "n3-odd": (3, (5, 7), (9, 13)),
    "n1-9x4": (1, (9, 4), (18, 8)),
    "n2-tiny": (2, (1, 2), (2, 4)),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale-shift": {"time_embedding_norm": "scale_shift", "output_scale_factor": 1.3},
    "no-time": {"temb_channels": None},
}


class Parts(nn.Module):
    """An upsampler, and the block that joins a skip to its output."""

    def __init__(self, skip: int, out: int, **settings: Any) -> None:
        super().__init__()
        self.up = Upsample2D(24, use_conv=True, out_channels=32)
        settings = {"temb_channels": 12, **settings}
        self.block = ResnetBlock2D(in_channels=32 + skip, out_channels=out, groups=8, **settings)

    def forward(self, x: Tensor, skip: Tensor | None, temb: Tensor, size: Any) -> Tensor:
        """As a stock block calls them."""
        y = self.up(x, size)
        full = y if skip is None else torch.cat([y, skip], dim=1)
        rows: Any = None if self.block.time_emb_proj is None else temb
        return self.block(full, rows)  # type: ignore[no-any-return]


def run_groups(
    parts: Parts, config: Config, x: Tensor, skip: Any, temb: Tensor, odd: bool
) -> tuple[Tensor, ResnetGroup, UpsampleGroup]:
    """The two groups as a UNet runs them."""
    up = UpsampleGroup("up", parts.up, config, to_skip=odd)
    group = ResnetGroup("resnet", parts.block, config, joins=skip is not None, before=up)
    state = State({}, extras={"odd_size": odd})
    state.hidden = x
    if skip is not None:
        state.skips.append(skip)
    state.temb = None if parts.block.time_emb_proj is None else temb
    up(state)
    group(state)
    return state.take(), group, up


@functools.cache
def built(kind: str, skip: int, out: int) -> Parts:
    return zoo.randomise(Parts(skip, out, **KINDS[kind]))  # type: ignore[no-any-return]


def tensors(size: str, skip: int) -> tuple[Tensor, Tensor | None, Tensor]:
    images, low, high = SIZES[size]
    x, temb = zoo.normal(images, 24, *low, seed=1), zoo.normal(images, 12, seed=3)
    return x, zoo.normal(images, skip, *high, seed=2) if skip else None, temb


@functools.cache
def stock(kind: str, size: str, skip: int, out: int, name: str) -> tuple[Tensor, float]:
    """Float64 truth and the stock error."""
    dtype = getattr(torch, name)
    x, other, temb = (None if t is None else t.to(dtype) for t in tensors(size, skip))
    assert x is not None
    assert temb is not None
    target = SIZES[size][2] if "odd" in size else None
    with torch.no_grad():
        y = zoo.clone(built(kind, skip, out), dtype)(x, other, temb, target)
    if name == "float64":
        return y, 0.0
    truth, _ = stock(kind, size, skip, out, "float64")
    return truth, zoo.relative_error(y, truth)


# Kind, channels of the skip and of the output, and whether the skip is recomputed.
VARIANTS = (
    ("plain", 16, 16, False),  # over the skip
    ("plain", 16, 32, True),
    ("scale-shift", 16, 16, True),
    ("no-time", 0, 32, False),
    ("no-time", 0, 16, False),
)


@pytest.mark.parametrize(
    ("variant", "dtype", "config"),
    zoo.in_turn(
        # Odd sizes are those of a skip.
        [(*v, size) for v in VARIANTS for size in SIZES if v[1] or "odd" not in size],
        BANDS,
    ),
    ids=str,
)
def test_upsampler_inside_a_resnet(
    variant: tuple[str, int, int, bool, str], dtype: str, config: str
) -> None:
    kind, skip, out, again, size = variant
    truth, error = stock(kind, size, skip, out, dtype)
    settings = Config(**BANDS[config])
    parts = zoo.clone(built(kind, skip, out), getattr(torch, dtype))
    x, other, temb = (
        None if t is None else t.to(getattr(torch, dtype)) for t in tensors(size, skip)
    )
    assert x is not None
    assert temb is not None
    x = channels_last(x)
    given: Any = None if other is None else channels_last(other)
    if again:
        kept = given.clone()
        given = RecomputedSkip(lambda start, stop: channels_last(kept[start:stop].clone()), given)
    before = [t.clone() for t in (x, given) if isinstance(t, Tensor)]
    with torch.no_grad():
        y, group, up = run_groups(parts, settings, x, given, temb, "odd" in size)
    assert y.shape == truth.shape
    ours = zoo.relative_error(y, truth)
    if dtype == "float64":
        assert ours < 1e-13
    else:
        zoo.assert_rule(ours, error)
    if not settings.inplace:
        after = [t for t in (x, given) if isinstance(t, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (up.axis, up.length) == (group.axis, group.length)
    assert group.axis == "frames" or (settings.bands and settings.fuse)
    if settings.bands and settings.fuse and settings.slice_mib == 1e-6 and truth.shape[2] > 4:
        assert (group.axis, group.length) == ("rows", 4)


@pytest.mark.parametrize("config", BANDS)
@pytest.mark.parametrize("where", ["up", "up.conv", "block", "block.conv1", "block.norm2"])
def test_hooks_inside(where: str, config: str) -> None:
    """A module with a hook runs as it came, and sees what it saw before."""
    parts = zoo.clone(built("plain", 16, 16), torch.float64)
    x, skip, temb = (t.double() for t in tensors("n3-odd", 16) if t is not None)
    handle = parts.get_submodule(where).register_forward_hook(lambda m, i, output: 1.5 * output)
    with torch.no_grad():
        truth = parts(x, skip, temb, (9, 13))
        x, skip = channels_last(x), channels_last(skip)
        y, group, up = run_groups(parts, Config(**BANDS[config]), x, skip, temb, True)
    assert zoo.relative_error(y, truth) < 1e-13
    alone = {g.name for g in (group, up) if g.status().kind == "untouched"}
    assert alone == {"up": {"up"}, "block": {"resnet"}}.get(where, set())
    banded = BANDS[config].get("bands") and config != "unfused"
    expected = {
        "block.conv1": "conv1 is not a plain 3x3 convolution",
        "block.norm2": "norm2 is not plain",
        "up.conv": "the upsampler has no plain 3x3 convolution",
    }
    if banded and where in expected:
        assert f"no bands: {expected[where]}" in group.status().reason
        assert group.axis == "frames"
    else:
        assert "no bands" not in group.status().reason
    handle.remove()


@pytest.mark.parametrize("config", BANDS)
def test_without_an_upsampler(config: str) -> None:
    """Over the input itself, which later rows still need, or beside it."""
    block = zoo.randomise(ResnetBlock2D(in_channels=16, temb_channels=None, groups=8)).double()
    x = zoo.normal(2, 16, 13, 6).double()
    with torch.no_grad():
        truth = block(x, None)
        state = State({})
        state.hidden = channels_last(x)
        kept, before = state.hidden, state.hidden.clone()
        settings = Config(**BANDS[config])
        group = ResnetGroup("resnet", block, settings)
        group(state)
        assert zoo.relative_error(state.take(), truth) < 1e-13
        overwritten = settings.inplace and group.length != group.total
        assert torch.equal(kept, before) != overwritten
        # Somebody who keeps the input finds it unchanged.
        kept = channels_last(x)
        state.hidden = kept
        state.hold(kept)
        group(state)
        assert torch.equal(kept, before)
        assert zoo.relative_error(state.take(), truth) < 1e-13


@pytest.mark.parametrize("config", BANDS)
def test_an_upsampler_alone(config: str) -> None:
    up = zoo.randomise(Upsample2D(16, use_conv=True)).double()
    x = zoo.normal(2, 16, 7, 5).double()
    for size in (None, (13, 9)):
        group = UpsampleGroup("up", up, Config(**BANDS[config]), to_skip=True)
        state = State({}, extras={"odd_size": size is not None})
        state.hidden = channels_last(x)
        if size is not None:
            state.skips.append(zoo.normal(2, 16, *size))
        with torch.no_grad():
            truth = up(x, size)
            group(state)
        assert zoo.relative_error(state.take(), truth) < 1e-13


def test_stages_after_a_pending_upsampler_can_be_repeated() -> None:
    parts = zoo.clone(built("no-time", 0, 32), torch.float64)
    x = channels_last(zoo.normal(2, 24, 5, 7).double())
    up = UpsampleGroup("up", parts.up, Config())
    group = ResnetGroup("resnet", parts.block, Config(), before=up)
    with torch.no_grad():
        truth = parts(x, None, x, None)
        state = State({})
        state.hidden = x
        up(state)
        for _ in range(2):
            state.hidden = x
            state.hold(x)
            group(state)
            assert zoo.relative_error(state.take(), truth) < 1e-13


@functools.cache
def tiny_vae() -> AutoencoderKL:
    """Three levels of two layers, with shortcuts."""
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
    )
    return zoo.randomise(vae)  # type: ignore[no-any-return]


def both(vae: Any, images: int) -> tuple[Tensor, Tensor]:
    """Decoded latents and encoded images of odd sizes."""
    dtype = next(vae.parameters()).dtype
    with torch.no_grad():
        return (
            vae.decode(zoo.normal(images, 4, 5, 7, seed=1).to(dtype)).sample,
            vae.encode(zoo.normal(images, 3, 22, 18, seed=2).to(dtype)).latent_dist.mean,
        )


@functools.cache
def stock_vae(images: int, name: str) -> tuple[tuple[Tensor, Tensor], tuple[float, ...]]:
    """Float64 truths and the stock errors."""
    result = both(zoo.clone(tiny_vae(), getattr(torch, name)), images)
    if name == "float64":
        return result, (0.0, 0.0)
    truths, _ = stock_vae(images, "float64")
    errors = (zoo.relative_error(y, t) for y, t in zip(result, truths, strict=True))
    return truths, tuple(errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", BANDS)
@pytest.mark.parametrize(("images", "together"), [(1, 1), (3, 1), (3, None)])
def test_image_vae(images: int, together: int | None, config: str, dtype: str) -> None:
    truths, errors = stock_vae(images, dtype)
    vae = zoo.clone(tiny_vae(), getattr(torch, dtype))
    accelrt.wrap(vae, vae_images=together, **BANDS[config])
    for y, truth, error in zip(both(vae, images), truths, errors, strict=True):
        ours = zoo.relative_error(y, truth)
        if dtype == "float64":
            assert ours < 1e-13
        else:
            zoo.assert_rule(ours, error)
    summary = accelrt.summary(vae)
    assert not summary.stock
    rows = {row.group: row for row in summary.rows if row.component == "decoder"}
    up = rows["up_blocks.0.upsamplers.0"]
    assert (up.status, up.total is None) == ("sliced", False)
    assert up.axis == rows["up_blocks.1.resnets.0"].axis


def test_tracing() -> None:
    """Bands are one graph too."""
    vae = zoo.clone(tiny_vae(), torch.float64)
    z = zoo.normal(1, 4, 5, 7).double()
    with torch.no_grad():
        truth = vae.decoder(z)
        accelrt.wrap(vae, bands=True, slice_mib=0.05, recompute="always")
        torch._dynamo.reset()
        compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
        assert zoo.relative_error(compiled(z), truth) < 1e-13
    torch._dynamo.reset()
