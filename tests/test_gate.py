"""The quality floor of a wrap: the first approximate request is checked against full compute."""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import model_zoo as zoo
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from torch import Tensor

import accelrt
from accelrt.quality import gate
from accelrt.quality.gate import decibels
from accelrt.steps import Interval, Rehash, Reuse, Taylor
from accelrt.wrap import forwards

STOCK = DiTPipeline.__call__
CALL = {"class_labels": [3, 77], "num_inference_steps": 8}
GOOD = Rehash(Interval(2), Taylor(1))
HOPELESS = Rehash(Interval(8), Reuse(), "out")
OUTPUT_TYPES = ("np", "pt", "pil")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pipe() -> Any:
    return zoo.dit_pipeline()


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The number of calls of ``model``."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = model.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe: Any, seed: int = 1, **more: Any) -> Tensor:
    found = pipe(**{**CALL, "output_type": "np", "generator": generator(seed), **more}).images
    return torch.from_numpy(found)


def tracker(pipe: Any) -> Any:
    return next(f.stepper.tracker for _, f in forwards(pipe) if f.stepper is not None)


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
def test_a_request_above_the_floor_is_the_accelerated_one(pipe: Any, output_type: str) -> None:
    def values() -> Any:
        found = pipe(**CALL, generator=generator(), output_type=output_type).images
        return np.stack([np.asarray(each) for each in found])

    accelrt.wrap(pipe, rehash=GOOD)
    expected = values()
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=20)
    assert tracker(pipe).gate == "not verified yet (floor 20 dB)"
    with counted(pipe.transformer) as calls, no_warning():
        first = values()
        assert calls == [16]  # twice
        assert tracker(pipe).latest.records[2].samples == [("predicted",)]
        second = values()
        assert calls == [24]
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)
    text = tracker(pipe).gate
    assert text.startswith("verified: ")
    assert text.endswith(" dB on the first request (floor 20 dB)")
    assert text in str(accelrt.summary(pipe))
    assert tracker(pipe).enabled


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
def test_a_request_below_the_floor_is_computed_in_full(pipe: Any, output_type: str) -> None:
    def values() -> Any:
        found = pipe(**CALL, generator=generator(), output_type=output_type).images
        return np.stack([np.asarray(each) for each in found])

    accelrt.wrap(pipe)
    exact = values()
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=HOPELESS, quality_floor=60.0)
    with (
        counted(pipe.transformer) as calls,
        pytest.warns(UserWarning, match=r"\d dB PSNR .* quality_floor is 60 dB: every step of Di"),
    ):
        first = values()
    assert calls == [16]
    with counted(pipe.transformer) as calls, no_warning():
        second = values()
    assert calls == [8]
    assert np.array_equal(first, exact)
    assert np.array_equal(second, exact)
    assert tracker(pipe).gate.startswith("not kept: ")
    assert tracker(pipe).gate.endswith("(floor 60 dB); every step is computed")
    assert not tracker(pipe).enabled


def test_the_warning_points_at_the_call(pipe: Any) -> None:
    accelrt.wrap(pipe, rehash=HOPELESS, quality_floor=60.0)
    with pytest.warns(UserWarning, match="quality_floor") as seen:
        images(pipe)
    assert [w.filename for w in seen if "quality_floor" in str(w.message)] == [__file__]


def test_a_request_without_predictions_leaves_the_gate_unverified(pipe: Any) -> None:
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=20)
    with counted(pipe.transformer) as calls:
        images(pipe, num_inference_steps=2)
        assert calls == [2]
        assert tracker(pipe).gate.startswith("not verified yet")
        images(pipe)
        assert calls == [18]
    assert tracker(pipe).gate.startswith("verified")


def test_random_numbers_are_drawn_as_by_one_call(pipe: Any) -> None:
    """Each sample has its own generator."""
    pair = [generator(1), generator(2)]
    call = {**CALL, "output_type": "np", "guidance_scale": 1.0}
    pipe(**call, generator=pair)
    after = [each.get_state() for each in pair]
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=1e-3)
    pair = [generator(1), generator(2)]
    first = pipe(**call, generator=pair).images
    assert tracker(pipe).gate.startswith("verified")
    assert all(torch.equal(a.get_state(), b) for a, b in zip(pair, after, strict=True))
    again = pipe(**call, generator=[generator(1), generator(2)]).images
    assert np.array_equal(first, again)


@pytest.mark.parametrize("rehash", [GOOD, HOPELESS])
def test_the_global_generator_advances_as_by_one_call(pipe: Any, rehash: Rehash) -> None:
    torch.manual_seed(3)
    pipe(**CALL, output_type="np")
    after = torch.get_rng_state()
    accelrt.wrap(pipe, rehash=rehash, quality_floor=25.0)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(**CALL, output_type="np")
    assert not tracker(pipe).gate.startswith("not verified")
    assert torch.equal(torch.get_rng_state(), after)


def test_both_runs_start_from_the_same_noise(pipe: Any) -> None:
    """Else no floor would be kept: the pictures would be others."""
    accelrt.wrap(pipe, rehash=Rehash(Interval(7), Taylor(1)), quality_floor=1e-3)
    starts: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...], __: Any) -> None:
        starts.append(args[0].clone())

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(**CALL, output_type="np")  # from torch's own generator
    handle.remove()
    assert len(starts) == 16
    assert torch.equal(starts[0], starts[8])


def test_latents_are_compared_in_their_own_range() -> None:
    pipe = zoo.animatediff_pipeline()
    expected = zoo.run_animatediff(accelrt.wrap(pipe))
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=Rehash(Interval(3, 1), Reuse(), "out"), quality_floor=300.0)
    with pytest.warns(UserWarning, match="AnimateDiffPipeline"):
        result = zoo.run_animatediff(pipe, return_dict=True)
    assert torch.equal(result, expected)
    number = float(tracker(pipe).gate.split()[2])
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=Rehash(Interval(3, 1), Reuse(), "out"))
    ours = zoo.run_animatediff(pipe)
    mse = float((ours - expected).double().square().mean())
    width = float(expected.max() - expected.min())
    assert width > 2
    assert number == pytest.approx(10 * math.log10(width**2 / mse), abs=0.06)


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_latents_are_known_by_the_output_type(
    output_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def ask(*_: Any, latent: bool) -> float:
        asked.append(latent)
        return math.inf

    monkeypatch.setattr(gate, "decibels", ask)
    pipe = accelrt.wrap(zoo.animatediff_pipeline(), rehash=Rehash(Interval(2, 1)), quality_floor=9)
    zoo.run_animatediff(pipe, output_type=output_type)
    assert asked == [output_type == "latent"]
    assert tracker(pipe).gate == "verified: identical on the first request (floor 9 dB)"


def test_a_tuple_is_compared_by_its_pictures(pipe: Any) -> None:
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=20)
    found = pipe(**CALL, output_type="np", return_dict=False, generator=generator())
    assert isinstance(found, tuple)
    assert tracker(pipe).gate.startswith("verified")


def test_an_error_leaves_the_gate_unverified(pipe: Any) -> None:
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=20)
    decode, runs = pipe.vae.decode, [0]

    def fail_at(run: int) -> Any:
        def failing(*args: Any, **kwargs: Any) -> Any:
            runs[0] += 1
            if runs[0] == run:
                raise RuntimeError("out of luck")
            return decode(*args, **kwargs)

        return failing

    for run in (1, 2):  # the accelerated one, the computed one
        runs[0] = 0
        pipe.vae.decode = fail_at(run)
        with pytest.raises(RuntimeError, match="out of luck"):
            images(pipe)
        assert tracker(pipe).gate.startswith("not verified yet")
        assert tracker(pipe).enabled
    del pipe.vae.decode
    with pytest.raises(TypeError, match="no_such_argument"):
        pipe(**CALL, no_such_argument=1)
    with counted(pipe.transformer) as calls:
        images(pipe)
    assert calls == [16]
    assert tracker(pipe).gate.startswith("verified")


def test_values_that_are_not_finite_do_not_pass(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias[0] = math.nan
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=1e-3)
    with pytest.warns(UserWarning, match="nan dB"):
        pipe(**CALL, output_type="np")
    assert not tracker(pipe).enabled


def test_the_class_is_restored_with_the_last_gate(pipe: Any) -> None:
    other = zoo.dit_pipeline()
    for each in (pipe, other):
        accelrt.wrap(each, rehash=GOOD, quality_floor=20)
    assert DiTPipeline.__call__ is not STOCK
    assert inspect.signature(DiTPipeline.__call__) == inspect.signature(STOCK)
    accelrt.unwrap(pipe)
    assert DiTPipeline.__call__ is not STOCK
    accelrt.unwrap(other)
    assert DiTPipeline.__call__ is STOCK
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=20)
    accelrt.unwrap(pipe.transformer)  # what the gate is about
    assert DiTPipeline.__call__ is STOCK


def test_the_class_is_restored_when_the_pipeline_dies() -> None:
    pipe = accelrt.wrap(zoo.dit_pipeline(), rehash=GOOD, quality_floor=20)
    assert DiTPipeline.__call__ is not STOCK
    del pipe
    gc.collect()
    assert DiTPipeline.__call__ is STOCK


def test_a_wrap_that_fails_leaves_no_gate(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no stage or group is called"):
        accelrt.wrap(pipe, rehash=Rehash(boundary="nowhere"), quality_floor=20)
    assert DiTPipeline.__call__ is STOCK


def test_another_pipeline_of_the_class_runs_as_ever(pipe: Any) -> None:
    other = zoo.dit_pipeline()
    expected = images(other)
    accelrt.wrap(pipe, rehash=HOPELESS, quality_floor=60)
    with counted(other.transformer) as calls, no_warning():
        assert torch.equal(images(other), expected)
    assert calls == [8]
    accelrt.wrap(other, rehash=GOOD)  # without a floor
    with counted(other.transformer) as calls:
        images(other)
    assert calls == [8]


def test_a_subclass_has_its_own_gate(pipe: Any) -> None:
    class Inherits(DiTPipeline):
        pass

    class Calls(DiTPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    base = zoo.dit_pipeline()
    accelrt.wrap(base, rehash=GOOD, quality_floor=20)
    own = Calls.__call__
    for kind in (Inherits, Calls):
        sub = kind(**{name: pipe.components[name] for name in ("transformer", "vae", "scheduler")})
        sub.set_progress_bar_config(disable=True)
        accelrt.wrap(sub, rehash=GOOD, quality_floor=20)
        with counted(sub.transformer) as calls:
            images(sub)
            images(sub)
        assert calls == [24]
        assert tracker(base).gate.startswith("not verified yet")
        accelrt.unwrap(sub)
    assert "__call__" not in vars(Inherits)
    assert Calls.__call__ is own
    accelrt.unwrap(base)
    assert DiTPipeline.__call__ is STOCK


def test_threads_wait_for_the_verdict(pipe: Any) -> None:
    accelrt.wrap(pipe, rehash=GOOD, quality_floor=20)
    entered, going = threading.Event(), threading.Event()
    decode = pipe.vae.decode

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        going.wait(30)
        return decode(*args, **kwargs)

    pipe.vae.decode = slow
    results: dict[int, Tensor] = {}

    def work(number: int) -> None:
        results[number] = images(pipe, seed=number)

    with counted(pipe.transformer) as calls:
        first = threading.Thread(target=work, args=(1,))
        first.start()
        assert entered.wait(30)
        second = threading.Thread(target=work, args=(2,))
        second.start()
        second.join(0.3)
        assert calls == [8]  # the second request has not begun
        going.set()
        first.join()
        second.join()
    assert calls == [24]
    del pipe.vae.decode
    expected = [images(pipe, seed=number) for number in (1, 2)]
    assert torch.equal(results[1], expected[0])
    assert torch.equal(results[2], expected[1])


def test_two_pipelines_in_two_threads() -> None:
    pipes = [zoo.dit_pipeline(), zoo.dit_pipeline()]
    calls = [0, 0]
    handles = []
    for i, (each, rehash) in enumerate(zip(pipes, (GOOD, HOPELESS), strict=True)):
        accelrt.wrap(each, rehash=rehash, quality_floor=45.0)

        def count(*_: Any, i: int = i) -> None:
            calls[i] += 1

        handles.append(each.transformer.register_forward_hook(count))
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            images(pipes[i])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert calls == [24, 24]
    assert tracker(pipes[0]).gate.startswith("verified")
    assert tracker(pipes[1]).gate.startswith("not kept")
    for each in pipes:
        accelrt.unwrap(each)
    assert DiTPipeline.__call__ is STOCK


@pytest.mark.parametrize("floor", [0, -1.0, True, math.inf, math.nan, "30"])
def test_a_wrong_floor_is_refused(pipe: Any, floor: Any) -> None:
    with pytest.raises(ValueError, match=r"quality_floor is .*; allowed: a number of dB above 0"):
        accelrt.wrap(pipe, rehash=GOOD, quality_floor=floor)
    assert not accelrt.is_wrapped(pipe)


def test_a_floor_needs_predicted_steps_and_a_pipeline(pipe: Any) -> None:
    with pytest.raises(ValueError, match="allowed: only with rehash"):
        accelrt.wrap(pipe, quality_floor=30)
    with pytest.raises(ValueError, match="DiTTransformer2DModel is none"):
        accelrt.wrap(pipe.transformer, rehash=GOOD, quality_floor=30)
    assert not accelrt.is_wrapped(pipe)
    assert DiTPipeline.__call__ is STOCK


def test_decibels_of_every_kind_of_output() -> None:
    black = np.zeros((2, 4, 5, 3), dtype=np.float32)
    grey = black + 0.1
    assert decibels((grey,), (black,), latent=False) == pytest.approx(20, abs=1e-4)
    assert decibels(torch.from_numpy(grey), torch.from_numpy(black), latent=False) == (
        pytest.approx(20, abs=1e-4)
    )
    assert decibels(black, black, latent=False) == math.inf

    def video(level: int) -> list[list[Image.Image]]:
        return [[Image.new("RGB", (5, 4), (level,) * 3)] * 3] * 2

    assert decibels(video(51), video(0), latent=False) == pytest.approx(10 * math.log10(25))
    # Latents, and numbers that cannot be pictures: the range of the reference.
    wide = torch.tensor([0.0, 0.5, 4.0])
    assert decibels(wide + 0.04, wide, latent=True) == pytest.approx(40, abs=1e-3)
    assert decibels(wide + 0.04, wide, latent=False) == pytest.approx(40, abs=1e-3)
    narrow = torch.tensor([0.0, 0.5])
    assert decibels(narrow + 0.05, narrow, latent=True) == pytest.approx(20, abs=1e-3)
    assert math.isnan(decibels(grey, black * math.nan, latent=False) or 0.0)
    assert decibels("a", "a", latent=False) is None
    assert decibels([], [], latent=False) is None
    assert decibels(grey, black[:1], latent=False) is None
