"""The code of docs/adding-a-model.md runs as it stands there."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_zoo import one_thread  # noqa: F401

from accelrt.models import family

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-a-model.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page() -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """What the page defines, and what its blocks print beside what it shows."""
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "adding_a_model"}
    shown: list[tuple[str, str]] = []
    printed = ""
    registered = dict(family._REGISTRY)
    try:
        for block in FENCE.finditer(text):
            kind, code = block.groups()
            if kind == "text":
                shown.append((printed, code))
                continue
            assert kind == "python"
            line = text.count("\n", 0, block.start(2))
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + code, str(PAGE), "exec"), names)
            printed = out.getvalue()
        yield names, shown
    finally:
        family._REGISTRY.clear()
        family._REGISTRY.update(registered)


def test_outputs_are_as_shown(page: Any) -> None:
    _, shown = page
    assert shown
    for printed, expected in shown:
        assert [line.rstrip() for line in printed.splitlines()] == expected.splitlines()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "fourier", "classes", "resnet-samplers", "no-attention"])
def test_the_test_on_the_page(page: Any, case: str, dtype: str) -> None:
    names, _ = page
    assert case in names["CASES"]
    names["test_exact"](case, getattr(names["torch"], dtype))


def test_calls_that_the_page_declines(page: Any) -> None:
    import torch

    import accelrt

    names, _ = page
    model = accelrt.wrap(names["build"](num_class_embeds=10))
    with torch.no_grad(), pytest.raises(ValueError, match="class_labels should be provided"):
        model(torch.zeros(1, 3, 8, 8), 3)


def test_every_case_of_the_page_is_run(page: Any) -> None:
    names, _ = page
    assert list(names["CASES"]) == [
        "plain", "fourier", "classes", "resnet-samplers", "no-attention",
    ]  # fmt: skip
