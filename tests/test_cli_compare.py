"""``accelrt compare``: several seeds, the floor, the pictures, the reference models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_svd
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import accelrt
from accelrt.cli import app
from accelrt.cli.compare import Findings
from accelrt.quality import compare
from accelrt.steps import Rehash, Schedule, Taylor

REHASH = Rehash(Schedule((0, 1, 2, 4), steps=6), Taylor(1), "out")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "Tiny DiT"
    zoo.dit_pipeline().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules") / "schedule.json"
    REHASH.save(path)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_seeds_are_aggregated(folder: Path, schedule: Path, tmp_path: Path) -> None:
    done = run(
        "--model", folder, "--rehash", schedule, "--seed", 5, "--seeds", 2, "--out", tmp_path,
        "--min-psnr", 5, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each["seed"] for each in found["seeds"]] == [5, 6]
    each = [one["psnr_db"] for one in found["seeds"]]
    assert each[0] != each[1]
    assert found["psnr_db"]["mean"] == pytest.approx(sum(each) / 2)
    assert found["psnr_db"]["worst"] == min(each)
    assert found["min_psnr_db"] == 5
    assert found["passed"] is True
    for one in found["seeds"]:
        assert one["call"]["num_inference_steps"] == 6  # of the schedule
        assert one["rehash"] == json.loads(json.dumps(REHASH.to_dict()))
        assert one["restored"] is True
        assert one["accelrt"]["peak_bytes"] > 0
    assert found["computed_stages"] == pytest.approx(4 / 6)
    assert found["cache_bytes"] == found["seeds"][0]["cache_bytes"] > 0
    assert [Path(path).name for path in found["pictures"]] == [
        "tiny-dit-seed5.png", "tiny-dit-seed6.png",
    ]  # fmt: skip
    for path in found["pictures"]:
        with Image.open(path) as picture:
            assert picture.width > 900
    for word in ("--seed 5", "--seeds 2", "--min-psnr 5", "--steps 6", "--rehash"):
        assert word in found["command"]
    assert found["environment"]["build"]["loaded"] is True


def test_below_the_floor_it_says_so_and_exits_with_1(folder: Path, schedule: Path) -> None:
    done = run("--model", folder, "--rehash", schedule, "--min-psnr", 150)
    assert done.exit_code == 1
    assert re.search(r"PSNR \d+\.\d dB is below --min-psnr 150 dB", done.stderr)
    for text in ("stages run", "67 %", "plain", "accelrt", "PSNR", "SSIM", "DiTPipeline"):
        assert text in done.stdout
    assert "written" not in done.stdout
    done = run("--model", folder, "--rehash", schedule, "--min-psnr", 150, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["passed"] is False


def test_without_a_cut_every_step_is_computed(folder: Path) -> None:
    done = run("--model", folder, "--steps", 2, "--min-psnr", 60, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["computed_stages"] == 1.0
    assert found["cache_bytes"] == 0
    assert found["seeds"][0]["rehash"] is None
    assert found["pictures"] == []


def test_settings_of_the_wrap(folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text('{"samples_per_slice": 1}')
    done = run("--model", folder, "--steps", 4, "--config", settings, "--rehash", "auto", "--json")
    assert done.exit_code == 0, done.stderr
    (one,) = json.loads(done.stdout)["seeds"]
    assert one["config"]["samples_per_slice"] == 1
    assert one["rehash"]["policy"]["kind"] == "interval"
    assert len(one["accelrt"]["seconds"]) == 1


def test_a_pipeline_that_is_not_restored(
    folder: Path, schedule: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(pipe: Any) -> Any:
        accelrt.unwrap(pipe)
        with torch.no_grad():
            pipe.transformer.proj_out_2.bias += 1e-2
        return pipe

    monkeypatch.setitem(compare.__globals__, "unwrap", careless)
    done = run("--model", folder, "--rehash", schedule)
    assert done.exit_code == 1
    assert "NOT RESTORED" in done.stderr


def test_a_pipeline_that_starts_from_a_picture(tmp_path: Path) -> None:
    zoo_svd.svd_pipeline().save_pretrained(tmp_path / "svd")
    done = run("--model", tmp_path / "svd", "--steps", 3)
    assert done.exit_code == 2
    assert "--image FILE" in done.stderr
    done = run("--model", tmp_path / "svd", "--image", tmp_path / "none.png")
    assert done.exit_code == 2
    assert "cannot be read as a picture" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-psnr", "0"), "--min-psnr is 0.0; allowed"),
        (("--min-psnr", "nan"), "--min-psnr is nan; allowed"),
        (("--rehash", "none.json"), "none.json"),
        (("--steps", "5"), "made for 6 steps, not for 5"),
        (("--prompt", "a seven"), "takes no prompt"),
        (("--frames", "3"), "takes no num_frames"),
        (("--config", "none.json"), "none.json"),
    ],
)
def test_wrong_arguments(
    folder: Path, schedule: Path, words: tuple[str, ...], message: str
) -> None:
    rehash = () if "--rehash" in words else ("--rehash", schedule)
    done = run("--model", folder, *rehash, *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_model_that_there_is_not() -> None:
    done = run("--model", "./nowhere")
    assert done.exit_code == 2
    assert "neither a folder nor a hub id" in done.stderr


def test_reference_models_by_their_names() -> None:
    done = run("--model", "dit", "--steps", 6, "--rehash", "auto", "--min-psnr", 10, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "DiT"
    assert found["detail"] == "20 images"
    assert found["seeds"][0]["pipeline"] == "DiTPipeline"
    assert 0.5 < found["computed_stages"] < 1
    done = run("--model", "dit", "--prompt", "a seven")
    assert done.exit_code == 2
    assert "DiTPipeline takes no prompt; leave --prompt out" in done.stderr


def test_a_reference_model_with_a_prompt_of_ones_own() -> None:
    done = run("--model", "pixart", "--steps", 2, "--prompt", "a handwritten four", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["detail"] == "prompt as given"
    call = found["seeds"][0]["call"]
    assert call["prompt"] == "a handwritten four"
    assert call["guidance_scale"] == 4.5


def test_help_names_the_exit_codes() -> None:
    text = " ".join(run("--help").stdout.split())
    assert "1 the mean PSNR is below --min-psnr" in text


@pytest.fixture(scope="module")
def one() -> Any:
    return compare(zoo.dit_pipeline(), {"class_labels": [3], "num_inference_steps": 2}, repeats=1)


def test_identical_pictures_are_no_number(one: Any) -> None:
    def findings(*values: float) -> Findings:
        return Findings("DiT", "", [replace(one, psnr_db=value) for value in values])

    assert findings(math.inf, 20.0, 30.0).mean_psnr == 25.0
    assert findings(math.inf, 20.0, 30.0).worst_psnr == 20.0
    assert findings(math.inf).mean_psnr == math.inf
    assert findings(math.inf).failures(90.0) == []
    assert findings(math.inf, 20.0).failures(21.0) != []
    # What is not finite passes no floor.
    broken = findings(math.nan, 50.0)
    assert broken.failures(1.0) == ["PSNR nan dB is below --min-psnr 1 dB"]
    assert math.isnan(broken.worst_psnr)
    json.dumps(broken.to_dict(1.0), allow_nan=False)
