"""What the measurement of a model gives."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any

from accelrt.benchmarking.gpu_use import GpuUse

STOCK, WRAPPED = "stock", "accelrt"
SLACK, TINY = 1.1, 1e-6


@dataclass(frozen=True)
class Times:
    """How fast one form of a model ran.

    Args:
        run: ``"stock"``, ``"stock, <label of switches>"`` or ``"accelrt"``.
        seconds: of one forward, per round; a single one for a form of stock so slow that
            only the forward whose memory was watched was timed.
        speedup: time of stock over this one's, median of the rounds' ratios.
        utilisation: model FLOP utilisation, median of the rounds' ratios; always with the
            FLOPs of the stock model.
        page_faults: per forward, median; ``None`` on a GPU.
        process_peak_bytes: growth of the process's peak during a forward, median; ``None``
            where the system does not tell, and on a GPU.
    """

    run: str
    seconds: tuple[float, ...]
    speedup: float
    utilisation: float
    page_faults: int | None
    process_peak_bytes: int | None

    @property
    def median_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Quality:
    """Memory and error of one form of a model.

    Args:
        run: as in :class:`Times`.
        peak_bytes: peak of live activations; weights and inputs not included.
        error: relative L2 error of the output against the truth; infinite if it is not finite.
        gpu_allocated_bytes, gpu_reserved_bytes: growth of the CUDA allocator's peaks.
    """

    run: str
    peak_bytes: int
    error: float
    gpu_allocated_bytes: int | None = None
    gpu_reserved_bytes: int | None = None


@dataclass(frozen=True)
class Rates:
    """All forms of a model timed in one process, in turn.

    Args:
        product_size: rows of the square matrices of the product beside it.
        product_flops_per_second: its rate, of the median time.
        times: one per form; stock is the first, accelrt the last.
    """

    product_size: int
    product_flops_per_second: float
    times: tuple[Times, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        """The inverse of ``dataclasses.asdict``, also after a trip through JSON."""
        times = tuple(Times(**{**t, "seconds": tuple(t["seconds"])}) for t in values["times"])
        return cls(values["product_size"], values["product_flops_per_second"], times)


@dataclass(frozen=True)
class Measurement:
    """One model, measured.

    Args:
        name, title, detail, size: which model.
        dtype, truth, device, threads, repeats, seed: how it ran.
        parameters, weight_bytes: of the model.
        flops: of one stock forward.
        rates: with the process's usual memory allocation.
        tuned: in a process whose malloc keeps freed memory; ``None`` if not measured.
        quality: memory and error per form, in the order of ``rates.times``.
        gpu: what its driver said while every form ran; a note where there is none.
        switches: what is switched on, per form of the stock model.
        config: settings of the wrap.
        groups: number of operator groups per status.
        stock_reason: why the wrapped model ran the stock forward; empty if it did not.
        phases: seconds per phase of the measurement.
    """

    name: str
    title: str
    detail: str
    size: str
    dtype: str
    truth: str
    device: str
    threads: int
    repeats: int
    seed: int
    parameters: int
    weight_bytes: int
    flops: int
    rates: Rates
    tuned: Rates | None
    quality: tuple[Quality, ...]
    gpu: GpuUse
    switches: dict[str, str]
    config: dict[str, Any]
    groups: dict[str, int]
    stock_reason: str
    phases: dict[str, float]

    @property
    def bound(self) -> float:
        """What the error of the wrapped model may be: 1.1 times that of stock, and 1e-6."""
        return error_bound(self.quality[0].error)

    @property
    def within(self) -> bool:
        """Whether the wrapped model keeps the rule."""
        return self.quality[-1].error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; errors that are not finite become ``None``."""
        values = dataclasses.asdict(self)
        values["bound"], values["within"] = self.bound, self.within
        for rates in (values["rates"], values["tuned"] or {"times": ()}):
            for times in rates["times"]:
                times["median_seconds"] = statistics.median(times["seconds"])
        return _plain(values)  # type: ignore[no-any-return]


def error_bound(stock: float) -> float:
    """The exactness rule: how large the error may be, given that of the stock model."""
    return SLACK * stock + TINY


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
