"""A measurement's process answers, fails with its last words, and ends with the one that asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accelrt.benchmarking.child import ask
from accelrt.benchmarking.progress import Progress

ANSWERS = """
from accelrt.benchmarking.child import answer
def handle(request, progress):
    print("a library prints")
    progress.call("thinking")
    return request["number"] + 1
answer(handle)
"""
WAITS = """
import os, time
from pathlib import Path
from accelrt.benchmarking.child import answer
def handle(request, progress):
    Path(request["file"]).write_text(str(os.getpid()))
    time.sleep(60)
answer(handle)
"""
ASKS = """
import sys
from accelrt.benchmarking.child import ask
from accelrt.benchmarking.progress import Progress
ask([sys.executable, "-c", sys.argv[1]], {"file": sys.argv[2]}, Progress())
"""


def _alive(process: int) -> bool:
    """Not ended, whether or not somebody has waited for it (Linux)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2]
    except OSError:
        return False
    return state.split()[0] != "Z"


def test_it_answers_and_tells_what_it_does() -> None:
    heard: list[str] = []

    class Ear(Progress):
        def call(self, what: str) -> None:
            heard.append(what)

    assert ask([sys.executable, "-c", ANSWERS], {"number": 41}, Ear()) == 42
    assert heard == ["thinking"]


def test_what_the_progress_raises_is_not_the_processs() -> None:
    """As that of a progress bar whose terminal has gone."""

    class Gone(Progress):
        def call(self, what: str) -> None:
            raise BrokenPipeError(what)

    with pytest.raises(BrokenPipeError, match="thinking"):
        ask([sys.executable, "-c", ANSWERS], {"number": 41}, Gone())


@pytest.mark.parametrize("size", [1, 2**20])
def test_last_words_of_one_that_never_reads(size: int) -> None:
    """However much it was asked: more than a pipe holds is refused by the system."""
    with pytest.raises(RuntimeError, match=r"ended with 3: no such model"):
        ask(
            [
                sys.executable,
                "-c",
                "import sys; print('no such model', file=sys.stderr); sys.exit(3)",
            ],
            {"padding": "x" * size},
            Progress(),
        )


def test_an_end_without_an_answer_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="ended with 0"):
        ask([sys.executable, "-c", "input()"], {}, Progress())


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes as Linux has them")
def test_it_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    told = tmp_path / "process"
    parent = subprocess.Popen([sys.executable, "-c", ASKS, WAITS, str(told)])
    try:
        while not (told.exists() and told.read_text()):
            assert parent.poll() is None
            time.sleep(0.01)
        child = int(told.read_text())
        assert _alive(child)
        parent.kill()
        parent.wait()
        for _ in range(3000):  # of 10 ms; at once, were nothing else running
            if not _alive(child):
                return
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        pytest.fail("it goes on, and nobody will read what it finds")
    finally:
        parent.kill()
        parent.wait()
