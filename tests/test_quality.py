"""The metrics against hand-made values, and the paired comparison on tiny pipelines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

import accelrt
from accelrt.quality import compare, psnr, relative_error, ssim
from accelrt.quality import compare as compare_function
from accelrt.quality.compare import steps_per_comparison
from accelrt.quality.observe import captured_latents, pictures, silent_steps
from accelrt.steps import Interval, Policy, Rehash, Reuse, Schedule, Taylor

DIT_CALL = {"class_labels": [3, 77], "num_inference_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny models on a busy machine: barriers between threads would dominate."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def video_call(pipe: Any, frames: int = 3) -> dict[str, Any]:
    """Latents of 2 x 3."""
    return {
        "prompt_embeds": zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=4),
        "negative_prompt_embeds": zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=5),
        "num_frames": frames,
        "height": 2 * pipe.vae_scale_factor,
        "width": 3 * pipe.vae_scale_factor,
        "num_inference_steps": 2,
    }


def test_relative_error_values() -> None:
    assert relative_error([3.0, 4.0], [3.0, 4.0]) == 0.0
    assert relative_error([0.0, 0.0], [3.0, 4.0]) == 1.0
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error([1.0], [0.0]) == math.inf
    assert relative_error([0.0], [0.0]) == 0.0
    # float32 would lose this difference.
    assert relative_error(
        torch.tensor([1 + 1e-12], dtype=torch.float64), torch.ones(1)
    ) == pytest.approx(1e-12, rel=1e-3)


def test_psnr_values() -> None:
    black = torch.zeros(2, 3, 5, 7)
    assert psnr(black + 0.1, black) == pytest.approx(20.0, abs=1e-5)
    assert psnr(black + 25.5, black, data_range=255.0) == pytest.approx(20.0)
    assert psnr(black, black) == math.inf
    one_pixel = black.clone()
    one_pixel[0, 0, 0, 0] = 1
    assert psnr(one_pixel, black) == pytest.approx(10 * math.log10(black.numel()))


def ssim_by_windows(x: Tensor, y: Tensor, data_range: float) -> float:
    """Equation 13 of Wang et al. written out, window by window, for one channel."""
    at = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a = (weights * (a - mean_a) ** 2).sum()
            var_b = (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
            values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_equation_13_of_wang_et_al(data_range: float) -> None:
    x = torch.rand(2, 3, 13, 17, dtype=torch.float64) * data_range
    y = (x + 0.1 * data_range * torch.randn_like(x)).clamp(0, data_range)
    expected = [
        ssim_by_windows(a, b, data_range)
        for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)
    ]
    assert ssim(x, y, data_range=data_range) == pytest.approx(sum(expected) / 6, abs=1e-10)


def test_ssim_identities() -> None:
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    assert ssim(x, x) == pytest.approx(1.0, abs=1e-12)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-12)
    # Flat pictures: only the luminance term is left.
    flat = ssim(torch.full((11, 11), 0.25), torch.full((11, 11), 0.75))
    assert flat == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4))
    assert ssim(1 - x, x) < 0  # a negative picture is anticorrelated


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(torch.zeros(2), torch.zeros(3)), r"psnr: shapes \(2,\) and \(3,\)"),
        (lambda: psnr(torch.zeros(2), torch.ones(2), data_range=0), "data_range is 0"),
        (lambda: psnr([], []), "empty"),
        (lambda: relative_error([1.0], [1.0, 2.0]), "relative_error: shapes"),
        (lambda: ssim(torch.zeros(3, 10, 40), torch.zeros(3, 10, 40)), "at least 11"),
        (lambda: ssim(torch.zeros(16, 16), torch.zeros(16, 16), window=4), "window is 4"),
        (lambda: ssim(torch.zeros(16, 16), torch.zeros(16, 16), sigma=0), "sigma is 0"),
    ],
)
def test_metrics_refuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_compare_images() -> None:
    pipe = zoo.dit_pipeline()
    before = (set(vars(pipe)), set(vars(pipe.vae)), set(vars(pipe.scheduler)))
    seen: list[tuple[str, int, int]] = []
    result = compare(
        pipe,
        DIT_CALL,
        seed=5,
        repeats=2,
        on_progress=lambda *a: seen.append(a),
        samples_per_slice=1,
    )
    assert not accelrt.is_wrapped(pipe)
    assert (set(vars(pipe)), set(vars(pipe.vae)), set(vars(pipe.scheduler))) == before
    assert result.pipeline == "DiTPipeline"
    assert not result.video
    side = 8 * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    assert result.stock.pictures.shape == result.accelrt.pictures.shape == (2, 1, 3, side, side)
    assert result.stock.latents is not None
    assert result.stock.latents.shape == (2, 4, 8, 8)
    assert len(result.stock.seconds) == len(result.accelrt.seconds) == 2
    assert result.restored
    assert result.restored_runs == 1
    assert result.latent_error is not None
    assert result.latent_error < 1e-4
    assert result.psnr_db > 60
    assert 0 < result.accelrt.peak_bytes < result.stock.peak_bytes
    parameters = [p for m in (pipe.vae, pipe.transformer) for p in m.parameters()]
    assert result.weight_bytes >= 4 * sum(p.numel() for p in parameters)
    assert result.config.samples_per_slice == 1
    # Progress covers every step of every run.
    runs = list(dict.fromkeys(what for what, _, _ in seen))
    assert runs == [
        "stock: run 1", "accelrt: run 1", "accelrt: run 2", "stock: run 2",
        "accelrt: memory", "stock: memory",
    ]  # fmt: skip
    assert len(seen) == steps_per_comparison(pipe, DIT_CALL, 2)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["speedup"] == pytest.approx(result.speedup)
    assert plain["groups"]["counts"] == result.groups.counts()


def test_compare_video() -> None:
    pipe = zoo.animatediff_pipeline()
    result = compare(pipe, video_call(pipe), repeats=1)
    assert result.video
    scale = pipe.vae_scale_factor
    assert result.stock.pictures.shape == (1, 3, 3, 2 * scale, 3 * scale)
    assert result.stock.latents is not None
    assert result.stock.latents.shape == (3, 4, 2, 3)
    assert result.restored
    assert result.restored_runs == 1
    assert result.latent_error is not None
    assert result.latent_error < 1e-4
    json.dumps(result.to_dict(), allow_nan=False)


def test_compare_with_fewer_computed_steps() -> None:
    pipe = zoo.dit_pipeline()
    rehash = Rehash(Schedule((0, 1, 2, 4), steps=6), Taylor(1), "out")
    call = {**DIT_CALL, "num_inference_steps": 6}
    seen: list[tuple[str, int, int]] = []
    result = compare(pipe, call, rehash=rehash, repeats=2, on_progress=lambda *a: seen.append(a))
    assert not accelrt.is_wrapped(pipe)
    assert result.restored
    assert result.rehash == rehash.to_dict()
    assert result.computed_stages == pytest.approx(4 / 6)
    assert result.cache_bytes > 0
    assert result.latent_error is not None
    assert 1e-4 < result.latent_error < 0.5
    assert 20 < result.psnr_db < 90
    # The wrapped side's memory is that of a whole call.
    assert seen[-8:] == [
        *(("accelrt: memory", i, 6) for i in range(1, 7)),
        ("stock: memory", 1, 2), ("stock: memory", 2, 2),
    ]  # fmt: skip
    assert len(seen) == steps_per_comparison(pipe, call, 2, rehash=True)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert Rehash.from_dict(plain["rehash"]) == rehash
    assert plain["computed_stages"] == result.computed_stages
    assert plain["cache_bytes"] == result.cache_bytes


def test_compare_tells_many_computed_steps_from_few() -> None:
    pipe = zoo.dit_pipeline()
    call = {**DIT_CALL, "num_inference_steps": 8}
    many, few = (
        compare(pipe, call, rehash=Rehash(Interval(every), Reuse(), "out"), repeats=1)
        for every in (2, 8)
    )
    assert many.psnr_db > few.psnr_db + 1
    assert many.computed_stages == pytest.approx(5 / 8)
    assert few.computed_stages == pytest.approx(3 / 8)


def test_compare_without_a_cut_computes_every_step() -> None:
    result = compare(zoo.dit_pipeline(), DIT_CALL, repeats=1)
    assert result.rehash is None
    assert result.computed_stages == 1.0
    assert result.cache_bytes == 0


def test_compare_reads_the_file_of_a_schedule(tmp_path: Path) -> None:
    rehash = Rehash(Interval(2, 1), Reuse())
    rehash.save(tmp_path / "schedule.json")
    result = compare(zoo.dit_pipeline(), DIT_CALL, rehash=tmp_path / "schedule.json", repeats=1)
    assert result.rehash == rehash.to_dict()
    assert result.computed_stages == pytest.approx(2 / 3)
    with pytest.raises(OSError, match=r"none\.json"):
        compare(zoo.dit_pipeline(), DIT_CALL, rehash=tmp_path / "none.json")


class Mine(Policy):
    """A policy that cannot be written down."""

    def fixed(self, step: int, steps: int | None) -> bool:
        return True


@pytest.mark.parametrize(
    ("rehash", "message"),
    [
        (Rehash(Schedule((0, 1), steps=4)), "made for 4 steps, not for 3"),
        (Rehash(Schedule((0, 7))), "step 7 is none of 3 steps"),
        (Rehash(boundary="nowhere"), "no stage or group is called 'nowhere'"),
        (Rehash(Mine()), "Mine is not one of ours"),
        (3, "rehash is 3; allowed"),
    ],
)
def test_compare_refuses_a_cut_before_any_work(rehash: Any, message: str) -> None:
    pipe = zoo.dit_pipeline()

    def never(*_: Any) -> None:
        raise AssertionError("a step has run")

    with pytest.raises(ValueError, match=message):
        compare(pipe, DIT_CALL, rehash=rehash, on_progress=never)
    assert not accelrt.is_wrapped(pipe)


def test_compare_notices_what_an_unwrap_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = zoo.dit_pipeline()

    def careless(target: Any) -> Any:
        accelrt.unwrap(target)
        with torch.no_grad():
            pipe.transformer.proj_out_2.bias += 1e-3
        return target

    monkeypatch.setitem(compare_function.__globals__, "unwrap", careless)
    result = compare(pipe, DIT_CALL, repeats=1)
    assert not result.restored


def test_compare_leaves_the_pipeline_unwrapped_after_an_error() -> None:
    pipe = zoo.dit_pipeline()

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("accelrt"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pipe, DIT_CALL, on_progress=stop)
    assert not accelrt.is_wrapped(pipe)
    assert "progress_bar" not in vars(pipe)
    assert "decode" not in vars(pipe.vae)


def test_compare_refuses() -> None:
    pipe = zoo.dit_pipeline()
    with pytest.raises(ValueError, match="repeats is 0"):
        compare(pipe, DIT_CALL, repeats=0)
    with pytest.raises(ValueError, match="takes no prompt; known: class_labels"):
        compare(pipe, {**DIT_CALL, "prompt": "a seven"})
    with pytest.raises(ValueError, match="generator is set by the comparison"):
        compare(pipe, {**DIT_CALL, "generator": None})
    with pytest.raises(ValueError, match="unknown setting slice"):
        compare(pipe, DIT_CALL, slice=3)
    with pytest.raises(ValueError, match=r"wrapped; call accelrt\.unwrap first"):
        compare(accelrt.wrap(pipe), DIT_CALL)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    with pytest.raises(accelrt.UnsupportedModelError, match="DiTTransformer2DModel"):
        compare(DDPMPipeline(unet, DDPMScheduler()), {})


def test_captured_latents_are_those_of_the_pipeline() -> None:
    pipe = zoo.animatediff_pipeline()
    call = {**video_call(pipe), "generator": torch.Generator().manual_seed(0)}
    with captured_latents(pipe) as found:
        pipe(**call, output_type="np")
    call["generator"].manual_seed(0)
    expected = pipe(**call, output_type="latent").frames  # [1, C, F, H, W]
    scaled = torch.cat(found).unflatten(0, (1, 3)).transpose(1, 2) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(scaled, expected)


def test_steps_are_reported_for_both_kinds_of_bar() -> None:
    class Pipe:
        def loop(self) -> list[int]:
            return list(self.progress_bar([4, 5, 6]))  # type: ignore[attr-defined]

        def manual(self) -> None:
            with self.progress_bar(total=2) as bar:  # type: ignore[attr-defined]
                bar.update()
                bar.update()

        def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
            raise AssertionError

    pipe, seen = Pipe(), []
    with silent_steps(pipe, lambda done, total: seen.append((done, total))):
        assert pipe.loop() == [4, 5, 6]
        pipe.manual()
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]
    assert vars(pipe) == {}


def test_pictures_need_a_known_output() -> None:
    with pytest.raises(ValueError, match="neither images nor frames"):
        pictures(object())
