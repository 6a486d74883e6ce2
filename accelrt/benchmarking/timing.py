"""Paired measurement: every implementation in turn, round by round, medians of the rounds.

Machines are shared and drift, so nothing is compared across runs: in each round all
implementations, and the copy and the matrix product that serve as ceilings, are timed one
after the other, and ratios are taken within the round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.rounds)


def ratio(a: Timing, b: Timing) -> float:
    """Median over the rounds of a / b, each taken within one round."""
    return statistics.median(x / y for x, y in zip(a.rounds, b.rounds, strict=True))


def synchronise(device: str) -> None:
    """Wait for the device, so that a timing holds the work and not its submission."""
    if device == "cuda":
        torch.cuda.synchronize()


def calls_per_round(variants: Sequence[Thunk], device: str, slice_seconds: float) -> int:
    """How often to call an implementation so that it runs for about ``slice_seconds``."""
    for thunk in variants:
        thunk()
    synchronise(device)
    start = time.perf_counter()
    for thunk in variants:
        thunk()
    synchronise(device)
    once = (time.perf_counter() - start) / len(variants)
    return max(1, min(1000, round(slice_seconds / max(once, 1e-7) / len(variants))))


def interleave(
    thunks: Mapping[str, Sequence[Thunk]],
    *,
    device: str = "cpu",
    rounds: int = 7,
    slice_seconds: float = 0.03,
    calls: Mapping[str, int] | None = None,
    on_call: Callable[[str, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the implementations in turn.

    Args:
        thunks: per implementation, the same call on one or more sets of tensors. More than
            one set, together larger than the last-level cache, measures a cold cache.
        device: where the work runs.
        rounds: measured rounds, after one that is not counted.
        slice_seconds: roughly how long each implementation runs in a round.
        calls: how often an implementation is called in a round, for those that ran
            before and are known to take long; they get no uncounted round.
        on_call: called as ``on_call(name, round)`` before each measurement, from round 0.
        clock: seconds; ``time.thread_time`` leaves out what other processes take from
            work on a single thread.
    """
    number = dict(calls or {})
    for name, variants in thunks.items():
        if name not in number:
            number[name] = calls_per_round(variants, device, slice_seconds)
    seconds: dict[str, list[float]] = {name: [] for name in thunks}
    for index in range(rounds):
        for name, variants in thunks.items():
            if on_call is not None:
                on_call(name, index)
            synchronise(device)
            start = clock()
            for _ in range(number[name]):
                for thunk in variants:
                    thunk()
            synchronise(device)
            seconds[name].append((clock() - start) / (number[name] * len(variants)))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def copies_for_cold_cache(bytes_per_call: int, limit: int = 384 << 20) -> int:
    """Sets of tensors to rotate over, so that none is in the cache when its turn comes."""
    return max(1, min(16, limit // max(bytes_per_call, 1)))
