"""Floating-point operations of a model; a large matrix product and a copy as ceilings."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from accelrt.benchmarking.models import ModelCase
from accelrt.benchmarking.timing import Thunk
from accelrt.benchmarking.weights import on_meta

# Rows of the square matrices: large enough to reach the device's rate.
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
TINY_PRODUCT_SIZE = 256


def product_size(device: str, size: str) -> int:
    """Rows of the matrices for a device and a size of the models."""
    return PRODUCT_SIZE[device] if size == "full" else TINY_PRODUCT_SIZE


def count_flops(case: ModelCase) -> int:
    """FLOPs of one stock forward: linear layers, convolutions, attention, batched products.

    A multiplication and an addition are two. The model runs on meta tensors, so that a
    full-size model takes seconds.
    """
    model = on_meta(case.build, torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.run(model, case.inputs(torch.bfloat16, "meta"))
    return int(counter.get_total_flops())


def matrix_product(size: int, dtype: torch.dtype, device: str) -> tuple[Thunk, int]:
    """A product of two square matrices into a third, and its FLOPs."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> Any:
        return torch.mm(a, b, out=out)

    return run, 2 * size**3


def copy_bytes(size: int, device: str) -> tuple[Thunk, int]:
    """A copy of ``size`` bytes, and the bytes that it reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)

    def run() -> Any:
        return target.copy_(source)

    return run, 2 * size


def utilisation(flops: int, seconds: float, product_flops: int, product_seconds: float) -> float:
    """Model FLOP utilisation: the model's rate over the matrix product's."""
    return (flops / seconds) / (product_flops / product_seconds)
