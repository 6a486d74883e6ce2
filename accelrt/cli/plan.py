"""``accelrt plan``: how a memory budget would be kept, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from accelrt.cli.common import check_file, check_packages, print_json, words
from accelrt.cli.demo import Dtype
from accelrt.cli.errors import user_errors
from accelrt.config import Config

if TYPE_CHECKING:
    from accelrt.planning import Plan


@user_errors
def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            autocompletion=words(
                "animatediff", "svd", "dit", "pixart", "pixart-1024", "unet2d", "vae", "svd-vae"
            ),
            help="animatediff or svd (whole pipelines), dit, pixart, unet2d, vae, svd-vae "
            "(models by themselves), or a folder that diffusers wrote.",
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            autocompletion=words("auto", "min"),
            help="What a call may take: 4GiB, 3.5GiB, auto, or min; default: that of --config, "
            "or auto.",
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Of the pictures, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the pictures, in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Per video.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures or videos.")] = 1,
    guidance: Annotated[bool, typer.Option(help="Classifier-free guidance.")] = True,
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.bf16,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the wrap: YAML or JSON.")
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="Also every operator group.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a picture of memory over time: .png or .svg."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Plan a call of a pipeline under a memory budget; nothing is loaded, nothing runs.

    The models are looked at on meta tensors: the peaks of the stock models, the smallest
    slices that keep the budget, and the offsets of the arena, for the sizes asked for.
    """
    import accelrt

    if out is not None:
        check_file(out, (".png", ".svg"))
        check_packages("pictures", "matplotlib")
    settings = Config() if config is None else Config.from_file(config)
    with Console(stderr=True).status("looking at the models"):
        target = _target(model, dtype)
        found = accelrt.plan(
            target, height=height, width=width, num_frames=frames, batch=batch, guidance=guidance,
            memory_budget=budget, config=settings,
        )  # fmt: skip
    if out is not None:
        from accelrt.planning.render import draw

        out.parent.mkdir(parents=True, exist_ok=True)
        draw(found, out)
    if as_json:
        print_json(found.to_dict())
        return
    console = Console()
    _show(found, console, groups)
    if out is not None:
        console.print(f"written: {out}", highlight=False, soft_wrap=True)


def _target(name: str, dtype: Dtype) -> Any:
    """A pipeline or model without weights."""
    from accelrt.benchmarking.models import FULL
    from accelrt.benchmarking.pipelines import PIPELINES
    from accelrt.benchmarking.weights import on_meta
    from accelrt.benchmarking.whole_call import DTYPES, on_meta_pipeline
    from accelrt.planning.folder import from_folder

    kind = DTYPES[dtype.value]
    if name in PIPELINES:
        return on_meta_pipeline(PIPELINES[name]("full"), kind)
    if name in FULL:
        return on_meta(FULL[name]().build, kind)
    if Path(name).is_dir():
        return from_folder(Path(name), kind)
    names = ", ".join(dict.fromkeys((*PIPELINES, *FULL)))
    raise ValueError(f"--model is {name}; allowed: {names}, or a folder")


def _show(plan: Plan, console: Console, groups: bool) -> None:
    from accelrt.planning.render import (
        COLUMNS,
        GROUP_COLUMNS,
        group_rows,
        summary_rows,
        total_text,
    )

    by_column = zip(COLUMNS, *summary_rows(plan), strict=True)  # few models, many columns
    head, *rows = [tuple(cells) for cells in by_column]
    _table(console, head, rows)
    for part in plan.components if groups else ():
        _table(console, GROUP_COLUMNS, group_rows(part), title=part.path or "model")
    console.print(total_text(plan), highlight=False, soft_wrap=True)


def _table(
    console: Console,
    heads: tuple[str, ...],
    rows: list[tuple[str, ...]],
    title: str | None = None,
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
