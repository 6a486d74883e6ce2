"""What a memory budget costs in time: none, loose, twice the floor, and the floor itself.

    python benchmarks/memory/budgets.py [--save | --out FILE] [--rounds N] [--dtype bf16]
                                        [--no-stock] [MODEL ...]

One process, one run: the variants of a model take turns, and each time is given as a ratio
to the wrapped model without a budget. The stock model takes part, unless ``--no-stock``: in
bfloat16 it takes minutes to hours a forward where the processor has no AVX-512. A forward that
is timed follows one of its own, as in a denoising loop: the first has the heap as another variant
left it, and under a budget gives that back. The floor is what ``memory_budget="min"`` reserves.
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


def measure(
    name: str, dtype: torch.dtype, rounds: int, taking_part: tuple[str, ...] = VARIANTS
) -> dict[str, Any]:
    """Median seconds of the variants taking part, in turn; ratios to that without a budget."""
    case = CASES[name]()
    inputs = case.inputs(dtype, "cpu")
    found, reserved = variants(case, dtype)
    times: dict[str, list[float]] = {variant: [] for variant in taking_part}
    with torch.no_grad():
        for i in range(rounds):
            for variant in taking_part if i % 2 == 0 else taking_part[::-1]:
                case.run(found[variant], inputs)
                begin = time.perf_counter()
                case.run(found[variant], inputs)
                times[variant].append(time.perf_counter() - begin)
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    return {
        "model": case.title,
        "detail": case.detail,
        "seconds": medians,
        "slowdown": {v: medians[v] / medians["no budget"] for v in taking_part},
        "reserved_bytes": reserved,
    }


def main() -> None:
    """Print a table; with --save, write benchmarks/results/memory-budgets-cpu.json as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar=f"{{{','.join(CASES)}}}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--no-stock", action="store_true")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--save", dest="out", action="store_const", const=TARGET)
    target.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - set(CASES)
    if unknown:
        parser.error(f"unknown model {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    taking_part = tuple(v for v in VARIANTS if v != "stock" or not arguments.no_stock)
    print("| time over no budget | " + " | ".join(taking_part) + " | floor |")
    print("|---" * (len(taking_part) + 2) + "|")
    rows: dict[str, Any] = {}
    if arguments.out is not None and arguments.out.exists():  # other models stay
        known = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        rows = {f"{row['model']}, {row['detail']}": row for row in known}
    gpu = DriverWatch("cpu").found
    for name in arguments.models or CASES:
        row = measure(name, DTYPES[arguments.dtype], arguments.rounds, taking_part)
        rows[f"{row['model']}, {row['detail']}"] = row
        cells = [f"{row['slowdown'][variant]:.2f}" for variant in taking_part]
        floor = bytes_text(row["reserved_bytes"]["floor"])
        print(f"| {row['model']}, {row['detail']} | {' | '.join(cells)} | {floor} |", flush=True)
        if arguments.out is not None:
            document = {
                "environment": inspect_environment().to_dict(), "gpu": gpu.to_dict(),
                "rows": [*rows.values()],
            }  # fmt: skip
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n" + driver_markdown(gpu), end="")


if __name__ == "__main__":
    main()
