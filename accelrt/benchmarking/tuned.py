"""The same times in a process whose malloc keeps freed memory.

glibc returns large blocks to the system when they are freed, so that every large output
costs page faults anew: a quarter of a stock forward on some machines. Thresholds that
avoid it are read at the start of a process only; this is the process, and the call of it.
It runs as ``python -m accelrt.benchmarking.tuned``: a request on stdin, lines of JSON on
stdout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, TextIO

import torch

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
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        try:
            rates = _talk(process, request, progress)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code or rates is None:
            errors.seek(0)
            words = errors.read()[-2000:]
            raise RuntimeError(f"the process with tuned malloc ended with {code}: {words}")
    return rates


def _talk(
    process: subprocess.Popen[str], request: dict[str, Any], progress: Progress
) -> Rates | None:
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        json.dump(request, process.stdin)
    rates = None
    for line in process.stdout:
        message = json.loads(line)
        if "call" in message:
            progress.call(message["call"])
        else:
            rates = Rates.from_dict(message["rates"])
    return rates


class _Lines(Progress):
    def __init__(self, out: TextIO) -> None:
        self.out = out

    def call(self, what: str) -> None:
        print(json.dumps({"call": what}), file=self.out, flush=True)


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    lines, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the lines are ours
    torch.set_num_threads(request["threads"])
    values = request["settings"]
    settings = Settings(**{**values, "config": Config.from_dict(values["config"])})
    rates = measure_rates(request["name"], settings, request["flops"], _Lines(lines))
    print(json.dumps({"rates": dataclasses.asdict(rates)}), file=lines, flush=True)


if __name__ == "__main__":
    main()
