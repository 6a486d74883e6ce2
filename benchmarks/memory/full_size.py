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
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNetMotionModel

import accelrt
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


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")


def motion_unet(frames: int, height: int, width: int) -> tuple[Any, Callable[[], Any]]:
    """AnimateDiff with guidance batched: two samples."""
    with torch.device("meta"):
        model = UNetMotionModel(cross_attention_dim=768).eval().to(DTYPE)
    x, context = _meta(2, 4, frames, height, width), _meta(2 * frames, 77, 768)
    t = torch.ones(2, device="meta")
    return model, lambda: model(x, t, context)


def dit(size: int) -> tuple[Any, Callable[[], Any]]:
    """DiT-XL/2 with guidance batched."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(sample_size=size, out_channels=8).eval().to(DTYPE)
    x = _meta(2, 4, size, size)
    t = torch.ones(2, dtype=torch.long, device="meta")
    return model, lambda: model(x, timestep=t, class_labels=t)


def vae(frames: int, size: int) -> tuple[Any, Callable[[], Any]]:
    """The decoder of Stable Diffusion 1.5."""
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        model = model.eval().to(DTYPE)
    z = _meta(frames, 4, size, size)
    return model, lambda: model.decode(z)


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "AnimateDiff UNet, 16 frames 512x512": (motion_unet, (16, 64, 64)),
    "AnimateDiff UNet, 16 frames 576x1024": (motion_unet, (16, 72, 128)),
    "DiT-XL/2 256x256": (dit, (32,)),
    "DiT-XL/2 512x512": (dit, (64,)),
    "SD VAE decode, 16 frames 512x512": (vae, (16, 64)),
}


@torch.no_grad()
def measure(call: Callable[[], Any]) -> float:
    """Peak MiB of live activations."""
    with track_peak() as tracker:
        call()
    return tracker.peak_bytes / 2**20


def measure_with_flags(model: Any, call: Callable[[], Any]) -> float | None:
    """Peak of the stock model with its own exact switches on; None where it has none."""
    if isinstance(model, AutoencoderKL):
        model.enable_slicing()
        peak = measure(call)
        model.disable_slicing()
        return peak
    if isinstance(model, UNetMotionModel):
        model.enable_forward_chunking(1, dim=1)  # feed-forward token by token
        peak = measure(call)
        model.disable_forward_chunking()
        return peak
    return None


def main() -> None:
    """Print the table; with --save, write benchmarks/results/memory-full-size.json."""
    F.scaled_dot_product_attention = _fused_attention
    rows = []

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    for name, (make, arguments) in CASES.items():
        model, call = make(*arguments)
        row: dict[str, Any] = {"case": name, "stock": measure(call)}
        row[FLAGS] = measure_with_flags(model, call)
        for title, settings in SETTINGS.items():
            accelrt.wrap(model, **settings)
            row[title] = measure(call)
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
