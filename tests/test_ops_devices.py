"""What holds of every operator on every device, at the trial sizes of the device benchmark.

On a GPU also: on a stream that is not the default one, and captured into a CUDA graph.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_common import all_devices, all_dtypes, error

from accelrt import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "device"))

import device_operators
from device_operators import TINY

ROOT = Path(__file__).resolve().parents[1]
HELPERS = {
    "context_keys", "feed_forward_scratch", "transformer_block_workspace", "group_norm_merge"
}  # fmt: skip
PUBLIC = {name for name in ops.__all__ if name[0].islower()} - HELPERS
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tensors(result: Any) -> list[torch.Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


@pytest.fixture(params=TINY, ids=lambda case: f"{case.op}-{case.size}".replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Iterator[Any]:
    with torch.no_grad():
        yield request.param


@all_dtypes
@all_devices
def test_into_given_memory_and_into_new_is_what_eager_gives(case, dtype, device):
    inputs = case.make(dtype, device)
    expected = tensors(inputs.eager())
    given, new = tensors(inputs.ours()), tensors(inputs.ours_allocating())
    assert len(given) == len(new) == len(expected)
    for mine, other, stock in zip(given, new, expected, strict=True):
        assert mine.device.type == device
        assert mine.shape == stock.shape
        assert torch.equal(mine, other)
        assert error(mine, stock.double()) < TOLERANCE[dtype]


@all_dtypes
@all_devices
def test_streams_and_graphs_of_a_gpu(case, dtype, device):
    """On the CPU a second call: the first must leave nothing behind."""
    inputs = case.make(dtype, device)
    held = tensors(inputs.ours())  # the memory that every call writes to
    expected = [t.clone() for t in held]
    if device != "cuda":
        assert all(map(torch.equal, tensors(inputs.ours()), expected))
        return
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        for t in held:
            t.zero_()  # over what a call on another stream, which would not wait, has written
        result = [t.clone() for t in tensors(inputs.ours())]
    side.synchronize()
    assert all(map(torch.equal, result, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.ours()
    for t in held:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, held, expected))


def empty_calls(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Results of every operator for nothing, which are all empty."""

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    rows, heads = zeros(0, 7, 8), zeros(0, 7, 2, 8)
    image = zeros(0, 3, 5, 8).permute(0, 3, 1, 2)
    layer = ops.LinearWeights(zeros(8, 8), None)
    attention = ops.AttentionWeights(layer, layer, layer, layer, 2)
    feed_forward = ops.FeedForwardWeights(layer, layer, "gelu_tanh")
    norm = ops.NormWeights()
    block = ops.BlockWeights(norm, attention, norm, feed_forward)
    statistics = torch.zeros(0, 2, 3, device=device)
    return {
        "silu": ops.silu(rows), "gelu": ops.gelu(rows), "gelu_tanh": ops.gelu_tanh(rows),
        "geglu": ops.geglu(rows),
        "attention": ops.attention(heads, heads.clone(), heads.clone()),
        "temporal_attention": ops.temporal_attention(heads, heads.clone(), heads.clone(), 2),
        "conv2d": ops.conv2d(image, zeros(4, 8, 3, 3)),
        "linear": ops.linear(zeros(0, 8), layer.weight),
        "feed_forward": ops.feed_forward(zeros(0, 8), feed_forward),
        "residual_blend": ops.residual_blend(rows, rows.clone()),
        "guided_step": ops.guided_step(rows, rows.clone(), sample_coef=1.0, eps_coef=1.0),
        "feature_delta": ops.feature_delta(rows, rows.clone()),
        "weighted_sum": ops.weighted_sum(zeros(2, 0, 8), torch.zeros(0, 2, device=device)),
        "group_norm_stats": ops.group_norm_stats(image, 2),
        "group_norm_apply": ops.group_norm_apply(image, statistics, 2),
        "layer_norm_modulate": ops.layer_norm_modulate(rows),
        "gate_residual_layer_norm_modulate": ops.gate_residual_layer_norm_modulate(
            rows, rows.clone()
        ),
        "transformer_block": ops.transformer_block(rows.clone(), zeros(0, 6, 8), block),
    }  # fmt: skip


@all_dtypes
@all_devices
@torch.no_grad()
def test_empty_tensors_give_empty_results(dtype, device):
    found = empty_calls(dtype, device)
    assert set(found) == PUBLIC
    for name, result in found.items():
        for t in tensors(result):
            assert (t.numel(), t.device.type) == (0, device), name


def test_every_operator_has_an_opcheck():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("accelrt::")
    }
    checked: set[str] = set()
    for path in Path(__file__).parent.glob("test_ops_*.py"):
        for part in re.split(r"(?m)^(?=def |@)", path.read_text()):
            if "opcheck" in part:
                checked |= set(re.findall(r"torch\.ops\.accelrt\.(\w+)\.default", part))
    assert len(registered) > 15
    assert checked == registered


def test_every_operator_has_a_case_and_a_test_on_all_devices():
    """A new operator is measured, and tested on a GPU where there is one."""
    used = (ROOT / "benchmarks" / "ops" / "cases.py").read_text()
    for name in PUBLIC - {"transformer_block", "silu", "gelu", "gelu_tanh"}:  # blocks/; getattr
        assert f"ops.{name}(" in used, name
    assert {"silu", "gelu", "gelu_tanh"} < {case.op for case in TINY}
    assert {case.op for case in device_operators.FULL} == {case.op for case in TINY}
    for path in Path(__file__).parent.glob("test_ops_*.py"):
        assert "@all_devices" in path.read_text(), path.name
