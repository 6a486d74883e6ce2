"""The same times in a process whose malloc keeps freed memory.

glibc returns large blocks to the system when they are freed, so that every large output
costs page faults anew: a quarter of a stock forward on some machines. Thresholds that
avoid it are read at the start of a process only; this is the process, and the call of it.
It runs as ``python -m accelrt.benchmarking.tuned``.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from accelrt.benchmarking.child import answer, ask
from accelrt.benchmarking.measure import Settings, measure_rates
from accelrt.benchmarking.progress import Progress
from accelrt.benchmarking.results import Rates
from accelrt.config import Config

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def tuned_rates(name: str, settings: Settings, flops: int, progress: Progress) -> Rates:
    """:func:`~accelrt.benchmarking.measure.measure_rates` in a process with tuned malloc.

    Raises:
        RuntimeError: if the process fails; with its last words.
    """
    request = {
        "name": name,
        "settings": dataclasses.asdict(settings),
        "flops": flops,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "accelrt.benchmarking.tuned"]
    return Rates.from_dict(ask(command, request, progress, ENVIRONMENT))


def _measure(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    values = request["settings"]
    settings = Settings(**{**values, "config": Config.from_dict(values["config"])})
    rates = measure_rates(request["name"], settings, request["flops"], progress)
    return dataclasses.asdict(rates)


if __name__ == "__main__":
    answer(_measure)
