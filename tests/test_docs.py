"""Every Python block of the READMEs and of the guides runs as it stands there.

The page on adding a model has a file of its own, since its blocks are a test themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import docs_pages
import feedback_common
import pytest
import torch
from diffusers import AnimateDiffPipeline, DiTPipeline
from model_zoo import one_thread  # noqa: F401
from zoo_pipelines import FAMILIES

import accelrt
from accelrt.feedback import FeedbackModule
from accelrt.planning import cost
from accelrt.steps import Rehash, Schedule, Taylor
from accelrt.steps.origin import origin_of

ROOT = docs_pages.ROOT
MODELS = ROOT / "examples" / "reference_models"
STEPS = 8
OWN_TEST = {
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("adding-a-model.md", "feedback.md", "steps.md")),
}


class ShortVideo(AnimateDiffPipeline):
    """A call that leaves its length open takes a moment."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"num_inference_steps": 2, "num_frames": 4, **kwargs})


def animatediff() -> Any:
    pipe = ShortVideo.from_pretrained(MODELS / "animatediff", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> Any:
    pipe = DiTPipeline.from_pretrained(MODELS / "dit", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_feedback() -> Any:
    """With the scheduler that the committed module was trained for."""
    pipe = dit()
    pipe.scheduler = FeedbackModule.from_pretrained(MODELS / "dit" / "feedback").scheduler()
    return pipe


def folder_of_files(folder: Path, pipe: Any) -> None:
    """The files that pages name."""
    for name in ("schedule.json", "calibrated/schedule.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        origin = origin_of(pipe.transformer, pipe.scheduler, STEPS)
        made = Rehash(Schedule((0, 1, 3, 5, 7), steps=STEPS), Taylor(1), "out", origin=origin)
        made.save(folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())
    return tmp_path


def call() -> dict[str, Any]:
    return {
        "class_labels": [3, 77],
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }


def test_the_readme_runs(folder: Path) -> None:
    makes: dict[int, Callable[[], Any]] = {
        0: animatediff, 1: with_feedback, 3: dit, 4: with_feedback, 5: dit, 6: animatediff,
    }  # fmt: skip
    folder_of_files(folder, dit())
    (folder / "folder-of-a-module").symlink_to(MODELS / "dit" / "feedback")
    names: dict[str, Any] = {"labels": [3, 7]}
    for number, _ in docs_pages.run(ROOT / "README.md", names):
        names["pipe"] = makes.pop(number)()
    assert not makes
    assert len(names["frames"][0]) == 4
    assert accelrt.is_wrapped(names["pipe"])


def test_the_page_on_steps_runs(folder: Path) -> None:
    pipe = FAMILIES["dit"].pipe()
    folder_of_files(folder, pipe)
    names: dict[str, Any] = {"pipe": pipe, "call": call()}

    def check() -> None:
        if accelrt.is_wrapped(pipe):
            pipe(**names["call"])
            assert accelrt.summary(pipe).steps.predicted == 3
            accelrt.unwrap(pipe)

    ran = 0
    for _ in docs_pages.run(ROOT / "docs" / "steps.md", names):
        check()  # what the block before left wrapped
        ran += 1
    check()
    assert ran == 4
    for name in ("step_rehash", "capped"):
        accelrt.wrap(pipe, rehash=names[name])
        pipe(**names["call"])
        assert accelrt.summary(pipe).steps.predicted > 0
        accelrt.unwrap(pipe)


def test_the_page_on_feedback_runs(folder: Path) -> None:
    pipe = feedback_common.pipeline("dit", torch.float32)
    feedback_common.module_for(pipe).save_pretrained("trained")
    names: dict[str, Any] = {"pipe": pipe, "call": call(), "folder": "trained"}
    assert STEPS == feedback_common.STANDS_FOR
    assert len(list(docs_pages.run(ROOT / "docs" / "feedback.md", names))) == 2
    accelrt.wrap(pipe, feedback=FeedbackModule.from_pretrained("untrained"))
    pipe(**{**names["call"], "num_inference_steps": 20})
    assert accelrt.summary(pipe).steps.feedback_steps == 3
    accelrt.unwrap(pipe)


@pytest.mark.parametrize(
    "page",
    [page for page in docs_pages.pages() if page not in OWN_TEST],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_other_pages_run(page: Path, folder: Path) -> None:
    """With a pipeline of images for whatever a page wraps."""
    pipe = dit()
    folder_of_files(folder, pipe)
    names: dict[str, Any] = {"pipe": pipe, "call": {**call(), "class_labels": [3, 7]}}
    assert list(docs_pages.run(page, names)), "every block of the page is marked as not run"


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page.name}:{block.line}")
        for page in docs_pages.pages()
        for block in docs_pages.blocks(page)
        if block.reason
    ],
)
def test_blocks_that_are_not_run(page: Path, block: docs_pages.Block) -> None:
    """Listed by ``pytest -rs``, with the reason that the page gives."""
    assert len(block.reason) >= 10
    pytest.skip(f"{page.name}, line {block.line}: {block.reason}")


def test_pages_with_a_test_of_their_own_exist() -> None:
    assert set(docs_pages.pages()) >= OWN_TEST


def test_a_block_that_prints_something_else_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError):
        list(docs_pages.run(page, {}))
    page.write_text("<!-- not run: it needs a GPU -->\n```python\nraise SystemExit\n```\n")
    assert not list(docs_pages.run(page, {}))
    assert docs_pages.blocks(page)[0].reason == "it needs a GPU"
