"""Every operator at every instruction set of this machine against eager, in one process.

``python benchmarks/ops/levels.py [--only PART] [--dtypes fp32,bf16] [--threads N] [--save]``.
Eager is torch at its best instruction set, whatever ours is held to, and runs with a malloc that
keeps freed memory, so that neither side pays for fresh pages. On one thread the clock is the
thread's processor time, which other processes disturb less. A ratio above one is a gain; of the
operators bound by memory, the share of a copy's bandwidth is given too.

``--held LEVEL`` holds torch (ATen, oneDNN, MKL) to that level too, and measures it alone: what a
processor of that level would show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import CASES, LEVEL_SIZES, Case

from accelrt import _C
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.tables import driver_markdown
from accelrt.benchmarking.timing import copies_for_cold_cache, interleave, ratio
from accelrt.benchmarking.tuned import ENVIRONMENT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEVELS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
HELD = {
    "generic": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
}
RESULTS = Path(__file__).resolve().parents[1] / "results"


def held_environment(level: str) -> dict[str, str]:
    """What holds torch and its libraries to a level."""
    aten, onednn, mkl = HELD[level]
    return {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


def levels() -> tuple[str, ...]:
    """What this processor and this build have, or the one level that torch is held to."""
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    held = [level for level, names in HELD.items() if names[0] == capability]
    return tuple(held) or LEVELS[: LEVELS.index(_C.best_isa()) + 1]


def measure(case: Case, dtype: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Ratios to eager, and shares of a copy's bandwidth, at every level."""
    first = case.make(DTYPES[dtype], "cpu")
    count = copies_for_cold_cache(first.moved_bytes) if case.bound == "memory" else 1
    sets = [first, *(case.make(DTYPES[dtype], "cpu") for _ in range(count - 1))]
    half = first.moved_bytes // 2
    pairs = [(torch.ones(half, dtype=torch.uint8), torch.zeros(half, dtype=torch.uint8))
             for _ in sets]  # fmt: skip
    thunks = {
        "eager": [s.eager for s in sets],
        "copy": [lambda d=d, s=s: d.copy_(s) for d, s in pairs],
        **{level: [s.ours for s in sets] for level in levels()},
    }

    def force(name: str, _: int) -> None:
        _C.set_isa(name if name in LEVELS else _C.best_isa())

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    timings = interleave(thunks, rounds=rounds, slice_seconds=seconds, on_call=force, clock=clock)
    row: dict[str, Any] = {"op": case.op, "size": case.size, "dtype": dtype}
    row["ms, eager"] = timings["eager"].median * 1e3
    for level in levels():
        row[level] = ratio(timings["eager"], timings[level])
    for level in levels():
        if case.bound == "memory":
            row[f"{level} of copy"] = ratio(timings["copy"], timings[level])
        else:
            row[f"{level} GFLOP/s"] = first.flops / timings[level].median / 1e9
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The ratios, and the share of copy bandwidth at the best level."""
    best = levels()[-1]
    head = ("op", "size", "dtype", "ms, eager", *levels(), "of copy", "GFLOP/s")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = {
            **row,
            "of copy": row.get(f"{best} of copy"),
            "GFLOP/s": row.get(f"{best} GFLOP/s"),
        }
        texts = ["" if (v := cells[c]) is None else v if isinstance(v, str) else f"{v:.3g}"
                 for c in head]  # fmt: skip
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of operators")
    parser.add_argument("--all", action="store_true", help="all sizes, not one or two each")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.03, help="of each form in a round")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--held", choices=sorted(HELD), help="hold torch to this level too")
    options = parser.parse_args()
    wanted = {**ENVIRONMENT, **(held_environment(options.held) if options.held else {})}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # malloc and torch read these before Python starts.
        command = [sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env={**os.environ, **wanted}).returncode)
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in options.dtypes.split(","):
        for case in CASES:
            if options.only in case.op and (options.all or case.size in LEVEL_SIZES):
                with torch.no_grad():
                    rows.append(measure(case, dtype, options.rounds, options.seconds))
                print(json.dumps(rows[-1]), flush=True)
    gpu = DriverWatch("cpu").found
    page = markdown(rows) + "\n\n" + driver_markdown(gpu)
    print(page, end="")
    if options.save:
        machine = {"torch": torch.__version__, "threads": options.threads, "best": _C.best_isa()}
        document = {"machine": machine, "gpu": gpu.to_dict(), "rows": rows}
        name = f"-held-{options.held}" if options.held else ""
        path = RESULTS / f"ops-levels{name}-cpu.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
