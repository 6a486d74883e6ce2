"""The demo: pictures, table, page; the reference models where they exist."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import accelrt
from accelrt.cli import app, scenarios
from accelrt.cli.threads import fastest_threads
from accelrt.quality import compare
from accelrt.reporting.environment import inspect_environment
from accelrt.reporting.media import panels, write_pictures
from accelrt.reporting.page import write_page
from accelrt.reporting.tables import (
    COLUMNS,
    Exhibit,
    bytes_text,
    decibel_text,
    error_text,
    restored_text,
    seconds_text,
    table_rows,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def video() -> Any:
    pipe = zoo.animatediff_pipeline()
    call = {
        "prompt_embeds": zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=4),
        "negative_prompt_embeds": zoo.normal(1, 5, zoo.CONTEXT_WIDTH, seed=5),
        "num_frames": 3,
        "height": 2 * pipe.vae_scale_factor,
        "width": 2 * pipe.vae_scale_factor,
        "num_inference_steps": 2,
    }
    return compare(pipe, call, repeats=1)


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Tiny DiT"
    zoo.dit_pipeline().save_pretrained(folder)
    return folder


class Tags(html.parser.HTMLParser):
    """Checks that tags nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path, pictures: int) -> str:
    page = path.read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("img") == pictures
    # Self-contained: nothing is fetched.
    assert len(re.findall(r'src="data:image/(?:gif|png);base64,', page)) == pictures
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "prefers-color-scheme" in page
    return page


def test_video_pictures(video: Any, tmp_path: Path) -> None:
    path = write_pictures(video, tmp_path, "clip")
    assert path.name == "clip.gif"
    with Image.open(path) as gif:
        assert gif.n_frames == 3
        assert gif.info["loop"] == 0
    frames = panels(video)
    width = frames[0].width
    third = (width - 12) // 3
    stock = frames[0].crop((12, 26, third, frames[0].height - 12))
    ours = frames[0].crop((third + 12, 26, 2 * third, frames[0].height - 12))
    assert stock.size == ours.size
    # The same pictures, up to one level of rounding.
    near = [abs(a - b) for a, b in zip(stock.tobytes(), ours.tobytes(), strict=True)]
    assert max(near) <= 1


def test_page_of_a_video(video: Any, tmp_path: Path) -> None:
    picture = write_pictures(video, tmp_path, "clip")
    exhibit = Exhibit("A & B", "1 x 3 frames", video, picture)
    write_page(tmp_path / "page.html", [exhibit], inspect_environment(), "accelrt demo --seed 0")
    page = check_page(tmp_path / "page.html", 1)
    assert "A &amp; B" in page
    assert "bit-equal to the first stock run" in page
    for row in video.groups.rows:
        assert row.group in page
    for cell in (*COLUMNS[2:], *table_rows(exhibit)[1]):
        assert cell in page


def test_demo_of_a_folder(dit_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app,
        ["demo", "--model", str(dit_folder), "--out", str(out), "--steps", "2", "--repeats", "1",
         "--seed", "7", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (model,) = found["models"]
    assert model["pipeline"] == "DiTPipeline"
    assert model["seed"] == 7
    assert model["restored"] is True
    assert model["latent_error"] < 1e-4
    assert model["accelrt"]["peak_bytes"] > 0
    assert Path(found["report"]) == out / "report.html"
    assert Path(model["picture"]) == out / "tiny-dit.png"
    page = check_page(out / "report.html", 1)
    assert "--seed 7" in found["command"]
    assert found["command"].split("--out")[0].strip() in page.replace("&#39;", "'")


def test_demo_table_and_negative_finding(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(pipe: Any) -> Any:
        accelrt.unwrap(pipe)
        with torch.no_grad():
            pipe.transformer.proj_out_2.bias += 1e-2
        return pipe

    monkeypatch.setitem(compare.__globals__, "unwrap", careless)
    out = tmp_path / "out"
    arguments = ["--model", str(dit_folder), "--out", str(out), "--steps", "2", "--repeats", "1"]
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 1, result.stderr
    assert "NOT RESTORED" in result.stdout
    assert "NOT RESTORED" in check_page(out / "report.html", 1)
    for column in ("seconds", "ratio", "peak memory", "rel. L2", "PSNR"):
        assert column in result.stdout


def test_threads_are_chosen_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = zoo.dit_pipeline()
    call = {"class_labels": [1], "num_inference_steps": 9}
    assert fastest_threads(pipe, call) == {}  # one thread: nothing to choose
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    measured = fastest_threads(pipe, call)
    assert sorted(measured) == [1, 2]
    assert chosen[:3] == [1, 1, 2]
    assert measured[chosen[-1]] == min(measured.values())


def test_cell_texts(video: Any) -> None:
    assert seconds_text(0.012345) == "0.0123"
    assert seconds_text(123.4) == "123"
    assert bytes_text(3 * 2**19) == "1.5 MiB"
    assert bytes_text(3 * 2**30) == "3.00 GiB"
    assert error_text(None) == "-"
    assert error_text(0.0) == "0"
    assert error_text(1.24e-6) == "1.2e-06"
    assert decibel_text(float("inf")) == "identical"
    assert decibel_text(81.26) == "81.3 dB"
    assert restored_text(video).startswith("The stock run after an unwrap was bit-equal")


def reference_models() -> bool:
    try:
        scenarios.reference_folder()
    except FileNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not reference_models(), reason="the reference models are not trained yet")
def test_default_demo(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["demo", "--out", str(tmp_path), "--steps", "2", "--repeats", "1", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    models = json.loads(result.stdout)["models"]
    assert [model["pipeline"] for model in models] == [
        "AnimateDiffPipeline",
        "StableVideoDiffusionPipeline",
        "DiTPipeline",
        "PixArtSigmaPipeline",
    ]
    for model in models:
        assert model["latent_error"] < 1e-4
        assert model["accelrt"]["peak_bytes"] < model["stock"]["peak_bytes"]
    for name, frames in (("animatediff", 16), ("svd", 8)):
        with Image.open(tmp_path / f"{name}.gif") as gif:
            assert gif.n_frames == frames
    check_page(tmp_path / "report.html", 4)
