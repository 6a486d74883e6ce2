"""What a profile costs and covers: calls with and without one, in turn.

    python benchmarks/profiling/run.py --steps 25 --rounds 5 --save

Costs are ratios of the processor time of the thread, which other processes disturb less, and of
wall time, which also has what the sampling thread takes. The second row without a profile shows
how far two equal runs are apart on this machine. The times of calls alone are compared; opening
and closing a profile is apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import accelrt
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.tables import driver_markdown
from accelrt.cli import scenarios
from accelrt.files import write_text
from accelrt.quality.observe import silent_steps
from accelrt.reporting.environment import inspect_environment

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True)
class Call:
    """One call of the pipeline.

    Args:
        processor: seconds of the thread.
        wall: seconds.
        beside: processor seconds of opening and closing the profile.
        coverage: share of the wall time with a name; ``None`` without a profile.
    """

    processor: float
    wall: float
    beside: float = 0.0
    coverage: float | None = None


Run = Callable[[], Call]


def forms(pipe: Any, call: dict[str, Any], every_kind: bool) -> dict[str, Run]:
    """Ways to run one call."""

    def plain() -> Call:
        wall, began = time.perf_counter(), time.thread_time()
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np")
        return Call(time.thread_time() - began, time.perf_counter() - wall)

    def profiled(every: int) -> Call:
        began = time.thread_time()
        with accelrt.profile(pipe, ops_every=every, ceilings=False) as prof:
            inner = plain()
        beside = time.thread_time() - began - inner.processor
        return Call(inner.processor, inner.wall, beside, prof.coverage)

    ways: dict[str, Run] = {
        "none": plain,
        "profile": lambda: profiled(20),
        "none again": plain,
    }
    if every_kind:
        ways["profile, no operators"] = lambda: profiled(0)
        ways["profile, all operators"] = lambda: profiled(1)
    return ways


def table(found: dict[str, list[Call]]) -> str:
    """Markdown: one row per form, ratios taken within rounds."""
    lines = [
        "| run | seconds | processor time, ratio | wall time, ratio | open and close, s "
        "| with a name |",
        "|---|---|---|---|---|---|",
    ]
    base = found["none"]
    for name, calls in found.items():
        pairs = list(zip(calls, base, strict=True))
        covered = [call.coverage for call in calls if call.coverage is not None]
        lines.append(
            f"| {name} | {statistics.median(call.wall for call in calls):.2f} "
            f"| {statistics.median(a.processor / b.processor for a, b in pairs):.3f} "
            f"| {statistics.median(a.wall / b.wall for a, b in pairs):.3f} "
            f"| {statistics.median(call.beside for call in calls):.2f} "
            f"| {f'{min(covered):.1%}' if covered else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=scenarios.REFERENCE_NAMES, default="animatediff")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--every-kind", action="store_true", help="also without, and all, operators"
    )
    parser.add_argument("--save", action="store_true", help=f"into {RESULTS.name}/")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = scenarios.reference_folder()
    scenario = scenarios.reference_scenario(asked.model, folder, "fp32", "cpu", asked.steps)
    pipe = accelrt.wrap(scenario.pipe)
    found: dict[str, list[Call]] = {}
    with silent_steps(pipe):
        ways = forms(pipe, scenario.call, asked.every_kind)
        ways["none"]()
        ways["profile"]()
        for _ in range(asked.rounds):
            for name, run in ways.items():
                found.setdefault(name, []).append(run())
    gpu = DriverWatch("cpu").found
    text = table(found) + "\n" + driver_markdown(gpu)
    print(text, end="")
    if asked.save:
        about = (
            f"{scenario.title}, {scenario.detail}, {asked.steps} steps, float32, one thread; "
            f"medians of {asked.rounds} rounds in turn, ratios within a round; the least that "
            "had a name.\n\n"
        )
        values = {
            "model": asked.model, "steps": asked.steps, "rounds": asked.rounds,
            "environment": inspect_environment().to_dict(), "gpu": gpu.to_dict(),
            "calls": {name: [asdict(call) for call in calls] for name, calls in found.items()},
        }  # fmt: skip
        write_text(RESULTS / "profiling-cpu.json", json.dumps(values, indent=1) + "\n")
        write_text(RESULTS / "profiling-cpu.md", about + text)


if __name__ == "__main__":
    main()
