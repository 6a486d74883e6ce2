"""Requests: interleaved, aborted, of other sizes, in threads: nothing leaks to the next."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)
from model_zoo import one_thread  # noqa: F401
from steps_common import STEPS, same, stepper_of, wrapped_run
from torch import Tensor
from zoo_pipelines import FAMILIES

import accelrt
from accelrt.steps import Interval, Policy, Rehash, Reuse, Schedule, Taylor, Threshold
from accelrt.steps.origin import origin_of

FAMILY = FAMILIES["unet2d"]
# Not the last step: without a scheduler of its own, a request does not know which that is.
REHASH = Rehash(Interval(2, warmup_steps=1, compute_last=False), Taylor(1))


class Stop(Exception):
    """Raised in a callback."""


def run(pipe: Any, steps: int = STEPS, **arguments: Any) -> Tensor:
    """The latents."""
    return FAMILY.run(pipe, num_inference_steps=steps, **arguments)


def at_step(step: int, act: Callable[[Any], Any]) -> Callable[..., dict[str, Any]]:
    """A callback that acts once."""

    def callback(pipe: Any, index: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            return act(pipe) or {}
        return {}

    return callback


@pytest.fixture
def pipe() -> Any:
    """Stable Diffusion with random weights."""
    return FAMILY.pipe()


@pytest.fixture
def alone(pipe: Any) -> Tensor:
    """What a request gives that nothing came before."""
    return wrapped_run(FAMILY, pipe, REHASH)


def other(pipe: Any) -> Any:
    """A pipeline with a scheduler of its own, and the same model."""
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    second = type(pipe)(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return second


def test_interleaved_requests(pipe: Any, alone: Tensor) -> None:
    """A request in the middle of another, on the same model: both are as if alone."""
    accelrt.wrap(pipe, rehash=REHASH)
    second, inside = other(pipe), []
    callback = at_step(2, lambda _: inside.append(run(second, 5)))
    outside = run(pipe, callback_on_step_end=callback)
    undisturbed = run(second, 5)
    accelrt.unwrap(pipe)
    assert same(outside, alone)
    assert same(inside[0], undisturbed)


def test_interleaved_steps(pipe: Any) -> None:
    """Two loops that take turns at every step: each has its own features."""
    model = FAMILY.model(pipe)
    schedulers = [DDIMScheduler(), DPMSolverMultistepScheduler()]
    text = zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=3).double()

    def loop(scheduler: Any, seed: int) -> Any:
        x = zoo.normal(1, 4, 8, 8, seed=seed).double()
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            yield
            scaled = scheduler.scale_model_input(x, t)
            with torch.no_grad():
                eps = model(scaled, t, text, return_dict=False)[0]
            x = scheduler.step(eps, t, x, return_dict=False)[0]
        yield x

    def together(order: list[int]) -> list[Any]:
        for scheduler in schedulers:
            pipe.scheduler = scheduler
            if not accelrt.is_wrapped(pipe):
                accelrt.wrap(pipe, rehash=REHASH)
            stepper_of(pipe).tracker.follow()
        loops = [loop(s, 40 + i) for i, s in enumerate(schedulers)]
        last = [None, None]
        for i in order:
            last[i] = next(loops[i])
        accelrt.unwrap(pipe)
        return last

    in_turn = together([0, 1] * 7)
    one_by_one = together([0] * 7 + [1] * 7)
    for a, b in zip(in_turn, one_by_one, strict=True):
        assert torch.equal(a, b)


def test_aborted_requests_leave_nothing(pipe: Any, alone: Tensor) -> None:
    """An exception in a callback, an early stop, and a reset, each followed by a request."""
    accelrt.wrap(pipe, rehash=REHASH)

    def stop(_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(pipe, callback_on_step_end=at_step(3, stop))
    assert same(run(pipe), alone)

    def interrupt(running: Any) -> None:
        running._interrupt = True

    run(pipe, callback_on_step_end=at_step(2, interrupt))
    assert same(run(pipe), alone)
    seen: list[int] = []

    def reset(running: Any) -> None:
        seen.append(len(_stores(running)))
        accelrt.reset(running)

    disturbed = run(pipe, callback_on_step_end=at_step(3, reset))
    assert seen[0] > 0
    assert not same(disturbed, alone)  # the step after it was computed
    assert same(run(pipe), alone)
    accelrt.unwrap(pipe)


def _stores(pipe: Any) -> dict[Any, Any]:
    return stepper_of(pipe).tracker.latest.stores


def test_nothing_is_kept_after_the_last_step(pipe: Any) -> None:
    """The features go before the decoder runs; what happened can still be read."""
    accelrt.wrap(pipe, rehash=REHASH)
    run(pipe)
    assert not _stores(pipe)
    steps = accelrt.summary(pipe).steps
    assert len(steps.rows) == STEPS
    assert steps.cache_bytes > 0
    assert "C.C.C.C" in str(steps)
    accelrt.unwrap(pipe)


def test_other_sizes_and_step_counts(pipe: Any, alone: Tensor) -> None:
    """Requests that differ in size and steps follow each other."""
    accelrt.wrap(pipe, rehash=REHASH)
    for steps, size in ((4, 72), (9, 64), (STEPS, 48)):
        out = run(pipe, steps, height=size, width=size)
        assert torch.isfinite(torch.as_tensor(out)).all()
        assert len(accelrt.summary(pipe).steps.rows) == steps
    assert same(run(pipe), alone)
    accelrt.unwrap(pipe)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guidance(pipe: Any, scale: float) -> None:
    """Off, and on: the batch has another size, and its features their own."""
    accelrt.wrap(pipe, rehash=REHASH)
    first = run(pipe, guidance_scale=scale)
    run(pipe, guidance_scale=5.0 - scale)
    assert same(run(pipe, guidance_scale=scale), first)
    accelrt.unwrap(pipe)


def test_guidance_that_is_switched_off_midway(pipe: Any) -> None:
    """The step after the change has no features of its size, and is computed."""

    def callback(running: Any, index: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index != 2:
            return {}
        running._guidance_scale = 1.0
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}

    arguments = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    exact = wrapped_run(FAMILY, pipe, Rehash(Interval(1), Taylor(1)), **arguments)
    assert same(exact, wrapped_run(FAMILY, pipe, None, **arguments))
    accelrt.wrap(pipe, rehash=Rehash(Schedule((0, 2)), Reuse()))
    run(pipe, **arguments)
    rows = accelrt.summary(pipe).steps.rows
    accelrt.unwrap(pipe)
    kinds = [row.samples[0] for row in rows]
    assert kinds == ["computed", "predicted", "computed", "computed", *["predicted"] * 3]


def test_threads_with_a_pipeline_each_and_one_model(pipe: Any, alone: Tensor) -> None:
    """Two pipelines with models of their own, and two that share one, at the same time."""
    separate = copy.deepcopy(pipe)
    shared = other(pipe)
    accelrt.wrap(pipe, rehash=REHASH)
    accelrt.wrap(separate, rehash=REHASH)
    results: dict[str, Tensor] = {}
    errors: list[BaseException] = []

    def work(name: str, what: Any) -> None:
        try:
            for _ in range(2):
                results[name] = run(what)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in (("own", pipe), ("separate", separate), ("shared", shared))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accelrt.unwrap(pipe)
    accelrt.unwrap(separate)
    assert not errors
    for name, found in results.items():
        assert same(found, alone), name


def test_a_scheduler_that_comes_after_the_wrap(pipe: Any) -> None:
    """It is followed from its first step; the one before is left as it was."""
    replaced = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    before = pipe.scheduler
    pipe.scheduler = replaced
    expected = wrapped_run(FAMILY, pipe, REHASH)
    pipe.scheduler = before
    accelrt.wrap(pipe, rehash=REHASH)
    pipe.scheduler = replaced
    assert same(run(pipe), expected)
    assert len(accelrt.summary(pipe).steps.rows) == STEPS
    accelrt.unwrap(pipe)
    for scheduler in (before, replaced):
        assert not {"step", "set_timesteps", "scale_model_input"} & set(scheduler.__dict__)


def test_schedulers_that_are_replaced_are_let_go(pipe: Any) -> None:
    """With what their requests kept."""
    accelrt.wrap(pipe, rehash=REHASH)
    gone = []
    for _ in range(3):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        run(pipe)
        gone.append(weakref.ref(pipe.scheduler))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    run(pipe)
    gc.collect()
    assert [scheduler() for scheduler in gone] == [None] * 3
    accelrt.unwrap(pipe)


def test_hooked_schedulers_look_like_themselves(pipe: Any, alone: Tensor) -> None:
    """Signatures that pipelines ask for; copies and pickles that no longer report here."""
    scheduler = pipe.scheduler
    names = ("set_timesteps", "step", "scale_model_input")
    before = {name: inspect.signature(getattr(scheduler, name)) for name in names}
    accelrt.wrap(pipe, rehash=REHASH)
    assert {name: inspect.signature(getattr(scheduler, name)) for name in names} == before
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        copied.set_timesteps(3)
        assert len(copied.timesteps) == 3
        assert copied.set_timesteps.__self__ is copied
    assert stepper_of(pipe).tracker.latest is None
    twin = copy.deepcopy(pipe)
    assert same(run(pipe), alone)
    twin_exact = run(twin)  # a copy of a wrapped model has no policy
    accelrt.unwrap(pipe)
    assert same(twin_exact, wrapped_run(FAMILY, pipe, None))


def test_a_solver_that_evaluates_a_time_twice(pipe: Any) -> None:
    """Heun's second evaluation has the same timestep: no slope is drawn through both."""
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    exact = wrapped_run(FAMILY, pipe, None)
    assert same(wrapped_run(FAMILY, pipe, Rehash(Interval(1), Taylor(2))), exact)
    out = wrapped_run(FAMILY, pipe, Rehash(Interval(3, warmup_steps=1), Taylor(2)))
    assert torch.isfinite(torch.as_tensor(out)).all()


def test_noisy_schedulers_are_told_of(pipe: Any) -> None:
    """A scheduler that adds noise at every step warns once; others do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrapped_run(FAMILY, pipe, REHASH)
    for scheduler, eta in ((EulerAncestralDiscreteScheduler, 0.0), (DDIMScheduler, 0.7)):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        accelrt.wrap(pipe, rehash=REHASH)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run(pipe, eta=eta)
            run(pipe, eta=eta)
        assert sum("adds noise at every step" in str(w.message) for w in found) == 1
        accelrt.unwrap(pipe)


def test_a_model_without_a_pipeline() -> None:
    """Its requests are told apart by their timesteps: one ends where they turn back."""
    model = zoo.clone(zoo.tiny_dit(), torch.float64)
    accelrt.wrap(model, rehash=REHASH)

    def request() -> list[Tensor]:
        outputs = []
        for t in (900, 700, 500, 300):
            inputs = {
                "hidden_states": zoo.normal(1, 4, 8, 8, seed=t).double(),
                "timestep": torch.tensor([t]),
                "class_labels": torch.tensor([3]),
            }
            with torch.no_grad():
                outputs.append(model(**inputs).sample)
        return outputs

    first, second = request(), request()
    kinds = [row.samples[0] for row in accelrt.summary(model).steps.rows]
    accelrt.unwrap(model)
    assert kinds == ["computed", "predicted", "computed", "predicted"]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_schedules_are_for_what_they_were_made_for(pipe: Any, tmp_path: Any) -> None:
    """Another number of steps, scheduler, configuration or model is refused before any step."""
    made = Rehash(
        Schedule((0, 2, 4, 6), steps=STEPS), Taylor(1),
        origin=origin_of(FAMILY.model(pipe), pipe.scheduler, STEPS),
    )  # fmt: skip
    path = tmp_path / "schedule.json"
    made.save(path, {"gamma": 0.9})
    assert Rehash.load(path) == made
    expected = wrapped_run(FAMILY, pipe, made)
    accelrt.wrap(pipe, rehash=path)
    assert same(run(pipe), expected)
    calls = []
    handle = FAMILY.model(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="7 steps, not 5"):
        run(pipe, 5)
    assert not calls
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler"):
        run(pipe)
    assert len(calls) == 1  # its timesteps were set before it could be followed
    handle.remove()
    accelrt.unwrap(pipe)
    changed = FAMILY.pipe()
    with torch.no_grad():
        for parameter in FAMILY.model(changed).parameters():
            parameter.mul_(1.5)
    accelrt.wrap(changed, rehash=made)
    with pytest.raises(ValueError, match="other weights"):
        run(changed)
    accelrt.unwrap(changed)


def test_wrap_refuses_what_is_not_a_rehash(pipe: Any, tmp_path: Any) -> None:
    """Before anything is changed."""
    (tmp_path / "bad.json").write_text("{")
    for wrong, message in (
        (7, "rehash is 7"),
        (tmp_path / "bad.json", "not valid JSON"),
        (Rehash(boundary="nowhere"), "no stage or group is called 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            accelrt.wrap(pipe, rehash=wrong)
        assert not accelrt.is_wrapped(pipe)
        assert "step" not in pipe.scheduler.__dict__
    with pytest.raises(OSError, match="missing"):
        accelrt.wrap(pipe, rehash=str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="no supported denoiser"):
        accelrt.wrap(pipe.vae, rehash="auto")
    assert not accelrt.is_wrapped(pipe.vae)
    accelrt.wrap(pipe, rehash="auto")
    run(pipe)
    accelrt.unwrap(pipe)


def test_threshold_sums_up_what_it_sees() -> None:
    """Small changes add up until a sample is computed; then the sum begins anew."""
    model = zoo.clone(zoo.tiny_dit(), torch.float64)
    accelrt.wrap(model, rehash=Rehash(Threshold(0.5, warmup_steps=1, max_consecutive=9), Reuse()))
    x = zoo.normal(1, 4, 8, 8, seed=1).double()
    for step in range(12):
        inputs = {
            "hidden_states": x * (1.0 + 0.2 * step),
            "timestep": torch.tensor([900 - step]),
            "class_labels": torch.tensor([3]),
        }
        with torch.no_grad():
            model(**inputs)
    kinds = [row.samples[0] for row in accelrt.summary(model).steps.rows]
    accelrt.unwrap(model)
    gaps = [i for i, kind in enumerate(kinds) if kind == "computed"]
    assert 3 <= len(gaps) < 12
    assert all(b - a > 1 for a, b in pairwise(gaps))


def test_policies_of_your_own(pipe: Any, alone: Tensor) -> None:
    """A subclass decides like any other; the summary names it, a file cannot hold it."""

    class Even(Policy):
        def fixed(self, step: int, steps: int | None) -> bool:
            return step % 2 == 0

    rehash = Rehash(Even(), Taylor(1))
    accelrt.wrap(pipe, rehash=rehash)
    out = run(pipe)
    text = str(accelrt.summary(pipe))
    accelrt.unwrap(pipe)
    assert same(out, alone)
    assert "Even()" in text
    with pytest.raises(ValueError, match="Even is not one of ours"):
        rehash.to_dict()
