"""What runs without a CUDA graph, and why; captures and models that fail."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_unet2d
from graphs_common import backends, call, dit_inputs, drawn, pair, report
from model_zoo import one_thread
from recording_backend import RecordingBackend
from torch import Tensor, nn

import accelrt
from accelrt.groups.capture import NotCapturable
from accelrt.models.dit import DiT
from accelrt.steps.graphs import WARMING
from accelrt.steps.static_inputs import described

__all__ = ["backends", "one_thread"]


# What runs without


def _eager_reason(model: Any, given: dict[str, Any], calls: int = 3) -> str:
    """The one reason why calls ran without a graph."""
    for _ in range(calls):
        call(model, given)
    found = report(model)
    assert found.captures == 0
    ((reason, count),) = found.eager.items()
    assert count == calls
    assert reason in str(accelrt.summary(model))
    return reason


class Extended(nn.Linear):
    """A layer of another library: it may hold values elsewhere."""

    scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scaling


def test_unknown_modules_hooks_and_processors_run_without(
    backends: list[RecordingBackend],
) -> None:
    model, _ = pair(zoo.tiny_dit)
    old = model.transformer_blocks[1].attn1.to_q
    extended = Extended(old.in_features, old.out_features)
    extended.load_state_dict(old.state_dict())
    model.transformer_blocks[1].attn1.to_q = extended
    assert "Extended" in _eager_reason(model, dit_inputs())

    model, _ = pair(zoo.tiny_dit)
    handle = model.transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert "forward hooks" in _eager_reason(model, dit_inputs())
    handle.remove()
    for _ in range(2):
        call(model, dit_inputs())
    assert report(model).captures == 1

    model, _ = pair(zoo.tiny_dit)
    model.transformer_blocks[0].forward = model.transformer_blocks[0].forward
    assert "forward of its own" in _eager_reason(model, dit_inputs())

    model, _ = pair(zoo.tiny_dit)
    model._hf_hook = object()
    assert "move or cast" in _eager_reason(model, dit_inputs())

    unet = zoo_unet2d.two_levels()
    zoo_unet2d.add_ip_adapters(unet)
    accelrt.wrap(unet, cuda_graphs=True)
    given = {**zoo_unet2d.inputs(2, 8, 8), "added_cond_kwargs": zoo_unet2d.pictures(2)}
    assert "Pictures" in _eager_reason(unet, given)


def test_arguments_that_are_no_tensors_run_without(backends: list[RecordingBackend]) -> None:
    model = accelrt.wrap(zoo_unet2d.two_levels(), cuda_graphs=True)
    given = {**zoo_unet2d.inputs(2, 8, 8), "cross_attention_kwargs": {"thing": object()}}
    assert _eager_reason(model, given) == "thing is a object"


def test_what_is_part_of_a_form() -> None:
    x = torch.zeros(2, 3)
    assert described({"x": x, "timestep": 5}) == described({"x": x + 1, "timestep": 7})
    assert described({"timestep": 5}) != described({"timestep": 5.0})
    for other in ({"x": x[:1]}, {"x": x.t()}, {"x": x.double()}, {"x": [x]}, {"x": None}, {"y": x}):
        assert described({"x": x}) != described(other)
    assert described({"scale": 1.0}) != described({"scale": 0.5})
    assert described({"flag": True}) != described({"flag": 1})
    with pytest.raises(NotCapturable, match="deep is a object"):
        described({"list": [{"deep": object()}]})


def test_only_denoisers(backends: list[RecordingBackend]) -> None:
    vae = accelrt.wrap(zoo.tiny_vae(), cuda_graphs=True)
    with torch.no_grad():
        for _ in range(3):
            vae.decode(zoo.normal(1, 4, 8, 8))
    found = report(vae, "decoder")
    assert found.eager == {"not a denoiser: it runs once per request": 3}
    assert found.captures == 0


def test_profiles_and_the_stock_forward_run_without(backends: list[RecordingBackend]) -> None:
    model, _ = pair(zoo.tiny_dit)
    for _ in range(2):
        call(model, dit_inputs())
    with accelrt.profile(model):
        call(model, dit_inputs())
    model(**dit_inputs())  # with gradients
    eager = report(model).eager
    assert eager["profiled or observed"] == 1
    assert eager["the stock forward ran: gradients are needed"] == 1
    call(model, dit_inputs())
    assert report(model).replays == 2


def test_compiled_models_are_one_program(backends: list[RecordingBackend]) -> None:
    model, eager = pair(lambda: zoo.tiny_dit(num_layers=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(**dit_inputs(), return_dict=False)[0]
    assert torch.equal(out, call(eager, dit_inputs()))
    assert report(model).captures == 0


# Failures


class Broken(RuntimeError):
    pass


def test_a_failed_capture_runs_eagerly_and_is_not_tried_again(
    backends: list[RecordingBackend],
) -> None:
    model, eager = pair(zoo.tiny_dit)
    call(model, dit_inputs(1))
    call(model, dit_inputs(1))
    (backend,) = backends

    def fail() -> None:
        raise Broken("no capture\nof this")

    backend.inside = fail
    for draw in range(4):
        given = drawn(dit_inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
        assert not backend.is_current
    reason = "computed: the capture failed: Broken: no capture"
    assert report(model).eager == {WARMING: 2, reason: 3}
    assert backend.events.count("capture") == 2
    backend.inside = lambda: None
    for draw in range(3):  # what was captured before still runs, beside a new pool
        given = drawn(dit_inputs(1), draw)
        assert torch.equal(call(model, given), call(eager, given))
        given = drawn(dit_inputs(1, 4), draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert len(backend.graphs) == 2
    for one in (model, eager):
        with torch.no_grad():
            one.proj_out_2.bias.add_(1)
    for draw in range(3):  # another model may be tried
        given = drawn(dit_inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert report(model).eager[reason] == 3


def test_what_waits_for_the_device_cannot_be_captured(
    backends: list[RecordingBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager = pair(zoo.tiny_dit)
    finish = DiT.finish

    def waits(self: DiT, module: nn.Module, state: Any) -> Tensor:
        assert state.hidden.sum().item() == state.hidden.sum()
        return finish(self, module, state)

    monkeypatch.setattr(DiT, "finish", waits)
    for _ in range(3):
        assert torch.equal(call(model, dit_inputs()), call(eager, dit_inputs()))
    assert any("_local_scalar_dense" in reason for reason in report(model).eager)
    assert report(model).kept == 0


def test_errors_of_the_model_are_raised(
    backends: list[RecordingBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair(zoo.tiny_dit)
    call(model, dit_inputs())
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> Tensor:
            raise Broken("of the model")

        patch.setattr(DiT, "finish", broken)
        with pytest.raises(Broken, match="of the model"):
            call(model, dit_inputs())
    assert backends[0].depth == 0
    call(model, dit_inputs())  # the lock is free
