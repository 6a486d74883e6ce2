"""The host simulator itself: what a kernel does wrong it reports, and no barrier goes unmissed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sim import SimulatorError, run_simulator

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

# ---- One fault each (cpp/sim_faults.cpp) -------------------------------------------------------

FAULTS = {
    "two blocks write an element": (1, "tsan", "data race"),
    "shared memory before it is written": (2, "tsan", None),
    "a copy before it is waited for": (3, "tsan", None),
    "a copy over what is still read": (4, "tsan", "data race"),
    "a copy that nobody waits for": (5, "asan", "copies that nobody waited for"),
    "a copy off its alignment": (6, "asan", "copy is not aligned"),
    "a shuffle for a barrier": (7, "tsan", "data race"),
    "tiles for a barrier": (8, "tsan", "data race"),
    "shared memory past its end": (9, "asan", "heap-buffer-overflow"),
    "a grid without blocks": (10, "asan", "faults: a grid of 0 x 1 x 1 blocks"),
}


def with_fault(sim_dir: Path, fault: int, sanitizer: str) -> torch.Tensor:
    return run_simulator(
        sim_dir / f"accelrt_sim_{sanitizer}", "faults", fault=fault,
        **{"from": torch.ones(128), "out": torch.zeros(2, 32)},
    )["out"]  # fmt: skip


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_a_kernel_without_fault_is_clean(sim_dir, sanitizer):
    assert torch.equal(with_fault(sim_dir, 0, sanitizer), torch.full((2, 32), 2.0))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(sim_dir, name):
    """Or, where it is no error of the program, seen in the result, which is NaN."""
    fault, sanitizer, report = FAULTS[name]
    if report is None:
        assert bool(with_fault(sim_dir, fault, sanitizer).isnan().all())
        return
    with pytest.raises(SimulatorError, match=report):
        with_fault(sim_dir, fault, sanitizer)


# ---- Every kernel runs in it -------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CSRC.rglob("*.cu")))
def test_every_kernel_is_simulated_under_both_sanitizers(folder):
    """The operators that the runners have of a kernel's folder, in some file of tests."""
    header = f'"kernels/{folder}/{folder}.h"'
    runners = [path.read_text() for path in TESTS.glob("cpp/sim_*.cpp")]
    operators = {
        name
        for text in runners
        if header in text
        for name in re.findall(r'Register k\w+\("(\w+)"', text)
    }
    assert operators
    files = [path.read_text() for path in TESTS.glob("test_ops_*.py")]
    for name in operators:
        own = [text for text in files if f'"{name}"' in text and "run_simulator(" in text]
        assert any('"tsan"' in text and re.search(r"asan\b", text) for text in own), name


# ---- Every barrier, and every wait for copies, is needed ---------------------------------------

SITE = re.compile(r"\b(__syncthreads\(|__syncwarp\(|copy_wait<)")
Case = tuple[str, dict[str, Any]]


def sites(path: Path) -> dict[int, str]:
    """Line numbers of what is called, by a file of device code."""
    lines = path.read_text().splitlines()
    code = ((number, line.partition("//")[0]) for number, line in enumerate(lines, 1))
    return {number: found[1] for number, line in code if (found := SITE.search(line))}


def device_code() -> Iterator[tuple[str, dict[int, str]]]:
    """What waits, by file; without those that define the waits."""
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".cuh", ".h", ".cu") and path.name not in ("device_stubs.h", "tile.h"):
            found = sites(path)
            if found:
                yield path.relative_to(CSRC).as_posix(), found


def attention() -> Iterator[Case]:
    """Queries that are held in registers; the ring of slots goes round."""
    q, k, v = (torch.randn(1, n, 1, 8).bfloat16() for n in (17, 200, 200))
    yield "attention", {"q": q, "k": k, "v": v, "scale": 0.3, "out": torch.zeros_like(q)}


def temporal(frames: int, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    q, k, v = (torch.randn(1, frames, 1, head_dim).to(dtype) for _ in range(3))
    yield "temporal_attention", {
        "q": q, "k": k, "v": v, "num_heads": 1, "scale": 0.3, "out": torch.zeros_like(q)
    }  # fmt: skip


def linear() -> Iterator[Case]:
    """More slices than stages, and the last one where the sums will lie."""
    x, weight = torch.randn(19, 200).bfloat16(), torch.randn(24, 200).bfloat16()
    yield "linear", {
        "x": x, "weight": weight, "epilogue": 0, "rows_per_sample": 1,
        "out": torch.zeros(19, 24).bfloat16(),
    }  # fmt: skip


def layer_norm() -> Iterator[Case]:
    x = torch.randn(1, 2, 640)  # a row is longer than a warp
    yield "layer_norm_modulate", {"x": x, "eps": 1e-5, "out": torch.zeros_like(x)}


def feature_delta() -> Iterator[Case]:
    yield "feature_delta", {
        "a": torch.randn(1, 99), "b": torch.randn(1, 99), "p": 2, "out": torch.zeros(1)
    }  # fmt: skip


def group_norm_stats() -> Iterator[Case]:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 32, 4, 8).contiguous(memory_format=layout)
        yield "group_norm_stats", {
            "x": x, "num_groups": 1, "frames": 1, "accumulate": 0, "out": torch.zeros(1, 1, 3)
        }  # fmt: skip


def group_norm_apply() -> Iterator[Case]:
    x = torch.randn(1, 32, 4, 8)
    yield "group_norm_apply", {
        "x": x, "stats": torch.ones(1, 1, 3), "num_groups": 1, "frames": 1, "eps": 1e-5, "silu": 0,
        "out": torch.zeros_like(x),
    }  # fmt: skip


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "include/accelrt/device.h": feature_delta,
    "kernels/attention/attention.cuh": attention,
    "kernels/group_norm_apply/group_norm_apply.cuh": group_norm_apply,
    "kernels/group_norm_stats/group_norm_stats.cuh": group_norm_stats,
    "kernels/layer_norm/layer_norm.cuh": layer_norm,
    "kernels/linear/linear.cuh": linear,
    "kernels/temporal_attention/temporal_attention.cuh": lambda: temporal(5, 100, torch.float32),
    "kernels/temporal_attention/temporal_attention_tiles.cuh": lambda: temporal(
        19, 24, torch.bfloat16
    ),
}


def test_every_file_that_waits_has_a_case():
    found = dict(device_code())
    assert set(found) == set(CASES)
    assert sum(map(len, found.values())) > 20


def missed(binary: Path, site: str, call: str, op: str, arguments: dict[str, Any]) -> bool:
    """A barrier left out is a race; a copy not waited for is one, or an error, or NaN."""
    try:
        result = run_simulator(binary, op, without=site, **arguments)["out"]
    except SimulatorError as report:
        message = str(report)
    else:
        return call == "copy_wait<" and bool(result.isnan().any())
    assert "data race" in message or call == "copy_wait<", message
    return True


@pytest.mark.parametrize("file", CASES)
def test_what_is_left_out_is_missed(sim_dir, file):
    binary = sim_dir / "accelrt_sim_tsan"
    cases = list(CASES[file]())
    for op, arguments in cases:  # what is reported below is for what was left out
        assert not run_simulator(binary, op, **arguments)["out"].isnan().any()
    for line, call in sites(CSRC / file).items():
        site = f"{file}:{line}"
        assert any(missed(binary, site, call, *case) for case in cases), f"{site}: {call}"
