"""Peak live activations of the published model sizes, stock against wrapped, in some minutes.

    python benchmarks/memory/full_size.py [--save] [CASE ...]

The models run on meta tensors: every allocation of a forward is counted, nothing is
computed. Weights are not counted. Attention counts as one fused operator without a score
matrix, as the flash kernels run it. With names (or parts of them), only those cases.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import accelrt
import accelrt.planning
from accelrt.benchmarking import models
from accelrt.benchmarking.gpu_use import DriverWatch, GpuUse
from accelrt.benchmarking.models import ModelCase, Run
from accelrt.benchmarking.tables import driver_markdown
from accelrt.benchmarking.weights import on_meta, share
from accelrt.config import Config
from accelrt.memory import track_peak
from accelrt.planning.dryrun import MetaKernels

DTYPE = torch.bfloat16
TARGET = Path(__file__).resolve().parent.parent / "results" / "memory-full-size.json"

# Case, sides of the pictures, frames.
CASES: dict[str, tuple[Callable[[], ModelCase], int, int, int]] = {
    "AnimateDiff UNet, 16 frames 512x512": (lambda: models.animatediff(16, 64, 64), 512, 512, 16),
    "AnimateDiff UNet, 16 frames 576x1024": (
        lambda: models.animatediff(16, 72, 128), 576, 1024, 16,
    ),
    "SVD UNet, 14 frames 576x1024": (lambda: models.svd(14, 72, 128), 576, 1024, 14),
    "SVD-XT UNet, 25 frames 576x1024": (lambda: models.svd(25, 72, 128), 576, 1024, 25),
    "Stable Diffusion 1.5 UNet 512x512": (lambda: models.unet2d(64), 512, 512, 1),
    "DiT-XL/2 256x256": (lambda: models.dit(32), 256, 256, 1),
    "DiT-XL/2 512x512": (lambda: models.dit(64), 512, 512, 1),
    "PixArt-XL/2 512x512": (lambda: models.pixart(64, 120), 512, 512, 1),
    "PixArt-XL/2 1024x1024": (lambda: models.pixart(128, 300), 1024, 1024, 1),
    "SD VAE decode, 16 frames 512x512": (lambda: models.vae(16, 64), 512, 512, 16),
    "SD VAE decode, 16 frames 576x1024": (lambda: _vae_576(), 576, 1024, 16),
    "SVD VAE decode, 14 frames 576x1024": (lambda: models.svd_vae(14, 72, 128), 576, 1024, 14),
    "SVD-XT VAE decode, 25 frames 576x1024": (lambda: models.svd_vae(25, 72, 128), 576, 1024, 25),
}  # fmt: skip

COLUMNS = {
    "stock": "stock",
    "switches": "stock, its switches",
    "default": "accelrt",
    "kept": "smallest, nothing computed twice",
    "min": "smallest",
}


def _vae_576() -> ModelCase:
    wide = models.vae(16, 64)
    z = torch.zeros(16, 4, 72, 128)
    return ModelCase(
        wide.name, wide.title, "16 images 576x1024", wide.build, lambda: {"z": z}, wide.run,
        wide.switches,
    )  # fmt: skip


@torch.no_grad()
def measure(run: Run, model: Any, inputs: dict[str, Any]) -> float:
    """Peak MiB of live activations."""
    with MetaKernels(), track_peak() as tracker:
        run(model, inputs)
    return tracker.peak_bytes / 2**20


def with_switches(case: ModelCase, model: Any, inputs: dict[str, Any]) -> float | None:
    """Smallest peak of the stock model with its own exact switches on; None if it has none."""
    peaks = []
    for switches in case.switches:
        if switches.exact:
            other = share(model)
            switches.apply(other)
            peaks.append(measure(switches.run or case.run, other, inputs))
    return min(peaks, default=None)


def smallest(model: Any, size: tuple[int, int, int], recompute: str) -> float:
    """Live MiB of the smallest plan of a denoiser: of ``"min"``."""
    height, width, frames = size
    plan = accelrt.plan(
        model, height=height, width=width, num_frames=frames, memory_budget="min",
        config=Config(recompute=recompute),
    )  # fmt: skip
    return plan.components[0].peak_bytes / 2**20


@torch.no_grad()
def smallest_decode(case: ModelCase, recompute: str) -> float:
    """Live MiB of a decoder's plan within the smallest number that it can keep.

    A plan of the whole VAE would have as much as its encoder needs, and use it up.
    """

    def peak_within(budget: int) -> int:
        model = on_meta(case.build, DTYPE)
        accelrt.wrap(model, memory_budget=budget, recompute=recompute)
        case.run(model, case.inputs(DTYPE, "meta"))
        peak: int = model.decoder.forward.planner.plans["decoder"].peak_bytes
        return peak

    try:
        peak = peak_within(1)
    except accelrt.BudgetError as error:
        peak = peak_within(error.smallest_bytes)
    return peak / 2**20


def row_of(name: str) -> dict[str, Any]:
    """All columns of one case."""
    make, *size = CASES[name]
    case = make()
    model, inputs = on_meta(case.build, DTYPE), case.inputs(DTYPE, "meta")
    row: dict[str, Any] = {"case": name, "stock": measure(case.run, model, inputs)}
    # Chunked over pixels, the temporal blocks of SVD take many minutes, even on meta tensors.
    row["switches"] = None if "SVD" in name else with_switches(case, model, inputs)
    accelrt.wrap(model, slice_mib=8.0)
    row["default"] = measure(case.run, model, inputs)
    accelrt.unwrap(model)
    for column, recompute in (("kept", "never"), ("min", "allow")):
        if hasattr(model, "decoder"):
            row[column] = smallest_decode(case, recompute)
        else:
            row[column] = smallest(model, (size[0], size[1], size[2]), recompute)
    return row


def save(row: dict[str, Any], gpu: GpuUse) -> None:
    """Put a row in its place in the file; the other cases stay."""
    known = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else []
    if isinstance(known, dict):  # an older file is the rows alone
        known = known["rows"]
    rows = {old["case"]: old for old in known if old["case"] in CASES and "min" in old}
    rows[row["case"]] = row
    document = {
        "gpu": gpu.to_dict(),
        "rows": [rows[name] for name in CASES if name in rows],
    }
    TARGET.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table; with --save, write benchmarks/results/memory-full-size.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="the name of a row, or a part")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    for word in arguments.cases:
        if not any(word in name for name in CASES):
            parser.error(f"no case has {word!r} in its name; known: {', '.join(CASES)}")
    print("| MiB, bf16, weights apart | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    gpu = DriverWatch("cpu").found
    for name in CASES:
        if arguments.cases and not any(word in name for word in arguments.cases):
            continue
        row = row_of(name)
        cells = ("" if row[c] is None else f"{row[c]:.1f}" for c in COLUMNS)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if arguments.save:  # after each: a long run may be interrupted
            save(row, gpu)
    print("\n" + driver_markdown(gpu), end="")


if __name__ == "__main__":
    main()
