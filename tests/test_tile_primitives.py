"""tile.h, the matrix primitives of a warp, in the simulator: products of whole tiles."""

from __future__ import annotations

import pytest
import torch
from sim import run_simulator

SIDE = 16


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("valid", [16, 11])
def test_products_of_tiles(sim_dir, variant, dtype, valid):
    """Loads of four and of two tiles, transposed or not, copies of rows and of zeros."""
    a, b, d = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(3))
    scores, sums, halves = (torch.full((SIDE, SIDE), torch.nan) for _ in range(3))
    low_rows = torch.full((8, SIDE), torch.nan, dtype=dtype)
    result = run_simulator(
        sim_dir / f"accelrt_sim_{variant}", "tiles", a=a, b=b, d=d, valid_rows=valid,
        scores=scores, sums=sums, halves=halves, low_rows=low_rows,
    )  # fmt: skip
    for t in (a, b, d):
        t[valid:] = 0

    def close(ours, left, right):
        assert torch.allclose(ours.double(), left.double() @ right.double(), rtol=0, atol=1e-5)

    close(result["scores"], a, b.T)
    close(result["halves"], a[:, :8], b[:, :8].T)
    close(result["sums"], result["scores"].to(dtype), d)
    assert torch.equal(result["low_rows"], d[:8])
