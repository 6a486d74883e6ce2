"""The page on Inner Loop Feedback: every Python block of it runs, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import feedback_common as common
import pytest
import torch
from model_zoo import one_thread  # noqa: F401

import accelrt
from accelrt.feedback import FeedbackModule

PAGE = Path(__file__).resolve().parent.parent / "docs" / "feedback.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = common.pipeline("dit", torch.float32)
    monkeypatch.chdir(tmp_path)
    common.module_for(pipe).save_pretrained("trained")
    call = {
        "class_labels": [3, 77],
        "num_inference_steps": common.STANDS_FOR,
        "output_type": "np",
    }
    names: dict[str, object] = {"pipe": pipe, "call": call, "folder": "trained"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    accelrt.wrap(pipe, feedback=FeedbackModule.from_pretrained("untrained"))
    pipe(**{**call, "num_inference_steps": 20})
    assert accelrt.summary(pipe).steps.feedback_steps == 3
    accelrt.unwrap(pipe)
