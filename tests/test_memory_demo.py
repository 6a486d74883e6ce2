"""Peaks of the demo's pipelines without a budget, whoever computes their products."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor

import accelrt
from accelrt.cli import scenarios
from accelrt.config import Config
from accelrt.groups import feed_forward, products
from accelrt.groups.feed_forward import FeedForwardRunner
from accelrt.memory import track_peak
from accelrt.quality.observe import silent_steps

MIB = 2**20


@pytest.fixture(params=[True, False], ids=["ours", "library"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether linear layers and attention are by our kernels, whatever the processor."""
    chosen = bool(request.param)
    monkeypatch.setattr(products, "linear_is_ours", lambda dtype, depth: chosen)
    monkeypatch.setattr(products, "_attention_is_ours", lambda dtype, head_dim, device: chosen)
    return chosen


@pytest.mark.parametrize(("name", "most"), [("animatediff", 9.0), ("svd", 6.0)])
def test_live_activations_of_the_demo(ours: bool, name: str, most: float) -> None:
    """MiB in float32, where the stock pipelines have 24.8 and 13.3."""
    folder = scenarios.reference_folder()
    scenario = scenarios.reference_scenario(name, folder, "fp32", "cpu", 1)
    accelrt.wrap(scenario.pipe)
    generator = torch.Generator().manual_seed(0)
    with silent_steps(scenario.pipe, lambda done, total: None), track_peak() as memory:
        scenario.pipe(**scenario.call, generator=generator, output_type="np")
    assert memory.peak_bytes <= most * MIB


def _runs(layer: FeedForward, x: Tensor, **settings: int) -> tuple[Tensor, int, int | None]:
    """What it adds to zeros, the peak beside, and the rows of a slice."""
    runner = FeedForwardRunner(layer, Config(**settings))  # type: ignore[arg-type]
    y = torch.zeros_like(x)
    with torch.no_grad(), track_peak() as memory:
        runner(x, y)
    return y, memory.peak_bytes, runner.rows


@pytest.mark.parametrize("bias", [True, False])
def test_a_geglu_holds_no_more_than_half_a_slice(ours: bool, bias: bool) -> None:
    """Rows of 64 channels: values and gates are 2 KiB each, and 8 MiB of 4096 rows."""
    layer = FeedForward(64, activation_fn="geglu", bias=bias)
    x = torch.randn(2, 5000, 64)
    y, peak, rows = _runs(layer, x)
    assert peak <= 4 * MIB
    assert rows is not None
    assert (rows > 2048) == ours
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)


def test_wide_layers_keep_enough_rows_for_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "linear_is_ours", lambda dtype, depth: False)
    for channels, most in ((320, 819), (640, 409)):  # by the rule: 8 MiB of values and gates
        layer = FeedForward(channels, activation_fn="geglu")
        _, _, rows = _runs(layer, torch.randn(1, 2 * most, channels))
        assert rows == min(most, feed_forward.FEWEST_ROWS)
        assert _runs(layer, torch.randn(1, 2 * most, channels), ff_rows=100)[2] == 100


def test_a_product_with_a_hook_sees_rows_beside_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what the hook of the first one keeps is not written over."""
    monkeypatch.setattr(products, "linear_is_ours", lambda dtype, depth: False)
    x = torch.randn(1, 300, 64)
    for index in (0, 2):
        layer = FeedForward(64, activation_fn="geglu")
        part = layer.net[0].proj if index == 0 else layer.net[2]
        kept: list[Tensor] = []
        part.register_forward_hook(
            lambda module, given, result, kept=kept: kept.extend((given[0], result))
        )
        y, _, _ = _runs(layer, x)
        assert all(t.is_contiguous() for t in kept)
        values = kept[1].clone()
        torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
        assert index == 2 or torch.equal(values, kept[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_a_tensor_of_its_own(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "linear_is_ours", lambda dtype, depth: False)
    layer = FeedForward(48, activation_fn="geglu").to(dtype)
    x = torch.randn(3, 70, 48).to(dtype)
    y, _, _ = _runs(layer, x)
    with torch.no_grad():
        h = layer.net[0].proj(x)
        expected = layer.net[2](accelrt.ops.geglu(h))
    torch.testing.assert_close(y, expected, atol=0, rtol=1e-6 if dtype == torch.float32 else 0)
