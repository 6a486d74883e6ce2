"""Which cut along time is worth its error? All configurations, rivals and plain runs.

    python benchmarks/steps/run.py --model dit --steps 25 --steps 50
    python benchmarks/steps/run.py --model svd --samples 10 --rows 'Taylor*' --rows 'DeepCache*'

On the trained reference models, in fp32 on the CPU. Rivals: ``pip install --group rivals``.
"""

from __future__ import annotations

import enum
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import configurations
import rivals
import tasks
import torch
import typer
from measure import machine, measure
from report import Table, write

from accelrt.benchmarking.gpu_use import DriverWatch

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Model(str, enum.Enum):
    """A reference model."""

    dit = "dit"
    pixart = "pixart"
    animatediff = "animatediff"
    svd = "svd"


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """The names that match one of the patterns (``*`` is anything), or all without patterns.

    Raises:
        ValueError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"rows: nothing is called {pattern!r}; allowed: {', '.join(names)}")
    return [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]


def table_of(
    model: str,
    steps: int,
    samples: int | None = None,
    batch: int | None = None,
    patterns: list[str] | None = None,
    files: list[Path] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Table:
    """Measure a model at one number of steps.

    Args:
        model: name of a reference model.
        steps: of the reference, at least 2.
        samples, batch: pictures or videos in all, and per call; see :func:`tasks.make`.
        patterns: of the names of rows besides the plain ones; all if there are none.
        files: of calibrated configurations, which are rows too.
        seed: of prompts, first frames and noise.
        quiet: tell nothing on the way.

    Raises:
        ValueError: an argument is out of range, or a pattern matches no row.
        OSError: a file cannot be read.
    """
    samples = tasks.default_samples(model) if samples is None else samples
    task = tasks.make(model, samples, batch, seed)
    plain, baselines = configurations.plain_rows(steps)
    found = {**configurations.configurations(model), **configurations.from_files(files or [])}
    pipe = tasks.load(model)
    others, reasons = rivals.rows_for(model, pipe, steps)
    rows = {row.name: row for row in (*configurations.rows_of(found, steps), *others)}
    names = matching([*rows, *reasons], patterns or [])
    driver = DriverWatch(pipe.device)
    tell = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
    results, failed = measure(
        pipe,
        task,
        [*plain, *(rows[name] for name in names if name in rows)],
        baselines,
        tasks.Judge(model),
        tell,
        driver,
    )
    left_out = {name: reasons[name] for name in names if name in reasons}
    return Table(
        steps, samples, task.batches[0].size, results, {**left_out, **failed}, driver.found
    )


def main(
    model: Annotated[list[Model], typer.Option(help="What to measure; may be given repeatedly.")],
    steps: Annotated[
        list[int] | None, typer.Option(min=2, help="Steps of the reference; default: 25 and 50.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Default: 200 pictures or 40 videos.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Per call; default: 50 pictures or 10 videos.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Only rows called so (* is anything), besides the plain ones."),
    ] = None,
    rehash: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A calibrated configuration, as one more row."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts, first frames and noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure; write steps-MODEL.json, .md and .png, and print the tables."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    for one in dict.fromkeys(model):
        for count in steps or [25, 50]:
            try:
                table = table_of(one.value, count, samples, batch, rows, rehash, seed)
            except (ValueError, OSError) as error:
                raise typer.BadParameter(str(error)) from error
            paths = write(out, one.value, machine(), table)
            typer.echo(table.markdown())
            typer.echo(", ".join(map(str, paths)))


if __name__ == "__main__":
    typer.run(main)
