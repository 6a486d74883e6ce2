"""One model, stock, stock with its memory switches, and wrapped, measured in one run."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import accelrt
from accelrt.benchmarking.flops import count_flops
from accelrt.benchmarking.gpu_use import gpu_use
from accelrt.benchmarking.models import SIZES, Inputs, ModelCase, Run, Switches
from accelrt.benchmarking.process import GpuWatch, release_memory
from accelrt.benchmarking.progress import Phases, Progress
from accelrt.benchmarking.rates import LONG_SECONDS, time_forms
from accelrt.benchmarking.results import STOCK, WRAPPED, Measurement, Quality, Rates, Times
from accelrt.benchmarking.timing import synchronise
from accelrt.benchmarking.weights import cast, on_meta, random_model, share
from accelrt.config import Config
from accelrt.memory import track_peak, weight_bytes
from accelrt.quality.metrics import relative_error

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

SLOW = 3.0  # forms of stock that take so many times as long are not timed again


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Args:
        size: ``"full"`` or ``"tiny"``.
        dtype: of weights and activations: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        truth: dtype of the forward that errors are taken against: ``"fp32"`` or ``"fp64"``.
        device: ``"cpu"`` or ``"cuda"``.
        repeats: timed rounds; with 0 only the forwards whose memory is watched are timed.
        seed: of the weights.
        config: of the wrap.
        switches: also the stock model with its memory switches on.

    Raises:
        ValueError: if the truth is no more precise than what is measured.
    """

    size: str = "full"
    dtype: str = "bf16"
    truth: str = "fp32"
    device: str = "cpu"
    repeats: int = 3
    seed: int = 0
    config: Config = dataclasses.field(default_factory=Config)
    switches: bool = True

    def __post_init__(self) -> None:
        if self.dtype == "fp32" and self.truth != "fp64":
            raise ValueError(f"truth is {self.truth!r}; with dtype fp32 it must be fp64")


def check(case: ModelCase, config: Config) -> None:
    """Fail before any work if the model cannot be wrapped.

    Raises:
        UnsupportedModelError: its class is not supported.
    """
    accelrt.wrap(on_meta(case.build, torch.bfloat16), config=config)


@dataclass(frozen=True)
class Form:
    """One form of a model, ready to be called."""

    model: Any
    inputs: Inputs
    run: Run

    def __call__(self) -> Tensor:
        """One forward."""
        with torch.no_grad():
            return self.run(self.model, self.inputs)


def measure(
    name: str,
    settings: Settings,
    *,
    progress: Progress | None = None,
    tuned: Callable[[str, Settings, int, Progress], Rates] | None = None,
) -> Measurement:
    """Build a model with random weights and measure it.

    Args:
        name: a key of :data:`~accelrt.benchmarking.models.FULL`.
        settings: how.
        progress: is told what runs.
        tuned: :func:`measure_rates` in a process with tuned malloc, called once this one
            has freed its model; ``None`` to leave it out.

    Raises:
        UnsupportedModelError: the class of the model is not supported.
        ValueError: the truth is not finite.
    """
    case = SIZES[settings.size][name]()
    if not settings.switches:
        case = dataclasses.replace(case, switches=())
    progress = progress or Progress()
    phases = Phases(progress)
    with phases("count"):
        check(case, settings.config)
        flops = count_flops(case)
    with phases("weights"):
        model = weights_of(case, settings)
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": weight_bytes(model),
        }
    with phases(f"truth in {settings.truth}"):
        truth = truth_of(case, model, settings)
    forms = _forms(case, model, settings)
    seconds: dict[str, float] = {}
    quality: list[Quality] = []
    with phases("memory and error"):
        for run, form in forms.items():
            progress.call(run)
            found, seconds[run] = _quality(run, form, truth, settings.device)
            quality.append(found)
    summary = accelrt.summary(forms[WRAPPED].model)
    with phases("time"):
        rates = _rates(forms, seconds, flops, settings, progress)
    with phases("what the driver says of the GPU"):
        use = gpu_use(forms, settings.device)
    del model, forms, form
    release_memory()
    other = None
    if tuned is not None:
        with phases("time, tuned malloc"):
            other = tuned(name, settings, flops, progress)
    return Measurement(
        name=case.name,
        title=case.title,
        detail=case.detail,
        size=settings.size,
        dtype=settings.dtype,
        truth=settings.truth,
        device=settings.device,
        threads=torch.get_num_threads(),
        repeats=settings.repeats,
        seed=settings.seed,
        flops=flops,
        rates=rates,
        tuned=other,
        quality=tuple(quality),
        gpu=use,
        switches={_run_name(switches): switches.text for switches in case.switches},
        config=settings.config.to_dict(),
        groups=summary.counts(),
        stock_reason="; ".join(dict.fromkeys(summary.stock.values())),
        phases=phases.seconds,
        **facts,
    )


def measure_rates(name: str, settings: Settings, flops: int, progress: Progress) -> Rates:
    """Only the times of a model, stock and wrapped; see :func:`measure`."""
    case = dataclasses.replace(SIZES[settings.size][name](), switches=())
    progress.call("weights")
    forms = _forms(case, weights_of(case, settings), settings)
    seconds = {}
    for run, form in forms.items():
        progress.call(f"{run}, warm-up")
        _, seconds[run] = _timed(form, settings.device)
    return _rates(forms, seconds, flops, settings, progress)


def weights_of(case: ModelCase, settings: Settings) -> Any:
    """The model of the settings, with random weights."""
    return random_model(case.build, DTYPES[settings.dtype], settings.device, settings.seed)


def _forms(case: ModelCase, model: Any, settings: Settings) -> dict[str, Form]:
    """Stock, stock with each set of switches, wrapped: around the same weights."""
    inputs = case.inputs(DTYPES[settings.dtype], settings.device)
    forms = {STOCK: Form(model, inputs, case.run)}
    for switches in case.switches:
        other = share(model)
        switches.apply(other)
        forms[_run_name(switches)] = Form(other, inputs, switches.run or case.run)
    wrapped = accelrt.wrap(share(model), config=settings.config)
    forms[WRAPPED] = Form(wrapped, inputs, case.run)
    return forms


def _run_name(switches: Switches) -> str:
    return f"{STOCK}, {switches.label}"


def truth_of(case: ModelCase, model: Any, settings: Settings) -> Tensor:
    """The stock output of the same weights in the truth's dtype, in float64 on the CPU.

    The weights are back in their own dtype afterwards.

    Raises:
        ValueError: it is not finite.
    """
    dtype = DTYPES[settings.truth]
    cast(model, dtype)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        form = Form(model, case.inputs(dtype, settings.device), case.run)
        truth = form().double().cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = before
    cast(model, DTYPES[settings.dtype])  # exact: the values came from this dtype
    release_memory()
    if not bool(truth.isfinite().all()):
        raise ValueError(f"{case.title}: the output in {settings.truth} is not finite")
    return truth


def _quality(run: str, form: Form, truth: Tensor, device: str) -> tuple[Quality, float]:
    gc.collect()
    with GpuWatch(device) as gpu, track_peak() as memory:
        output, seconds = _timed(form, device)
    finite = bool(output.isfinite().all())
    error = relative_error(output.double().cpu(), truth) if finite else float("inf")
    return Quality(run, memory.peak_bytes, error, gpu.allocated, gpu.reserved), seconds


def _timed(form: Form, device: str) -> tuple[Tensor, float]:
    synchronise(device)
    began = time.perf_counter()
    output = form()
    synchronise(device)
    return output, time.perf_counter() - began


def _rates(
    forms: dict[str, Form],
    seconds: dict[str, float],
    flops: int,
    settings: Settings,
    progress: Progress,
) -> Rates:
    """Time the forms in turn; what is slow keeps the one time that it has.

    Args:
        forms: warm ones.
        seconds: roughly what a forward of each takes.
        flops: of the stock model.
    """
    order = list(forms)
    limit = max(LONG_SECONDS, SLOW * seconds[STOCK])
    kept = (STOCK, WRAPPED) if settings.repeats else ()
    slow = {
        run: seconds[run]
        for run in forms
        if run not in kept and (seconds[run] > limit or not settings.repeats)
    }
    rates = time_forms(
        {run: form for run, form in forms.items() if run not in slow},
        seconds,
        flops,
        first=STOCK,
        dtype=DTYPES[settings.dtype],
        device=settings.device,
        size=settings.size,
        rounds=settings.repeats,
        on_call=lambda run, index: progress.call(f"{run}, {index + 1} of {settings.repeats}"),
    )
    once = [
        # The one forward whose memory was watched, beside stock's.
        Times(
            run, (time,), seconds[STOCK] / time, flops / time / rates.product_flops_per_second,
            None, None,
        )
        for run, time in slow.items()
    ]  # fmt: skip
    times = sorted((*rates.times, *once), key=lambda one: order.index(one.run))
    return dataclasses.replace(rates, times=tuple(times))
