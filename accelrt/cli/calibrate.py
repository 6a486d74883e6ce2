"""``accelrt calibrate``: a schedule for a pipeline, made and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from accelrt.cli.common import bars, check_folder, check_packages, prepared, print_json, words
from accelrt.cli.compare import loader_of
from accelrt.cli.demo import Device, Dtype
from accelrt.cli.errors import EXIT_NEGATIVE, user_errors

if TYPE_CHECKING:
    from accelrt.cli.scenarios import Scenario
    from accelrt.quality import SearchResult
    from accelrt.steps import Calibration, Rehash

CALIBRATION, SIMILARITY, FRONT = "calibration.json", "similarity.png", "front.png"


@user_errors
def calibrate(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_PATH_OR_HUB_ID",
            autocompletion=words("animatediff", "svd", "dit", "pixart"),
            help="A pipeline, or one of the reference models: animatediff, svd, dit, pixart.",
        ),
    ],
    steps: Annotated[int, typer.Option(min=3, help="Denoising steps of the requests.")] = 25,
    gamma: Annotated[
        float | None, typer.Option(help="Step Rehash: the similarity that is enough, up to 1.")
    ] = None,
    computed: Annotated[
        int | None,
        typer.Option(min=2, help="Step Rehash: about so many computed steps; default: half."),
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Search the fastest schedule of this PSNR."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="RATIO", help="Search the best schedule of this speed."),
    ] = None,
    boundary: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The last stage that is left out: default, published, out, or a name of "
            "accelrt.summary; default: default, or several where a target is searched.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Requests that are looked at.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the measured runs.")] = 2,
    max_runs: Annotated[
        int, typer.Option(min=1, help="With a target: measured requests, at most.")
    ] = 80,
    seed: Annotated[int, typer.Option(help="Seed of the first request.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="The text.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture to start from.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Per video.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the wrap: YAML or JSON.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where files are written.")] = Path(
        "calibration"
    ),
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.fp32,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU that this build has code for, else the CPU.")
    ] = Device.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Make a schedule for a pipeline: which steps are computed, and what predicts the others.

    Without a target Step Rehash as published: the similarity map of the features, the greedy
    key steps, reuse in between. With --psnr or --speedup boundaries, predictors and schedules
    are searched and measured. `accelrt.wrap(pipe, rehash="FOLDER")` uses it.
    """
    options = {
        "--gamma": gamma, "--computed": computed, "--psnr": psnr, "--speedup": speedup,
    }  # fmt: skip
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} do not go together; give one")
    if gamma is not None and not -1 <= gamma <= 1:
        raise ValueError(f"--gamma is {gamma}; allowed: a number from -1 to 1")
    if computed is not None and computed > steps:
        raise ValueError(f"--computed is {computed}; allowed: from 2 to --steps, {steps}")
    check_folder(out)
    check_packages("the pictures", "matplotlib")
    settings, _ = prepared(config, threads)
    load = loader_of(model, dtype.value, device.value, steps, prompt, frames, image)
    with bars() as progress:
        task = progress.add_task("loading", total=None, model="")

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=what)

        scenario = load()
        progress.update(task, model=scenario.title)
        common: dict[str, Any] = {
            "runs": runs, "seed": seed, "config": settings, "on_progress": on_progress,
        }  # fmt: skip
        if psnr is None and speedup is None:
            count = computed or round(steps / 2)
            made = _published(scenario, boundary or "default", gamma, count, seeds, common)
        else:
            made = _searched(scenario, boundary, psnr, speedup, seeds, max_runs, common)
    out.mkdir(parents=True, exist_ok=True)
    written = _write(made, out)
    if as_json:
        print_json(made.to_dict(written))
    else:
        _show(scenario, made, written, Console())
    if not made.result.reached:
        Console(stderr=True).print(
            f"[bold red]{escape(_missed(made.result))}[/]", highlight=False, soft_wrap=True
        )
        raise typer.Exit(EXIT_NEGATIVE)


@dataclass(frozen=True)
class _Made:
    """A schedule and what is known of it."""

    rehash: Rehash
    calibration: Calibration
    result: SearchResult
    gamma: float | None = None

    def about(self) -> dict[str, Any]:
        """What the file of the schedule says besides."""
        best = self.result.best.to_dict()
        best.pop("rehash")
        about: dict[str, Any] = {} if self.gamma is None else {"gamma": self.gamma}
        return {
            **about,
            "similarity": SIMILARITY,
            "calibration": CALIBRATION,
            "measured": best,
        }

    @property
    def keys(self) -> tuple[int, ...]:
        """Computed steps; none for a policy that decides on the way."""
        return tuple(getattr(self.rehash.policy, "computed", ()))

    def to_dict(self, written: list[Path]) -> dict[str, Any]:
        return {
            **self.about(),
            **self.result.to_dict(),
            "schedule": self.rehash.to_dict(),
            "files": [str(path) for path in written],
        }


def _published(
    scenario: Scenario,
    boundary: str,
    gamma: float | None,
    computed: int,
    seeds: int,
    common: dict[str, Any],
) -> _Made:
    """Step Rehash, and how it does beside as many steps without it."""
    from accelrt.quality import calibrate as look
    from accelrt.quality import measure

    # Nothing is weighed: the published walk takes all steps alike.
    found = look(scenario.pipe, scenario.call, boundary=boundary, probes=0, **common)
    chosen = found.gamma_for(computed) if gamma is None else gamma
    rehash = found.schedule(chosen)
    result = measure(
        scenario.pipe, scenario.call, {"Step Rehash": rehash}, calibration=found,
        fewer=[len(found.keys(chosen))], seed=common["seed"], seeds=seeds,
        config=common["config"], on_progress=common["on_progress"],
    )  # fmt: skip
    return _Made(rehash, found, result, chosen)


def _searched(
    scenario: Scenario,
    boundary: str | None,
    psnr: float | None,
    speedup: float | None,
    seeds: int,
    max_runs: int,
    common: dict[str, Any],
) -> _Made:
    from accelrt.quality import search

    result = search(
        scenario.pipe, scenario.call, psnr_db=psnr, speedup=speedup,
        boundaries=None if boundary is None else [boundary], seeds=seeds, max_runs=max_runs,
        **common,
    )  # fmt: skip
    rehash = result.best.rehash
    assert rehash is not None
    calibration = next(c for c in result.calibrations if c.boundary == rehash.boundary)
    return _Made(rehash, calibration, result)


def _write(made: _Made, out: Path) -> list[Path]:
    from accelrt.steps.rehash import FILE_NAME

    names = [FILE_NAME, CALIBRATION, SIMILARITY]
    made.rehash.save(out / FILE_NAME, about=made.about())
    made.calibration.save(out / CALIBRATION)
    made.calibration.plot(out / SIMILARITY, made.keys)
    if made.result.psnr_db is not None or made.result.speedup is not None:
        made.result.plot(out / FRONT)
        names.append(FRONT)
    return [out / name for name in names]


def _show(scenario: Scenario, made: _Made, written: list[Path], console: Console) -> None:
    console.print(f"{scenario.title}, {scenario.detail}", highlight=False)
    console.print(made.result.table())
    if made.gamma is not None:
        console.print(f"gamma {made.gamma:.6g}", highlight=False)
    if made.keys:
        keys = " ".join(map(str, made.keys))
        console.print(
            f"computed steps, {len(made.keys)} of {made.calibration.steps}: {keys}",
            highlight=False,
        )
    for line in made.result.skipped:
        console.print(f"left out: {escape(line)}", highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _missed(result: SearchResult) -> str:
    best = result.best
    wanted = (
        f"{result.psnr_db:g} dB" if result.psnr_db is not None else f"a ratio of {result.speedup:g}"
    )
    return (
        f"{wanted} was not reached; the closest is {best.label}: {best.psnr_db:.1f} dB at "
        f"{best.speedup:.2f}x"
    )
