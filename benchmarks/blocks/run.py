"""One transformer block: ours, eager, and torch.compile with freezing; paired, medians.

``python benchmarks/blocks/run.py [--save]`` prints a table and writes
``benchmarks/results/blocks-<device>.json`` and ``.md``. On the CPU all of it runs twice, the
second time in a process whose malloc keeps freed memory (the compiled kernels of the first
are used again).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, build, count_flops

from accelrt import _C
from accelrt.benchmarking.flops import PRODUCT_SIZE, matrix_product, utilisation
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.tables import driver_markdown
from accelrt.benchmarking.timing import calls_per_round, interleave, ratio
from accelrt.benchmarking.tuned import ENVIRONMENT

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLUMNS = (
    "block", "malloc", "ms", "utilisation", "utilisation, eager", "utilisation, compiled",
    "over eager", "over compiled",
)  # fmt: skip


def measure(
    case: Case, device: str, rounds: int, seconds: float, driver: DriverWatch
) -> dict[str, Any]:
    """Times of a block and its utilisation; the driver is asked after them."""
    import torch._inductor.config as inductor

    built = build(case, torch.bfloat16, device)
    inductor.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(built.stock, dynamic=False)
    forms = {"ours": built.ours, "eager": built.stock, "compiled": compiled}
    product, product_flops = matrix_product(PRODUCT_SIZE[device], torch.bfloat16, device)
    thunks: dict[str, list[Any]] = {}
    calls = {}
    for name, form in forms.items():
        thunks[f"product before {name}"] = [product]
        thunks[name] = [lambda form=form: form(built.stream)]
        calls[name] = calls_per_round(thunks[name], device, seconds)
    calls |= dict.fromkeys([name for name in thunks if name not in calls], 1)
    timings = interleave(thunks, device=device, rounds=rounds, calls=calls)
    for name, form in forms.items():
        driver.repeat(f"{case.name}: {name}", lambda form=form: form(built.stream))
    flops = count_flops(case)
    product_seconds = min(
        timings[f"product before {name}"].median for name in forms
    )  # the machine's rate, whoever else is on it
    used = {
        name: utilisation(flops, timings[name].median, product_flops, product_seconds)
        for name in forms
    }
    return {
        "block": case.name,
        "malloc": "tuned" if os.environ.get("MALLOC_TRIM_THRESHOLD_") else "default",
        "flops": flops,
        "product TFLOP/s": product_flops / product_seconds / 1e12,
        "ms": timings["ours"].median * 1e3,
        "ms, eager": timings["eager"].median * 1e3,
        "ms, compiled": timings["compiled"].median * 1e3,
        "utilisation": used["ours"],
        "utilisation, eager": used["eager"],
        "utilisation, compiled": used["compiled"],
        "over eager": ratio(timings["eager"], timings["ours"]),
        "over compiled": ratio(timings["compiled"], timings["ours"]),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as the README shows it."""

    def cell(value: Any) -> str:
        return str(value) if isinstance(value, str) else f"{value:.3g}"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each form in a round")
    parser.add_argument("--only", default="", help="part of the names of the blocks")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--lines", action="store_true", help="rows as lines of JSON, this malloc")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    driver = DriverWatch(options.device)
    with torch.no_grad():
        for case in CASES:
            if options.only in case.name:
                row = measure(case, options.device, options.rounds, options.seconds, driver)
                rows.append(row)
                print(json.dumps(rows[-1]), flush=True)
    if options.lines:
        return
    if options.device == "cpu":
        command = [sys.executable, __file__, *sys.argv[1:], "--lines"]
        environment = {**os.environ, **ENVIRONMENT}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    page = markdown(rows) + "\n\n" + driver_markdown(driver.found)
    print(page, end="")
    if options.save:
        machine = {
            "device": options.device,
            "cpu_isa": _C.active_isa(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        document = {"machine": machine, "gpu": driver.found.to_dict(), "rows": rows}
        path = RESULTS / f"blocks-{options.device}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
