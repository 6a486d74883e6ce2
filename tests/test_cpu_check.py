"""The CPU kernels of every instruction set under sanitizers, in guarded memory.

tests/cpp/cpu_check.cpp has the cases and says what is seen.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from accelrt import _C

TESTS = Path(__file__).resolve().parent
KERNELS = TESTS.parent / "csrc" / "kernels"
# By which forms, of the instruction sets that the processor has.
PARTS = {
    "attention": ("avx2", "avx512", "avx512bf16", "amx_emulated"),
    "conv2d": ("avx2", "avx512", "avx512bf16", "amx_emulated"),
    "linear": ("avx2", "avx512", "avx512bf16", "amx_emulated"),
    "norms": ("avx2", "avx512", "avx512bf16"),
    "temporal_attention": ("avx2", "avx512bf16"),
}
FAULTS = {
    "a read past the end": (1, "caused by a READ"),
    "a read before the beginning": (2, "caused by a READ"),
    "a write to an input": (3, "caused by a WRITE"),
    "a write between rows": (4, "byte 20 from the first element, which is none's, was written"),
    "a write before the beginning": (5, "caused by a WRITE"),
    "memory that nobody wrote": (6, "element 0 is -?nan"),
    "a wrong result": (7, "element 0 is .*, expected"),
}

pytestmark = pytest.mark.skipif(
    _C.best_isa() == "generic", reason="generic kernels alone, which the simulator runs"
)


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True)


@pytest.mark.parametrize("part", PARTS)
def test_kernels_are_clean_and_right(cpu_check, part):
    done = run(cpu_check, part)
    assert done.returncode == 0, done.stderr[-4000:]
    levels = ["avx2", "avx512", "avx512bf16"]
    if _C.best_isa() != "amx":
        levels = levels[: levels.index(_C.best_isa()) + 1]
    levels += ["amx_emulated"] if "avx512bf16" in levels else []
    assert done.stdout.split() == [level for level in levels if level in PARTS[part]]


def test_a_copy_without_fault_is_clean(cpu_check):
    assert run(cpu_check, "fault", "0").returncode == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(cpu_check, name):
    fault, report = FAULTS[name]
    done = run(cpu_check, "fault", str(fault))
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr[-4000:]
    assert re.search("^in: a copy at", done.stderr, re.MULTILINE)


def test_every_kernel_with_scratch_memory_is_checked():
    """tests/cpp/CMakeLists.txt lists them, and which there are at each instruction set."""
    own = re.compile(r"\bmake_(aligned|lines)\(")
    files = [*KERNELS.glob("*/*.cpp"), *KERNELS.glob("*/*.h")]
    having = {path.parent.name for path in files if own.search(path.read_text())}
    text = (TESTS / "cpp" / "CMakeLists.txt").read_text()
    listed = {
        level: set(names.split())
        for level, names in re.findall(r"set\(check_ops_(\w+) ([^)]+)\)", text)
    }
    assert set().union(*listed.values()) == having
    assert listed["avx2"] == having
