"""``accelrt bench``: full-size models with random weights, stock against accelrt."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from accelrt.benchmarking.progress import Progress
from accelrt.cli.common import MOST_THREADS, check_file, check_seed, print_json
from accelrt.cli.demo import Device, Dtype
from accelrt.cli.errors import EXIT_NEGATIVE, user_errors
from accelrt.config import Config
from accelrt.files import write_text

if TYPE_CHECKING:
    from accelrt.benchmarking.measure import Settings
    from accelrt.benchmarking.results import Measurement


class Model(str, enum.Enum):
    """What is measured."""

    svd = "svd"
    pixart = "pixart"
    pixart_1024 = "pixart-1024"
    dit = "dit"
    animatediff = "animatediff"
    unet2d = "unet2d"
    vae = "vae"
    svd_vae = "svd-vae"
    all = "all"


class Size(str, enum.Enum):
    """The published configuration, or one for a trial."""

    full = "full"
    tiny = "tiny"


class Truth(str, enum.Enum):
    """Precision of the forward that errors are taken against."""

    fp32 = "fp32"
    fp64 = "fp64"


@user_errors
def bench(
    model: Annotated[list[Model], typer.Option(help="What to measure; may be given repeatedly.")],
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.bf16,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU that this build has code for, else the CPU.")
    ] = Device.auto,
    size: Annotated[
        Size, typer.Option(help="full: the published one; tiny: for a trial of the command.")
    ] = Size.full,
    repeats: Annotated[
        int,
        typer.Option(
            min=0, help="Timed rounds; 0: time only the forwards whose memory is watched."
        ),
    ] = 3,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_THREADS, help="CPU threads; default: torch's number."),
    ] = None,
    truth: Annotated[
        Truth | None,
        typer.Option(
            help="Precision of the truth for errors; default: fp32, with --dtype fp32 fp64."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the wrap: YAML or JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    switches: Annotated[
        bool,
        typer.Option(help="Also the stock model with its memory switches on, which may be slow."),
    ] = True,
    tuned_malloc: Annotated[
        bool | None,
        typer.Option(
            help="Time stock and accelrt once more in a process whose malloc keeps freed memory; "
            "default: on Linux, on the CPU."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write JSON, and a Markdown table beside it; into a folder: models-DEVICE.json.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Whole pipelines (animatediff, svd) on the CPU instead, within a memory budget: "
            "the peak of a process that loads and calls them.",
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            help="With --memory: 4GiB, min, ...; default: that of --config, or 3.5GiB, and 8.5GiB "
            "for svd."
        ),
    ] = None,
) -> None:
    """Measure published models with random weights: one forward, stock against accelrt.

    Time, model FLOP utilisation (against a large matrix product of the same run), peak
    memory and error, each also for the stock model with its memory switches on. A
    forward is one denoising step with guidance batched, or one decode.
    """
    import torch

    from accelrt.benchmarking.measure import check, measure
    from accelrt.benchmarking.models import SIZES
    from accelrt.benchmarking.tuned import tuned_rates
    from accelrt.cli.scenarios import choose_device
    from accelrt.reporting.environment import inspect_environment

    check_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    if memory:
        from accelrt.cli.bench_memory import bench_memory

        names = [m.value for m in dict.fromkeys(model)]
        given = Config() if config is None else Config.from_file(config)
        bench_memory(names, size.value, dtype.value, budget, seed, given, out, as_json)
        return
    if budget is not None:
        raise ValueError("--budget goes with --memory")
    where = choose_device(device.value)
    if tuned_malloc is None:
        tuned_malloc = where == "cpu" and sys.platform == "linux"
    elif tuned_malloc and where != "cpu":
        raise ValueError(f"--tuned-malloc goes with --device cpu; the device is {where}")
    settings = _settings(dtype, where, size, repeats, truth, config, seed, switches)
    target = _target(out, where)
    environment = inspect_environment()
    if not environment.build["loaded"]:
        raise ImportError(environment.statements[0])
    cases = SIZES[size.value]
    names = list(cases) if Model.all in model else list(dict.fromkeys(m.value for m in model))
    for name in names:
        check(cases[name](), settings.config)
    document: dict[str, Any] = {"environment": environment.to_dict(), "models": []}
    results: list[Measurement] = []
    console = Console(stderr=True)
    for name in names:
        with Reporter(console, name) as reporter:
            tuned = tuned_rates if tuned_malloc else None
            results.append(measure(name, settings, progress=reporter, tuned=tuned))
        document["models"] = [result.to_dict() for result in results]
        if target is not None:  # after each model: a long run may be interrupted
            _write(target, document, results)
    if as_json:
        print_json(document)
    else:
        _show(results, target, Console())
    if not all(result.within for result in results):
        raise typer.Exit(EXIT_NEGATIVE)


class Reporter(Progress):
    """Shows what runs, and leaves a line with the time of each phase.

    Args:
        console: where to, normally that of stderr.
        name: of the model.
    """

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name
        self.phase = ""
        self.status = console.status(name)

    def __enter__(self) -> Reporter:
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self.phase = phase
        self.status.update(escape(f"{self.name}: {phase}"))

    def call(self, what: str) -> None:
        """A call inside of the phase begins."""
        self.status.update(escape(f"{self.name}: {self.phase}: {what}"))

    def end(self, phase: str, seconds: float) -> None:
        """A phase is done."""
        self.console.print(f"{self.name}: {phase} took {seconds:.1f} s", highlight=False)


def _settings(
    dtype: Dtype,
    device: str,
    size: Size,
    repeats: int,
    truth: Truth | None,
    config: Path | None,
    seed: int,
    switches: bool,
) -> Settings:
    from accelrt.benchmarking.measure import Settings

    if truth is None:
        truth = Truth.fp64 if dtype is Dtype.fp32 else Truth.fp32
    return Settings(
        size=size.value,
        dtype=dtype.value,
        truth=truth.value,
        device=device,
        repeats=repeats,
        seed=seed,
        config=Config() if config is None else Config.from_file(config),
        switches=switches,
    )


def _target(out: Path | None, device: str) -> Path | None:
    """The JSON file; checked before any work."""
    if out is None:
        return None
    if out.is_dir():
        return out / f"models-{device}.json"
    check_file(out, (".json",))
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _write(target: Path, document: dict[str, Any], results: Sequence[Measurement]) -> None:
    from accelrt.benchmarking.tables import markdown

    write_text(target, json.dumps(document, indent=1) + "\n")
    write_text(target.with_suffix(".md"), markdown(results))


def _show(results: Sequence[Measurement], target: Path | None, console: Console) -> None:
    """A table and sentences per model, and what was written."""
    from accelrt.benchmarking.tables import columns, rows, sentences, title

    for result in results:
        heads = columns(result.device)
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=0,
            title=title(result),
            title_justify="left",
        )
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
        for cells in rows(result):
            table.add_row(*(escape(cell) for cell in cells))
        console.print(table)
        for line in sentences(result):
            console.print(escape(line), highlight=False, soft_wrap=True)
        console.print()
    for path in (target, target.with_suffix(".md")) if target is not None else ():
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
