"""``accelrt compare``: what an acceleration costs in quality, over several seeds."""

from __future__ import annotations

import inspect
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    Progress,
)
from rich.table import Table

from accelrt.cli.common import (
    MOST_THREADS,
    bars,
    check_folder,
    check_seed,
    prepared,
    print_json,
    words,
)
from accelrt.cli.demo import Device, Dtype
from accelrt.cli.errors import EXIT_NEGATIVE, user_errors

if TYPE_CHECKING:
    from accelrt.cli.scenarios import Scenario
    from accelrt.config import Config
    from accelrt.feedback import FeedbackModule
    from accelrt.quality import Comparison, Side
    from accelrt.steps import Rehash

DEFAULT_STEPS = 25
AUTO = "auto"


@user_errors
def compare(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_PATH_OR_HUB_ID",
            autocompletion=words("animatediff", "svd", "dit", "pixart"),
            help="A pipeline, or one of the reference models: animatediff, svd, dit, pixart.",
        ),
    ],
    rehash: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|auto",
            autocompletion=words("auto"),
            help="Leave stages out at some steps: the file of a schedule, or auto; default: "
            "every step is computed.",
        ),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Inner Loop Feedback with the module of a folder; both sides take the scheduler "
            "that it was trained for.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the wrap: YAML or JSON.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Denoising steps; default: those of the schedule or the module, or 25."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of both sides.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted from --seed.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per seed and side.")] = 1,
    min_psnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Exit with 1 if the mean PSNR is below."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture to start from.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Per video.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the pictures, side by side.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.fp32,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU that this build has code for, else the CPU.")
    ] = Device.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Run a pipeline plain and accelerated from the same seeds; report quality, time and memory.

    PSNR, SSIM and the error of the latents are those of the accelerated side against the plain
    one. With --rehash they are what the left-out steps cost, with --feedback what it costs that
    fewer stand for all.
    """
    if min_psnr is not None and not 0 < min_psnr < math.inf:
        raise ValueError(f"--min-psnr is {min_psnr}; allowed: a number of dB above 0")
    check_seed(seed, seeds)
    if out is not None:
        check_folder(out)
    settings, environment = prepared(config, threads)
    cut = _cut(rehash, feedback)
    count = steps or cut.steps or DEFAULT_STEPS
    load = loader_of(model, dtype.value, device.value, count, prompt, frames, image)
    with bars() as progress:
        found = _run(load, list(range(seed, seed + seeds)), repeats, settings, cut, out, progress)
    if as_json:
        words = _command(
            model, rehash, feedback, config, count, seed, seeds, repeats, min_psnr, prompt, image,
            frames, out, dtype, device, threads,
        )  # fmt: skip
        values = {"command": words, **found.to_dict(min_psnr), "environment": environment.to_dict()}
        print_json(values)
    else:
        _show(found, Console())
    failures = found.failures(min_psnr)
    for failure in failures:
        Console(stderr=True).print(
            f"[bold red]{escape(failure)}[/]", highlight=False, soft_wrap=True
        )
    if failures:
        raise typer.Exit(EXIT_NEGATIVE)


@dataclass
class Findings:
    """The comparisons of one pipeline, one per seed.

    Args:
        title, detail: of the pipeline and its call.
        comparisons: in the order of the seeds.
        pictures: files that were written.
    """

    title: str
    detail: str
    comparisons: list[Comparison] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    @property
    def mean_psnr(self) -> float:
        """Mean in dB over the seeds; identical pictures have no number, and are left out."""
        return _mean([each.psnr_db for each in self.comparisons])

    @property
    def worst_psnr(self) -> float:
        """Of the worst seed in dB; NaN if one has none."""
        values = [each.psnr_db for each in self.comparisons]
        return math.nan if any(map(math.isnan, values)) else min(values)

    def seconds(self, side: str) -> float:
        """Median over all runs of a side, ``"stock"`` or ``"accelrt"``."""
        return statistics.median(s for each in self._sides(side) for s in each.seconds)

    def peak(self, side: str) -> int:
        """Largest peak of a side in bytes."""
        return max(each.peak_bytes for each in self._sides(side))

    def _sides(self, side: str) -> list[Side]:
        return [each.stock if side == "stock" else each.accelrt for each in self.comparisons]

    @property
    def speedup(self) -> float:
        """Plain seconds over accelerated seconds, of the medians."""
        return self.seconds("stock") / self.seconds("accelrt")

    @property
    def computed_stages(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(each.computed_stages for each in self.comparisons)

    @property
    def cache_bytes(self) -> int:
        """Largest of the seeds."""
        return max(each.cache_bytes for each in self.comparisons)

    def failures(self, min_psnr: float | None) -> list[str]:
        """What makes the finding negative, in sentences."""
        found = []
        # A NaN is no quality: not "at least" the floor.
        if min_psnr is not None and not self.mean_psnr >= min_psnr:
            found.append(f"PSNR {self.mean_psnr:.1f} dB is below --min-psnr {min_psnr:g} dB")
        if not all(each.restored for each in self.comparisons):
            found.append("NOT RESTORED: a run after an unwrap differs from the first plain run")
        return found

    def to_dict(self, min_psnr: float | None) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.title,
            "detail": self.detail,
            "psnr_db": {"mean": _number(self.mean_psnr), "worst": _number(self.worst_psnr)},
            "min_psnr_db": min_psnr,
            "passed": not self.failures(min_psnr),
            "speedup": self.speedup,
            "computed_stages": self.computed_stages,
            "cache_bytes": self.cache_bytes,
            "seeds": [each.to_dict() for each in self.comparisons],
            "pictures": [str(path) for path in self.pictures],
        }


def _mean(values: Sequence[float]) -> float:
    counted = [value for value in values if value != math.inf]
    return statistics.fmean(counted) if counted else math.inf


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Cut:
    """The cut along time: at most one of the two.

    Args:
        rehash, feedback: as for :func:`accelrt.wrap`.
    """

    rehash: Rehash | str | None = None
    feedback: FeedbackModule | None = None

    @property
    def steps(self) -> int | None:
        """The number of steps that it was made for, if it says so."""
        if self.feedback is not None:
            return min(self.feedback.schedules, default=None)
        if self.rehash is None or isinstance(self.rehash, str):
            return None
        origin = self.rehash.origin
        steps = getattr(self.rehash.policy, "steps", None) or (origin and origin.steps)
        return int(steps) if steps else None


def _cut(rehash: str | None, feedback: Path | None) -> Cut:
    """The cut along time, read before anything is loaded."""
    if feedback is not None:
        if rehash is not None:
            raise ValueError("--rehash and --feedback were both given; allowed: one of them")
        from accelrt.wrap import feedback_of

        return Cut(feedback=feedback_of(feedback))
    if rehash is None or rehash == AUTO:
        return Cut(rehash)
    from accelrt.steps import Rehash

    return Cut(Rehash.load(rehash))


def loader_of(
    model: str,
    dtype: str,
    device: str,
    steps: int,
    prompt: str | None,
    frames: int | None,
    image: Path | None,
) -> Callable[[], Scenario]:
    """What to load; a missing reference model is reported before any work."""
    from accelrt.cli import scenarios

    where = scenarios.choose_device(device)
    if model not in scenarios.REFERENCE_NAMES:
        arguments = (model, dtype, where, steps, prompt, frames, image)
        return lambda: scenarios.custom_scenario(*arguments)
    folder = scenarios.reference_folder()
    return lambda: _changed(
        scenarios.reference_scenario(model, folder, dtype, where, steps), prompt, frames, image
    )


def _changed(
    scenario: Scenario, prompt: str | None, frames: int | None, image: Path | None
) -> Scenario:
    """A reference scenario with what was asked for in place of its own.

    Raises:
        ValueError: the pipeline does not take it.
        FileNotFoundError: there is no such picture.
    """
    from accelrt.cli.scenarios import open_image

    kind = type(scenario.pipe)
    known = inspect.signature(kind.__call__).parameters
    asked: dict[str, Any] = {"prompt": prompt, "num_frames": frames, "image": image}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked:
        return scenario
    for name in asked:
        if name not in known:
            option = name.removeprefix("num_")
            raise ValueError(f"{kind.__name__} takes no {name}; leave --{option} out")
    if image is not None:
        asked["image"] = open_image(image)
    given = ", ".join(name.removeprefix("num_") for name in asked)
    return replace(scenario, detail=f"{given} as given", call={**scenario.call, **asked})


def _run(
    load: Callable[[], Scenario],
    seeds: Sequence[int],
    repeats: int,
    config: Config,
    cut: Cut,
    out: Path | None,
    progress: Progress,
) -> Findings:
    """Load, compare from every seed, write the pictures."""
    from accelrt.quality import compare as measure
    from accelrt.quality.compare import steps_per_comparison
    from accelrt.reporting.media import write_pictures

    task = progress.add_task("loading", total=None, model="")
    scenario = load()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if cut.feedback is not None:
        scenario.pipe.scheduler = cut.feedback.scheduler()
    each = steps_per_comparison(scenario.pipe, scenario.call, repeats, rehash=cut != Cut())
    progress.update(task, total=each * len(seeds), model=scenario.title)
    found = Findings(scenario.title, scenario.detail)
    for i, seed in enumerate(seeds):
        running, before, last = "", each * i, 0

        def on_progress(
            what: str, done: int, _: int, seed: int = seed, end: int = each * (i + 1)
        ) -> None:
            nonlocal running, before, last
            if what != running:
                running, before = what, before + last
            last = done
            text = what if len(seeds) == 1 else f"seed {seed}, {what}"
            progress.update(task, completed=min(before + done, end), description=text)

        result = measure(
            scenario.pipe, scenario.call, config=config, rehash=cut.rehash, feedback=cut.feedback,
            seed=seed, repeats=repeats, on_progress=on_progress,
        )  # fmt: skip
        found.comparisons.append(result)
        if out is not None:
            name = scenario.name if len(seeds) == 1 else f"{scenario.name}-seed{seed}"
            found.pictures.append(write_pictures(result, out, name))
    progress.update(task, completed=each * len(seeds), description="done")
    return found


def _show(found: Findings, console: Console) -> None:
    """One table of both sides, one of the seeds if there are several."""
    from accelrt.memory.sizes import bytes_text
    from accelrt.reporting.tables import (
        decibel_text,
        error_text,
        gpu_text,
        groups_text,
        seconds_text,
        share_text,
    )

    several = len(found.comparisons) > 1
    heads = ("model", "run", "seconds", "ratio", "peak memory", "stages run", "cache")
    table = _table(heads)
    stock, ours = found.peak("stock"), found.peak("accelrt")
    table.add_row(
        escape(found.title), "plain", seconds_text(found.seconds("stock")), "1.00x",
        bytes_text(stock), "100 %", "",
    )  # fmt: skip
    table.add_row(
        f"[dim]{escape(found.detail)}[/]", "accelrt", seconds_text(found.seconds("accelrt")),
        f"{found.speedup:.2f}x", f"{bytes_text(ours)} ({share_text(ours, stock)})",
        f"{100 * found.computed_stages:.0f} %",
        bytes_text(found.cache_bytes) if found.cache_bytes else "",
    )  # fmt: skip
    console.print(table)
    quality = _table(("seed", "PSNR", "SSIM", "rel. L2 of latents"))
    for each in found.comparisons:
        ssim = "-" if each.ssim is None else f"{each.ssim:.4f}"
        cells = decibel_text(each.psnr_db), ssim, error_text(each.latent_error)
        quality.add_row(str(each.seed), *cells)
    console.print(quality)
    if several:
        console.print(
            f"PSNR over {len(found.comparisons)} seeds: mean {decibel_text(found.mean_psnr)}, "
            f"worst {decibel_text(found.worst_psnr)}",
            highlight=False,
        )
    result = found.comparisons[0]
    console.print(f"{result.pipeline}: {groups_text(result)}", highlight=False)
    if gpu_text(result):
        console.print(escape(gpu_text(result)), highlight=False, soft_wrap=True)
    for path in found.pictures:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _table(heads: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _command(
    model: str,
    rehash: str | None,
    feedback: Path | None,
    config: Path | None,
    steps: int,
    seed: int,
    seeds: int,
    repeats: int,
    min_psnr: float | None,
    prompt: str | None,
    image: Path | None,
    frames: int | None,
    out: Path | None,
    dtype: Dtype,
    device: Device,
    threads: int | None,
) -> str:
    """The command that repeats this run."""
    words = ["accelrt", "compare", "--model", model]
    for option, value in (
        ("--rehash", rehash),
        ("--feedback", feedback),
        ("--config", config),
        ("--steps", steps),
        ("--seed", seed),
        ("--seeds", seeds),
        ("--repeats", repeats),
        ("--min-psnr", min_psnr),
        ("--prompt", prompt),
        ("--image", image),
        ("--frames", frames),
        ("--out", out),
        ("--dtype", dtype.value),
        ("--device", device.value),
        ("--threads", threads),
    ):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)
