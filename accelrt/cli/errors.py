"""How commands end: a line for what the user can mend, a traceback for what they cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

P = ParamSpec("P")
R = TypeVar("R")

EXIT_NEGATIVE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# UnsupportedModelError is a ValueError; a missing package is mended by its command.
USER_ERRORS = (ValueError, OSError, ImportError)

_debug = False


def set_debug(enabled: bool) -> None:
    """Show tracebacks of user errors too."""
    global _debug
    _debug = _debug or enabled


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print errors that the user can mend without traceback, and exit with 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except USER_ERRORS as error:
            if _debug:
                raise
            console = Console(stderr=True)
            text = str(error) or type(error).__name__
            if isinstance(error, ImportError):
                text += " (`accelrt doctor` lists what is missing and the commands that mend it)"
            console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
            console.print("[dim]`accelrt --debug ...` shows where it comes from.[/]")
            raise typer.Exit(EXIT_USAGE) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return run
