"""Error, memory and time of a model's forms; each runs in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import forms
import torch
from forms import COMPILING, EAGER, Made
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from accelrt.benchmarking.flops import matrix_product, product_size
from accelrt.benchmarking.limits import OutOfTime, time_limit
from accelrt.benchmarking.measure import DTYPES, Settings, truth_of, weights_of
from accelrt.benchmarking.models import SIZES
from accelrt.benchmarking.process import ProcessWatch, release_memory
from accelrt.benchmarking.progress import Progress
from accelrt.benchmarking.rates import time_forms
from accelrt.memory import track_peak, weight_bytes
from accelrt.quality.metrics import relative_error

#: Of a model that takes longer only what compiles is called before the rounds.
SLOW_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """What a process is asked for.

    Args:
        model: a key of :data:`~accelrt.benchmarking.models.FULL`.
        part: ``"errors"``, ``"times"`` or ``"roofline"``.
        size: ``"full"`` or ``"tiny"``.
        forms: names of :data:`forms.NAMES`.
        rounds: timed calls of each form.
        threads: of torch.
        seed: of the weights.
        limit: seconds that each form may take before the rounds, compilation included.
        compiler: as in :func:`forms.make`.
        flops: of a stock forward.
    """

    model: str
    part: str
    size: str = "full"
    forms: tuple[str, ...] = forms.NAMES
    rounds: int = 2
    threads: int = 1
    seed: int = 0
    limit: float = 600.0
    compiler: str = "inductor"
    flops: int = 0

    @property
    def settings(self) -> Settings:
        """The same for what ``accelrt bench`` shares."""
        return Settings(size=self.size, repeats=self.rounds, seed=self.seed, switches=False)


class Limited:
    """Calls forms within a time limit and remembers those that failed.

    Args:
        made: the forms; those that fail are dropped from it.
        seconds: limit of a call.
        progress: is told what runs.
    """

    def __init__(self, made: dict[str, Made], seconds: float, progress: Progress) -> None:
        self.made = made
        self.seconds = seconds
        self.progress = progress
        self.left_out: dict[str, str] = {}

    def call(self, name: str, what: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returns, or ``None`` if the form failed, now or before."""
        if name not in self.made:
            return None
        self.progress.call(f"{name}, {what}")
        try:
            with time_limit(self.seconds):
                return run()
        except OutOfTime as error:
            reason = f"{what}: {error}"
        except Exception as error:  # whatever a compiler raises is a finding
            text = str(error).strip().splitlines() or [""]
            reason = f"{what}: {type(error).__name__}: {text[0][:160]}"
        self.left_out[name] = reason
        del self.made[name]
        gc.collect()
        return None


def errors(request: Request, progress: Progress) -> dict[str, Any]:
    """Error against float32, peak of live tensors and of the process, of each form."""
    case, settings = SIZES[request.size][request.model](), request.settings
    progress.call("weights")
    model = weights_of(case, settings)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weight_bytes(model),
    }
    progress.call(f"truth in {settings.truth}")
    truth = truth_of(case, model, settings)
    progress.call("plans")
    made = forms.make(case, model, DTYPES[settings.dtype], request.forms, request.compiler)
    limited = Limited(made, request.limit, progress)
    found: dict[str, Any] = {}
    for name in list(made):
        one = made[name]
        compiling: float | None = None
        if name in COMPILING:
            began = time.perf_counter()
            limited.call(name, "compiling", one.form)
            compiling = time.perf_counter() - began
        watched = limited.call(
            name, "watched", lambda one=one, name=name: _watched(one, name in COMPILING)
        )
        made.pop(name, None)  # with the weights that the compiler packed
        if watched is None:
            continue
        output, live, process = watched
        finite = bool(output.isfinite().all())
        found[name] = {
            "error": relative_error(output.double(), truth) if finite else None,
            "peak_bytes": live,
            "process_bytes": process,
            "reserved_bytes": one.reserved_bytes,
            "first_call_seconds": compiling,
        }
        del watched, output
    return {**facts, "forms": found, "left_out": limited.left_out, "truth": settings.truth}


def _watched(one: Made, compiled: bool) -> tuple[Tensor, int, int | None]:
    """Output, peak of live tensors, growth of the process."""
    release_memory()  # what the process keeps would hide what it takes
    peak = 0
    with ProcessWatch() as watch:
        if compiled:
            output = one.form()
        else:
            output, peak = _tracked(one)
    if compiled:  # by itself: the profiler takes memory of its own
        _, peak = _profiled(one)
    return output, peak, watch.growth


def _tracked(one: Made) -> tuple[Tensor, int]:
    with track_peak() as memory:
        output = one.form()
    return output, memory.peak_bytes


def _profiled(one: Made) -> tuple[Tensor, int]:
    """Compiled code makes its buffers where only the allocator sees them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = one.form()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return output, peak


def times(request: Request, progress: Progress) -> dict[str, Any]:
    """Seconds of each form, in turn, beside those of a matrix product."""
    case, settings = SIZES[request.size][request.model](), request.settings
    progress.call("weights")
    dtype, model = DTYPES[settings.dtype], weights_of(case, settings)
    progress.call("plans")
    made = forms.make(case, model, dtype, request.forms, request.compiler)
    limited = Limited(made, request.limit, progress)
    expected = request.flops / product_rate(dtype, request.size)
    seconds: dict[str, float] = {}
    for name in list(made):
        one = made[name]
        if name in COMPILING:
            limited.call(name, "compiling", one.form)
        if expected > SLOW_SECONDS:
            seconds[name] = expected
            continue
        began = time.perf_counter()
        limited.call(name, "warm-up", one.form)
        seconds[name] = time.perf_counter() - began
    rates = time_forms(
        {name: one.form for name, one in made.items()},
        seconds,
        request.flops,
        first=EAGER if EAGER in made else next(iter(made)),
        dtype=dtype,
        device="cpu",
        size=request.size,
        rounds=request.rounds,
        on_call=lambda name, i: progress.call(f"{name}, {i + 1} of {request.rounds}"),
    )
    return {**dataclasses.asdict(rates), "left_out": limited.left_out}


def product_rate(dtype: torch.dtype, size: str) -> float:
    """FLOP/s of one product that is as large as those beside the forms, roughly."""
    run, flops = matrix_product(product_size("cpu", size), dtype, "cpu")
    run()
    began = time.perf_counter()
    run()
    return flops / (time.perf_counter() - began)
