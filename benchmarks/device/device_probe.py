"""Is this machine fit for benchmarks/device.sh? The architecture to build for, or why not.

Exit status 2, and one line per reason on stderr, if something is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys

TORCH = (2, 11)
MODULES = {
    "pybind11": "pybind11", "pytest": "pytest", "filelock": "filelock", "hypothesis": "hypothesis",
    "diffusers": "diffusers", "typer": "typer", "rich": "rich", "yaml": "PyYAML",
    "psutil": "psutil",
}  # fmt: skip
PROGRAMS = {"cmake": "cmake>=3.31", "ninja": "ninja"}


def architecture(major: int, minor: int) -> str:
    """As CMake wants it; Hopper's own instructions need the ``a``."""
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def about_torch() -> tuple[str, list[str]]:
    """The architecture, or why there is none."""
    try:
        import torch
    except ImportError as error:
        return "", [f"torch cannot be imported in {sys.executable}: {error}"]
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    reasons = []
    if numbers < TORCH:
        reasons.append(f"torch is {torch.__version__}; needed: 2.11 or later")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    elif not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} finds no GPU (does nvidia-smi?)")
    else:
        return architecture(*torch.cuda.get_device_capability()), reasons
    return "", reasons


def about_tools() -> list[str]:
    """What is missing beside torch, with the command that fixes it."""
    missing = [name for module, name in MODULES.items() if not importlib.util.find_spec(module)]
    missing += [name for program, name in PROGRAMS.items() if not shutil.which(program)]
    reasons = []
    if missing:
        listed = " ".join(f"'{name}'" for name in missing)
        reasons.append(f"missing here: pip install {listed}")
    if not shutil.which(os.environ.get("CUDACXX", "nvcc")):
        reasons.append("nvcc is not found (PATH, CUDACXX)")
    return reasons


def main() -> None:
    """Print the architecture, or the reasons."""
    found, reasons = about_torch()
    reasons += about_tools()
    if reasons:
        print("\n".join(reasons), file=sys.stderr)
        sys.exit(2)
    print(found)


if __name__ == "__main__":
    main()
