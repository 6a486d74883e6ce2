"""How commands end: a line for what the user can mend, a traceback for what they cannot."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

P = ParamSpec("P")
R = TypeVar("R")

EXIT_NEGATIVE = 1
EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # as a shell has it of a program that SIGPIPE ends

# UnsupportedModelError is a ValueError; a missing package is mended by its command.
USER_ERRORS = (ValueError, OSError, ImportError)

_debug = False


def set_debug(enabled: bool) -> None:
    """Show tracebacks of user errors too."""
    global _debug
    _debug = _debug or enabled


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn every exception of a command into one of the documented exit codes.

    What the user can mend is a line without traceback, and 2. Everything else is 3, never 1: a
    script that asks `compare` or `calibrate` a question must not take a failure for an answer.
    A reader of the output that has gone is 141, in silence.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except (BrokenPipeError, SystemExit) as error:
            # Typer and rich, who makes a SystemExit of it, would end with 1, which is an answer.
            cause = error.__context__ if isinstance(error, SystemExit) else error
            if not isinstance(cause, BrokenPipeError):
                raise
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()  # what is buffered has no reader
            raise typer.Exit(EXIT_READER_GONE) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except USER_ERRORS as error:
            text = str(error) or type(error).__name__
            if isinstance(error, ImportError):
                text += " (`accelrt doctor` lists what is missing and the commands that mend it)"
            _say(text)
            raise typer.Exit(EXIT_USAGE) from error
        except Exception as error:
            if _out_of_memory(error):
                _say(
                    f"out of memory: {error} (a --budget, or memory_budget in --config, plans "
                    "what fits: `accelrt plan` shows it)"
                )
            else:
                _traceback()
            raise typer.Exit(EXIT_FAILED) from error

    return run


def _say(text: str) -> None:
    console = Console(stderr=True)
    if _debug:
        _traceback()
    console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
    if not _debug:
        console.print("[dim]`accelrt --debug ...` shows where it comes from.[/]")


def _traceback() -> None:
    import traceback

    Console(stderr=True).print(
        escape(traceback.format_exc().rstrip()), soft_wrap=True, highlight=False
    )


def _out_of_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of the CPU, for which torch has no class of its own."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
