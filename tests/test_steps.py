"""Fewer steps computed: against the exact path, and against predictions made in stock models."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from steps_common import (
    STEPS,
    predicted_layers,
    same,
    stepper_of,
    timesteps,
    wrapped_run,
)
from zoo_pipelines import FAMILIES, with_controlnet, with_t2i_adapter

import accelrt
from accelrt.steps import (
    AdamsBashforth,
    Boundary,
    Hermite,
    Interval,
    LearnedLinear,
    Rehash,
    Reuse,
    Schedule,
    Taylor,
    Threshold,
    Verified,
)
from accelrt.swap import find

UNETS = ("animatediff", "svd", "unet2d")
KEYS = Schedule((0, 1, 3, 6))
LEARNED = LearnedLinear({2: (-0.8, 1.7), 4: (0.3, -1.1, 1.9), 5: (0.1, -0.5, 1.3)})
ADAPTIVE = (Threshold(0.3, warmup_steps=1), Verified(0.3, warmup_steps=1))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_steps_computed_is_the_exact_path(name: str) -> None:
    """Bit for bit, wherever the boundary lies, whatever the policy is that computes all."""
    family = FAMILIES[name]
    pipe = family.pipe()
    stock = family.run(pipe, num_inference_steps=3)
    exact = wrapped_run(family, pipe, None, num_inference_steps=3)
    boundaries: list[Any] = ["default", "out", *(["published"] if name == "animatediff" else [])]
    policies: list[Any] = [Interval(1), Threshold(1e-9), Verified(1e-9)]
    for boundary in boundaries:
        for policy in policies:
            if boundary != "default" and policy is not policies[0]:
                continue  # nothing comes before or after it
            rehash = Rehash(policy, Taylor(2), boundary)
            assert same(wrapped_run(family, pipe, rehash, num_inference_steps=3), exact)
    assert same(family.run(pipe, num_inference_steps=3), stock)


@pytest.mark.parametrize(
    ("name", "predictor"),
    [
        *((name, Taylor(2)) for name in FAMILIES),
        *(("dit", other) for other in (Reuse(), Hermite(2), AdamsBashforth(), LEARNED)),
        ("unet2d", Reuse()),
    ],
)
def test_prediction_at_the_default_boundary(name: str, predictor: Any) -> None:
    """The layer in front of the boundary gives the predictor's sum: so does a hook in stock."""
    family = FAMILIES[name]
    pipe = family.pipe()
    rehash = Rehash(KEYS, predictor)
    accelrt.wrap(pipe, rehash=rehash)
    ours = family.run(pipe, num_inference_steps=STEPS)
    boundary = stepper_of(pipe).boundary(find(family.model(pipe)))
    counts = accelrt.summary(pipe).steps
    accelrt.unwrap(pipe)
    last, base = boundary.last, None
    if name not in UNETS:
        last, base = last.replace("blocks.", "transformer_blocks."), "transformer_blocks.0"
    with predicted_layers(family.model(pipe), last, rehash, timesteps(pipe), base):
        truth = family.run(pipe, num_inference_steps=STEPS)
    exact = family.run(pipe, num_inference_steps=STEPS)
    assert counts.computed == 4
    assert counts.predicted == 3
    assert zoo.relative_error(ours, truth) < 1e-6  # the kernel's weights are float32
    assert zoo.relative_error(ours, exact) > 1e-8


@pytest.mark.parametrize("name", FAMILIES)
def test_prediction_of_the_output(name: str) -> None:
    """The whole model is left out."""
    family = FAMILIES[name]
    pipe = family.pipe()
    rehash = Rehash(KEYS, Taylor(1), "out")
    ours = wrapped_run(family, pipe, rehash)
    with predicted_layers(family.model(pipe), "", rehash, timesteps(pipe)):
        truth = family.run(pipe, num_inference_steps=STEPS)
    assert zoo.relative_error(ours, truth) < 1e-6  # the kernel's weights are float32


@pytest.mark.parametrize("name", ["animatediff", "svd"])
def test_published_boundary(name: str) -> None:
    """Step Rehash's own: no layer before the last up block runs, so the skips are kept, too."""
    family = FAMILIES[name]
    pipe = family.pipe()
    calls = {"conv_in": 0, "out": 0}
    model = family.model(pipe)
    accelrt.wrap(pipe, rehash=Rehash(KEYS, Reuse(), "published"))
    handles = [
        model.conv_in.register_forward_hook(lambda *_: _count(calls, "conv_in")),
        model.conv_out.register_forward_hook(lambda *_: _count(calls, "out")),
    ]
    out = family.run(pipe, num_inference_steps=STEPS)
    per_pass = calls["out"] / STEPS
    for handle in handles:
        handle.remove()
    assert calls["conv_in"] == 4 * per_pass
    assert torch.isfinite(torch.as_tensor(out)).all()
    accelrt.unwrap(pipe)
    kept = accelrt.wrap(pipe, rehash=Rehash(KEYS, Reuse(), Boundary(_temporal(name))))
    fresh = family.run(pipe, num_inference_steps=STEPS)
    accelrt.unwrap(kept)
    assert not same(out, fresh)  # that boundary computes the skips anew


def _temporal(name: str) -> str:
    kind = "motion_modules" if name == "animatediff" else "attentions"
    return f"up_blocks.1.{kind}.0"


def _count(calls: dict[str, int], name: str) -> None:
    calls[name] += 1


def test_published_needs_temporal_layers() -> None:
    """Images have none, and the wrap says so before anything is changed."""
    pipe = FAMILIES["dit"].pipe()
    with pytest.raises(ValueError, match="temporal layer"):
        accelrt.wrap(pipe, rehash=Rehash(KEYS, Reuse(), "published"))
    assert not accelrt.is_wrapped(pipe)
    assert "step" not in pipe.scheduler.__dict__


@pytest.mark.parametrize("case", ["controlnet", "t2i"])
@pytest.mark.parametrize("policy", [KEYS, *ADAPTIVE], ids=["static", "threshold", "verified"])
def test_residuals_of_the_call_reach_the_kept_skips(case: str, policy: Any) -> None:
    """ControlNets and T2I-Adapters add to skips in the middle: predicted steps have them, too."""
    family = FAMILIES["unet2d"]
    pipe, extra = with_controlnet("unet2d") if case == "controlnet" else with_t2i_adapter()
    exact = wrapped_run(family, pipe, None, **extra)
    same_all = wrapped_run(family, pipe, Rehash(Interval(1), Taylor(1)), **extra)
    assert same(same_all, exact)
    rehash = Rehash(policy, Taylor(1))
    ours = wrapped_run(family, pipe, rehash, **extra)
    if policy is not KEYS:
        assert torch.isfinite(torch.as_tensor(ours)).all()
        return
    last = "up_blocks.2.resnets.0"
    found = zoo.relative_error(ours, exact)
    assert 0 < found < 0.5
    if case == "t2i":  # the skip of the first convolution is as it was
        with predicted_layers(family.model(pipe), last, rehash, timesteps(pipe)):
            truth = family.run(pipe, num_inference_steps=STEPS, **extra)
        assert zoo.relative_error(ours, truth) < 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_passes_and_budget(name: str) -> None:
    """Guidance halves in turn, and a memory budget, change nothing of the prediction."""
    family = FAMILIES[name]
    pipe = family.pipe()
    rehash = Rehash(KEYS, Taylor(1))
    plain = wrapped_run(family, pipe, rehash)
    budget: list[dict[str, Any]] = [{"memory_budget": "min"}] if name in ("dit", "unet2d") else []
    if name == "unet2d":  # which the smallest plan does anyway: a third of the ways to search
        budget[0]["recompute"] = "always"
    for settings in ({"samples_per_pass": 1}, *budget):
        accelrt.wrap(pipe, rehash=rehash, **settings)
        found = family.run(pipe, num_inference_steps=STEPS)
        summary = accelrt.summary(pipe)
        accelrt.unwrap(pipe)
        assert summary.exceeded == 0
        assert zoo.relative_error(found, plain) < 1e-9


def test_a_budget_has_room_for_the_cache() -> None:
    """What is kept from step to step comes out of the budget, and is told before it is made."""
    family = FAMILIES["dit"]
    pipe = family.pipe()
    model = family.model(pipe)
    accelrt.wrap(model, memory_budget="min")
    inputs = _dit_inputs(2)
    with torch.no_grad():
        model(**inputs)
    floor = accelrt.summary(model).planned[""]
    accelrt.unwrap(model)
    rehash = Rehash(Interval(2, warmup_steps=1), Taylor(1))
    accelrt.wrap(model, memory_budget=2 * floor, rehash=rehash)
    with torch.no_grad():
        model(**inputs)
    steps = accelrt.summary(model).steps
    stepper = stepper_of(model)
    forward = find(model)
    told = forward.planner._kept_features(forward, {**forward.arguments(**inputs)})
    assert told == steps.cache_bytes > 0
    accelrt.unwrap(model)
    assert stepper.tracker.latest is None
    accelrt.wrap(model, memory_budget=floor + told // 2, rehash=rehash)
    with pytest.raises(accelrt.BudgetError):
        model.requires_grad_(False)(**inputs)
    accelrt.unwrap(model)


def _dit_inputs(batch: int, time: int = 400, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": zoo.normal(batch, 4, 8, 8, seed=seed).double(),
        "timestep": torch.full((batch,), time),
        "class_labels": torch.arange(batch),
    }


def test_max_cache() -> None:
    """A cap lowers the order of the predictor, saying so; one that nothing fits under raises."""
    family = FAMILIES["dit"]
    pipe = family.pipe()
    accelrt.wrap(pipe, rehash=Rehash(Interval(2), Taylor(2)))
    family.run(pipe, num_inference_steps=4)
    one = accelrt.summary(pipe).steps.cache_bytes // 3
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=Rehash(Interval(2), Taylor(2), max_cache=2 * one + 8))
    with pytest.warns(UserWarning, match=r"Taylor\(order=1\) takes the place"):
        family.run(pipe, num_inference_steps=4)
    assert accelrt.summary(pipe).steps.cache_bytes == 2 * one
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=Rehash(Interval(2), Taylor(2), max_cache=one - 8))
    with pytest.raises(ValueError, match="max_cache"):
        family.run(pipe, num_inference_steps=4)
    accelrt.unwrap(pipe)


@pytest.mark.parametrize("policy", ADAPTIVE, ids=["threshold", "verified"])
def test_decisions_are_each_samples_own(policy: Any) -> None:
    """In a batch with another, a sample is computed and predicted as when it is alone."""
    model = zoo.clone(zoo.tiny_dit(), torch.float64)
    quiet, lively = (zoo.normal(1, 4, 8, 8, seed=s).double() for s in (1, 2))
    noise = [zoo.normal(1, 4, 8, 8, seed=10 + i).double() for i in range(12)]
    times = list(range(900, 300, -50))

    def inputs(step: int, rows: list[int]) -> dict[str, Any]:
        x = torch.cat([quiet + 0.01 * step * noise[0], lively + 0.5 * noise[step]])
        return {
            "hidden_states": x[rows],
            "timestep": torch.full((len(rows),), times[step]),
            "class_labels": torch.tensor([3, 77])[rows],
        }

    def run(rows: list[int]) -> tuple[list[torch.Tensor], list[tuple[str, ...]]]:
        accelrt.wrap(model, rehash=Rehash(policy, Taylor(1)))
        with torch.no_grad():
            outputs = [model(**inputs(step, rows)).sample for step in range(len(times))]
        report = accelrt.summary(model).steps
        accelrt.unwrap(model)
        return outputs, [row.samples for row in report.rows]

    both, kinds = run([0, 1])
    first, kinds_first = run([0])
    second, kinds_second = run([1])
    assert kinds == [(a[0], b[0]) for a, b in zip(kinds_first, kinds_second, strict=True)]
    assert any(a != b for a, b in kinds), "the samples were to be treated differently"
    assert any("predicted" in kind for kind in kinds)
    for step in range(len(times)):
        assert zoo.relative_error(both[step][:1], first[step]) < 1e-11
        assert zoo.relative_error(both[step][1:], second[step]) < 1e-11


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", ADAPTIVE, ids=["threshold", "verified"])
def test_adaptive_policies_in_pipelines(name: str, policy: Any) -> None:
    """Guidance halves are one sample; the loosest threshold predicts, the tightest computes."""
    family = FAMILIES[name]
    pipe = family.pipe()
    exact = wrapped_run(family, pipe, None)
    boundary: Any = "default" if name not in UNETS else Boundary("up_blocks.0")
    accelrt.wrap(pipe, rehash=Rehash(type(policy)(1e5, max_consecutive=2), Taylor(1), boundary))
    out = family.run(pipe, num_inference_steps=STEPS)
    steps = accelrt.summary(pipe).steps
    accelrt.unwrap(pipe)
    samples = len(steps.rows[0].samples)
    assert steps.computed == 4 * samples  # two, one after two predicted, and the last
    assert steps.predicted == 3 * samples - steps.rejected
    assert 0 < zoo.relative_error(out, exact) < 1.0
    tight = Rehash(type(policy)(1e-12), Taylor(1), boundary)
    assert same(wrapped_run(family, pipe, tight), exact)


def test_static_policies_never_wait_for_the_device() -> None:
    """After the first step no value of a tensor is asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = func._schema.name
            if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"):
                asked.append(name)
            return func(*args, **(kwargs or {}))

    family = FAMILIES["dit"]
    pipe = family.pipe()
    accelrt.wrap(pipe, rehash=Rehash(KEYS, Taylor(1)))
    stepper = stepper_of(pipe)
    stock, inside = stepper.run, []

    def run(*arguments: Any) -> Any:
        with Watch():
            inside.append(len(asked))
            return stock(*arguments)

    stepper.run = run
    family.run(pipe, num_inference_steps=STEPS)
    accelrt.unwrap(pipe)
    assert len(inside) == STEPS
    assert asked == []


@pytest.mark.parametrize("name", ["dit", "unet2d"])
def test_torch_compile(name: str) -> None:
    """Every policy works in a compiled model, which runs as if it were not compiled."""
    family = FAMILIES[name]
    pipe = family.pipe()
    boundary: Any = "default" if name not in UNETS else Boundary("up_blocks.0")
    short = {"num_inference_steps": 4}
    for policy in (Interval(2, warmup_steps=1), *(ADAPTIVE if name == "dit" else ())):
        rehash = Rehash(policy, Taylor(1), boundary)
        plain = wrapped_run(family, pipe, rehash, **short)
        torch._dynamo.reset()
        accelrt.wrap(pipe, rehash=rehash)
        model = family.model(pipe)
        setattr(pipe, family.denoiser, torch.compile(model, backend="eager"))
        compiled = family.run(pipe, **short)
        setattr(pipe, family.denoiser, model)
        accelrt.unwrap(pipe)
        torch._dynamo.reset()
        assert same(compiled, plain)
