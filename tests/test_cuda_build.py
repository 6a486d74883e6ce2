"""What nvcc made of every kernel: all architectures, no spills, as the committed table says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from accelrt import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ptxas
from ptxas import Build, Kernel, Usage

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = {"80", "86", "89", "90a", "100", "120"}


def built_with_cuda() -> bool:
    return bool(_C.build_info()["cuda_kernels"] == "nvcc")


needs_nvcc = pytest.mark.skipif(not built_with_cuda(), reason="this build has no CUDA kernels")


@needs_nvcc
@pytest.mark.skipif(bool(os.environ.get("ACCELRT_CUDA_ARCHS")), reason="architectures were chosen")
def test_all_architectures_are_built():
    assert set(_C.build_info()["cuda_architectures"].split(",")) == EXPECTED


@needs_nvcc
def test_every_kernel_is_as_the_table_says():
    """Instances, spills, and with the table's compiler registers, stack, shared memory."""
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu")}
    assert set(ptxas.reports(ptxas.build_folder())) == sources
    build = ptxas.read_build()
    assert build.architectures == _C.build_info()["cuda_architectures"].split(",")
    assert build.nvcc == _C.build_info()["cuda_compiler"]
    found = ptxas.compare(saved(), build)
    assert not found, "\n".join((*found, f"If that is meant: {ptxas.REGENERATE}"))


def saved() -> Build:
    return ptxas.from_json(ptxas.TABLE.read_text())


def test_the_table_spills_nowhere_and_its_page_is_of_it():
    table = saved()
    assert set(table.architectures) == EXPECTED
    for name, kernel in table.kernels.items():
        assert set(kernel.usage) == EXPECTED, name
        assert not any(usage.spilled for usage in kernel.usage.values()), name
    assert ptxas.to_json(table) == ptxas.TABLE.read_text()
    assert ptxas.markdown(table) == ptxas.PAGE.read_text(), f"write it: {ptxas.REGENERATE}"


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7accelrt12geglu_kernelINS_11GegluTraitsIfLi4EEEEE\
vNS_11GegluParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN7accelrt12geglu_kernelINS_11GegluTraitsIfLi4EEEEE\
vNS_11GegluParamsE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Function properties for helper
    16 bytes stack frame, 2 bytes spill stores, 2 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read():
    assert list(ptxas.parse(REPORT)) == [
        ("geglu_kernel<GegluTraits<float, 4>>", "80", Usage(40, 20, 24, 1024)),
        ("plain", "90a", Usage(255)),
    ]


def kernels(nvcc: str = "13.0", **usage: dict[str, Usage]) -> Build:
    return Build(nvcc, {name: Kernel("op", dict(one)) for name, one in usage.items()})


def test_what_is_compared():
    table = kernels(a={"80": Usage(40), "90a": Usage(33)}, b={"80": Usage(64)})

    def found(**usage: dict[str, Usage]) -> list[str]:
        return ptxas.compare(table, kernels(**usage))

    same = {"a": {"80": Usage(40)}, "b": {"80": Usage(64)}}  # some architectures only
    assert found(**same) == []
    assert found(**{**same, "a": {"80": Usage(33)}}) == []
    assert found(a={"80": Usage(40), "90a": Usage(40)}, b={"80": Usage(64)}) == []
    (grown,) = found(a={"80": Usage(40), "90a": Usage(41)}, b={"80": Usage(64)})
    assert grown.startswith("a, sm_90a: 41 registers, 33 in the table")
    (new,) = found(**same, c={"80": Usage(1)})
    assert new == "c is not in the table of sm_80"
    (gone,) = found(a=same["a"])
    assert gone == "b is in the table but not in the build of sm_80"
    (spill,) = found(**{**same, "b": {"80": Usage(64, spilled=8)}})
    assert spill == "b, sm_80: spills 8 bytes, 0 in the table"
    assert found(**{**same, "b": {"80": Usage(64, 0, 8, 16)}}) == [
        "b, sm_80: 8 bytes of stack, 0 in the table", "b, sm_80: 16 bytes of shared, 0 in the table"
    ]  # fmt: skip


def test_another_compiler_or_architecture_is_asked_for_instances_and_spills_alone():
    table = kernels(a={"80": Usage(40)})
    for version in ("12.8", ""):
        other = kernels(version, a={"80": Usage(255, 0, 8, 8)})
        assert ptxas.compare(table, other) == []
        assert len(ptxas.compare(table, kernels(version, a={"80": Usage(8, 4)}))) == 1
    assert ptxas.compare(table, kernels(a={"75": Usage(200)})) == []
    assert len(ptxas.compare(table, kernels(a={"75": Usage(20, 4)}))) == 1
    assert len(ptxas.compare(table, kernels(b={"75": Usage(20)}))) == 2


WAITS = re.compile(r"cuda(Malloc|Free|Memcpy|Memset|HostAlloc|HostRegister)\w*|cuda\w*Synchronize")
MATRIX = re.compile(r"\b(mma\.sync|wgmma|ldmatrix|cp\.async|tcgen05)")


def test_launchers_neither_allocate_nor_wait_and_tiles_are_of_one_header():
    """Results, workspaces and partial sums are the caller's memory."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = re.sub(r"//.*", "", path.read_text())
            assert not WAITS.search(text), path
            assert path.name == "tile.h" or not MATRIX.search(text), path
    assert MATRIX.search((ROOT / "csrc" / "include" / "accelrt" / "tile.h").read_text())


def test_only_device_code_of_ours_names_torch_nowhere():
    """csrc/ is torch-free, so that a C++ server can use it without Python."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text(), path
