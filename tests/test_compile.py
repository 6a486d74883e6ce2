"""torch.compile of wrapped models, in the pipelines that call them."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from zoo_pipelines import FAMILIES

import accelrt


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "function") for name in FAMILIES), ("dit", "method")]
)
def test_torch_compile(name: str, how: str) -> None:
    """The wrapped model is one graph: no break, whichever way it is compiled."""
    family = FAMILIES[name]
    pipe = family.pipe()
    before = family.run(pipe)
    torch._dynamo.reset()
    accelrt.wrap(pipe)  # longer slices, fewer of them in the graph
    model = family.model(pipe)
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    if how == "function":
        setattr(pipe, family.denoiser, torch.compile(model, **options))
    else:
        model.compile(**options)
    after = family.run(pipe)
    setattr(pipe, family.denoiser, model)
    model._compiled_call_impl = None
    accelrt.unwrap(pipe)
    torch._dynamo.reset()
    assert zoo.relative_error(after, before) < 1e-11
    assert not torch.equal(after, before)
    assert torch.equal(family.run(pipe), before)


def test_inductor() -> None:
    """The default backend: the fused operators stay whole between its own kernels."""
    model = zoo.tiny_dit(num_layers=1)
    inputs = {
        "hidden_states": zoo.normal(2, 4, 8, 8),
        "timestep": torch.tensor([7, 301]),
        "class_labels": torch.tensor([3, 77]),
    }
    with torch.no_grad():
        truth = zoo.clone(model, torch.float64)(**zoo.to_dtype(inputs, torch.float64)).sample
        stock = zoo.relative_error(model(**inputs).sample, truth)
        accelrt.wrap(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        wrapped = zoo.relative_error(compiled(**inputs).sample, truth)
        torch._dynamo.reset()
    zoo.assert_rule(wrapped, stock)
