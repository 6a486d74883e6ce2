"""Peak live activations of the published model sizes, stock against wrapped, in seconds.

    python benchmarks/memory/full_size.py [--save]

The models run on meta tensors: every allocation of a forward is counted, nothing is
computed, so a full-size UNet takes seconds on any machine. Weights are not counted. Attention
counts as one fused operator without a score matrix, as the flash kernels run it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import accelrt
from accelrt.benchmarking import models
from accelrt.benchmarking.models import ModelCase, Run
from accelrt.benchmarking.weights import on_meta, share
from accelrt.memory import track_peak

DTYPE = torch.bfloat16
FLAGS = "stock, its switches"
SMALL: dict[str, Any] = {
    "frames_per_slice": 1,
    "pixels_per_slice": 64,
    "ff_rows": 64,
    "samples_per_slice": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "8 MiB slices": {"slice_mib": 8.0},
    "smallest slices": SMALL,
}


def _fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    batch, heads, length, dim = q.shape
    out = torch.empty(batch, length, heads, dim, dtype=q.dtype, device=q.device)
    return out.transpose(1, 2)


CASES: dict[str, Callable[[], ModelCase]] = {
    "AnimateDiff UNet, 16 frames 512x512": lambda: models.animatediff(16, 64, 64),
    "AnimateDiff UNet, 16 frames 576x1024": lambda: models.animatediff(16, 72, 128),
    "SVD UNet, 14 frames 576x1024": lambda: models.svd(14, 72, 128),
    "Stable Diffusion 1.5 UNet 512x512": lambda: models.unet2d(64),
    "DiT-XL/2 256x256": lambda: models.dit(32),
    "DiT-XL/2 512x512": lambda: models.dit(64),
    "PixArt-XL/2 512x512": lambda: models.pixart(64, 120),
    "PixArt-XL/2 1024x1024": lambda: models.pixart(128, 300),
    "SD VAE decode, 16 frames 512x512": lambda: models.vae(16, 64),
    "SVD VAE decode, 14 frames 576x1024": lambda: models.svd_vae(14, 72, 128),
}


@torch.no_grad()
def measure(run: Run, model: Any, inputs: dict[str, Any]) -> float:
    """Peak MiB of live activations."""
    with track_peak() as tracker:
        run(model, inputs)
    return tracker.peak_bytes / 2**20


def measure_with_switches(case: ModelCase, model: Any, inputs: dict[str, Any]) -> float | None:
    """Smallest peak of the stock model with its own exact switches on; None if it has none."""
    peaks = []
    for switches in case.switches:
        if switches.exact:
            other = share(model)
            switches.apply(other)
            peaks.append(measure(switches.run or case.run, other, inputs))
    return min(peaks, default=None)


def main() -> None:
    """Print the table; with --save, write benchmarks/results/memory-full-size.json."""
    F.scaled_dot_product_attention = _fused_attention
    rows = []

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    for name, make in CASES.items():
        case = make()
        model, inputs = on_meta(case.build, DTYPE), case.inputs(DTYPE, "meta")
        row: dict[str, Any] = {"case": name, "stock": measure(case.run, model, inputs)}
        row[FLAGS] = measure_with_switches(case, model, inputs)
        for title, settings in SETTINGS.items():
            accelrt.wrap(model, **settings)
            row[title] = measure(case.run, model, inputs)
            accelrt.unwrap(model)
        rows.append(row)
        print(row, file=sys.stderr)
    head = ["stock", FLAGS, *SETTINGS]
    print(
        "| MiB, bf16, weights apart | " + " | ".join(head) + " |\n|---" + "|---" * len(head) + "|"
    )
    for row in rows:
        print(f"| {row['case']} | " + " | ".join(cell(row[c]) for c in head) + " |")
    if "--save" in sys.argv:
        target = Path(__file__).resolve().parent.parent / "results" / "memory-full-size.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
