"""``accelrt bench --memory``: whole calls of published pipelines within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from accelrt.cli.common import check_file, print_json
from accelrt.cli.errors import EXIT_NEGATIVE
from accelrt.config import Config
from accelrt.files import write_text

if TYPE_CHECKING:
    from accelrt.benchmarking.gpu_use import GpuUse

COLUMNS = ("pipeline", "budget", "planned", "process", "weights", "seconds", "kept")


def bench_memory(
    names: list[str],
    size: str,
    dtype: str,
    budget: str | None,
    seed: int,
    config: Config,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run each pipeline once in a process of its own, with one denoising step.

    Args:
        names: of pipelines; those of models that are no pipelines are refused.
        size: ``"full"`` or ``"tiny"``.
        dtype: of weights and activations.
        budget: for all of them; ``None`` for that of ``config``, or the published one of each.
        seed: of the weights.
        config: the other settings of the wrap, and the budget if ``budget`` is ``None``.
        out: a JSON file, or a folder for ``memory-whole-calls.json``.
        as_json: print JSON in place of the table.

    Raises:
        ValueError: for a model that is no pipeline, or a budget that cannot be met.
    """
    from accelrt.benchmarking.gpu_use import DriverWatch
    from accelrt.benchmarking.pipelines import PIPELINES
    from accelrt.benchmarking.whole_call import measure_apart
    from accelrt.memory.sizes import parse_budget
    from accelrt.reporting.environment import inspect_environment

    chosen = list(PIPELINES) if "all" in names else names
    unknown = [name for name in chosen if name not in PIPELINES]
    if unknown:
        raise ValueError(f"--memory goes with --model {', '.join(PIPELINES)}; got {unknown[0]}")
    target = out / "memory-whole-calls.json" if out is not None and out.is_dir() else out
    if target is not None:
        check_file(target, (".json",))
        target.parent.mkdir(parents=True, exist_ok=True)
    environment = inspect_environment().to_dict()
    asked_for = budget or config.memory_budget
    if asked_for is not None:
        parse_budget(asked_for)
    if isinstance(asked_for, int):
        asked_for = f"{asked_for}B"
    results: list[dict[str, Any]] = []
    gpu = DriverWatch("cpu").found
    document = {
        "environment": environment, "size": size, "gpu": gpu.to_dict(), "calls": results,
    }  # fmt: skip
    console = Console(stderr=True)
    for name in chosen:
        asked = asked_for or PIPELINES[name](size).budget
        with console.status(f"{name}: a whole call within {asked}"):
            results.append(measure_apart(name, size, dtype, asked, seed, config))
        if target is not None:  # after each: a long run may be interrupted
            write_text(target, json.dumps(document, indent=1) + "\n")
    if as_json:
        print_json(document)
    else:
        _show(results, size, gpu, Console())
    if not all(result["kept"] for result in results):
        raise typer.Exit(EXIT_NEGATIVE)


def _show(results: list[dict[str, Any]], size: str, gpu: GpuUse, console: Console) -> None:
    from accelrt.benchmarking.pipelines import PIPELINES
    from accelrt.benchmarking.tables import driver_text
    from accelrt.memory.sizes import bytes_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows: list[tuple[str, ...]] = []
    for result in results:
        case = PIPELINES[result["name"]](size)
        budget = result["budget_bytes"]
        rows.append(
            (
                f"{case.title}, {case.frames} frames {case.height}x{case.width}",
                "min" if budget is None else bytes_text(budget),
                bytes_text(result["planned_bytes"]),
                bytes_text(result["process_bytes"]),
                bytes_text(result["weight_bytes"]),
                f"{result['seconds']:.3g}",
                "yes" if result["kept"] else "NO",
            )
        )
    head, *lines = zip(COLUMNS, *rows, strict=True)  # few pipelines, many columns
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(
        "process: growth of the resident memory from before the weights to its peak; one "
        "denoising step and the decode",
        highlight=False,
    )
    console.print(escape(driver_text(gpu)), highlight=False, soft_wrap=True)
