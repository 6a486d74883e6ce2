"""No code for a newer instruction set outside the variant that was chosen at run time."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from accelrt import _C

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
# Registers and encodings that an older x86-64 processor does not have.
NEWER = {
    "avx512": (re.compile(r"%zmm|%k[1-7]\b"), ("avx512", "3amx", "amx_emulated")),
    "avx2": (re.compile(r"%ymm|\tv[a-z0-9]+ +.*%xmm"), ("avx512", "avx2", "3amx", "amx_emulated")),
}


pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump"),
    pytest.mark.skipif("avx2" not in _C.build_info()["cpu_isas"], reason="no x86 variants"),
]
TILES = re.compile(r"\t(tdpbf16ps|tileloadd|tilestored|tilezero|ldtilecfg|tilerelease)\b")


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The function and the text of every instruction of the extension."""
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, found = "", []
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            name = match[1]
        else:
            found.append((name, line))
    return found


def test_inline_functions_are_those_of_the_oldest_variant(instructions):
    """Inline functions of shared headers exist once per variant; the linker keeps the first."""
    assert any("avx512" in name for name, _ in instructions)
    found = {
        f"{isa} in {name}"
        for isa, (pattern, owners) in NEWER.items()
        for name, line in instructions
        if pattern.search(line) and not any(owner in name for owner in owners)
    }
    assert not found, "\n".join(sorted(found))


def test_tile_instructions_are_those_of_the_amx_kernels(instructions):
    found: dict[str, set[str]] = {}
    for name, line in instructions:
        if match := TILES.search(line):
            found.setdefault(match[1], set()).add(name)
    assert len(found) == 6
    assert all("3amx" in name for names in found.values() for name in names)
    for params in ("LinearParams", "Conv2dParams", "AttentionParams"):
        for instruction in ("ldtilecfg", "tilerelease"):
            assert any(params in name for name in found[instruction])
