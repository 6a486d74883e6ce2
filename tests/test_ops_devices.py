"""What holds of every operator on every device, at the trial sizes of the device benchmark.

On a GPU also: on a stream that is not the default one, and captured into a CUDA graph.
"""

from __future__ import annotations

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


def test_every_operator_has_a_case_and_a_test_on_all_devices():
    """A new operator is measured, and tested on a GPU where there is one."""
    helpers = {"context_keys", "transformer_block_workspace", "group_norm_merge"}
    public = {name for name in ops.__all__ if name[0].islower()} - helpers
    used = (ROOT / "benchmarks" / "ops" / "cases.py").read_text()
    for name in public - {"transformer_block", "silu", "gelu", "gelu_tanh"}:  # blocks/; getattr
        assert f"ops.{name}(" in used, name
    assert {"silu", "gelu", "gelu_tanh"} < {case.op for case in TINY}
    assert {case.op for case in device_operators.FULL} == {case.op for case in TINY}
    for path in Path(__file__).parent.glob("test_ops_*.py"):
        assert "@all_devices" in path.read_text(), path.name
