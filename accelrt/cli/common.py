"""What the commands that run pipelines share."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
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


def bars(*, still: bool = False) -> Progress:
    """Progress bars on the error output, with the ``model`` of each task in front.

    Args:
        still: they move only where the caller says ``refresh()``: no thread of theirs takes
            time from what is measured.
    """
    return Progress(
        TextColumn("{task.fields[model]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        refresh_per_second=4,
        auto_refresh=not still,
    )


def print_json(values: Any) -> None:
    """The answer of ``--json``: one document, and all of the standard output.

    Infinities and NaN, which JSON has no numbers for, become ``"inf"``, ``"-inf"`` and ``"nan"``.
    """
    typer.echo(json.dumps(_plain(values), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def words(*known: str) -> Callable[[str], list[str]]:
    """Completion of an option by known words; of anything else by the names of files.

    The scripts of the shells fall back to files where a completion has nothing to offer.
    """

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def check_packages(purpose: str, *names: str) -> None:
    """Refuse, before any work, what optional packages are needed to write in the end.

    Args:
        purpose: what needs them, in the plural.
        names: of the modules, which are also those on the package index.

    Raises:
        ImportError: one is missing; with the command that installs it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{purpose} need {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that results could not be written to, before there are any.

    It is not made: a command that fails to load its model leaves nothing behind.

    Raises:
        ValueError: there is a file of that name or in the way, or the user may not write there.
    """
    there = path.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if not there.is_dir():
        what = "a file" if there == path.absolute() else f"and {there} is a file"
        raise ValueError(f"{option} is {path}, {what}; allowed: a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} is {path}, but {there} cannot be written to")


def check_file(path: Path, suffixes: tuple[str, ...], option: str = "--out") -> None:
    """Refuse a file that could not be written, before there is anything to write.

    Raises:
        ValueError: the name has another suffix or is a folder's, or :func:`check_folder`
            refuses its folder.
    """
    if path.suffix not in suffixes or path.is_dir():
        raise ValueError(f"{option} is {path}; allowed: a {' or '.join(suffixes)} file")
    check_folder(path.parent, option)
