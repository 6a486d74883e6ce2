"""`accelrt bench`: what it measures, how it counts, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from model_zoo import one_thread  # noqa: F401
from torch import nn
from typer.testing import CliRunner

import accelrt
from accelrt.benchmarking import measure as measuring
from accelrt.benchmarking import models, tables, tuned, whole_call
from accelrt.benchmarking import rates as rating
from accelrt.benchmarking.flops import count_flops, utilisation
from accelrt.benchmarking.measure import DTYPES, Settings, measure
from accelrt.benchmarking.models import FULL, TINY, ModelCase
from accelrt.benchmarking.process import ProcessWatch
from accelrt.benchmarking.progress import Progress
from accelrt.benchmarking.results import Measurement, Rates, error_bound
from accelrt.benchmarking.timing import Timing, interleave
from accelrt.benchmarking.weights import cast, random_model, share
from accelrt.cli import app, errors
from accelrt.models import family

LINUX = sys.platform == "linux"
TINY_SETTINGS = Settings(size="tiny", repeats=1)


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_debug", False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(scope="module")
def measured() -> Measurement:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = measure("dit", TINY_SETTINGS)
    torch.set_num_threads(before)
    return result


class Heard(Progress):
    def __init__(self) -> None:
        self.words: list[str] = []

    def begin(self, phase: str) -> None:
        self.words.append(phase)

    def call(self, what: str) -> None:
        self.words.append(what)


@pytest.mark.parametrize("name", TINY)
def test_every_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SLOW", float("inf"))
    heard = Heard()
    result = measure(name, TINY_SETTINGS, progress=heard)
    runs = [times.run for times in result.rates.times]
    assert runs[0] == "stock"
    assert runs[-1] == "accelrt"
    assert len(runs) >= 3
    assert runs == [quality.run for quality in result.quality]
    assert set(result.switches) == set(runs[1:-1])
    assert result.stock_reason == ""
    assert result.groups["fused"] > 0
    stock, ours = result.quality[0], result.quality[-1]
    assert 0 < ours.peak_bytes < stock.peak_bytes
    assert result.within
    for switches, quality in zip(TINY[name]().switches, result.quality[1:], strict=False):
        assert 0 < quality.peak_bytes < stock.peak_bytes or not switches.exact
        # Inexact switches are told from exact ones by the error that is reported.
        assert (quality.error < 2 * stock.error) is switches.exact
    assert 1e-3 < stock.error < 0.1  # the rounding of bf16: no path is empty, none overflows
    for times in result.rates.times:
        assert len(times.seconds) == 1
        assert times.median_seconds > 0
        assert times.utilisation > 0
        assert (times.process_peak_bytes is not None) is LINUX
    assert result.rates.times[0].speedup == 1.0
    assert {"count", "weights", "truth in fp32", "memory and error", "time"} <= set(heard.words)
    assert set(result.phases) <= set(heard.words)


def test_slow_forms_of_stock_are_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "SLOW", 0.0)
    result = measure("dit", dataclasses.replace(TINY_SETTINGS, repeats=2))
    stock, *switched, ours = result.rates.times
    assert (stock.run, ours.run) == ("stock", "accelrt")
    assert [t.run for t in switched] == [q.run for q in result.quality[1:-1]]
    assert [len(t.seconds) for t in (ours, *switched)] == [2, *(1 for _ in switched)]
    assert all(t.speedup > 0 and t.utilisation > 0 for t in switched)


def test_without_rounds_the_watched_forwards_count() -> None:
    result = measure("dit", dataclasses.replace(TINY_SETTINGS, repeats=0))
    assert [t.run for t in result.rates.times] == [q.run for q in result.quality]
    assert all(len(t.seconds) == 1 and t.utilisation > 0 for t in result.rates.times)
    assert result.rates.times[0].speedup == 1.0


def test_without_switches() -> None:
    settings = dataclasses.replace(TINY_SETTINGS, repeats=0, switches=False)
    result = measure("svd", settings)
    assert [times.run for times in result.rates.times] == ["stock", "accelrt"]
    assert result.switches == {}
    assert result.within


def test_full_and_tiny_are_the_same_models() -> None:
    assert list(FULL) == list(TINY)
    for name in FULL:
        full, tiny = FULL[name](), TINY[name]()
        assert full.name == tiny.name == name
        assert [s.label for s in full.switches] == [s.label for s in tiny.switches]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_dtypes(dtype: str) -> None:
    truth = "fp64" if dtype == "fp32" else "fp32"
    result = measure("dit", Settings(size="tiny", repeats=1, dtype=dtype, truth=truth))
    assert 0 < result.quality[0].error < (1e-5 if dtype == "fp32" else 1e-2)
    assert result.within


def test_command_writes_json_and_markdown(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    result = run(
        "--model", "dit", "--size", "tiny", "--repeats", "2", "--threads", "1", "--seed", "3",
        "--no-tuned-malloc", "--json", "--out", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(out.read_text())
    assert document["environment"]["build"]["loaded"] is True
    (found,) = document["models"]
    assert found["name"] == "dit"
    assert found["device"] == "cpu"
    assert found["dtype"] == "bf16"
    assert (found["threads"], found["repeats"], found["seed"]) == (1, 2, 3)
    assert found["tuned"] is None
    assert found["bound"] == pytest.approx(1.1 * found["quality"][0]["error"] + 1e-6)
    assert found["within"] is True
    assert found["flops"] == count_flops(TINY["dit"]())
    assert found["config"] == accelrt.Config().to_dict()
    for times in found["rates"]["times"]:
        assert len(times["seconds"]) == 2
        assert times["median_seconds"] == pytest.approx(sum(times["seconds"]) / 2)
    text = out.with_suffix(".md").read_text()
    assert "| DiT-XL/2, 128x128, bf16, cpu, tiny | stock | " in text
    assert "set_chunk_feed_forward" in text
    assert "dit: count took" in result.stderr


def test_command_prints_a_table_into_a_folder(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("fuse: false\nff_rows: 8\n")
    result = run(
        "--model", "dit", "--size", "tiny", "--repeats", "1", "--threads", "1",
        "--no-tuned-malloc", "--config", str(config), "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for word in ("MFU", "rel. L2", "stock, chunked", "accelrt", "matrix product 256^3", "0 fused"):
        assert word in words
    written = json.loads((tmp_path / "models-cpu.json").read_text())
    assert written["models"][0]["config"]["ff_rows"] == 8


def test_all_runs_every_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: Measurement
) -> None:
    asked: list[str] = []

    def pretend(name: str, settings: Settings, **_: Any) -> Measurement:
        asked.append(name)
        return dataclasses.replace(measured, name=name)

    monkeypatch.setattr(measuring, "measure", pretend)
    monkeypatch.setattr(measuring, "check", lambda case, config: None)
    result = run("--model", "all", "--size", "tiny", "--out", str(tmp_path / "all.json"))
    assert result.exit_code == 0, result.output
    assert asked == list(FULL)
    found = json.loads((tmp_path / "all.json").read_text())["models"]
    assert [model["name"] for model in found] == list(FULL)


def test_an_error_above_the_bound_is_a_negative_finding(
    monkeypatch: pytest.MonkeyPatch, measured: Measurement
) -> None:
    worse = dataclasses.replace(measured.quality[-1], error=measured.bound * 1.001)
    result = dataclasses.replace(measured, quality=(*measured.quality[:-1], worse))
    assert not result.within
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: result)
    done = run("--model", "dit", "--size", "tiny")
    assert done.exit_code == 1
    assert "ABOVE" in done.stdout
    broken = dataclasses.replace(worse, error=float("inf"))
    result = dataclasses.replace(result, quality=(*measured.quality[:-1], broken))
    done = run("--model", "dit", "--size", "tiny", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["models"][0]["quality"][-1]["error"] is None


def test_the_rule() -> None:
    assert error_bound(0.01) == pytest.approx(0.011001)


def test_wrong_arguments(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"slice": 3}')
    cases = [
        (("--model", "flux"), "'flux' is not one of"),
        (("--repeats", "-1"), "repeats"),
        (("--threads", "0"), "threads"),
        (("--dtype", "fp32", "--truth", "fp32"), "with dtype fp32 it must be fp64"),
        (("--config", str(config)), "unknown setting slice"),
        (("--config", str(tmp_path / "gone.json")), "gone.json"),
        (("--out", str(tmp_path / "result.txt")), "allowed: a .json file"),
    ]
    if not torch.cuda.is_available():
        cases.append((("--device", "cuda"), "--device cuda is not available here"))
    for arguments, message in cases:
        result = run("--model", "dit", "--size", "tiny", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.stderr
    assert "Missing option '--model'" in run().stderr


def test_unsupported_model_fails_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(family._REGISTRY, DiTTransformer2DModel)
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: pytest.fail("measured"))
    result = run("--model", "all", "--out", str(tmp_path / "x.json"))
    assert result.exit_code == 2
    assert "DiTTransformer2DModel has no supported component" in result.stderr
    assert not (tmp_path / "x.json").exists()


class Small(nn.Module):
    """A convolution, a linear layer, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(self.conv(x).flatten(2).transpose(1, 2))
        heads = tokens.unflatten(-1, (2, 4)).transpose(1, 2)  # [N, 2, HW, 4]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_flops_of_a_small_model_by_hand() -> None:
    case = ModelCase(
        "small", "", "", Small, lambda: {"x": torch.zeros(3, 4, 5, 7)},
        run=lambda model, inputs: model(**inputs),
    )  # fmt: skip
    pixels = 3 * 5 * 7
    conv = 2 * pixels * 6 * (4 * 3 * 3)
    linear = 2 * pixels * 6 * 8
    attention = 2 * (2 * 3 * 2 * 35 * 35 * 4)
    assert count_flops(case) == conv + linear + attention


def test_flops_of_dit_by_hand() -> None:
    d, blocks, tokens, samples = 1152, 28, 256, 2
    embedding = 256 * d + d * d
    block = tokens * 12 * d * d + 2 * tokens**2 * d + embedding + 6 * d * d
    ends = tokens * (4 * 4 * d + d * 4 * 8) + embedding + 2 * d * d
    assert count_flops(models.dit()) == 2 * samples * (blocks * block + ends)


def test_utilisation() -> None:
    # 3 TFLOP in 2 s against a product of 1 TFLOP in 0.25 s: 1.5 of 4 TFLOP/s.
    assert utilisation(3 * 10**12, 2.0, 10**12, 0.25) == pytest.approx(0.375)


def test_ratios_are_taken_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {
        "product before stock": (1.0, 1.0, 1.0), "stock": (4.0, 8.0, 4.0),
        "product before accelrt": (1.0, 2.0, 1.0), "accelrt": (2.0, 8.0, 1.0),
    }  # fmt: skip
    monkeypatch.setattr(
        rating, "interleave", lambda *_, **__: {k: Timing(v) for k, v in rounds.items()}
    )
    settings = dataclasses.replace(TINY_SETTINGS, repeats=3)
    form = measuring.Form(None, {}, lambda model, inputs: torch.zeros(1))
    forms = {"stock": form, "accelrt": form}
    rates = measuring._rates(forms, dict.fromkeys(forms, 9.0), 2 * 256**3, settings, Progress())
    stock, ours = rates.times
    assert stock.speedup == 1.0
    assert ours.speedup == 2.0  # the median of 2, 1 and 4
    # The model has the FLOPs of the product: utilisation is a ratio of seconds.
    assert stock.utilisation == pytest.approx(0.25)
    assert ours.utilisation == pytest.approx(0.5)  # the median of 1/2, 2/8 and 1/1
    assert rates.product_flops_per_second == pytest.approx(2 * 256**3)
    assert Rates.from_dict(json.loads(json.dumps(dataclasses.asdict(rates)))) == rates


def test_interleaving() -> None:
    order: list[str] = []
    heard: list[tuple[str, int]] = []
    thunks = {name: [lambda name=name: order.append(name)] for name in "ab"}
    timings = interleave(
        thunks, rounds=2, calls={"a": 1, "b": 2}, on_call=lambda *what: heard.append(what)
    )
    assert order == ["a", "b", "b", "a", "b", "b"]  # known ones get no uncounted round
    assert heard == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert all(len(timing.rounds) == 2 for timing in timings.values())


def test_tuned_malloc_in_a_process_of_its_own() -> None:
    heard = Heard()
    rates = tuned.tuned_rates("dit", TINY_SETTINGS, 10**9, heard)
    assert [times.run for times in rates.times] == ["stock", "accelrt"]
    assert all(times.median_seconds > 0 for times in rates.times)
    assert "accelrt, 1 of 1" in heard.words


def test_tuned_malloc_reports_its_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nread -r request\necho $MALLOC_TOP_PAD_ $* >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(RuntimeError, match="ended with 3: 268435456 -m accelrt"):
        tuned.tuned_rates("dit", TINY_SETTINGS, 1, Progress())


def test_random_weights() -> None:
    model = random_model(TINY["dit"]().build, torch.bfloat16, "cpu", 5)
    again = random_model(TINY["dit"]().build, torch.bfloat16, "cpu", 5)
    other = random_model(TINY["dit"]().build, torch.bfloat16, "cpu", 6)
    keys = model.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in keys.items())
    assert not all(torch.equal(value, other.state_dict()[key]) for key, value in keys.items())
    plain = TINY["dit"]().build()
    assert [(k, v.shape) for k, v in keys.items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    assert torch.equal(model.pos_embed.pos_embed, plain.pos_embed.pos_embed.bfloat16())
    for key, value in model.named_parameters():
        assert value.dtype is torch.bfloat16
        assert value.abs().sum() > 0, key  # also what training begins with at zero
        if value.dim() == 2 and "embedding_table" not in key:
            wanted = value.shape[1] ** -0.5
            assert float(value.float().std()) == pytest.approx(wanted, rel=0.2), key


def test_sharing_and_casting_keep_the_weights() -> None:
    model = random_model(TINY["vae"]().build, torch.bfloat16, "cpu")
    other = share(model)
    assert other is not model
    assert other.decoder is not model.decoder
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cast(model, torch.float32)
    assert model.dtype is torch.float32
    cast(model, torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux only")
def test_process_watch() -> None:
    with ProcessWatch() as watch:
        torch.zeros(96 << 20, dtype=torch.uint8).fill_(1)
    assert watch.growth is not None
    assert 90 << 20 < watch.growth < 160 << 20
    assert watch.page_faults > 100
    with ProcessWatch() as watch:  # the peak was reset, what was freed counts no more
        pass
    assert watch.growth is not None
    assert watch.growth < 1 << 20


def test_gpu_columns(measured: Measurement) -> None:
    quality = tuple(
        dataclasses.replace(q, gpu_allocated_bytes=3 << 20, gpu_reserved_bytes=5 << 20)
        for q in measured.quality
    )
    result = dataclasses.replace(measured, device="cuda", quality=quality, tuned=measured.rates)
    rows = tables.rows(result)
    heads = tables.columns("cuda")
    assert len(rows) == 2 * len(quality)
    assert all(len(row) == len(heads) for row in rows)
    assert rows[0][heads.index("allocated")] == "3.0 MiB"
    assert rows[0][heads.index("reserved")] == "5.0 MiB"
    assert rows[-1][0] == "accelrt [tuned malloc]"


def test_settings_cover_the_command() -> None:
    assert set(DTYPES) == {"fp32", "bf16", "fp16", "fp64"}
    with pytest.raises(ValueError, match="truth is 'fp32'"):
        Settings(dtype="fp32", truth="fp32")


@pytest.mark.skipif(not LINUX, reason="only Linux tells the peak of a process")
def test_memory_of_a_whole_call(tmp_path: Path) -> None:
    result = run(
        "--memory", "--model", "animatediff", "--size", "tiny", "--budget", "64MiB",
        "--threads", "1", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "memory-whole-calls.json").read_text())
    (call,) = document["calls"]
    assert call["kept"]
    assert call["finite"]
    assert call["weight_bytes"] < call["planned_bytes"] <= call["budget_bytes"] == 64 * 2**20
    assert call["process_bytes"] > call["weight_bytes"]
    assert {plan["path"] for plan in call["plans"]} == {"unet", "vae.decoder"}
    assert "AnimateDiff, 3 frames 16x32" in result.output
    assert document["gpu"]["note"]
    assert f"By the driver: {document['gpu']['note']}." in result.output
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    keys = ", ".join(f"`{key}`" for key in document)
    assert f"with `--memory`: {keys} |" in page


def test_memory_takes_settings_and_budget_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def not_kept(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return {
            "name": arguments[0], "budget_bytes": 0, "planned_bytes": 0, "process_bytes": 1,
            "weight_bytes": 0, "seconds": 1.0, "kept": False,
        }  # fmt: skip

    monkeypatch.setattr(whole_call, "measure_apart", not_kept)
    (tmp_path / "settings.yaml").write_text("memory_budget: 48MiB\nff_rows: 777\n")
    command = ["--memory", "--model", "svd", "--config", str(tmp_path / "settings.yaml"),
               "--size", "tiny", "--threads", "1"]  # fmt: skip
    assert run(*command).exit_code == 1
    assert run(*command, "--budget", "64MiB").exit_code == 1
    assert [arguments[3] for arguments in asked] == ["48MiB", "64MiB"]
    assert all(arguments[5].ff_rows == 777 for arguments in asked)


def test_memory_refuses_what_it_cannot_do() -> None:
    no_pipeline = run("--memory", "--model", "dit")
    assert no_pipeline.exit_code == 2
    assert "--memory goes with --model animatediff, svd; got dit" in no_pipeline.output
    alone = run("--budget", "4GiB", "--model", "dit")
    assert alone.exit_code == 2
    assert "--budget goes with --memory" in alone.output
