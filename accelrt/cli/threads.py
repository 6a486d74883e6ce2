"""How many threads the demo runs with, measured rather than assumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from accelrt.quality.observe import silent_steps

# torch's OpenMP threads wait by spinning: where other processes want the same cores, two
# threads can be ten times slower than one. More is taken only if it pays.


def fastest_threads(pipe: Any, call: Mapping[str, Any]) -> dict[int, float]:
    """Set torch to one thread or to its default, whichever runs the stock pipeline faster.

    Args:
        pipe: an unwrapped pipeline on the CPU.
        call: keywords of its call; one denoising step of it is timed.

    Returns:
        Seconds per number of threads; empty if there was no choice.
    """
    default = torch.get_num_threads()
    if default == 1:
        return {}
    short = {**call, "num_inference_steps": 1}

    def seconds() -> float:
        began = time.perf_counter()
        with silent_steps(pipe):
            pipe(**short, generator=torch.Generator().manual_seed(0), output_type="np")
        return time.perf_counter() - began

    measured: dict[int, float] = {}
    torch.set_num_threads(1)
    seconds()  # the first call pays for more than its work
    for threads in (1, default):
        torch.set_num_threads(threads)
        measured[threads] = seconds()
    torch.set_num_threads(min(measured, key=lambda threads: measured[threads]))
    return measured
