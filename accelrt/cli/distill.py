"""``accelrt distill``: a feedback module for a pipeline, trained."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from accelrt.cli.common import MOST_THREADS, check_folder, prepared, print_json, words
from accelrt.cli.demo import Device, Dtype
from accelrt.cli.errors import EXIT_NEGATIVE, user_errors
from accelrt.files import read

if TYPE_CHECKING:
    from accelrt.feedback.training import DistillConfig, DistillResult

_ROWS = {
    "feedback": "with feedback",
    "without": "the same steps without",
    "equal_blocks": "plain steps, as many blocks",
    "stands_for": "plain steps that it stands for",
}


class Precision(str, enum.Enum):
    """Mixed precision of the training."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Objective(str, enum.Enum):
    """What is minimised."""

    landing = "landing"
    ahead = "ahead"


@user_errors
def distill(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_PATH_OR_HUB_ID",
            autocompletion=words("dit", "pixart"),
            help="A DiT or PixArt pipeline, or one of the reference models: dit, pixart.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the module is written.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Images in class folders or with metadata.jsonl, a folder saved by datasets, or "
            "latents in .safetensors; default: noise alone.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="All settings: YAML or JSON; options go before it."),
    ] = None,
    objective: Annotated[Objective | None, typer.Option(help="What is minimised.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a pass, per process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Passes per optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    stands_for: Annotated[
        int | None, typer.Option(help="Denoising steps of the requests that it answers.")
    ] = None,
    outer: Annotated[int | None, typer.Option(help="Passes in place of them.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Of the teacher.")] = None,
    diffusion_weight: Annotated[
        float | None, typer.Option(help="Of the squared error to the noise, on data.")
    ] = None,
    mixed_precision: Annotated[Precision | None, typer.Option(help="As in accelerate.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to draw from without data, one a line."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the frozen model.")] = Dtype.fp32,
    device: Annotated[
        Device, typer.Option(help="auto: what accelerate finds, or is launched with.")
    ] = Device.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Train a feedback module: one pass with it does what several steps do.

    The pipeline's model stays frozen. Run again with the same settings, an interrupted training
    goes on from its last checkpoint in --out. On several GPUs or machines:
    `accelerate launch -m accelrt distill ...`.
    """
    prepared(None, threads)
    from accelrt.cli import scenarios

    given = {
        "objective": objective and objective.value,
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "stands_for": stands_for,
        "outer": outer,
        "guidance_scale": guidance_scale,
        "diffusion_weight": diffusion_weight,
        "mixed_precision": mixed_precision and mixed_precision.value,
        "seed": seed,
    }
    settings = _settings(config, given, prompts)
    if data is not None and not data.exists():
        raise FileNotFoundError(f"--data is {data}; there is no such file or folder")
    check_folder(out)
    if device is Device.cuda:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda is not available here; `accelrt doctor` says why")
    # Where the stock models run: the device is accelerate's choice, so the CPU until then.
    source = model
    if model in scenarios.REFERENCE_NAMES:
        source = str(scenarios.reference_folder() / model)
    pipe = scenarios.load_pipeline(source, dtype.value, "cpu", quiet=source != model)

    from accelrt.feedback.training import distill as train

    result = train(pipe, settings, out, data, cpu=device is Device.cpu)
    if _main_process():
        if as_json:
            print_json(result.to_dict())
        else:
            _show(result, Console())
        if not result.improved:
            Console(stderr=True).print(
                "[bold red]with the module the error is not below that of the same steps without "
                "it[/]",
                highlight=False,
                soft_wrap=True,
            )
    if not result.improved:
        raise typer.Exit(EXIT_NEGATIVE)


def _settings(config: Path | None, given: dict[str, Any], prompts: Path | None) -> DistillConfig:
    """Those of the file, with the options in front of it."""
    from accelrt.feedback.training import DistillConfig

    settings = DistillConfig() if config is None else DistillConfig.from_file(config)
    changed = {name: value for name, value in given.items() if value is not None}
    if prompts is not None:
        changed["prompts"] = read(prompts, str.splitlines, _texts)
    return settings.override(**changed)


def _texts(lines: list[str]) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines if line.strip())


def _main_process() -> bool:
    from accelerate import PartialState

    main: bool = PartialState().is_main_process
    return main


def _show(result: DistillResult, console: Console) -> None:
    """Every way of sampling against the teacher's small steps."""
    from accelrt.reporting.tables import decibel_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, head in enumerate(("run", "steps", "blocks", "rel. L2 of latents", "PSNR")):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for name, row in result.validation.items():
        cells = str(row.steps), str(row.blocks), f"{row.relative_l2:.4f}"
        table.add_row(_ROWS[name], *cells, decibel_text(row.psnr_db))
    console.print(table)
    console.print(
        f"final loss {result.losses[-1]['loss']:.4g}, {result.seconds:.0f} s", highlight=False
    )
    console.print(f"written: {result.folder}", highlight=False, soft_wrap=True)
