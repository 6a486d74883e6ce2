"""Compiler launcher of nvcc: keeps what ptxas says of registers and spills beside the object.

`keep_ptxas_report.py nvcc ... -o X.o` runs the command, writes its messages to
`X.o.ptxas.txt`, and shows only what is no ptxas information. tests/test_cuda_build.py
reads the reports.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run the compiler and split its messages."""
    command = sys.argv[1:]
    done = subprocess.run(command, capture_output=True, text=True)
    messages = done.stdout + done.stderr
    if "-o" in command and done.returncode == 0:
        Path(command[command.index("-o") + 1] + ".ptxas.txt").write_text(messages)
    for line in messages.splitlines():
        if not line.startswith("ptxas info") and "bytes stack frame" not in line:
            print(line, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
