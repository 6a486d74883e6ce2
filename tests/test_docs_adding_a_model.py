"""The code of docs/adding-a-model.md runs as it stands there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import docs_pages
import pytest
from model_zoo import one_thread  # noqa: F401

from accelrt.models import family

PAGE = docs_pages.ROOT / "docs" / "adding-a-model.md"


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page defines; what it shows to be printed was compared."""
    names: dict[str, Any] = {"__name__": "adding_a_model"}
    registered = dict(family._REGISTRY)
    try:
        ran = [block for _, block in docs_pages.run(PAGE, names)]
        assert any(block.shown for block in ran)
        yield names
    finally:
        family._REGISTRY.clear()
        family._REGISTRY.update(registered)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "fourier", "classes", "resnet-samplers", "no-attention"])
def test_the_test_on_the_page(page: Any, case: str, dtype: str) -> None:
    assert case in page["CASES"]
    page["test_exact"](case, getattr(page["torch"], dtype))


def test_calls_that_the_page_declines(page: Any) -> None:
    import torch

    import accelrt

    model = accelrt.wrap(page["build"](num_class_embeds=10))
    with torch.no_grad(), pytest.raises(ValueError, match="class_labels should be provided"):
        model(torch.zeros(1, 3, 8, 8), 3)


def test_every_case_of_the_page_is_run(page: Any) -> None:
    assert list(page["CASES"]) == [
        "plain", "fourier", "classes", "resnet-samplers", "no-attention",
    ]  # fmt: skip
