"""Fixtures of the whole suite: the simulator's binaries, seeds, the operators' devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Waiting threads give their core away: several test processes share two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from filelock import FileLock

from accelrt import _C

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build_simulator(*targets: str) -> Path:
    """The folder of the simulator's binaries, with these built (incrementally) from the sources."""
    build = Path(os.environ.get("ACCELRT_SIM_BUILD", ROOT / "build" / "sim"))
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
        "-DACCELRT_SIM=ON", "-DACCELRT_CUDA=0", "-DCMAKE_BUILD_TYPE=Debug",
    ]  # fmt: skip
    compile_all = ["cmake", "--build", str(build), "-j", "2", "--target", *targets]
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / ".lock"):  # several test processes may want it at once
        for command in (configure, compile_all):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build


@pytest.fixture(scope="session")
def sim_dir() -> Path:
    """The folder of the simulator's binaries."""
    return build_simulator("accelrt_sim_asan", "accelrt_sim_tsan", "accelrt_sim_no_barrier")


@pytest.fixture(scope="session")
def launches() -> Path:
    """The program that runs the launchers of a build without nvcc on the simulator."""
    return build_simulator("accelrt_launches") / "accelrt_launches"


ISAS = ["generic", "avx2", "avx512", "avx512bf16"]
TILE_ISAS = ["amx_emulated", "amx"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The levels of the tiles are those of bfloat16, in modules that say ``USES_TILES``."""
    if "isa" in metafunc.fixturenames:
        tiles = TILE_ISAS if getattr(metafunc.module, "USES_TILES", False) else []
        metafunc.parametrize("isa", ISAS + tiles, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the other dtypes the levels of the tiles run what avx512bf16 runs."""

    def repeats(item: pytest.Item) -> bool:
        chosen = getattr(item, "callspec", None)
        if chosen is None or chosen.params.get("isa") not in TILE_ISAS:
            return False
        return chosen.params.get("dtype", torch.bfloat16) != torch.bfloat16

    items[:] = [item for item in items if not repeats(item)]


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """Every CPU instruction set of the build that this processor has, forced in turn."""
    if request.param not in _C.build_info()["cpu_isas"]:
        pytest.skip(f"built without {request.param}")
    before = _C.active_isa()
    try:
        _C.set_isa(request.param)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    yield request.param
    _C.set_isa(before)
