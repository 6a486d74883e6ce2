"""What the operator tests share: layouts, sizes, and the bound against the float64 truth."""

from __future__ import annotations

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
ODD_SIZES = [1, 7, 19, 111, 989]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

all_devices = pytest.mark.parametrize("device", DEVICES)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 error against a float64 truth."""
    difference = (result.double().cpu() - truth.cpu()).norm()
    return float(difference / truth.norm().clamp(min=1e-30).cpu())


def assert_as_good_as(
    ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, tiny: float = 1e-6
) -> None:
    """err(ours) <= 1.1 * err(stock) + tiny; the message names the worst coordinate."""
    assert ours.shape == truth.shape
    assert ours.dtype == stock.dtype
    mine, theirs = error(ours, truth), error(stock, truth)
    if mine <= 1.1 * theirs + tiny:
        return
    gap = (ours.double().cpu() - truth.cpu()).abs()
    worst = int(gap.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape))
    raise AssertionError(
        f"error {mine:.3e} against {theirs:.3e} of the stock path; worst at {where}: "
        f"{float(ours.flatten()[worst])} instead of {float(truth.flatten()[worst])}"
    )


def strided_like(t: torch.Tensor) -> torch.Tensor:
    """A view with gaps between the rows (last stride 1) that holds the values of ``t``."""
    padded = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype, device=t.device)
    view = padded[..., 2 : 2 + t.shape[-1]]
    view.copy_(t)
    return view
