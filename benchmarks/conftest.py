"""Options and the result table of the benchmarks."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.tables import driver_markdown

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

COLUMNS = (
    "ms",
    "GB/s",
    "of copy",
    "over eager",
    "over eager, allocating",
    "over compile",
    "GFLOP/s",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("accelrt benchmarks")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--bench-dtypes", default="fp32,bf16", help="comma-separated: fp32,bf16,fp16")
    group.addoption("--bench-compile", action="store_true", default=True)
    group.addoption("--no-bench-compile", action="store_false", dest="bench_compile")
    group.addoption("--bench-save", action="store_true", help="write benchmarks/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_DRIVER] = DriverWatch(config.getoption("--bench-device"))


_ROWS: pytest.StashKey[list[dict[str, object]]] = pytest.StashKey()
_DRIVER: pytest.StashKey[DriverWatch] = pytest.StashKey()


@pytest.fixture
def op_results(pytestconfig: pytest.Config) -> list[dict[str, object]]:
    """Rows of the operators' table."""
    return pytestconfig.stash[_ROWS]


@pytest.fixture
def driver(pytestconfig: pytest.Config) -> DriverWatch:
    """Of the device, for the whole table."""
    return pytestconfig.stash[_DRIVER]


def markdown(rows: list[dict[str, object]]) -> str:
    """The table as the README shows it."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    head = ("op", "size", "dtype", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(row[c]) for c in head) + " |" for row in rows]
    return "\n".join(lines)


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    from accelrt import _C

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": device,
        "name": name or platform.machine(),
        "cpu_isa": _C.active_isa(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    device = config.getoption("--bench-device")
    terminalreporter.write_sep("=", f"operators on {device}: ratios within one run, medians")
    gpu = config.stash[_DRIVER].found
    page = markdown(rows) + "\n\n" + driver_markdown(gpu, "call")
    terminalreporter.write_line(page)
    slower = [r for r in rows if float(str(r["over eager"])) < 1.0]
    below = [r for r in rows if r["of copy"] is not None and float(str(r["of copy"])) < 0.6]
    for title, found in (("slower than eager", slower), ("below 60 % of copy", below)):
        names = "; ".join(f"{r['op']} {r['size']} {r['dtype']}" for r in found) or "none"
        terminalreporter.write_line(f"{title}: {names}")
    if config.getoption("--bench-save"):
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        document = {"machine": machine(device), "gpu": gpu.to_dict(), "rows": rows}
        (folder / f"ops-{device}.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / f"ops-{device}.md").write_text(page)
