"""A measurement in a process of its own: a line of JSON on stdin, lines of JSON on stdout.

The process ends with the one that asked, even if that is killed: it may hold many GiB for an hour.
Until then its stdin stays open.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from accelrt.benchmarking.progress import Progress


def ask(
    command: Sequence[str],
    request: Mapping[str, Any],
    progress: Progress,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Start a process that calls :func:`answer`, and wait for what it answers.

    Args:
        command: the program and its arguments.
        request: values that JSON has.
        progress: is told what the process tells its own.
        environment: variables beside those of this process.

    Raises:
        RuntimeError: the process fails; with its last words.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert process.stdin is not None
        try:
            answers = _talk(process, request, progress)
            code = process.wait()
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # of a request that nobody read
                process.stdin.close()
            process.wait()
        if code or not answers:
            errors.seek(0)
            raise RuntimeError(f"the process ended with {code}: {errors.read()[-2000:]}")
    return answers[-1]


def answer(handle: Callable[[dict[str, Any], Progress], Any]) -> None:
    """Answer the one request of :func:`ask`.

    Args:
        handle: makes the answer, of values that JSON has, from the request.
    """
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, args=(sys.stdin.fileno(),), daemon=True).start()
    lines, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the lines are ours
    result = handle(request, _Lines(lines))
    print(json.dumps({"answer": result}), file=lines, flush=True)


def _talk(
    process: subprocess.Popen[str], request: Mapping[str, Any], progress: Progress
) -> list[Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # it has ended before it read: its last words say why
        print(json.dumps(dict(request)), file=process.stdin, flush=True)
    answers = []
    for line in process.stdout:
        message = json.loads(line)
        if "call" in message:
            progress.call(message["call"])
        else:
            answers.append(message["answer"])
    return answers


def _end_with_stdin(stdin: int) -> None:
    while os.read(stdin, 1):  # not through sys.stdin: its lock is wanted when the process ends
        pass
    os._exit(1)


class _Lines(Progress):
    def __init__(self, out: TextIO) -> None:
        self.out = out

    def call(self, what: str) -> None:
        print(json.dumps({"call": what}), file=self.out, flush=True)
