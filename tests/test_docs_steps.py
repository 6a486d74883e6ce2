"""The page on fewer steps: every Python block of it runs, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from zoo_pipelines import FAMILIES

import accelrt
from accelrt.steps import Rehash, Schedule, Taylor
from accelrt.steps.origin import origin_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "steps.md"
STEPS = 8


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FAMILIES["dit"].pipe()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibrated").mkdir()
    origin = origin_of(pipe.transformer, pipe.scheduler, STEPS)
    made = Rehash(Schedule((0, 1, 3, 5, 7), steps=STEPS), Taylor(1), "out", origin=origin)
    made.save("calibrated/schedule.json")
    call = {
        "class_labels": [3, 77],
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    names: dict[str, object] = {"pipe": pipe, "call": call}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        if accelrt.is_wrapped(pipe):
            pipe(**call)
            assert accelrt.summary(pipe).steps.predicted == 3
            accelrt.unwrap(pipe)
    for name in ("step_rehash", "capped"):
        accelrt.wrap(pipe, rehash=names[name])
        pipe(**call)
        assert accelrt.summary(pipe).steps.predicted > 0
        accelrt.unwrap(pipe)
