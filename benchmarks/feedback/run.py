"""Inner Loop Feedback against plain steps, caches and step rehash in the same time.

    python benchmarks/feedback/run.py --model dit --save
    python benchmarks/feedback/run.py --model pixart --module FOLDER --ablations FOLDER

On the trained reference models with DPM-Solver++, in fp32 on the CPU. The rows are those of
Inner Loop Feedback's table (arXiv 2501.13107), with accelrt's own beside them.
Rivals: ``pip install --group rivals``.
"""

from __future__ import annotations

import enum
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

STEPS_BENCHMARK = Path(__file__).resolve().parents[1] / "steps"
if str(STEPS_BENCHMARK) not in sys.path:
    sys.path.append(str(STEPS_BENCHMARK))

import contenders  # noqa: E402
import counting  # noqa: E402
import modules  # noqa: E402
import rivals  # noqa: E402
import tasks  # noqa: E402
from lines import equal_time, lines_of  # noqa: E402
from measure import Row, check_rows, collect, machine, short_collections  # noqa: E402
from table import Table, write  # noqa: E402

from accelrt.benchmarking.gpu_use import DriverWatch  # noqa: E402
from accelrt.feedback import FeedbackModule  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Model(str, enum.Enum):
    """A reference model with like blocks."""

    dit = "dit"
    pixart = "pixart"


def table_of(
    model: str,
    module: FeedbackModule | Path | None = None,
    ablations: Path | None = None,
    steps: int = 20,
    reference_steps: int = 200,
    samples: int = 200,
    batch: int | None = None,
    resamples: int = 200,
    seed: int = 0,
    families: dict[str, tuple[rivals.Rival, ...]] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Table:
    """Measure a model.

    Args:
        model: ``"dit"`` or ``"pixart"``.
        module: with a schedule that stands for ``steps``, or its folder; by default
            ``feedback`` in the reference model's folder.
        ablations: a folder whose sub-folders hold modules.
        steps: of the base, at least 2.
        reference_steps: of the run that errors are measured against.
        samples, batch: pictures in all, at least 2, and per call; see :func:`tasks.make`.
        resamples: of the pictures, for intervals.
        seed: of prompts and noise.
        families: rivals, see :data:`contenders.FAMILIES`.
        tell: is told how far it is.

    Raises:
        ValueError: an argument is out of range, or a module is for another model.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; allowed: at least 2, for a covariance")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; allowed: at least 1")
    if reference_steps <= steps:
        raise ValueError(f"reference_steps is {reference_steps}; allowed: above steps ({steps})")
    plain, baselines = contenders.plain_rows(steps)
    pipe = contenders.pipeline(model)
    task = tasks.make(model, samples, batch, seed)
    size = task.batches[0].size
    folder: Path | None = None
    if isinstance(module, FeedbackModule):
        own = module
        modules.check_module(own, pipe, steps, contenders.ILF)
    else:
        folder = Path(tasks.REFERENCE / model / "feedback" if module is None else module)
        own = modules.load_module(folder, pipe, steps)
    others = {} if ablations is None else modules.load_ablations(ablations, pipe, steps)
    ilf = contenders.fed(contenders.ILF, own, steps)
    silent = contenders.fed(
        contenders.WITHOUT, modules.without_feedback(own, steps), steps, "without"
    )
    rows = [*plain, silent, ilf, *contenders.cut_rows(pipe, steps)]
    ablated = [contenders.fed(path.name, one, steps, "ablation") for path, one in others.items()]
    check_rows([*rows, *ablated], (baselines.stock, baselines.exact))
    families = contenders.FAMILIES if families is None else families
    counted = min(counting.COUNTED, size)
    driver = DriverWatch(pipe.device)

    def count(row: Row) -> counting.Work:
        return counting.work_of(pipe, row, model, counted)

    with short_collections():
        chosen, tried, left_out = contenders.tuned(model, pipe, steps, size, ilf, families, tell)
        rows += [*chosen, *ablated]
        reference = counting.reference(pipe, task, reference_steps, tell)
        measured, failed = collect(pipe, task, rows, count, tell, driver)
    lines = lines_of(
        rows, measured, reference, baselines, ilf.name, task, tasks.Judge(model), resamples
    )
    made = [modules.described(ilf.name, own, steps, folder)]
    made += [modules.described(path.name, one, steps, path) for path, one in others.items()]
    settings: dict[str, Any] = {
        "steps": steps,
        "reference_steps": reference_steps,
        "samples": samples,
        "batch": size,
        "resamples": resamples,
        "seed": seed,
        "guidance": task.batches[0].call["guidance_scale"],
        "scheduler": type(pipe.scheduler).__name__,
    }
    return Table(
        model, settings, machine(), lines, made, equal_time(lines), tried,
        {**left_out, **failed}, driver.found,
    )  # fmt: skip


def main(
    model: Annotated[list[Model], typer.Option(help="What to measure; may be given repeatedly.")],
    module: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Default: feedback/ of the reference model."),
    ] = None,
    ablations: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Its sub-folders hold further modules.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of the base.")] = 20,
    reference_steps: Annotated[int, typer.Option(help="Of what errors are against.")] = 200,
    samples: Annotated[int, typer.Option(min=2, help="Pictures in all.")] = 200,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures per call; default: 50.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the pictures.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts and noise.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Write the results.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for them.")] = RESULTS,
) -> None:
    """Measure and print the table; --save writes feedback-MODEL.json, .md and .png."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    for one in dict.fromkeys(model):
        try:
            table = table_of(
                one.value, module, ablations, steps, reference_steps, samples, batch, resamples,
                seed, tell=lambda text: typer.echo(text, err=True),
            )  # fmt: skip
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
        table.show()
        if save:
            typer.echo(", ".join(map(str, write(out, table))))


if __name__ == "__main__":
    typer.run(main)
