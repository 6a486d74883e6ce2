"""The page on profiles: every Python block of it runs, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import model_zoo as zoo
import pytest
from model_zoo import one_thread  # noqa: F401

import accelrt
from accelrt.profiling import Profile, ceilings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "profiling.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "PRODUCT_ROWS", 128)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    pipe = accelrt.wrap(zoo.dit_pipeline())
    monkeypatch.chdir(tmp_path)
    call = {"class_labels": [3, 77], "num_inference_steps": 3, "output_type": "np"}
    names: dict[str, object] = {"pipe": pipe, "call": call}
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    prof = names["prof"]
    assert isinstance(prof, Profile)
    assert prof.steps == 3
    assert (tmp_path / "trace.json").is_file()
    assert "Roofline" in (tmp_path / "report.html").read_text()
    for picture in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (PAGE.parent / picture).is_file()
