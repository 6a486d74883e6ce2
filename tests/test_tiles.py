"""Tile registers of AMX: the instruction, its emulation and the kernels' machine code agree."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from ops_common import assert_as_good_as

from accelrt import _C, ops, reference

pytestmark = pytest.mark.skipif(
    _C.best_isa() not in ("avx512bf16", "amx"),
    reason=f"the kernels on tiles need AVX512-BF16 beside them; here is {_C.best_isa()}",
)


def random(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * spread).bfloat16()


@pytest.fixture
def level():
    """Sets the instruction set; the one before comes back."""
    before = _C.active_isa()
    yield _C.set_isa
    _C.set_isa(before)


@pytest.fixture(scope="module")
def program(sim_dir):
    """tests/cpp/tile_check.cpp with the shipped objects."""
    command = ["cmake", "--build", str(sim_dir), "-j", "2", "--target", "accelrt_tile_check"]
    with FileLock(sim_dir / ".lock"):
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return sim_dir / "accelrt_tile_check"


@pytest.mark.parametrize("what", ["product", "linear", "conv2d", "attention"])
def test_machine_code_and_emulation_agree(program, what):
    """To the bit; where the processor has no tiles every instruction is trapped and modelled."""
    done = subprocess.run([program, what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    how = r"executed" if _C.best_isa() == "amx" else r"trapped [1-9]\d*"
    assert re.fullmatch(how, done.stdout.strip())


@pytest.mark.skipif(
    _C.best_isa() != "amx", reason=f"this processor or system has no tiles: {_C.best_isa()}"
)
def test_tiles_of_this_processor_give_what_their_emulation_gives(level):
    results = {}
    for isa in ("amx_emulated", "amx"):
        torch.manual_seed(0)
        level(isa)
        x, weight, bias = random(989, 776), random(2000, 776, spread=0.04), random(2000)
        q, k, v = random(2, 300, 3, 72, spread=2), random(2, 530, 3, 72), random(2, 530, 3, 72)
        results[isa] = (
            ops.linear(x, weight, bias, activation="gelu"),
            ops.linear(x, weight, bias, activation="geglu"),
            ops.attention(q, k, v),
            # torch's own kernels on tiles, after ours have released them
            F.linear(x, weight, bias),
        )
    for emulated, real in zip(results["amx_emulated"], results["amx"], strict=True):
        assert torch.equal(emulated, real)


def test_many_columns_share_the_rows_that_were_read(level):
    """So wide that several panels go together, with a last group of fewer."""
    level("amx_emulated")
    x, weight, bias = random(33, 400), random(8210, 400, spread=0.05), random(8210)
    truth = reference.linear(x.double(), weight.double(), bias.double())
    assert_as_good_as(ops.linear(x, weight, bias), F.linear(x, weight, bias), truth)


def test_levels_are_refused_by_name(level):
    assert _C.best_isa() != "amx_emulated"
    if _C.best_isa() != "amx":
        with pytest.raises(RuntimeError, match=r"ACCELRT_CPU_ISA=amx: .* at most avx512bf16"):
            level("amx")
    with pytest.raises(RuntimeError, match=r"is 'amx2'; allowed: generic, .*, amx_emulated, amx"):
        level("amx2")
