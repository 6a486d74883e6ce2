"""What nvcc made of every kernel: all architectures, no spills; and the simulator's own test."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from sim import SimulatorError, run_simulator

from accelrt import _C

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = {"80", "86", "89", "90a", "100", "120"}

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)


def reports() -> list[Path]:
    build = os.environ.get("ACCELRT_BUILD_DIR")
    folders = [Path(build)] if build else sorted((ROOT / "build").glob("*"))
    return sorted({p for f in folders if f.is_dir() for p in f.rglob("*.ptxas.txt")})


def built_with_cuda() -> bool:
    return bool(_C.build_info()["cuda_kernels"] == "nvcc")


needs_nvcc = pytest.mark.skipif(not built_with_cuda(), reason="this build has no CUDA kernels")


@needs_nvcc
@pytest.mark.skipif(bool(os.environ.get("ACCELRT_CUDA_ARCHS")), reason="architectures were chosen")
def test_all_architectures_are_built():
    assert set(_C.build_info()["cuda_architectures"].split(",")) == EXPECTED


@needs_nvcc
def test_no_kernel_spills():
    found = reports()
    assert found, "the build keeps a .ptxas.txt beside every CUDA object"
    sources = {p.parent.name for p in (ROOT / "csrc" / "kernels").glob("*/*.cu")}
    assert sources == {p.name.split(".")[0] for p in found}
    spills, kernels = [], 0
    for path in found:
        for match in ENTRY.finditer(path.read_text()):
            kernels += 1
            if int(match["stores"]) or int(match["loads"]):
                spills.append(f"{match['name']} sm_{match['arch']}: {match['stores']} bytes")
    assert kernels >= len(sources) * 3
    assert not spills, "\n".join(spills)


def test_only_device_code_of_ours_names_torch_nowhere():
    """csrc/ is torch-free, so that a C++ server can use it without Python."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text(), path


def layer_norm_arguments() -> dict[str, torch.Tensor | float]:
    x = torch.randn(1, 3, 640)
    return {"x": x, "eps": 1e-5, "out": torch.zeros_like(x)}


def test_simulator_is_clean_with_barriers(sim_dir):
    run_simulator(sim_dir / "accelrt_sim_tsan", "layer_norm_modulate", **layer_norm_arguments())


def test_simulator_notices_a_removed_barrier(sim_dir):
    with pytest.raises(SimulatorError, match="data race"):
        run_simulator(
            sim_dir / "accelrt_sim_no_barrier", "layer_norm_modulate", **layer_norm_arguments()
        )
