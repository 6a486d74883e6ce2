"""Fixtures of the whole suite: the simulator's binaries, seeds, the operators' devices."""

from __future__ import annotations

import gc
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
    return build_simulator("accelrt_sim_asan", "accelrt_sim_tsan")


@pytest.fixture(scope="session")
def launches() -> Path:
    """The program that runs the launchers of a build without nvcc on the simulator."""
    return build_simulator("accelrt_launches") / "accelrt_launches"


@pytest.fixture(scope="session")
def cpu_check() -> Path:
    """The program that runs the CPU kernels of every instruction set under sanitizers."""
    return build_simulator("accelrt_cpu_check") / "accelrt_cpu_check"


ISAS = ["generic", "avx2", "avx512", "avx512bf16"]
TILE_ISAS = ["amx_emulated", "amx"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The levels of the tiles are those of bfloat16, in modules that say ``USES_TILES``."""
    if "isa" in metafunc.fixturenames:
        tiles = TILE_ISAS if getattr(metafunc.module, "USES_TILES", False) else []
        metafunc.parametrize("isa", ISAS + tiles, indirect=True)


# With `--dist loadfile --no-loadscope-reorder` processes take the files in this order, then the
# others by name. What takes longest comes first, so that no process waits at the end for another's
# long file; before it all one that builds the simulator, which others then find built.
FIRST = (
    "test_ops_group_norm", "test_memory_unet", "test_budget", "test_compile",
    "test_exactness_temporal_vae", "test_exactness_passes", "test_steps", "test_pipelining",
    "test_features", "test_exactness_models", "test_exactness_svd", "test_cli_bench",
    "test_embed_cpp", "test_tiles", "test_cpu_check", "test_robust_runs", "test_exactness_pixart",
    "test_exactness_unet_2d", "test_graphs", "test_bench_steps", "test_graphs_steps",
    "test_feedback_training", "test_bands", "test_bench_models", "test_demo", "test_memory_vae",
    "test_calibrate", "test_docs", "test_bench_device", "test_bench_feedback", "test_cli_compare",
    "test_memory_dit", "test_robust_settings", "test_cpu_build", "test_docs_profiling",
    "test_docs_adding_a_model", "test_ops_attention", "test_ops_linear", "test_ops_block",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; of the other dtypes the levels of the tiles run what avx512bf16 runs."""

    def repeats(item: pytest.Item) -> bool:
        chosen = getattr(item, "callspec", None)
        if chosen is None or chosen.params.get("isa") not in TILE_ISAS:
            return False
        return chosen.params.get("dtype", torch.bfloat16) != torch.bfloat16

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items[:] = sorted((item for item in items if not repeats(item)), key=place)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage looks through it again.

    Half a million objects take a third of a second, and many tests collect several times.
    """
    gc.collect()
    gc.freeze()


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
