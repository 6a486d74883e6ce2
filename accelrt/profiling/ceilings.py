"""How fast this machine can be: a large matrix product, and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Rows of the square matrices of the product.
PRODUCT_ROWS = 2048
COPY_BYTES = 256 << 20
RUNS = 3


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing on this machine exceeds, measured right after the run.

    Args:
        flops_per_second: of a product of two square matrices.
        bytes_per_second: of a copy between two buffers beyond the caches, read and written.
        rows: of the matrices.
        dtype: of the matrices.
    """

    flops_per_second: float
    bytes_per_second: float
    rows: int
    dtype: str


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    """The rates with the present number of threads; the best of a few runs each.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the product.
    """
    from accelrt.benchmarking.flops import matrix_product

    rows = PRODUCT_ROWS
    product, flops = matrix_product(rows, dtype, device)
    size = COPY_BYTES // 2
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        flops / _best(product, device),
        2 * size / _best(lambda: target.copy_(source), device),
        rows,
        str(dtype).removeprefix("torch."),
    )


def _best(run: Callable[[], object], device: str) -> float:
    from accelrt.benchmarking.timing import synchronise

    run()
    seconds = []
    for _ in range(RUNS):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
