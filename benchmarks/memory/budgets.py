"""What a memory budget costs in time: none, loose, twice the floor, and the floor itself.

    python benchmarks/memory/budgets.py [--save] [--rounds N] [--dtype bf16] [MODEL ...]

One process, one run: the variants of a model take turns, and each time is given as a ratio
to the wrapped model without a budget. The stock model takes part. A forward that is timed follows
one of its own, as in a denoising loop: the first has the heap as another variant left it, and
under a budget gives that back. The floor is what ``memory_budget="min"`` reserves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import accelrt
from accelrt.benchmarking import models
from accelrt.benchmarking.budgets import reserved_bytes
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.models import ModelCase
from accelrt.benchmarking.tables import driver_markdown
from accelrt.benchmarking.weights import random_model, share
from accelrt.benchmarking.whole_call import DTYPES
from accelrt.memory.sizes import bytes_text
from accelrt.reporting.environment import inspect_environment

TARGET = Path(__file__).resolve().parent.parent / "results" / "memory-budgets-cpu.json"
CASES: dict[str, Callable[[], ModelCase]] = {
    "animatediff": lambda: models.animatediff(16, 32, 32),
    "svd": lambda: models.svd(14, 32, 32),
    "vae": lambda: models.vae(1, 64),
    "svd-vae": lambda: models.svd_vae(4, 32, 32),
    "pixart": lambda: models.pixart(64, 120),
    "dit": lambda: models.dit(32),
}
VARIANTS = ("stock", "no budget", "loose", "2x floor", "floor")


def variants(case: ModelCase, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, int]]:
    """The model under every variant, with shared weights; and their reserved bytes."""
    model = random_model(case.build, dtype, "cpu")
    inputs = case.inputs(dtype, "cpu")
    found: dict[str, Any] = {"stock": model, "no budget": accelrt.wrap(share(model))}
    reserved: dict[str, int] = {}

    def planned(name: str, budget: int | str) -> None:
        found[name] = accelrt.wrap(share(model), memory_budget=budget)
        with torch.no_grad():
            case.run(found[name], inputs)  # plans, and warms
        reserved[name] = reserved_bytes(found[name])

    planned("floor", "min")
    planned("2x floor", 2 * reserved["floor"])
    planned("loose", "1TiB")
    return found, reserved


def measure(name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median seconds of every variant, in turn; ratios to the one without a budget."""
    case = CASES[name]()
    inputs = case.inputs(dtype, "cpu")
    found, reserved = variants(case, dtype)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with torch.no_grad():
        for i in range(rounds):
            for variant in VARIANTS if i % 2 == 0 else VARIANTS[::-1]:
                case.run(found[variant], inputs)
                begin = time.perf_counter()
                case.run(found[variant], inputs)
                times[variant].append(time.perf_counter() - begin)
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    return {
        "model": case.title,
        "detail": case.detail,
        "seconds": medians,
        "slowdown": {v: medians[v] / medians["no budget"] for v in VARIANTS},
        "reserved_bytes": reserved,
    }


def main() -> None:
    """Print a table; with --save, write benchmarks/results/memory-budgets-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar=f"{{{','.join(CASES)}}}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - set(CASES)
    if unknown:
        parser.error(f"unknown model {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    print("| time over no budget | " + " | ".join(VARIANTS) + " | floor |")
    print("|---" * (len(VARIANTS) + 2) + "|")
    rows: dict[str, Any] = {}
    if arguments.save and TARGET.exists():  # other models stay
        known = json.loads(TARGET.read_text(encoding="utf-8"))["rows"]
        rows = {f"{row['model']}, {row['detail']}": row for row in known}
    gpu = DriverWatch("cpu").found
    for name in arguments.models or CASES:
        row = measure(name, DTYPES[arguments.dtype], arguments.rounds)
        rows[f"{row['model']}, {row['detail']}"] = row
        cells = [f"{row['slowdown'][variant]:.2f}" for variant in VARIANTS]
        floor = bytes_text(row["reserved_bytes"]["floor"])
        print(f"| {row['model']}, {row['detail']} | {' | '.join(cells)} | {floor} |", flush=True)
        if arguments.save:
            document = {
                "environment": inspect_environment().to_dict(), "gpu": gpu.to_dict(),
                "rows": [*rows.values()],
            }  # fmt: skip
            TARGET.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n" + driver_markdown(gpu), end="")


if __name__ == "__main__":
    main()
