"""The recorder of graphs: a wrong capture must not look right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recording_backend import RecordingBackend, Refused
from torch import Tensor


def _recorded(body: Any, x: Tensor) -> tuple[RecordingBackend, Any, Tensor]:
    backend = RecordingBackend()
    device = torch.device("cpu")
    with torch.no_grad(), backend.capture(backend.pool(device), device) as graph:
        out = body(x)
    return backend, graph, out


def _replayed(backend: RecordingBackend, graph: Any, out: Tensor) -> Tensor:
    with backend.in_turn(torch.device("cpu")):
        backend.replay(graph)
    return out.clone()


def test_the_recorder_repeats_python_values_and_addresses() -> None:
    x, factor = torch.ones(3), [2.0]
    backend, graph, out = _recorded(lambda t: t * factor[0] + 1, x)
    x.fill_(5.0)
    factor[0] = 100.0
    assert _replayed(backend, graph, out).tolist() == [11.0] * 3
    y = torch.full((3,), 7.0)
    del y  # another tensor is not looked at
    assert _replayed(backend, graph, out).tolist() == [11.0] * 3


def test_the_recorder_does_not_run_what_it_captures() -> None:
    x, total = torch.ones(3), torch.zeros(3)
    backend, graph, out = _recorded(lambda t: total.add_(t) * 1, x)
    assert total.tolist() == [0.0] * 3
    _replayed(backend, graph, out)
    _replayed(backend, graph, out)
    assert total.tolist() == [2.0] * 3


def test_the_recorder_shows_what_outlives_its_turn() -> None:
    kept: list[Tensor] = []

    def body(t: Tensor) -> Tensor:
        kept.append(t + 1)
        return kept[0] * 2

    backend, graph, _ = _recorded(body, torch.ones(3))
    with backend.capture(0, torch.device("cpu")) as other:
        late = kept[0] * 3  # made inside of one graph, used in another
    assert _replayed(backend, other, late).isnan().all()
    assert graph is not other


@pytest.mark.parametrize(
    "body",
    [
        lambda t: t * t.sum().item(),
        lambda t: t + torch.tensor([1.0, 2.0, 3.0]),
        lambda t: t[t > 0],
        lambda t: t if bool((t > 0).all()) else -t,
    ],
    ids=["item", "copy from the host", "a shape from values", "a branch on values"],
)
def test_the_recorder_refuses_what_cuda_would(body: Any) -> None:
    with pytest.raises((Refused, RuntimeError)):
        _recorded(body, torch.ones(3))
