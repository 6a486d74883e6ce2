"""``accelrt demo``: stock and accelerated, from the same seed, side by side."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Callable, Sequence
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
from accelrt.cli.errors import EXIT_NEGATIVE, user_errors

if TYPE_CHECKING:
    from accelrt.cli.scenarios import Scenario
    from accelrt.config import Config
    from accelrt.reporting.environment import Environment
    from accelrt.reporting.tables import Exhibit


class Dtype(str, enum.Enum):
    """Precision of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(str, enum.Enum):
    """Where the pipelines run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@user_errors
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH_OR_HUB_ID",
            autocompletion=words("animatediff", "svd", "dit", "pixart"),
            help="A pipeline to run instead of all, or one of the reference models: animatediff, "
            "svd, dit, pixart.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of pictures and report.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option(help="Seed of every run.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.fp32,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU that this build has code for, else the CPU.")
    ] = Device.auto,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 3,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="CPU threads; default: one or torch's number, as is faster.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the wrap: YAML or JSON.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With --model: the text.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="With --model: the number of frames.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --model: the picture to start from.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Run pipelines stock and accelerated from the same seed; write pictures and a report.

    By default the four reference models: videos with AnimateDiff and Stable Video Diffusion,
    images with DiT and PixArt.
    """
    from accelrt.reporting.page import write_page

    if model is None and not (prompt is None and frames is None and image is None):
        raise ValueError("--prompt, --frames and --image go with --model")
    check_seed(seed)
    check_folder(out)
    settings, environment = prepared(config, threads)
    loaders = _loaders(model, dtype.value, device.value, steps, prompt, frames, image)
    with bars() as progress:
        choose = threads is None and model is None
        exhibits = [
            _run(load, out, seed, repeats, settings, progress, choose_threads=choose and i == 0)
            for i, load in enumerate(loaders)
        ]
    command = _command(
        model, out, seed, steps, dtype, device, repeats, threads, config, prompt, frames, image
    )  # fmt: skip
    page = out / "report.html"
    write_page(page, exhibits, environment, command)
    if as_json:
        print_json(_as_dict(exhibits, page, command, environment))
    else:
        _show(exhibits, page, Console())
    if not all(exhibit.comparison.restored for exhibit in exhibits):
        raise typer.Exit(EXIT_NEGATIVE)


def _loaders(
    model: str | None,
    dtype: str,
    device: str,
    steps: int,
    prompt: str | None,
    frames: int | None,
    image: Path | None,
) -> list[Callable[[], Scenario]]:
    """What to load, one pipeline at a time; missing models are reported before any work."""
    from accelrt.cli import scenarios
    from accelrt.cli.compare import loader_of

    if model is not None:
        return [loader_of(model, dtype, device, steps, prompt, frames, image)]
    where = scenarios.choose_device(device)
    folder = scenarios.reference_folder()

    def loader(name: str) -> Callable[[], Scenario]:
        return lambda: scenarios.reference_scenario(name, folder, dtype, where, steps)

    return [loader(name) for name in scenarios.REFERENCE_NAMES]


def _run(
    load: Callable[[], Scenario],
    out: Path,
    seed: int,
    repeats: int,
    config: Config,
    progress: Progress,
    *,
    choose_threads: bool,
) -> Exhibit:
    """Load, compare, write the pictures."""
    from accelrt.cli.threads import fastest_threads
    from accelrt.quality.compare import compare, steps_per_comparison
    from accelrt.reporting.media import write_pictures
    from accelrt.reporting.tables import Exhibit

    task = progress.add_task("loading", total=None, model="")
    scenario = load()
    out.mkdir(parents=True, exist_ok=True)
    if choose_threads and scenario.pipe.device.type == "cpu":
        progress.update(task, description="choosing the number of threads")
        fastest_threads(scenario.pipe, scenario.call)
    total = steps_per_comparison(scenario.pipe, scenario.call, repeats)
    progress.update(task, total=total, model=scenario.title)
    running, before, last = "", 0, 0

    def on_progress(what: str, done: int, _: int) -> None:
        nonlocal running, before, last
        if what != running:
            running, before = what, before + last
        last = done
        progress.update(task, completed=min(before + done, total), description=what)

    result = compare(
        scenario.pipe,
        scenario.call,
        config=config,
        seed=seed,
        repeats=repeats,
        on_progress=on_progress,
    )
    progress.update(task, completed=total, description="writing pictures")
    picture = write_pictures(result, out, scenario.name)
    progress.update(task, description="done")
    return Exhibit(scenario.title, scenario.detail, result, picture)


def _show(exhibits: Sequence[Exhibit], page: Path, console: Console) -> None:
    """The table, and what was written."""
    from accelrt.reporting.tables import (
        COLUMNS,
        gpu_text,
        groups_text,
        restored_text,
        table_rows,
    )

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i > 0)
    for exhibit in exhibits:
        stock, ours = table_rows(exhibit)
        table.add_row(*stock)
        table.add_row(f"[dim]{escape(ours[0])}[/]", *ours[1:], end_section=True)
    console.print(table)
    for exhibit in exhibits:
        result = exhibit.comparison
        name = result.pipeline
        console.print(f"{name}: {groups_text(result)}. {restored_text(result)}", highlight=False)
        if gpu_text(result):
            console.print(f"{name}: {escape(gpu_text(result))}", highlight=False, soft_wrap=True)
    for path in (*(exhibit.picture for exhibit in exhibits), page):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _as_dict(
    exhibits: Sequence[Exhibit], page: Path, command: str, environment: Environment
) -> dict[str, Any]:
    return {
        "command": command,
        "models": [
            {
                "title": exhibit.title,
                "detail": exhibit.detail,
                "picture": str(exhibit.picture),
                **exhibit.comparison.to_dict(),
            }
            for exhibit in exhibits
        ],
        "report": str(page),
        "environment": environment.to_dict(),
    }


def _command(
    model: str | None,
    out: Path,
    seed: int,
    steps: int,
    dtype: Dtype,
    device: Device,
    repeats: int,
    threads: int | None,
    config: Path | None,
    prompt: str | None,
    frames: int | None,
    image: Path | None,
) -> str:
    """The command that repeats this run."""
    words = ["accelrt", "demo"]
    if model is not None:
        words += ["--model", model]
    words += ["--out", str(out), "--seed", str(seed), "--steps", str(steps)]
    words += ["--dtype", dtype.value, "--device", device.value, "--repeats", str(repeats)]
    for option, value in (
        ("--threads", threads),
        ("--config", config),
        ("--prompt", prompt),
        ("--frames", frames),
        ("--image", image),
    ):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)
