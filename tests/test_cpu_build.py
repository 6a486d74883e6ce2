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


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif("avx2" not in _C.build_info()["cpu_isas"], reason="no x86 variants")
def test_inline_functions_are_those_of_the_oldest_variant():
    """Inline functions of shared headers exist once per variant; the linker keeps the first."""
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "avx512" in listing
    name, found = "", set()
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            name = match[1]
            continue
        for isa, (pattern, owners) in NEWER.items():
            if pattern.search(line) and not any(owner in name for owner in owners):
                found.add(f"{isa} in {name}")
    assert not found, "\n".join(sorted(found))
