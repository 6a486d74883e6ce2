"""Calibration: the similarity map, key steps, learned weights, the search, the command."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import model_zoo as zoo
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from model_zoo import one_thread  # noqa: F401
from typer.testing import CliRunner

import accelrt
from accelrt.cli import app, scenarios
from accelrt.quality import measure, search
from accelrt.steps import (
    AdamsBashforth,
    Boundary,
    Calibration,
    Hermite,
    Interval,
    LearnedLinear,
    Origin,
    Rehash,
    Reuse,
    Schedule,
    Taylor,
    walk,
)
from accelrt.steps.search import KeySearch, Problem, cost, errors, fitted, learn, rule_of

STEPS = 6
CALL: dict[str, Any] = {
    "class_labels": [3, 77],
    "guidance_scale": 3.0,
    "num_inference_steps": STEPS,
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return zoo.dit_pipeline()


@pytest.fixture(scope="module")
def calibration(pipe: Any) -> Calibration:
    return accelrt.calibrate(pipe, CALL, runs=2, probes=3)


def images(pipe: Any, seed: int = 0, **changed: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**CALL, **changed}, generator=generator, output_type="np").images


def smooth(steps: int, width: int = 40, seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """Features that change smoothly over the steps, ``[K, M]``."""
    rng = np.random.default_rng(seed)
    speed, phase = rng.uniform(0.5, 4, width), rng.uniform(0, 6, width)
    curves = np.sin(np.linspace(0, 1, steps)[:, None] ** 2 * speed + phase)
    return curves + noise * rng.standard_normal(curves.shape)


def problem(features: np.ndarray, times: Any = None, importance: Any = None) -> Problem:
    times = range(len(features)) if times is None else times
    return Problem(features @ features.T, tuple(map(float, times)), importance)


def made(features: np.ndarray, **changed: Any) -> Calibration:
    """A calibration without a model."""
    norms = np.linalg.norm(features, axis=1)
    gram = features @ features.T
    values: dict[str, Any] = {
        "gram": gram,
        "similarity": np.clip(gram / np.outer(norms, norms), -1, 1),
        "timesteps": tuple(np.linspace(950, 0, len(features))),
        "boundary": Boundary("blocks.1"),
        "feature": "auto",
        "time": "timestep",
        "origin": Origin("Model", "0" * 16, "DDIMScheduler", "0" * 16, len(features)),
        "samples": 1,
    }
    return Calibration(**{**values, **changed})


# Numbers


def test_walk_by_hand() -> None:
    similarity = [
        [1.0, 0.95, 0.80, 0.60, 0.50],
        [0.95, 1.0, 0.90, 0.70, 0.55],
        [0.80, 0.90, 1.0, 0.92, 0.70],
        [0.60, 0.70, 0.92, 1.0, 0.93],
        [0.50, 0.55, 0.70, 0.93, 1.0],
    ]
    assert walk(similarity, 0.9) == (0, 2, 4)
    assert walk(similarity, 0.0) == (0, 4)
    assert walk(similarity, 1.0) == (0, 1, 2, 3, 4)
    assert walk(similarity, 0.93) == (0, 2, 3, 4)


@pytest.mark.parametrize("compute_last", [True, False])
@pytest.mark.parametrize(
    ("points", "rule"),
    [
        (1, rule_of(Reuse())),
        (2, rule_of(Taylor(1))),
        (3, rule_of(Hermite(2))),
        (3, rule_of(AdamsBashforth(2))),
        (2, fitted(1e-3)),
    ],
)
def test_key_search_against_all_choices(points: int, rule: Any, compute_last: bool) -> None:
    rng = np.random.default_rng(7)
    steps = 8
    given = problem(
        rng.standard_normal((steps, 12)),
        times=np.sort(rng.uniform(0, 1000, steps))[::-1],
        importance=rng.uniform(0.1, 2.0, steps),
    )
    searched = KeySearch(given, rule, points, compute_last=compute_last)
    assert searched.exact
    for computed in range(2, steps + 1):
        free = range(1, steps - compute_last)
        ends = (steps - 1,) if compute_last else ()
        choices = [
            (0, *inner, *ends)
            for inner in itertools.combinations(free, computed - 1 - compute_last)
        ]
        costs = [cost(given, keys, rule, points) for keys in choices]
        best = searched.best(computed)
        assert best in choices
        assert cost(given, best, rule, points) == pytest.approx(min(costs), rel=1e-9, abs=1e-12)


def test_key_search_beyond_the_exact() -> None:
    given = problem(smooth(90))
    rule = rule_of(Taylor(2))
    keys = KeySearch(given, rule, 3).best(20)
    assert not KeySearch(given, rule, 3).exact
    assert len(keys) == 20
    even = [round(k) for k in np.linspace(0, 89, 20)]
    assert cost(given, keys, rule, 3) < 0.8 * cost(given, even, rule, 3)
    exact = KeySearch(given, rule_of(Reuse()), 1)
    near = KeySearch(given, rule_of(Reuse()), 1, exact=False)
    costs = [cost(given, s.best(20), rule_of(Reuse()), 1) for s in (exact, near)]
    assert costs[0] <= costs[1] * (1 + 1e-12)
    assert costs[1] < 1.5 * costs[0]


def test_errors_are_those_of_the_features() -> None:
    features = smooth(9)
    given = problem(features, times=np.linspace(900, 20, 9))
    keys, predictor = (0, 2, 3, 6), Taylor(2)
    found = np.sqrt(errors(given, keys, rule_of(predictor), predictor.points))
    for step in range(9):
        if step in keys:
            assert found[step] == 0
            continue
        past = [k for k in keys if k < step][-3:]
        weights = predictor.weights([given.times[k] for k in past], given.times[step], step)
        predicted = sum(w * features[k] for w, k in zip(weights, past, strict=True))
        wanted = np.linalg.norm(predicted - features[step]) / np.linalg.norm(features[step])
        assert found[step] == pytest.approx(wanted, rel=1e-6)


def test_steps_of_one_time_take_each_others_place() -> None:
    given = problem(smooth(6), times=(900, 600, 600, 300, 300, 0))
    assert given.pasts((0, 1, 2, 3), 3) == {4: (0, 2, 3), 5: (0, 2, 3)}
    assert given.pasts((0, 1, 3), 2) == {2: (0, 1), 4: (1, 3), 5: (1, 3)}
    for points, rule in ((3, rule_of(Taylor(2))), (3, fitted(1e-3))):
        keys = KeySearch(given, rule, points).best(4)
        assert np.isfinite(cost(given, keys, rule, points))


def test_learned_weights_recover_a_linear_relation() -> None:
    rng = np.random.default_rng(3)
    a, b, c = rng.standard_normal((3, 64))
    features = np.stack([a, b, c, 0.3 * a - 1.1 * b + 1.7 * c, rng.standard_normal(64)])
    found = learn(problem(features, times=(900, 700, 480, 250, 10)), (0, 1, 2, 4), 3, 0.0)
    assert found.table[3] == pytest.approx((0.3, -1.1, 1.7), abs=1e-6)
    few = learn(problem(features), (0, 4), 3, 0.0)
    assert [len(few.table[step]) for step in (1, 2, 3)] == [1, 1, 1]


def test_ridge_pulls_towards_taylor_and_tames_noise() -> None:
    noisy = problem(smooth(12, noise=1e-4), times=np.linspace(1000, 0, 12))
    keys = (0, 1, 2, 4, 6, 8, 11)
    strong = learn(noisy, keys, 3, 1e9)
    taylor = Taylor(1)
    for step, row in strong.table.items():
        past = [noisy.times[k] for k in keys if k < step][-3:]
        wanted = taylor.weights(past[-2:], noisy.times[step], step)
        assert row == pytest.approx((0.0,) * (len(row) - len(wanted)) + wanted, abs=1e-5)
    # Three features that hardly differ: without a penalty the weights follow their noise.
    flat = problem(1.0 + 1e-7 * np.random.default_rng(0).standard_normal((5, 50)))
    tame = learn(flat, (0, 1, 2, 4), 3, 1e-3).table[3]
    assert max(map(abs, tame)) < 4


def test_learned_fit_is_no_worse_than_taylor_there() -> None:
    given = problem(smooth(16), times=np.linspace(900, 0, 16))
    keys = (0, 2, 4, 7, 10, 13, 15)
    learned = learn(given, keys, 2, 1e-9)
    ours = errors(given, keys, rule_of(learned), 2)
    taylor = errors(given, keys, rule_of(Taylor(1)), 2)
    assert (ours <= taylor + 1e-12).all()
    assert ours.sum() < 0.9 * taylor.sum()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gram": np.eye(4)}, "for 6 steps"),
        ({"gram": np.full((6, 6), np.nan)}, "not finite"),
        ({"similarity": np.eye(4)}, "similarity is"),
        ({"importance": (1.0,) * 5}, "importance"),
        ({"importance": (0.0,) * 6}, "numbers above 0"),
        ({"feature": "skips"}, "feature is 'skips'"),
    ],
)
def test_wrong_calibrations(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(smooth(6), **changed)


def test_wrong_questions() -> None:
    found = made(smooth(6))
    for ask, message in (
        (lambda: found.schedule(1.1), "gamma is 1.1"),
        (lambda: found.gamma_for(7), "computed is 7; allowed: an integer from 1 to 6"),
        (lambda: found.best_keys(1, Reuse()), "from 2 to 6"),
        (lambda: found.best_keys(3, LearnedLinear({1: (1.0,)})), "best_learned"),
        (lambda: found.best_learned(6), "from 1 to 5"),
        (lambda: found.best_learned(3, 5), "points is 5"),
        (lambda: found.learned(range(6)), "nothing to learn"),
        (lambda: found.learned((0, 3), ridge=-1.0), "ridge is -1.0"),
        (lambda: found.errors((1, 2), Reuse()), "keys are"),
        (lambda: found.errors((0, 3, 2), Reuse()), "must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_gamma_for_a_number_of_steps() -> None:
    found = made(smooth(25))
    for computed in (4, 9, 13, 20, 25):
        gamma = found.gamma_for(computed)
        assert len(found.keys(gamma)) == computed
        policy = found.schedule(gamma).policy
        assert isinstance(policy, Schedule)
        assert policy.computed == walk(found.similarity.tolist(), gamma)
        assert policy.steps == 25


# A model


def test_similarity(calibration: Calibration) -> None:
    assert calibration.similarity.shape == (STEPS, STEPS)
    assert np.array_equal(np.diagonal(calibration.similarity), np.ones(STEPS))
    assert np.array_equal(calibration.similarity, calibration.similarity.T)
    assert calibration.similarity.min() < 0.999999
    assert calibration.samples == 2 * 4  # runs, samples with their guidance halves
    assert calibration.origin.model == "DiTTransformer2DModel"
    assert calibration.boundary == Boundary("blocks.2")
    assert calibration.importance is not None
    assert len(calibration.importance) == STEPS


def test_gram_is_that_of_the_features(pipe: Any) -> None:
    """Against features recorded another way: the model's own outputs."""
    found = accelrt.calibrate(pipe, CALL, runs=1, probes=0, boundary="out")
    outputs: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    try:
        images(pipe)
    finally:
        hook.remove()
    x = torch.stack(outputs).double().flatten(2).transpose(0, 1)  # [B, K, M]
    inner = x @ x.transpose(1, 2)
    norms = inner.diagonal(dim1=1, dim2=2).sqrt()
    gram = (inner / norms.mean(1)[:, None, None].square()).mean(0)
    cosine = (inner / (norms[:, :, None] * norms[:, None, :])).mean(0)
    np.testing.assert_allclose(found.gram, gram.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.similarity, cosine.numpy(), rtol=1e-5)
    assert found.timesteps == tuple(pipe.scheduler.timesteps.double().tolist())


def test_calls_of_halves_are_further_samples(pipe: Any) -> None:
    whole = accelrt.calibrate(pipe, CALL, runs=1, probes=0)
    config = accelrt.Config(samples_per_pass=1)
    parts = accelrt.calibrate(pipe, CALL, runs=1, probes=0, config=config)
    assert parts.samples == whole.samples
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-4)


def test_pipeline_is_left_as_it_was(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = images(pipe)
    accelrt.calibrate(pipe, CALL, runs=1, probes=2)
    assert not accelrt.is_wrapped(pipe)
    assert np.array_equal(images(pipe), before)
    assert "step" not in vars(pipe.scheduler)

    calls = 0
    forward = type(pipe.vae).decode

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("no more")
        return forward(*args, **kwargs)

    for runs in (2, 1):  # fails in a run, and in a probe
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.vae), "decode", failing)
            with pytest.raises(RuntimeError, match="no more"):
                accelrt.calibrate(pipe, CALL, runs=runs, probes=2)
        assert not accelrt.is_wrapped(pipe)
        assert "step" not in vars(pipe.scheduler)
        assert np.array_equal(images(pipe), before)


def test_wrong_arguments(pipe: Any) -> None:
    def ask(call: Any = CALL, **changed: Any) -> None:
        accelrt.calibrate(pipe, call, **changed)

    for arguments, message in (
        ({"runs": 0}, "runs is 0"),
        ({"probes": -1}, "probes is -1"),
        ({"boundary": "nowhere"}, "no stage or group is called 'nowhere'"),
        ({"boundary": "published"}, "Step Rehash's own boundary"),
        ({"call": {**CALL, "generator": None}}, "sets generator itself"),
        ({"call": {**CALL, "prompt": "a"}}, "takes no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(**arguments)
        assert not accelrt.is_wrapped(pipe)
    accelrt.wrap(pipe)
    with pytest.raises(ValueError, match=r"call accelrt\.unwrap first"):
        ask()
    accelrt.unwrap(pipe)
    with pytest.raises(ValueError, match="no pipeline with a scheduler"):
        accelrt.calibrate(pipe.transformer, {})


def test_call_that_cannot_be_followed(pipe: Any) -> None:
    pipe.transformer.train()
    pipe.transformer.transformer_blocks[0].ff.net[1].p = 0.5
    try:
        with pytest.raises(ValueError, match="cannot be followed: dropout is active"):
            accelrt.calibrate(pipe, CALL, runs=1, probes=0)
    finally:
        pipe.transformer.transformer_blocks[0].ff.net[1].p = 0.0
        pipe.transformer.eval()


def test_two_evaluations_of_a_step() -> None:
    pipe = zoo.dit_pipeline()
    pipe.scheduler = HeunDiscreteScheduler(beta_schedule="linear")
    found = accelrt.calibrate(pipe, CALL, runs=1, probes=2)
    assert found.steps == 2 * STEPS - 1
    rehash = found.rehash(found.best_keys(7, Taylor(1)), Taylor(1))
    accelrt.wrap(pipe, rehash=rehash)
    assert np.isfinite(images(pipe)).all()
    accelrt.unwrap(pipe)


@pytest.mark.parametrize("boundary", ["published", "default", "out"])
def test_video(boundary: str) -> None:
    """Boundaries with skips, and guidance halves in one call."""
    video = zoo.animatediff_pipeline()
    call = {
        "prompt_embeds": zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=4),
        "negative_prompt_embeds": zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=5),
        "num_frames": 3,
        "height": 2 * video.vae_scale_factor,
        "width": 2 * video.vae_scale_factor,
        "num_inference_steps": 5,
    }
    found = accelrt.calibrate(video, call, runs=1, probes=1, boundary=boundary)
    assert found.samples == 2
    assert (found.boundary.first is not None) == (boundary == "published")
    keys, learned = found.best_learned(3, 2)
    result = measure(video, call, {"learned": found.rehash(keys, learned)}, calibration=found)
    assert result.points[0].computed == 3.0
    assert 5 < result.points[0].psnr_db < np.inf


def test_file_of_a_calibration(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration.save(path)
    again = Calibration.load(path)
    assert again.to_dict() == calibration.to_dict()
    assert np.array_equal(again.gram, calibration.gram)
    for text, message in (
        ("{", "not valid JSON"),
        ("{}", "format is None"),
        (json.dumps({**calibration.to_dict(), "version": 2}), "version 2"),
        (json.dumps({**calibration.to_dict(), "more": 1}), "unknown or missing more"),
        (json.dumps({**calibration.to_dict(), "origin": {"model": "x"}}), "calibration: "),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            Calibration.load(path)
        assert "calibration.json" in str(caught.value)
    calibration.plot(tmp_path / "map.png", keys=(0, 2, 5))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_file_of_a_schedule(calibration: Calibration, pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    keys, learned = calibration.best_learned(4, 2)
    calibration.rehash(keys, learned).save(path, about={"gamma": 0.9})
    assert Rehash.load(path) == calibration.rehash(keys, learned)
    accelrt.wrap(pipe, rehash=path)
    try:
        first = images(pipe)
        with pytest.raises(ValueError, match="6 steps, not 7"):
            images(pipe, num_inference_steps=7)
    finally:
        accelrt.unwrap(pipe)
    assert not np.array_equal(first, images(pipe))

    other = zoo.dit_pipeline()
    other.scheduler = EulerDiscreteScheduler(beta_schedule="linear")
    with pytest.raises(ValueError, match="scheduler DDIMScheduler, not EulerDiscreteScheduler"):
        images(accelrt.wrap(other, rehash=path))
    other = zoo.dit_pipeline()
    other.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    with pytest.raises(ValueError, match="another configuration of DDIMScheduler"):
        images(accelrt.wrap(other, rehash=path))
    other = zoo.dit_pipeline()
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match="with other weights"):
        images(accelrt.wrap(other, rehash=path))


# The search


@pytest.fixture(scope="module")
def found(pipe: Any, calibration: Calibration) -> Any:
    return search(
        pipe, CALL, psnr_db=20.0, counts=(4, 3), calibrations=[calibration], seeds=2, max_runs=80
    )


def test_search(found: Any, pipe: Any, tmp_path: Path) -> None:
    assert not accelrt.is_wrapped(pipe)
    labels = [point.label for point in found.points]
    assert len(labels) == len(set(labels))
    assert {"4 steps", "3 steps"} <= set(labels)
    assert any(label.startswith("Verified") for label in labels)
    assert {point.computed for point in found.points if "searched" in point.label} == {4.0, 3.0}
    ours = [p for p in found.points if p.rehash is not None and p.computed < STEPS]
    enough = [point for point in ours if point.psnr_db >= 20.0]
    assert found.reached == bool(enough)
    if enough:
        assert found.best.speedup == max(point.speedup for point in enough)
    front = found.front
    assert all(len(point.psnrs) == len(point.ratios) == 2 for point in (*front, found.best))
    for slow, fast in itertools.pairwise(front):
        assert slow.speedup < fast.speedup
        assert slow.psnr_db > fast.psnr_db
    for point in found.points:
        beaten = any(p.speedup > point.speedup and p.psnr_db > point.psnr_db for p in front)
        assert beaten or point in front or any(p.psnr_db == point.psnr_db for p in front)
    assert len(found.rows()) == len(found.points)
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(found.to_dict(), allow_nan=False)


def test_measured_psnr_is_that_of_the_pictures(pipe: Any, calibration: Calibration) -> None:
    from accelrt.quality import psnr

    rehash = calibration.rehash((0, 2, 5), Reuse())
    result = measure(pipe, CALL, {"three": rehash}, calibration=calibration, fewer=[3], seed=4)
    three, fewer = result.points
    accelrt.wrap(pipe)
    whole, less = images(pipe, 1004), images(pipe, 1004, num_inference_steps=3)
    accelrt.unwrap(pipe)
    accelrt.wrap(pipe, rehash=rehash)
    ours = images(pipe, 1004)
    accelrt.unwrap(pipe)
    assert three.psnr_db == pytest.approx(psnr(ours, whole), abs=1e-3)
    assert fewer.psnr_db == pytest.approx(psnr(less, whole), abs=1e-3)
    assert (three.computed, fewer.computed) == (3.0, 3.0)
    assert three.estimate_db is not None
    assert abs(three.estimate_db - three.psnr_db) < 15


def test_every_step_computed_is_identical(pipe: Any, calibration: Calibration) -> None:
    same = measure(pipe, CALL, {"all": Rehash(Interval(1))}, calibration=calibration)
    assert same.points[0].psnr_db == np.inf
    assert same.points[0].computed == STEPS
    assert same.to_dict()["points"][0]["psnr_db"] == "inf"


def test_wrong_searches(pipe: Any, calibration: Calibration) -> None:
    for arguments, message in (
        ({}, "one target"),
        ({"psnr_db": 30.0, "speedup": 2.0}, "one target"),
        ({"psnr_db": -1.0}, "psnr_db is -1.0"),
        ({"speedup": 1.0}, "speedup is 1.0; allowed: a number above 1"),
        ({"psnr_db": 30.0, "seeds": 0}, "seeds is 0"),
        ({"psnr_db": 30.0, "counts": (1,)}, "counts is"),
        ({"psnr_db": 30.0, "counts": (6,)}, "allowed: from 2 to 5"),
        ({"psnr_db": 30.0, "max_runs": 3}, "max_runs is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            search(pipe, CALL, calibrations=[calibration], **arguments)
        assert not accelrt.is_wrapped(pipe)


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.dit_pipeline().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", "--device", "cpu", "--threads", "1", *arguments])


def test_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**CALL}
    monkeypatch.setattr(scenarios, "generic_call", lambda *_: dict(call))
    out = tmp_path / "out"
    common = ("--model", str(folder), "--steps", str(STEPS), "--out", str(out), "--seeds", "1")
    result = run(*common, "--computed", "4", "--runs", "1", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    schedule = json.loads((out / "schedule.json").read_text())
    assert schedule["about"]["gamma"] == values["gamma"]
    assert schedule["about"]["measured"]["label"] == "Step Rehash"
    assert schedule["predictor"] == {"kind": "reuse"}
    keys = Calibration.load(out / "calibration.json").keys(values["gamma"])
    assert schedule["policy"]["computed"] == list(keys)
    assert (out / "similarity.png").is_file()
    assert not (out / "front.png").exists()
    pipe = scenarios.load_pipeline(str(folder), "fp32", "cpu")
    pipe.set_progress_bar_config(disable=True)
    accelrt.wrap(pipe, rehash=str(out / "schedule.json"))
    assert np.isfinite(images(pipe)).all()

    result = run(*common, "--psnr", "200", "--runs", "1", "--boundary", "default")
    assert result.exit_code == 1, result.output
    assert "200 dB was not reached; the closest is" in " ".join(result.stderr.split())
    assert (out / "front.png").is_file()
    assert "written:" in result.stdout
    assert Rehash.load(out / "schedule.json").boundary == Boundary("blocks.2")


def test_command_checks_before_it_works(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    result = run("--model", str(folder), "--out", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "a file; allowed: a folder" in " ".join(result.stderr.split())
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "matplotlib" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    result = run("--model", str(folder), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install matplotlib" in " ".join(result.stderr.split())


def test_command_refuses(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--gamma", "0.9", "--psnr", "30"), "--gamma and --psnr do not go together"),
        (("--gamma", "1.5"), "--gamma is 1.5"),
        (("--computed", "30"), "--computed is 30"),
        (("--prompt", "a seven"), "takes no prompt"),
        (("--boundary", "nowhere"), "no stage or group is called 'nowhere'"),
        (("--psnr", "-3"), "psnr_db is -3"),
    ):
        out = tmp_path / "out"
        result = run("--model", str(folder), "--steps", "4", "--out", str(out), *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), result.stderr
        assert not out.exists()
