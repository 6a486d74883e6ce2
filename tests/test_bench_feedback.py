"""The benchmark of Inner Loop Feedback: its runs, its columns, its choice of rows, its files."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "steps"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "benchmarks" / "feedback"))

import contenders
import counting
import lines
import modules
import picture
import rivals
import table
import tasks
from bootstrap import Bootstrap, Interval, interval
from lines import EqualTime, Line
from measure import Baselines, Row, Samples
from reference_digits.measures import frechet_distance

from accelrt.benchmarking.gpu_use import GpuUse
from accelrt.feedback import FeedbackModule

STEPS, OUTER, BLOCKS = 9, 4, 8
FEEDBACK = [True, True, False, False]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run() -> Any:
    """The script; its name is that of the other benchmark's."""
    path = Path(contenders.__file__).with_name("run.py")
    spec = importlib.util.spec_from_file_location("feedback_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["feedback_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dit() -> Any:
    return contenders.pipeline("dit")


def untrained(pipe: Any, stands_for: int = STEPS, **settings: Any) -> FeedbackModule:
    schedules = {str(stands_for): {"feedback": FEEDBACK, "timesteps": None, "ahead": 0.0}}
    torch.manual_seed(0)
    made: FeedbackModule = FeedbackModule.from_backbone(
        pipe.transformer, schedules=schedules, **settings
    )
    return made


def line(name: str, kind: str, steps: int, seconds: float, psnr: float, **other: Any) -> Line:
    """A row that takes ``seconds`` where feedback takes 1 and the base 2."""
    values: dict[str, Any] = {
        "outer": steps,
        "blocks": 8 * steps,
        "seconds": seconds,
        "speedup": 2 / seconds,
        "of_stock": 3 / seconds,
        "of_ilf": seconds,
        "distance": Interval(20.0, 19.0, 21.5),
        "gap": Interval(0.5, -0.25, 1.0),
        "accuracy": 0.995,
        "psnr_db": psnr,
        "latent_error": 0.05,
    }
    return Line(name=name, kind=kind, steps=steps, **{**values, **other})


LINES = (
    line("diffusers, 20 steps", "stock", 20, 3.0, 46.0),
    line("accelrt, 20 steps", "exact", 20, 2.0, 46.0),
    line("accelrt, 12 steps", "exact", 12, 1.2, 40.0),
    line("accelrt, 10 steps", "exact", 10, 0.95, 38.0),
    line("ILF", "ilf", 20, 1.0, 41.0),
    line("Taylor, 2nd", "rehash", 20, 1.08, 43.0),
    line("Taylor, 3rd", "rehash", 20, 0.7, 37.0),
    line("slow cache", "rival", 20, 1.3, 45.0),
    line("fast cache", "rival", 20, 0.8, 30.0),
    line("inner", "caching", 20, 1.05, 29.0),
)


# Runs


def test_a_small_table(run: Any, dit: Any, tmp_path: Path) -> None:
    own = untrained(dit)
    untrained(dit, passes=2, start=1, length=4, scale_shape="block").save_pretrained(
        tmp_path / "two"
    )
    lite = (rivals.taylor_seer_lite(2), rivals.taylor_seer_lite(3))
    found = run.table_of(
        "dit",
        own,
        tmp_path,
        steps=STEPS,
        reference_steps=12,
        samples=4,
        batch=2,
        resamples=10,
        families={"lite": lite, "DeepCache": (rivals.deep_cache(2),)},
    )
    rows = {row.name: row for row in found.lines}
    chosen = next(name for name in rows if name.startswith("TaylorSeer lite"))
    assert list(rows) == [
        "diffusers, 9 steps",
        "accelrt, 9 steps",
        "accelrt, 8 steps",
        contenders.WITHOUT,
        contenders.ILF,
        "Taylor 2 of the output, every 2nd",
        "Taylor 2 of the output, every 3rd",
        contenders.NAIVE,
        chosen,
        "two",
    ]
    assert set(found.tried) == {rival.name for rival in lite}
    assert list(found.left_out) == ["DeepCache 2"]
    work = {name: (row.outer, row.blocks) for name, row in rows.items()}
    assert work["diffusers, 9 steps"] == work["accelrt, 9 steps"] == (9, 9 * BLOCKS)
    assert work["accelrt, 8 steps"] == (8, 8 * BLOCKS)
    assert work[contenders.WITHOUT] == (OUTER, OUTER * BLOCKS)
    assert work[contenders.ILF] == (OUTER, OUTER * BLOCKS + 2 * (own.length + 1))
    assert work["two"] == (OUTER, OUTER * BLOCKS + 2 * 2 * (4 + 1))
    # Computed: 0, 1, 3, 5, 7, 8, and 0, 1, 4, 7, 8; at steps 1, 3, 5, 7 two of eight blocks.
    assert work["Taylor 2 of the output, every 2nd"] == (9, 6 * BLOCKS)
    assert work["Taylor 2 of the output, every 3rd"] == (9, 5 * BLOCKS)
    assert work[contenders.NAIVE] == (9, 9 * BLOCKS - 4 * (BLOCKS - 2))
    assert work[chosen][0] == 9
    assert 0 < work[chosen][1] < 9 * BLOCKS
    stock, exact, ilf = (rows[name] for name in [*list(rows)[:2], contenders.ILF])
    assert stock.of_stock == exact.speedup == ilf.of_ilf == 1
    assert stock.gap == Interval(0.0, 0.0, 0.0)
    assert exact.latent_error == pytest.approx(stock.latent_error, rel=1e-3)
    # Scales of 0: feedback changes nothing.
    assert ilf.latent_error == pytest.approx(rows[contenders.WITHOUT].latent_error, rel=1e-3)
    assert ilf.latent_error > stock.latent_error > 0
    assert [made.name for made in found.made] == [contenders.ILF, "two"]
    assert found.equal_time.plain == "accelrt, 8 steps"
    assert len(found.ablation_cells()) == 2
    json.dumps(found.to_dict(), allow_nan=False)
    assert counting.find(dit.transformer) is None


def test_blocks_are_counted_without_a_trace(dit: Any) -> None:
    row = Row("stock", "stock", 2)
    assert counting.work_of(dit, row, "dit", 1) == counting.Work(2, 2 * BLOCKS)
    assert all(not b.attn1.to_q._forward_hooks for b in dit.transformer.transformer_blocks)
    exact = contenders.plain_rows(2)[0][1]
    with exact.switch(dit):
        assert counting.work_of(dit, exact, "dit", 1) == counting.Work(2, 2 * BLOCKS)
        forward = counting.find(dit.transformer)
        assert forward is not None
        assert forward.observer is None


def test_published_block_count_of_caching() -> None:
    """326 of 560 blocks: 28 a step, 20 steps."""
    blocks = SimpleNamespace(transformer=object())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "like_blocks", lambda model: range(28))
        (row,) = [r for r in contenders.cut_rows(blocks, 20) if r.name == contenders.NAIVE]
    rehash = row.switch.keywords["rehash"]  # type: ignore[attr-defined]
    predicted = sum(not rehash.policy.fixed(step, 20) for step in range(20))
    assert (rehash.boundary.first, rehash.boundary.last) == ("blocks.1", "blocks.26")
    assert 560 - predicted * 26 == 326


def test_the_solver_starts_at_the_last_noise_level() -> None:
    for model in contenders.MODELS:
        scheduler = contenders.pipeline(model).scheduler
        scheduler.set_timesteps(20)
        assert scheduler.timesteps[0] == 999
        assert scheduler.config.algorithm_type == "dpmsolver++"


# Columns


class FixedJudge:
    """Features are the pictures' first pixels."""

    reference = torch.tensor([[-1.0], [1.0]])

    def read(self, pictures: torch.Tensor, wanted: torch.Tensor) -> Any:
        return wanted[:, None] > 0, pictures.flatten(1)[:, :1]


def made_up(offset: float, seconds: list[float], work: counting.Work) -> Samples[counting.Work]:
    shape = (2, 1, 3, 4, 4)
    parts = [torch.full(shape, 0.5), torch.zeros(shape)]
    return Samples(
        count=work,
        seconds=seconds,
        latents=[torch.full((2, 4), 1.0 + offset) for _ in parts],
        pictures=[part + offset for part in parts],
    )


def test_columns() -> None:
    rows = [Row("stock", "stock", 20), Row("exact", "exact", 20), Row("ILF", "ilf", 20)]
    rows.append(Row("failed", "rival", 20))
    samples = {
        "stock": made_up(0.0, [6.0, 9.0], counting.Work(20, 160)),
        "exact": made_up(0.0, [4.0, 8.0], counting.Work(20, 160)),
        "ILF": made_up(0.1, [2.0, 2.0], counting.Work(10, 96)),
    }
    reference = (samples["stock"].latents, samples["stock"].pictures)
    task = tasks.Task("dit", (), torch.tensor([1, 0, 1, 1]), "transformer")
    found = lines.lines_of(
        rows, samples, reference, Baselines("stock", "exact"), "ILF", task, FixedJudge(), 20
    )
    assert [one.name for one in found] == ["stock", "exact", "ILF"]
    stock, exact, ilf = found
    assert (ilf.outer, ilf.blocks, ilf.steps) == (10, 96, 20)
    assert ilf.seconds == 2.0
    assert ilf.speedup == (4 / 2 + 8 / 2) / 2  # the median of ratios, batch by batch
    assert ilf.of_stock == (6 / 2 + 9 / 2) / 2
    assert exact.of_ilf == (4 / 2 + 8 / 2) / 2
    assert exact.of_stock == (6 / 4 + 9 / 8) / 2
    assert (stock.of_stock, exact.speedup, ilf.of_ilf) == (1, 1, 1)
    assert ilf.accuracy == 0.75
    assert ilf.psnr_db == pytest.approx(20.0, abs=1e-4)
    assert ilf.latent_error == pytest.approx(0.1)
    assert exact.latent_error == 0
    # One channel: squared difference of means and of standard deviations.
    spread = torch.tensor([0.5, 0.5, 0.0, 0.0]).std().item()
    common = (spread - math.sqrt(2)) ** 2
    assert stock.frechet == pytest.approx(0.25**2 + common)
    assert ilf.frechet == pytest.approx(0.35**2 + common, rel=1e-5)
    assert ilf.gap.value == pytest.approx(0.35**2 - 0.25**2, rel=1e-4)
    assert ilf.gap.low < ilf.gap.value < ilf.gap.high


def test_distances_are_those_of_the_reference_measure() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, features = (torch.randn(n, 16, generator=generator) for n in (100, 40))
    features = features * 2 + 1
    bootstrap = Bootstrap(reference, 40, 120)
    assert bootstrap.distance(features) == pytest.approx(frechet_distance(features, reference))
    draws = bootstrap.draws(features)
    assert draws.shape == (120,)
    for i in (0, 50, 119):
        again = features[bootstrap.drawn[i]]
        assert draws[i].item() == pytest.approx(frechet_distance(again, reference))


def test_rows_are_resampled_alike() -> None:
    reference = torch.tensor([[-1.0], [1.0]])
    features = torch.tensor([[0.0], [1.0], [4.0], [9.0]])
    bootstrap = Bootstrap(reference, 4, 50)
    gap = bootstrap.draws(features + 3) - bootstrap.draws(features)
    # (m + 3)^2 - m^2 of each resample's own mean; the spread is the same and cancels.
    means = features[bootstrap.drawn, 0].double().mean(dim=1)
    torch.testing.assert_close(gap, 6 * means + 9)
    assert gap.std() > 1
    same = bootstrap.draws(features) - bootstrap.draws(features.clone())
    assert interval(0.0, same) == Interval(0.0, 0.0, 0.0)


def test_interval_of_known_draws() -> None:
    found = interval(10.0, torch.arange(101.0))
    assert (found.value, found.low, found.high) == pytest.approx((10.0, -35.0, 55.0))
    half = interval(10.0, torch.arange(101.0), 0.5)
    assert (half.low, half.high) == pytest.approx((-15.0, 35.0))
    assert str(Interval(1.234, -0.5, 2.0)) == "1.23 [-0.50, 2.00]"
    assert Interval(1.234, -0.5, 2.0).signed == "+1.23 [-0.50, +2.00]"


@pytest.mark.parametrize(
    ("samples", "resamples", "message"),
    [(1, 5, "samples is 1; allowed: at least 2"), (4, 0, "resamples is 0; allowed: at least 1")],
)
def test_wrong_bootstraps(samples: int, resamples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bootstrap(torch.randn(8, 2), samples, resamples)
    with pytest.raises(ValueError, match=r"coverage is 1\.0; allowed: above 0, below 1"):
        interval(0.0, torch.zeros(3), 1.0)


# Equal time


def test_what_there_is_in_the_time_of_feedback() -> None:
    assert lines.equal_time(LINES) == EqualTime("accelrt, 10 steps", "fast cache", "Taylor, 2nd")
    slower = [replace(one, of_ilf=2.0) for one in LINES if one.kind in ("rehash", "rival")]
    assert lines.equal_time(slower) == EqualTime(None, None, None)


def test_gain_over_plain_steps_in_the_same_time() -> None:
    by_name = {one.name: one for one in LINES}
    found = lines.gain(by_name["ILF"], LINES)
    assert found is not None
    assert found.nearest == "accelrt, 10 steps"
    share = (1.0 - 0.95) / (1.2 - 0.95)
    amplitude = 10**-1.9 + share * (10**-2.0 - 10**-1.9)
    assert found.psnr_gain_db == pytest.approx(41.0 + 20 * math.log10(amplitude))
    assert lines.gain(by_name["accelrt, 12 steps"], LINES) is None
    assert lines.gain(by_name["diffusers, 20 steps"], LINES) is None


def test_the_setting_nearest_in_time() -> None:
    family = tuple(rivals.first_block_cache(t) for t in (0.05, 0.1, 0.2))
    ratios = {"FirstBlockCache 0.05": 1.9, "FirstBlockCache 0.1": 1.2, "FirstBlockCache 0.2": 0.9}
    chosen = contenders.nearest(family, ratios)
    assert chosen is not None
    assert chosen.name == "FirstBlockCache 0.2"  # 1 / 0.9 is less than 1.2
    assert contenders.nearest(family[:1], {}) is None


# Modules


def test_a_module_for_another_model_is_refused(run: Any, dit: Any, tmp_path: Path) -> None:
    untrained(contenders.pipeline("pixart")).save_pretrained(tmp_path / "pixart")
    for arguments in ((tmp_path / "pixart",), (untrained(dit), tmp_path)):
        with pytest.raises(ValueError, match=r"pixart: .*PixArtTransformer2DModel, not DiT"):
            run.table_of("dit", *arguments, steps=STEPS, samples=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 20}, "ILF: steps is 20; allowed: 9"),
        ({"steps": 1}, "steps is 1; allowed: at least 2"),
        ({"samples": 1}, "samples is 1; allowed: at least 2"),
        ({"resamples": 0}, "resamples is 0; allowed: at least 1"),
        ({"reference_steps": 9}, r"reference_steps is 9; allowed: above steps \(9\)"),
        ({"samples": 4, "batch": 3}, "batch is 3; allowed: divisors"),
        ({"model": "svd"}, "model is 'svd'; allowed: dit, pixart"),
    ],
)
def test_wrong_arguments(run: Any, dit: Any, settings: dict[str, Any], message: str) -> None:
    given = {"model": "dit", "module": untrained(dit), "steps": STEPS, "samples": 2, **settings}
    with pytest.raises(ValueError, match=message):
        run.table_of(**given)


def test_folders_without_a_module(run: Any, dit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none has no config\.json; allowed: the folder of a"):
        modules.load_module(tmp_path / "none", dit, STEPS)
    with pytest.raises(ValueError, match=r"no sub-folder has a config\.json"):
        modules.load_ablations(tmp_path, dit, STEPS)
    answer = CliRunner().invoke(_app(run), ["--model", "dit", "--module", str(tmp_path)])
    assert answer.exit_code == 2
    # The box around the message breaks its lines.
    said = " ".join(answer.output.replace("│", " ").split())
    assert "has no config.json" in said or "has no config. json" in said


def _app(run: Any) -> Any:
    import typer

    app = typer.Typer()
    app.command()(run.main)
    return app


def test_steps_without_feedback_leave_the_module_as_it_was(dit: Any) -> None:
    module = untrained(dit)
    silent = modules.without_feedback(module, STEPS)
    assert silent.schedules[STEPS].feedback == (False,) * OUTER
    assert module.schedules[STEPS].feedback == tuple(FEEDBACK)
    assert silent.block is module.block


def test_how_a_module_was_made(dit: Any, tmp_path: Path) -> None:
    module = untrained(dit, learned_scale=False, conditioning="ahead", enters="first")
    alone = modules.described("one", module, STEPS, None)
    assert (alone.start, alone.length, alone.passes) == (module.start, module.length, 1)
    assert (alone.scales, alone.conditioning, alone.enters) == ("fixed at 1", "ahead", "first")
    assert (alone.feedback_steps, alone.objective) == (2, None)
    (tmp_path / "training.json").write_text('{"config": {"objective": "landing"}}')
    assert modules.described("one", module, STEPS, tmp_path).objective == "landing"
    assert modules.described("two", untrained(dit), STEPS, None).scales == "channel"


# Files


def small_table(**other: Any) -> table.Table:
    settings = {"steps": 20, "reference_steps": 200, "resamples": 200, "samples": 4}
    made = modules.Made("ILF", 2, 3, 1, "every", "channel", "t", None, 4, 0.5)
    values: dict[str, Any] = {
        "model": "dit",
        "settings": settings,
        "machine": {"threads": 1},
        "lines": LINES,
        "made": [made],
        "equal_time": lines.equal_time(LINES),
        "tried": {"fast cache": 0.8},
        "left_out": {"SeaCache": "serves others"},
        "gpu": GpuUse("the pipeline runs on the CPU"),
    }
    return table.Table(**{**values, **other})


def test_files(tmp_path: Path) -> None:
    nan = replace(LINES[-1], name="odd", latent_error=math.nan)
    paths = table.write(tmp_path / "new", small_table(lines=[*LINES, nan]))
    assert [path.name for path in paths] == [
        "feedback-dit.json",
        "feedback-dit.md",
        "feedback-dit.png",
    ]
    found = json.loads(paths[0].read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["odd"]["latent_error"] is None  # JSON has no NaN
    assert rows["ILF"]["distance"] == {"value": 20.0, "low": 19.0, "high": 21.5}
    assert rows["ILF"]["gap"] == {"value": 0.5, "low": -0.25, "high": 1.0}
    assert rows["ILF"]["verdict"]["nearest"] == "accelrt, 10 steps"
    assert found["equal_time"]["rehash"] == "Taylor, 2nd"
    assert found["modules"][0]["length"] == 3
    text = paths[1].read_text()
    expected = (
        "| accelrt, 10 steps * | 10 | 80 | 0.95 | 2.11x | 3.16x | 20.00 [19.00, 21.50] "
        "| +0.50 [-0.25, +1.00] | 99.5 % | 38.0 | 0.050 |  |"
    )
    assert expected in text
    assert "- Left out: SeaCache: serves others." in text
    assert "## Modules" not in text  # only the table's own
    assert text.endswith("By the driver of the GPU: the pipeline runs on the CPU.\n")
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_ablations_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    ilf = modules.Made("ILF", 2, 3, 1, "every", "channel", "t", None, 4, 0.5)
    other = replace(ilf, name="two", length=4, passes=2, objective="landing")
    ablation = line("two", "ablation", 20, 1.4, 40.5, blocks=120, outer=10)
    both = small_table(lines=[*LINES, ablation], made=[ilf, other])
    assert "two" not in [row.name for row in both.rows]
    assert both.ablation_cells()[1][:11] == [
        "two", "2", "4", "2", "every", "channel", "t", "0.5", "landing", "10 (4)", "120",
    ]  # fmt: skip
    assert "| two | 2 | 4 | 2 |" in both.markdown().split("## Modules")[1]
    both.show()
    shown = capsys.readouterr().out
    assert "+0.50 [-0.25, +1.00]" in shown
    assert "accelrt, 10 steps *" in shown
    (row,) = [text for text in shown.splitlines() if text.startswith(" accelrt, 12 steps")]
    assert row.split()[-2:] == ["40.0", "0.050"]  # not cut off


def test_labels_do_not_overlap() -> None:
    from matplotlib.figure import Figure

    axis = Figure(figsize=(9, 6)).add_subplot()
    points = [(1 + 0.01 * i, 40 + 0.2 * (i % 3), 6.0) for i in range(8)]
    axis.plot([p[0] for p in points], [p[1] for p in points], "o", label="all")
    axis.margins(0.5)
    axis.legend(loc="lower right")
    labels = {f"a configuration with a long name, {i}": p[:2] for i, p in enumerate(points)}
    boxes = picture.place(axis, points, labels)
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    for x, y, _ in points:
        where = axis.transData.transform((x, y))
        assert not any(box.contains(*where) for box in boxes.values())
    assert sorted(text.get_text() for text in axis.texts) == sorted(labels)


def test_the_front() -> None:
    rounding = replace(LINES[0], name="stock again", seconds=3.1, psnr_db=46.004)
    names = [one.name for one in picture.front([rounding, *LINES])]
    assert names == ["Taylor, 3rd", "accelrt, 10 steps", "ILF", "Taylor, 2nd", "slow cache",
                     "accelrt, 20 steps"]  # fmt: skip
