"""The paired comparison: one pipeline object, stock and wrapped, from one seed."""

from __future__ import annotations

import gc
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelrt.config import Config
from accelrt.memory.tracker import track_peak
from accelrt.profiling.sampler import Sampler, Use, mean_use
from accelrt.quality.metrics import psnr, relative_error, ssim
from accelrt.quality.observe import captured_latents, pictures, silent_steps, weight_bytes
from accelrt.steps.outer_steps import OuterSteps
from accelrt.steps.report import FeedbackReport, StepsReport, report_of
from accelrt.steps.session import Tracker
from accelrt.wrap import forwards, is_wrapped, summary, unwrap, wrap

if TYPE_CHECKING:
    from accelrt.feedback.module import FeedbackModule
    from accelrt.report import Summary
    from accelrt.steps.rehash import Rehash

MEMORY_STEPS = 2
# Arguments with which the number of steps is another than the one asked for.
_OWN_STEPS = {"timesteps", "sigmas", "strength"}

# What is running, denoising steps done, and steps of this run.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Side:
    """One of the two pipelines compared.

    Args:
        seconds: wall time of each run, in order.
        peak_bytes: peak live bytes that a call allocates, weights not included.
        latents: final latents, as the VAE received them; ``None`` if the pipeline has
            neither VAE nor scheduler.
        pictures: float32 ``[N, F, C, H, W]`` in [0, 1]; ``F`` is 1 for images.
        gpu: by its driver, during the timed runs; energy per picture or frame.
    """

    seconds: tuple[float, ...]
    peak_bytes: int
    latents: Tensor | None
    pictures: Tensor
    gpu: Use = field(default_factory=Use)

    @property
    def median_seconds(self) -> float:
        """Median wall time of a run."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured.

    Args:
        pipeline: class name of the pipeline.
        call: keywords of the call.
        seed, dtype, device, threads: of the runs.
        stock, accelrt: both sides, from the same seed.
        video: whether the pictures are frames of videos.
        weight_bytes: bytes of all weights; the same on both sides.
        latent_error: relative L2 error of the wrapped latents against the stock ones.
        psnr_db, ssim: of the wrapped pictures against the stock ones; ``ssim`` is ``None``
            for pictures below 11 pixels.
        restored: every stock run after an unwrap was bit-equal to the first stock run.
        restored_runs: number of those runs.
        config: settings of the wrap.
        groups: which operator groups were fused, sliced or left alone.
        rehash: settings of the cut along time, as :meth:`accelrt.steps.Rehash.to_dict`;
            ``None`` where every step was computed.
        feedback: passes, loop and what they stand for; ``None`` without Inner Loop Feedback.
        computed_stages: share of the stages that the cut leaves out which ran all the same,
            over the samples of all steps; with ``feedback`` the blocks that ran over those of
            the steps that they stand for; 1 without either.
        cache_bytes: most that was kept from step to step.
        gpu_note: why the driver of a GPU said nothing; empty if it did.
    """

    pipeline: str
    call: dict[str, Any]
    seed: int
    dtype: str
    device: str
    threads: int
    stock: Side
    accelrt: Side
    video: bool
    weight_bytes: int
    latent_error: float | None
    psnr_db: float
    ssim: float | None
    restored: bool
    restored_runs: int
    config: Config
    groups: Summary
    rehash: dict[str, Any] | None = None
    feedback: dict[str, Any] | None = None
    computed_stages: float = 1.0
    cache_bytes: int = 0
    gpu_note: str = ""

    @property
    def speedup(self) -> float:
        """Stock seconds over accelerated seconds, of the medians."""
        return self.stock.median_seconds / self.accelrt.median_seconds

    @property
    def memory_ratio(self) -> float:
        """Stock peak over accelerated peak, weights apart."""
        if not self.accelrt.peak_bytes:
            return math.nan
        return self.stock.peak_bytes / self.accelrt.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without pictures; an infinite PSNR becomes ``"inf"``."""

        def side(values: Side) -> dict[str, Any]:
            return {
                "seconds": list(values.seconds),
                "median_seconds": values.median_seconds,
                "peak_bytes": values.peak_bytes,
                "gpu": {
                    "joules_per_image": values.gpu.joules,
                    "watts": values.gpu.watts,
                    "megahertz": values.gpu.megahertz,
                    "used_bytes": values.gpu.used_bytes,
                },
            }

        return {
            "pipeline": self.pipeline,
            "call": {key: _plain(value) for key, value in self.call.items()},
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "stock": side(self.stock),
            "accelrt": side(self.accelrt),
            "speedup": self.speedup,
            "memory_ratio": _plain(self.memory_ratio),
            "weight_bytes": self.weight_bytes,
            "latent_error": _plain(self.latent_error),
            "psnr_db": _plain(self.psnr_db),
            "ssim": _plain(self.ssim),
            "restored": self.restored,
            "restored_runs": self.restored_runs,
            "config": self.config.to_dict(),
            "groups": self.groups.to_dict(),
            "rehash": _plain(self.rehash),
            "feedback": _plain(self.feedback),
            "computed_stages": self.computed_stages,
            "cache_bytes": self.cache_bytes,
            "gpu_note": self.gpu_note,
        }


@dataclass
class _Runs:
    """Everything that one side gathers during the comparison."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    latents: Tensor | None = None
    pictures: Tensor | None = None
    video: bool = False
    restored: int = 0
    equal: bool = True
    uses: list[Use] = field(default_factory=list)

    def keep(self, output: Any, latents: Tensor | None) -> None:
        """The first run is kept, later ones are held against it."""
        images, self.video = pictures(output)
        if self.pictures is None:
            self.pictures, self.latents = images, latents
            return
        self.restored += 1
        self.equal &= same_bits(images, self.pictures)
        if latents is not None and self.latents is not None:
            self.equal &= same_bits(latents, self.latents)

    def side(self) -> Side:
        assert self.pictures is not None
        return Side(
            tuple(self.seconds), self.peak_bytes, self.latents, self.pictures, mean_use(self.uses)
        )  # fmt: skip


def compare(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    config: Config | None = None,
    rehash: Rehash | str | Path | None = None,
    feedback: FeedbackModule | str | Path | None = None,
    seed: int = 0,
    repeats: int = 3,
    on_progress: Progress | None = None,
    **overrides: Any,
) -> Comparison:
    """Run a pipeline stock and wrapped from the same seed, and measure both.

    The runs are interleaved on one pipeline object, wrapping and unwrapping it in
    between: stock, wrapped, wrapped, stock, and so on, so that a drift of the machine's
    speed falls on both. A run is timed alone, after a short untimed one that pays for
    what only the first call after a wrap does. Memory is measured in separate short
    calls; with ``rehash`` or ``feedback`` that of the wrapped side in a whole one, since what is
    kept grows from step to step. The stock runs after an unwrap prove that unwrapping restores the
    pipeline.

    Args:
        pipe: an unwrapped diffusers pipeline.
        call: keywords of its call, without ``generator`` and ``output_type``.
        config: settings for :func:`accelrt.wrap`.
        rehash: the cut along time, as for :func:`accelrt.wrap`; the stock side computes every
            step.
        feedback: Inner Loop Feedback, as for :func:`accelrt.wrap`; the stock side runs the steps
            that the outer steps stand for, with the same scheduler.
        seed: of the CPU generator that every run starts from.
        repeats: timed runs of each side, at least 1.
        on_progress: called as ``on_progress(what, steps_done, steps)``.
        overrides: single settings of :class:`accelrt.Config`.

    Returns:
        A :class:`Comparison`. The pipeline is left unwrapped.

    Raises:
        UnsupportedModelError: nothing in the pipeline can be wrapped.
        ValueError: it is wrapped already, takes no generator, or an argument is wrong.
        OSError: the file of ``rehash`` or ``feedback`` cannot be read.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"compare: repeats is {repeats!r}; allowed: an integer >= 1")
    if is_wrapped(pipe):
        raise ValueError("compare: the pipeline is wrapped; call accelrt.unwrap first")
    config = (config or Config()).override(**overrides)
    # Fails here, before any work, if the pipeline or its call is not one that we can compare.
    runner = _Runner(pipe, call, seed, on_progress)
    cut = _fits(pipe, call, config, rehash, feedback, runner.steps(call))
    sides = {"stock": _Runs(), "accelrt": _Runs()}
    steps: StepsReport | FeedbackReport | None = None
    try:
        for wrapped, what in _order(repeats):
            _switch(pipe, wrapped, config, cut)
            runner.timed(sides["accelrt" if wrapped else "stock"], what)
            steps = _steps(pipe) or steps
        for wrapped in (True, False):
            _switch(pipe, wrapped, config, cut)
            name = "accelrt" if wrapped else "stock"
            whole = wrapped and bool(cut)
            sides[name].peak_bytes = runner.peak(f"{name}: memory", whole=whole)
            if wrapped:
                groups = summary(pipe)
    finally:
        _switch(pipe, False, config, cut)
    stock, ours = sides["stock"].side(), sides["accelrt"].side()
    big_enough = min(stock.pictures.shape[-2:]) >= 11
    return Comparison(
        pipeline=type(pipe).__name__,
        call=dict(call),
        seed=seed,
        dtype=str(pipe.dtype).removeprefix("torch."),
        device=str(runner.device),
        threads=torch.get_num_threads(),
        stock=stock,
        accelrt=ours,
        video=sides["stock"].video,
        weight_bytes=weight_bytes(pipe),
        latent_error=(
            None
            if stock.latents is None or ours.latents is None
            else relative_error(ours.latents, stock.latents)
        ),
        psnr_db=psnr(ours.pictures, stock.pictures),
        ssim=ssim(ours.pictures, stock.pictures) if big_enough else None,
        restored=sides["stock"].equal and sides["stock"].restored > 0,
        restored_runs=sides["stock"].restored,
        config=config,
        groups=groups,
        rehash=steps.settings if isinstance(steps, StepsReport) else None,
        feedback=steps.settings if isinstance(steps, FeedbackReport) else None,
        computed_stages=1.0 if steps is None else steps.computed_share,
        cache_bytes=0 if steps is None else steps.cache_bytes,
        gpu_note=runner.gpu_note,
    )


def steps_per_comparison(
    pipe: Any, call: Mapping[str, Any], repeats: int, *, rehash: bool = False
) -> int:
    """Steps that :func:`compare` reports to ``on_progress`` in all.

    Args:
        pipe, call, repeats: of the comparison.
        rehash: whether it has a cut along time, or feedback.
    """
    runner = _Runner(pipe, call, 0, None)
    full, short = runner.steps(call), runner.steps(runner.short)
    return len(_order(repeats)) * full + short + (full if rehash else short)


def _fits(
    pipe: Any,
    call: Mapping[str, Any],
    config: Config,
    rehash: Rehash | str | Path | None,
    feedback: FeedbackModule | str | Path | None,
    steps: int,
) -> dict[str, Any]:
    """The cut along time, read; refuses, before any work, what the pipeline cannot be run with."""
    wrap(pipe, config=config, rehash=rehash, feedback=feedback)
    try:
        tracker = _tracker(pipe)
        if tracker is None:
            return {}
        scheduler = getattr(pipe, "scheduler", None)
        own = getattr(scheduler, "order", 1) == 1 and not _OWN_STEPS & set(call)
        if isinstance(tracker, OuterSteps):
            if own:
                tracker.check_steps(scheduler, steps)
            return {"feedback": tracker.module}
        tracker.rehash.to_dict()  # of a policy of the user's own it says that it cannot
        if own:
            tracker.check_request(scheduler, steps)
        return {"rehash": tracker.rehash}
    finally:
        unwrap(pipe)


def _tracker(pipe: Any) -> Tracker | None:
    """What follows the requests of a wrapped pipeline whose steps are cut."""
    found = (forward.stepper for _, forward in forwards(pipe))
    return next((stepper.tracker for stepper in found if stepper is not None), None)


def _steps(pipe: Any) -> StepsReport | FeedbackReport | None:
    found = (report_of(forward) for _, forward in forwards(pipe))
    return next((report for report in found if report is not None), None)


def _order(repeats: int) -> list[tuple[bool, str]]:
    """(wrapped, what) of the timed runs; the last is stock, and so follows an unwrap."""
    order: list[tuple[bool, str]] = []
    for i in range(repeats):
        pair = [(False, f"stock: run {i + 1}"), (True, f"accelrt: run {i + 1}")]
        order += pair if i % 2 == 0 else pair[::-1]
    if order[-1][0]:
        order.append((False, "stock: after unwrap"))
    return order


def _switch(pipe: Any, wrapped: bool, config: Config, cut: Mapping[str, Any]) -> None:
    if wrapped and not is_wrapped(pipe):
        wrap(pipe, config=config, **cut)
    elif not wrapped and is_wrapped(pipe):
        unwrap(pipe)


class _Runner:
    """Calls the pipeline, each time from the same seed."""

    def __init__(
        self, pipe: Any, call: Mapping[str, Any], seed: int, on_progress: Progress | None
    ) -> None:
        known = inspect.signature(type(pipe).__call__).parameters
        for name in ("generator", "output_type"):
            if name not in known:
                raise ValueError(f"compare: {type(pipe).__name__} takes no {name}")
            if name in call:
                raise ValueError(f"compare: {name} is set by the comparison; leave it out")
        unknown = sorted(set(call) - set(known))
        if unknown:
            raise ValueError(
                f"compare: {type(pipe).__name__} takes no {', '.join(unknown)}; "
                f"known: {', '.join(name for name in known if name != 'self')}"
            )
        self.pipe = pipe
        self.call = dict(call)
        self.seed = seed
        self.on_progress = on_progress
        self.device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
        self.gpu_note = self._sampler().stop().gpu.note
        self.short = dict(call)
        self.default_steps = None
        if "num_inference_steps" in known:
            self.default_steps = known["num_inference_steps"].default
            self.short["num_inference_steps"] = min(MEMORY_STEPS, self.steps(call))

    def _sampler(self) -> Sampler:
        return Sampler(self.device.index or 0 if self.device.type == "cuda" else None)

    def steps(self, call: Mapping[str, Any]) -> int:
        """Denoising steps of a call."""
        return int(call.get("num_inference_steps") or self.default_steps or 1)

    def run(self, call: Mapping[str, Any], what: str = "") -> Any:
        """One call from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        report = self.on_progress

        def step(done: int, total: int) -> None:
            if report is not None and what:
                report(what, done, total)

        with silent_steps(self.pipe, step):
            output = self.pipe(**call, generator=generator, output_type="np")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output

    def timed(self, runs: _Runs, what: str) -> None:
        """A short warm-up, then a timed run whose output is kept or compared."""
        tracker = _tracker(self.pipe)
        # A schedule is for its own number of steps.
        with nullcontext() if tracker is None else tracker.paused():
            self.run(self.short)
        gc.collect()
        # Where there is nothing to ask, no thread looks: it would only take time from the run.
        sampler = None if self.gpu_note else self._sampler()
        with captured_latents(self.pipe) as found, ExitStack() as stack:
            if sampler is not None:
                sampler.start()
                stack.callback(sampler.stop)
            began = time.perf_counter()
            output = self.run(self.call, what)
            runs.seconds.append(time.perf_counter() - began)
        if sampler is not None:
            images, _ = pictures(output)
            runs.uses.append(sampler.found.use(images.shape[0] * images.shape[1]))
        latents = torch.cat([part.detach().cpu() for part in found]) if found else None
        runs.keep(output, latents)

    def peak(self, what: str, *, whole: bool) -> int:
        """Peak live bytes that a short call allocates, or a whole one."""
        gc.collect()
        with track_peak() as memory:
            self.run(self.call if whole else self.short, what)
        return int(memory.peak_bytes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, which also holds for equal NaNs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = (t.detach().cpu().contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(*raw)


def _plain(value: Any) -> Any:
    """A value that JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)
