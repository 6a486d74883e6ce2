"""Runs rows batch by batch, in turn, and measures them against the plain run of all steps."""

from __future__ import annotations

import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from tasks import Batch, Judge, Task, call
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from accelrt import _C
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.memory import track_peak
from accelrt.quality import relative_error, ssim
from accelrt.quality.observe import patched
from accelrt.quality.observe import pictures as pictures_of

# Pictures that differ by rounding only have no meaningful PSNR; the mean needs a finite one.
PSNR_CAP_DB = 100.0
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Row:
    """One way to sample.

    Args:
        name: unique, as the table shows it.
        kind: ``"stock"``, ``"exact"`` (wrapped, every step computed), ``"ours"``, ``"rival"``.
        steps: denoising steps of the scheduler.
        switch: turns it on for a loaded pipeline, and off again.
    """

    name: str
    kind: str
    steps: int
    switch: Callable[[Any], AbstractContextManager[None]] = field(
        default=lambda pipe: nullcontext(), repr=False
    )


@dataclass(frozen=True)
class Result:
    """A row as measured.

    Args:
        name, kind, steps: of the :class:`Row`.
        seconds: median wall seconds of sampling one batch: from the scheduler's timesteps to
            the first latent decoded, without prompts and without the VAE.
        speedup: median over the batches of the baseline's seconds over this row's; the
            baseline is the plain run of all steps, stock for rivals, accelrt-exact for ours.
        computed: FLOPs of the denoising loop over those of the baseline's.
        psnr_db, ssim: means over pictures against the stock run of all steps; PSNR is capped
            at ``PSNR_CAP_DB`` for each.
        latent_error: relative L2 error of the final latents against those.
        accuracy, frechet: see :class:`tasks.Judgement`.
        cache_bytes: bytes alive between steps beyond the baseline's, for one picture or video
            with its guidance.
    """

    name: str
    kind: str
    steps: int
    seconds: float
    speedup: float
    computed: float
    psnr_db: float
    ssim: float
    latent_error: float
    accuracy: float
    frechet: float
    cache_bytes: int


@dataclass
class _Call:
    """Observations of one pipeline call."""

    began: float = 0.0
    ended: float = 0.0
    latents: list[Tensor] = field(default_factory=list)


class _EnoughError(Exception):
    """Ends a warm-up."""


Callback = Callable[[], None]


@contextmanager
def observed(
    pipe: Any,
    on_start: Callback | None = None,
    on_step: Callback | None = None,
    on_end: Callback | None = None,
) -> Iterator[_Call]:
    """Times the denoising loop of the call inside, and keeps its final latents.

    Args:
        pipe: called once inside.
        on_start, on_step, on_end: called when the scheduler has its timesteps, when a step
            begins, and before the first latents are decoded.
    """
    seen = _Call()
    scheduler = pipe.scheduler
    stock_decode, stock_timesteps = pipe.vae.decode, scheduler.set_timesteps
    stock_scale = scheduler.scale_model_input

    # The pipelines ask which arguments these take.
    @functools.wraps(stock_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = stock_timesteps(*args, **kwargs)
        if on_start is not None:
            on_start()
        seen.began = time.perf_counter()
        return result

    @functools.wraps(stock_scale)
    def scale_model_input(*args: Any, **kwargs: Any) -> Any:
        if on_step is not None:
            on_step()
        return stock_scale(*args, **kwargs)

    @functools.wraps(stock_decode)
    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not seen.latents:
            seen.ended = time.perf_counter()
            if on_end is not None:
                on_end()
        seen.latents.append(z)
        return stock_decode(z, *args, **kwargs)

    with (
        patched(pipe.vae, "decode", decode),
        patched(scheduler, "set_timesteps", set_timesteps),
        patched(scheduler, "scale_model_input", scale_model_input),
    ):
        yield seen


def warm_up(pipe: Any, batch: Batch, steps: int) -> None:
    """The first steps of a call, which pay for what only the first call after a switch does.

    The call is broken off: some policies are made for one number of steps only.
    """
    left = WARM_UP_STEPS

    def count() -> None:
        nonlocal left
        if left == 0:
            raise _EnoughError
        left -= 1

    with suppress(_EnoughError), observed(pipe, on_step=count):
        call(pipe, batch, steps)


@dataclass(frozen=True)
class Count:
    """Of one untimed call.

    Args:
        flops: of the denoising loop.
        live_bytes: largest number of live bytes when a step began.
    """

    flops: int
    live_bytes: int


def count(pipe: Any, batch: Batch, steps: int) -> Count:
    """Counts a call's work and what it keeps from step to step."""
    before, after, live = 0, 0, 0

    def start() -> None:
        nonlocal before
        before = flops.get_total_flops()

    def step() -> None:
        nonlocal live
        live = max(live, memory.live_bytes)

    def end() -> None:
        nonlocal after
        after = flops.get_total_flops()

    gc.collect()
    with (
        track_peak() as memory,
        FlopCounterMode(display=False) as flops,
        observed(pipe, start, step, end),
    ):
        call(pipe, batch, steps)
    return Count(after - before, live)


Counted = TypeVar("Counted")


@dataclass
class Samples(Generic[Counted]):
    """What the calls of one row gave, one entry a batch.

    Args:
        count: of the untimed call before.
        seconds: of the denoising loop.
        latents: ``[B, C, H, W]``, final.
        pictures: ``[B, F, 3, H, W]`` in [0, 1].
    """

    count: Counted
    seconds: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Baselines:
    """Names of the plain rows of all steps.

    Args:
        stock: of diffusers; quality is measured against it, rivals' speed too.
        exact: of accelrt with every step computed, for the speed of ours.
    """

    stock: str
    exact: str

    def of(self, kind: str) -> str:
        """The baseline for the speed of a kind of rows."""
        return self.stock if kind in ("stock", "rival") else self.exact


def measure(
    pipe: Any,
    task: Task,
    rows: Sequence[Row],
    baselines: Baselines,
    judge: Judge,
    tell: Callable[[str], None] = lambda text: None,
    driver: DriverWatch | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Run all rows on all batches, and measure them.

    Work and memory are counted in a call of their own, before; see :func:`collect`.

    Args:
        pipe: the stock pipeline.
        task: what it is asked for.
        rows: with both baselines among them.
        baselines: names of the rows to compare with.
        judge: of the pictures.
        tell: is told how far it is.
        driver: is asked while the rows run, by the rows' names.

    Returns:
        Results in the order of ``rows``; and rivals that raised, with their errors.

    Raises:
        ValueError: two rows have one name, or a baseline is missing.
    """
    check_rows(rows, (baselines.stock, baselines.exact))
    with short_collections():
        samples, failed = collect(
            pipe, task, rows, lambda row: count(pipe, task.batches[0], row.steps), tell, driver
        )
    running = [row for row in rows if row.name not in failed]
    return [_result(row, samples, baselines, task, judge) for row in running], failed


def check_rows(rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """Names must differ, and baselines be among them.

    Raises:
        ValueError: they do not.
    """
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"row {name!r} is there {names.count(name)} times; allowed: once")
    for name in baselines:
        if name not in names:
            raise ValueError(f"baseline {name!r} is not among the rows: {', '.join(names)}")


def collect(
    pipe: Any,
    task: Task,
    rows: Sequence[Row],
    counter: Callable[[Row], Counted],
    tell: Callable[[str], None] = lambda text: None,
    driver: DriverWatch | None = None,
) -> tuple[dict[str, Samples[Counted]], dict[str, str]]:
    """Run all rows on all batches.

    Batch ``b`` of every row comes before batch ``b + 1`` of any, and every batch begins with
    another row, so that a drift of the machine's speed falls on all alike.

    Args:
        pipe: the stock pipeline.
        task: what it is asked for.
        rows: with names of their own.
        counter: makes an untimed call of the pipeline, switched to the row, before the others.
        tell: is told how far it is.
        driver: is asked while the rows run, by the rows' names.

    Returns:
        By name of the row what its calls gave; and rivals that raised, with their errors.
    """
    samples: dict[str, Samples[Counted]] = {}
    failed: dict[str, str] = {}
    for row in rows:
        tell(f"counting: {row.name}")
        try:
            with row.switch(pipe):
                samples[row.name] = Samples(counter(row))
        except Exception as error:
            if row.kind != "rival":
                raise
            failed[row.name] = f"{type(error).__name__}: {error}"
    running = [row for row in rows if row.name not in failed]
    for i, batch in enumerate(task.batches):
        first = i * len(running) // len(task.batches)
        for row in (*running[first:], *running[:first]):
            seconds, latents, pictures = timed(pipe, row, batch, driver)
            found = samples[row.name]
            found.seconds.append(seconds)
            found.latents.append(latents)
            found.pictures.append(pictures)
            tell(f"batch {i + 1} of {len(task.batches)}: {row.name}, {seconds:.2f} s")
    return samples, failed


@contextmanager
def short_collections() -> Iterator[None]:
    """Garbage is collected before every timed call: what lives already is not looked at again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(
    pipe: Any, row: Row, batch: Batch, driver: DriverWatch | None = None
) -> tuple[float, Tensor, Tensor]:
    """One call of a row: seconds of its denoising loop, final latents, and pictures.

    What the ``driver`` is asked about is the whole call, its prompts and the VAE too.
    """
    watch = nullcontext() if driver is None else driver.watch(row.name, batch.size)
    with row.switch(pipe):
        warm_up(pipe, batch, row.steps)
        gc.collect()
        with watch, observed(pipe) as seen:
            output = call(pipe, batch, row.steps)
    return seen.ended - seen.began, torch.cat(seen.latents), pictures_of(output)[0]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "isa": _C.active_isa(),
        "threads": torch.get_num_threads(),
        "dtype": "fp32",
        "torch": torch.__version__,
    }


def _result(
    row: Row, samples: dict[str, Samples[Count]], baselines: Baselines, task: Task, judge: Judge
) -> Result:
    mine, reference = samples[row.name], samples[baselines.stock]
    base = samples[baselines.of(row.kind)]
    pictures, plain = torch.cat(mine.pictures), torch.cat(reference.pictures)
    judgement = judge(pictures, task.wanted)
    ratios = [b / a for a, b in zip(mine.seconds, base.seconds, strict=True)]
    kept = max(0, mine.count.live_bytes - base.count.live_bytes)
    return Result(
        name=row.name,
        kind=row.kind,
        steps=row.steps,
        seconds=statistics.median(mine.seconds),
        speedup=statistics.median(ratios),
        computed=mine.count.flops / base.count.flops,
        psnr_db=mean_psnr(pictures.flatten(0, 1), plain.flatten(0, 1)),
        ssim=ssim(pictures, plain),
        latent_error=relative_error(torch.cat(mine.latents), torch.cat(reference.latents)),
        accuracy=judgement.accuracy,
        frechet=judgement.frechet,
        cache_bytes=kept // task.batches[0].size,
    )


def mean_psnr(pictures: Tensor, reference: Tensor) -> float:
    """Mean over pictures ``[N, C, H, W]`` in [0, 1] of the PSNR in dB, each at most the cap."""
    mse = (pictures.double() - reference.double()).square().flatten(1).mean(dim=1)
    return float((-10 * mse.log10()).clamp(max=PSNR_CAP_DB).mean())
