"""What the commands that run pipelines share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

if TYPE_CHECKING:
    from accelrt.config import Config
    from accelrt.reporting.environment import Environment


def prepared(config: Path | None, threads: int | None) -> tuple[Config, Environment]:
    """The settings of a file, and the machine, with its number of threads set.

    Raises:
        ValueError: the file holds something else.
        ImportError: the extension is missing; with the command that builds it.
    """
    import torch

    from accelrt.config import Config
    from accelrt.reporting.environment import inspect_environment

    settings = Config() if config is None else Config.from_file(config)
    environment = inspect_environment()
    if not environment.build["loaded"]:
        raise ImportError(environment.statements[0])
    if threads is not None:
        torch.set_num_threads(threads)
    return settings, environment


def bars() -> Progress:
    """Progress bars on the error output, with the ``model`` of each task in front."""
    return Progress(
        TextColumn("{task.fields[model]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
