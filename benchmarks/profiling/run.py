"""What a profile costs: calls with and without one, in turn, by processor time of the thread.

    python benchmarks/profiling/run.py --steps 25 --rounds 9

The second row without a profile shows how far two equal runs are apart on this machine. The
times of calls alone are compared; opening and closing a profile is printed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import accelrt
from accelrt.cli import scenarios
from accelrt.quality.observe import silent_steps

Run = Callable[[], tuple[float, float]]


def forms(pipe: Any, call: dict[str, Any]) -> dict[str, Run]:
    """Ways to run one call; each gives seconds of the call, and of the profile around it."""

    def plain() -> tuple[float, float]:
        began = time.thread_time()
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np")
        return time.thread_time() - began, 0.0

    def profiled(every: int) -> tuple[float, float]:
        began = time.thread_time()
        with accelrt.profile(pipe, ops_every=every, ceilings=False):
            seconds, _ = plain()
        return seconds, time.thread_time() - began - seconds

    return {
        "none": plain,
        "profile": lambda: profiled(20),
        "none again": plain,
        "profile, no operators": lambda: profiled(0),
        "profile, all operators": lambda: profiled(1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=scenarios.REFERENCE_NAMES, default="animatediff")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = scenarios.reference_folder()
    scenario = scenarios.reference_scenario(asked.model, folder, "fp32", "cpu", asked.steps)
    pipe = accelrt.wrap(scenario.pipe)
    found: dict[str, list[tuple[float, float]]] = {}
    with silent_steps(pipe):
        ways = forms(pipe, scenario.call)
        ways["none"]()
        ways["profile"]()
        for _ in range(asked.rounds):
            for name, run in ways.items():
                found.setdefault(name, []).append(run())
    print("| run | seconds | ratio, median of rounds | ratio of the fastest | open and close, s |")
    print("|---|---|---|---|---|")
    base = [seconds for seconds, _ in found["none"]]
    for name, pairs in found.items():
        own = [seconds for seconds, _ in pairs]
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        beside = statistics.median(seconds for _, seconds in pairs)
        print(
            f"| {name} | {statistics.median(own):.3f} | {ratio:.3f} | {min(own) / min(base):.3f} "
            f"| {beside:.2f} |"
        )


if __name__ == "__main__":
    main()
