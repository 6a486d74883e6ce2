"""Time on a device without the launches, ceilings, and a budget of seconds.

On a GPU an implementation is captured into a CUDA graph of many calls, and the graph is timed:
small kernels take less than their launch from Python, which is not what a kernel is judged by.
What cannot be captured is timed as it is called, and marked so.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accelrt import _C
from accelrt.benchmarking.flops import copy_bytes, matrix_product, product_size
from accelrt.benchmarking.timing import Thunk, Timing, interleave, synchronise

COPY_BYTES = {"full": 1 << 30, "tiny": 1 << 20}
GRAPH_SECONDS = 2e-3  # roughly what one replay lasts
MOST_CALLS = 200


class Budget:
    """Seconds that a script may take.

    Args:
        seconds: of all its work.
        clock: seconds.
    """

    def __init__(self, seconds: float, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return float(self._end - self._clock())


@dataclass(frozen=True)
class Replay:
    """An implementation, ready to be timed.

    Args:
        run: its calls.
        calls: how many ``run`` makes.
        captured: they are one CUDA graph.
    """

    run: Thunk
    calls: int
    captured: bool


def replay(variants: Sequence[Thunk], device: str) -> Replay:
    """Warm an implementation up and, on a GPU, capture calls on all sets of tensors in turn.

    Args:
        variants: the same call on one or more sets of tensors.
        device: ``"cpu"`` or ``"cuda"``.
    """
    for thunk in variants:
        thunk()
    synchronise(device)
    if device != "cuda":
        return Replay(lambda: [thunk() for thunk in variants], len(variants), False)
    began = time.perf_counter()
    for thunk in variants:
        thunk()
    synchronise(device)
    once = max(time.perf_counter() - began, 1e-6)
    turns = max(1, min(MOST_CALLS // len(variants), round(GRAPH_SECONDS / once)))
    try:
        side: Any = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what an implementation allocates once, outside of the graph
            for thunk in variants:
                thunk()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for thunk in variants:
                    thunk()
        graph.replay()
        synchronise(device)
    except RuntimeError:  # it synchronises, or its library cannot be captured
        synchronise(device)
        return Replay(lambda: [thunk() for thunk in variants], len(variants), False)
    return Replay(graph.replay, turns * len(variants), True)


def with_own_products(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call with our kernels for the products and the attention of CUDA tensors.

    Everything else uses what ACCELRT_CUDA_PRODUCTS says, torch's by default. A captured call keeps
    the kernels of its capture.

    Raises:
        RuntimeError: at the call, if the build has no such choice.
    """

    def chosen() -> Any:
        if not hasattr(_C, "set_cuda_products"):
            raise RuntimeError("this build has no products of its own for CUDA tensors")
        before = _C.cuda_products()
        _C.set_cuda_products("own")
        try:
            return run()
        finally:
            _C.set_cuda_products(before)

    return chosen


def time_replays(
    replays: Mapping[str, Replay], device: str, rounds: int, slice_seconds: float
) -> dict[str, Timing]:
    """Seconds of one call of each, in turn; see :func:`~accelrt.benchmarking.timing.interleave`."""
    thunks = {name: [one.run] for name, one in replays.items()}
    found = interleave(thunks, device=device, rounds=rounds, slice_seconds=slice_seconds)
    return {
        name: Timing(tuple(seconds / replays[name].calls for seconds in timing.rounds))
        for name, timing in found.items()
    }


def ceilings(device: str, dtype: torch.dtype, size: str, rounds: int = 5) -> dict[str, Any]:
    """The two rates that operators are held against, measured here.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the product.
        size: ``"full"`` or ``"tiny"``.
        rounds: the median of which counts.
    """
    rows = product_size(device, size)
    product, flops = matrix_product(rows, dtype, device)
    copy, moved = copy_bytes(COPY_BYTES[size], device)
    replays = {"product": replay([product], device), "copy": replay([copy], device)}
    timings = time_replays(replays, device, rounds, 0.1 if size == "full" else 0.01)
    return {
        "product": f"{rows}^3 {str(dtype).removeprefix('torch.')}",
        "flops_per_second": flops / timings["product"].median,
        "copy": f"{COPY_BYTES[size] / 2**20:g} MiB",
        "bytes_per_second": moved / timings["copy"].median,
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    info = _C.build_info()
    found: dict[str, Any] = {
        "device": device,
        "name": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda_architectures": info["cuda_architectures"],
        "nvcc": info["cuda_compiler"],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found
