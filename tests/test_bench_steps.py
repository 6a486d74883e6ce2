"""The steps benchmark: its runs, what it measures, its verdict, its files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "steps"))

import configurations
import evaluate
import measure
import report
import rivals
import run
import tasks
import verdict
from measure import Baselines, Result, Row


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dit() -> Any:
    return tasks.load("dit")


def latents_of(pipe: Any, steps: int = 4) -> torch.Tensor:
    batch = tasks.make("dit", 2).batches[0]
    with measure.observed(pipe) as seen:
        tasks.call(pipe, batch, steps)
    return torch.cat(seen.latents)


def result(name: str, kind: str, steps: int, speedup: float, psnr: float, frechet: float) -> Result:
    return Result(
        name, kind, steps, 10.0 / speedup, speedup, 1.0, psnr, 0.9, 0.1, 0.99, frechet, 2048
    )  # fmt: skip


PLAIN = (
    result("exact 20", "exact", 20, 1.0, 100.0, 10.0),
    result("exact 10", "exact", 10, 2.0, 40.0, 12.0),
    result("exact 5", "exact", 5, 4.0, 20.0, 20.0),
)


# Runs


@pytest.mark.slow
def test_a_small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"cache_dit", "DeepCache"}
    monkeypatch.setattr(
        rivals, "_missing", lambda name: f"{name} is not installed" if name in absent else None
    )
    patterns = ["Taylor 1, every 2nd", "FirstBlockCache 0.05", "cache-dit*", "SeaCache"]
    table = run.table_of("dit", 4, samples=2, batch=1, patterns=patterns, quiet=True)
    rows = {row.name: row for row in table.results}
    stock, exact = rows["stock, 4 steps"], rows["accelrt exact, 4 steps"]
    ours, rival = rows["Taylor 1, every 2nd"], rows["FirstBlockCache 0.05"]
    assert set(table.left_out) == {
        "SeaCache",
        "cache-dit DBCache 0.08",
        "cache-dit DBCache 0.2",
        "cache-dit DBCache 0.2 + TaylorSeer",
    }
    assert "not installed" in table.left_out["cache-dit DBCache 0.08"]
    assert stock.psnr_db == measure.PSNR_CAP_DB
    assert stock.latent_error == 0
    assert stock.computed == stock.speedup == exact.computed == exact.speedup == 1
    assert exact.latent_error < 1e-4
    assert exact.psnr_db > 80
    assert rows["stock, 2 steps"].computed == pytest.approx(0.5)
    # Steps 0, 1 and the last of four are computed; two points of features are kept.
    assert ours.computed == pytest.approx(0.75, abs=0.01)
    assert 1e-4 < ours.latent_error < 1
    tokens, width, halves, points = 16, 96, 2, 2
    assert ours.cache_bytes == pytest.approx(4 * tokens * width * halves * points, rel=0.1)
    assert rival.kind == "rival"
    assert table.verdict(stock) is None
    for row in (ours, rival):
        found = table.verdict(row)
        assert found is not None
        assert found.nearest.startswith("accelrt exact" if row is ours else "stock")
        assert math.isfinite(found.psnr_gain_db)


def test_batches_are_interleaved_and_begin_with_another_row(dit: Any) -> None:
    order: list[str] = []

    def noting(name: str) -> Row:
        @contextmanager
        def switch(pipe: Any) -> Iterator[None]:
            order.append(name)
            yield

        return Row(name, "stock", 1, switch)

    task = tasks.make("dit", 2, 1)
    results, failed = measure.measure(
        dit, task, [noting("a"), noting("b")], Baselines("a", "a"), tasks.Judge("dit")
    )
    assert order == ["a", "b", "a", "b", "b", "a"]  # counted, then two batches
    assert [row.name for row in results] == ["a", "b"]
    assert not failed


@pytest.mark.parametrize("kind", ["rival", "ours"])
def test_a_rival_that_raises_is_left_out_and_a_row_of_ours_is_not(dit: Any, kind: str) -> None:
    @contextmanager
    def broken(pipe: Any) -> Iterator[None]:
        raise RuntimeError("no such block")
        yield

    rows = [Row("stock", "stock", 1), Row("broken", kind, 1, broken)]
    arguments = (dit, tasks.make("dit", 1), rows, Baselines("stock", "stock"), tasks.Judge("dit"))
    if kind == "ours":
        with pytest.raises(RuntimeError, match="no such block"):
            measure.measure(*arguments)
    else:
        results, failed = measure.measure(*arguments)
        assert [row.name for row in results] == ["stock"]
        assert failed == {"broken": "RuntimeError: no such block"}


def test_rows_must_have_names_of_their_own_and_baselines_must_be_there(dit: Any) -> None:
    task, judge = tasks.make("dit", 1), tasks.Judge("dit")
    row = Row("stock", "stock", 1)
    with pytest.raises(ValueError, match="'stock' is there 2 times"):
        measure.measure(dit, task, [row, row], Baselines("stock", "stock"), judge)
    with pytest.raises(ValueError, match="baseline 'exact' is not among the rows: stock"):
        measure.measure(dit, task, [row], Baselines("stock", "exact"), judge)


def test_a_broken_off_warm_up_leaves_no_trace(dit: Any) -> None:
    expected = latents_of(dit, 5)
    before = dict(dit.scheduler.__dict__)
    measure.warm_up(dit, tasks.make("dit", 2).batches[0], 5)
    assert set(dit.scheduler.__dict__) <= set(before) | {"num_inference_steps", "timesteps"}
    assert torch.equal(latents_of(dit, 5), expected)


# Rivals


@pytest.mark.parametrize("model", tasks.MODELS)
def test_every_rival_runs_or_says_why_not(model: str) -> None:
    pipe = tasks.load(model)
    rows, reasons = rivals.rows_for(model, pipe, 4)
    assert len(rows) + len(reasons) == len(rivals.RIVALS)
    assert all(row.kind == "rival" and row.steps == 4 for row in rows)
    assert ("FasterCache" in reasons) == (model != "pixart")
    assert ("FirstBlockCache 0.05" in reasons) == (model in tasks.VIDEO)


DIFFUSERS = ("FirstBlockCache 0.2", "MagCache 0.24", "TaylorSeer 3*", "TaylorSeer lite 3*", "PAB*")


@pytest.mark.parametrize("pattern", DIFFUSERS)
def test_a_rival_changes_the_run_and_leaves_a_stock_pipeline(dit: Any, pattern: str) -> None:
    steps = 9
    rows = {row.name: row for row in rivals.rows_for("dit", dit, steps)[0]}
    (name,) = run.matching(list(rows), [pattern])
    stock, keys = latents_of(dit, steps), list(dit.transformer.state_dict())
    attributes = {n: set(m.__dict__) for n, m in dit.transformer.named_modules()}
    with rows[name].switch(dit):
        first, second = latents_of(dit, steps), latents_of(dit, steps)
    assert torch.equal(first, second), "it remembers the run before"
    assert 1e-3 < float((first - stock).norm() / stock.norm()) < 1
    assert torch.equal(latents_of(dit, steps), stock)
    assert list(dit.transformer.state_dict()) == keys
    assert {n: set(m.__dict__) for n, m in dit.transformer.named_modules()} == attributes


@pytest.mark.parametrize(
    ("package", "model", "name"),
    [("cache_dit", "dit", "cache-dit DBCache 0.2"), ("DeepCache", "svd", "DeepCache 3")],
)
def test_packages_leave_a_stock_pipeline_too(package: str, model: str, name: str) -> None:
    pytest.importorskip(package, reason="pip install --group rivals")
    pipe = tasks.load(model)
    batch, kind = tasks.make(model, 1).batches[0], type(pipe)
    call, names = kind.__call__, set(kind.__dict__)

    def latents() -> torch.Tensor:
        with measure.observed(pipe) as seen:
            tasks.call(pipe, batch, 8)
        return torch.cat(seen.latents)

    stock = latents()
    keys = list(rivals.denoiser_of(pipe).state_dict())
    row = next(row for row in rivals.rows_for(model, pipe, 8)[0] if row.name == name)
    with row.switch(pipe):
        first, second = latents(), latents()
    assert torch.equal(first, second), "it remembers the run before"
    assert float((first - stock).norm() / stock.norm()) > 1e-3
    assert torch.equal(latents(), stock)
    assert kind.__call__ is call
    assert set(kind.__dict__) == names
    assert list(rivals.denoiser_of(pipe).state_dict()) == keys


# What is asked for, and how it is judged


@pytest.mark.parametrize("model", tasks.MODELS)
def test_the_calls_are_those_of_evaluate(model: str) -> None:
    """The same keywords from the same seeds, so that figures can be compared."""
    asked: list[dict[str, Any]] = []
    frames = {"animatediff": 16, "svd": 8}.get(model)

    def pipe(**call: Any) -> Any:
        asked.append(call)
        shape = (2, 32, 32, 3) if frames is None else (2, frames, 32, 32, 3)
        pictures = np.random.default_rng(0).random(shape, dtype=np.float32)
        return SimpleNamespace(images=pictures, frames=pictures)

    evaluate.EVALUATORS[model](pipe, 4, batch=2, steps=3)
    task = tasks.make(model, 4, 2)
    assert len(asked) == len(task.batches) == 2
    for call, batch in zip(asked, task.batches, strict=True):
        assert call.pop("generator").initial_seed() == batch.seed
        expected = {**batch.call, "num_inference_steps": 3, "output_type": "np"}
        assert call.keys() == expected.keys()
        for key, value in call.items():
            if key == "image":
                pairs = zip(value, expected[key], strict=True)
                assert all(a.tobytes() == b.tobytes() for a, b in pairs)
            else:
                assert value == expected[key], key


@pytest.mark.parametrize(
    ("model", "samples", "batch", "message"),
    [
        ("sdxl", 2, None, "model is 'sdxl'; allowed: dit, pixart, animatediff, svd"),
        ("dit", 0, None, "samples is 0; allowed: at least 1"),
        ("dit", 4, 3, r"batch is 3; allowed: divisors of samples \(4\)"),
        ("dit", 4, 0, "batch is 0; allowed: divisors"),
    ],
)
def test_wrong_tasks(model: str, samples: int, batch: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.make(model, samples, batch)


def test_psnr_is_the_mean_over_pictures() -> None:
    reference = torch.zeros(3, 3, 4, 4)
    pictures = torch.stack([torch.full((3, 4, 4), v) for v in (0.1, 0.01, 0.0)])
    assert measure.mean_psnr(pictures, reference) == pytest.approx((20 + 40 + 100) / 3)


# Rows


@pytest.mark.parametrize("model", tasks.MODELS)
def test_configurations_have_names_of_their_own(model: str) -> None:
    pipe = tasks.load(model)
    plain, baselines = configurations.plain_rows(25)
    ours = configurations.rows_of(configurations.configurations(model), 25)
    others, _ = rivals.rows_for(model, pipe, 25)
    names = [row.name for row in (*plain, *ours, *others)]
    assert len(names) == len(set(names))
    assert {baselines.stock, baselines.exact} <= set(names)
    assert [row.steps for row in plain if row.kind == "stock"] == [25, 13]
    assert [row.steps for row in plain if row.kind == "exact"] == [25, 19, 12, 8, 6, 5]


def test_the_published_configuration_computes_13_of_25_steps() -> None:
    policy = configurations.configurations("svd")["Step Rehash (published)"].policy
    assert sum(bool(policy.fixed(step, 25)) for step in range(25)) == 13


def test_calibrated_configurations_come_from_files(tmp_path: Path) -> None:
    one = configurations.configurations("dit")["Taylor 1, every 2nd"]
    one.save(tmp_path / "mine.json")
    assert configurations.from_files([tmp_path / "mine.json"]) == {"mine": one}


def test_patterns_must_match() -> None:
    names = ["Taylor 1", "Taylor 2", "PAB"]
    assert run.matching(names, []) == names
    assert run.matching(names, ["PAB", "Taylor*"]) == names
    assert run.matching(names, ["*2"]) == ["Taylor 2"]
    with pytest.raises(ValueError, match=r"nothing is called 'Tailor\*'; allowed: Taylor 1, "):
        run.matching(names, ["PAB", "Tailor*"])


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="steps is 1; allowed: at least 2"):
        configurations.plain_rows(1)


# Verdict


@pytest.mark.parametrize(
    ("speedup", "psnr", "frechet", "text"),
    [
        (2.0, 41.0, 11.9, "better"),
        (2.0, 41.0, 12.1, "PSNR only"),
        (2.0, 39.0, 11.9, "Frechet only"),
        (2.0, 39.0, 12.1, "worse"),
        # Above the nearest row (20 dB, 20), below the interpolated run (23.1 dB).
        (3.0, 22.0, 17.0, "Frechet only"),
        # Above the interpolated run (31.6 dB, 13.5), below the nearest row (40 dB, 12).
        (2.2, 35.0, 13.0, "worse"),
        # Slower than plain: no approximation can win.
        (0.9, 90.0, 10.5, "worse"),
        # Faster than every plain row: the fastest is to beat.
        (8.0, 21.0, 19.0, "better"),
    ],
)
def test_verdict(speedup: float, psnr: float, frechet: float, text: str) -> None:
    row = result("ours", "ours", 20, speedup, psnr, frechet)
    assert verdict.judge(row, PLAIN).text == text


def test_interpolation_in_time() -> None:
    # Time 1 / 2.5 = 0.4 lies at 3/5 of the way from 0.25 to 0.5.
    found = verdict.judge(result("ours", "ours", 20, 2.5, 30.0, 15.0), PLAIN)
    amplitude = 0.1 + 0.6 * (0.01 - 0.1)
    assert found.psnr_db == pytest.approx(-20 * math.log10(amplitude))
    assert found.frechet == pytest.approx(20 + 0.6 * (12 - 20))
    assert found.psnr_gain_db == pytest.approx(30.0 - found.psnr_db)
    assert found.frechet_gain == pytest.approx(found.frechet - 15.0)
    assert found.nearest == "exact 10"


def test_the_nearest_plain_row_is_not_the_reference() -> None:
    found = verdict.judge(result("ours", "ours", 20, 1.1, 60.0, 9.0), PLAIN)
    assert found.nearest == "exact 10"
    # Nearly no time saved, yet above the line from 40 dB to no error at all.
    assert found.psnr_gain_db > 0
    assert found.text == "better"


def test_no_plain_rows() -> None:
    with pytest.raises(ValueError, match="no plain rows"):
        verdict.judge(result("ours", "ours", 20, 2.0, 40.0, 10.0), [])


def test_each_kind_has_plain_rows_of_its_own() -> None:
    stock = [replace(row, name=row.name + " stock", kind="stock") for row in PLAIN]
    results = [*PLAIN, *stock]
    ours = result("ours", "ours", 20, 2.0, 40.0, 10.0)
    assert verdict.plain_for(ours, results) == list(PLAIN)
    assert verdict.plain_for(replace(ours, kind="rival"), results) == stock
    assert verdict.plain_for(stock[0], results) == []


# Files


def table(steps: int, frechet: float = 11.0) -> report.Table:
    ours = result("Taylor", "ours", steps, 2.0, 41.0, frechet)
    return report.Table(steps, 4, 2, [*PLAIN, ours], {"SeaCache": "serves others"})


def test_files(tmp_path: Path) -> None:
    machine = {"threads": 1}
    report.write(tmp_path / "new", "dit", machine, table(20))
    report.write(tmp_path / "new", "dit", machine, table(10))
    paths = report.write(tmp_path / "new", "dit", {"threads": 2}, table(20, math.nan))
    assert [path.name for path in paths] == ["steps-dit.json", "steps-dit.md", "steps-dit.png"]
    found = json.loads(paths[0].read_text())
    assert [one["steps"] for one in found["tables"]] == [10, 20]
    assert found["machines"] == {"10": {"threads": 1}, "20": {"threads": 2}}
    assert found["tables"][1]["rows"][3]["frechet"] is None  # JSON has no NaN
    assert found["tables"][0]["rows"][3]["verdict"]["text"] == "better"
    assert found["tables"][0]["left_out"] == {"SeaCache": "serves others"}
    text = paths[1].read_text()
    assert text.index("## 10 steps: 4 samples in batches of 2") < text.index("## 20 steps")
    assert "| Taylor | 5 | 2.00x | 1.00 | 41.0 | 0.9000 | 0.100 | 99.0 % | 11.00 | 2 KiB |" in text
    assert "- Left out: SeaCache: serves others." in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_table_survives_its_file() -> None:
    one = table(20)
    assert report.Table.from_dict(json.loads(json.dumps(one.to_dict()))) == one
