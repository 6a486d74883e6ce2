"""Runs an operator's CUDA source under the host simulator, from torch tensors.

The simulator is built by the `sim` fixture (see conftest.py). Tensors are passed with
their strides; outputs come back in the same layout.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class SimulatorError(AssertionError):
    """The simulator failed: a sanitizer report or an error of the operator."""


def _storage_elements(t: torch.Tensor) -> int:
    if t.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def _raw(t: torch.Tensor) -> bytes:
    flat = torch.as_strided(t, (_storage_elements(t),), (1,), t.storage_offset()).contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def run_simulator(
    binary: Path,
    op: str,
    device: str = "cuda",
    *,
    without: str | None = None,
    printed: list[str] | None = None,
    **arguments: int | float | torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Run ``op`` and return every tensor argument as the operator left it.

    Args:
        without: the place, "file.cuh:line", of a barrier or a wait for copies that is left out.
        printed: gets the lines that the program prints.
    """
    environment = dict(os.environ)
    if without is not None:
        # The first report is enough, and without the names that are slow to find.
        environment["ACCELRT_SIM_WITHOUT"] = without
        environment["TSAN_OPTIONS"] = "halt_on_error=1:symbolize=0"
    body = b""
    count = 0
    for name, value in arguments.items():
        if value is None:
            continue
        count += 1
        encoded = name.encode()
        body += struct.pack("<I", len(encoded)) + encoded
        if isinstance(value, torch.Tensor):
            raw = _raw(value)
            body += struct.pack("<Bii", 2, DTYPES[value.dtype], value.dim())
            body += struct.pack(f"<{2 * value.dim()}q", *value.shape, *value.stride())
            body += struct.pack("<q", len(raw)) + raw
        elif isinstance(value, int):
            body += struct.pack("<Bq", 0, int(value))
        else:
            body += struct.pack("<Bd", 1, value)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        source.write_bytes(b"ASIM" + struct.pack("<I", count) + body)
        done = subprocess.run(
            [str(binary), op, device, str(source), str(target)],
            capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        if done.returncode != 0 or "WARNING: ThreadSanitizer" in done.stderr:
            raise SimulatorError(
                f"{binary.name} {op}: exit {done.returncode}\n{done.stderr[-4000:]}"
            )
        if printed is not None:
            printed += done.stdout.splitlines()
        data = target.read_bytes()
    results: dict[str, torch.Tensor] = {}
    at = 8
    for _ in range(struct.unpack_from("<I", data, 4)[0]):
        (length,) = struct.unpack_from("<I", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        (size,) = struct.unpack_from("<q", data, at + 4 + length)
        at += 12 + length
        like = arguments[name]
        assert isinstance(like, torch.Tensor)
        flat = torch.frombuffer(bytearray(data[at : at + size]) or bytearray(1), dtype=torch.uint8)
        flat = flat[:size].view(like.dtype)
        results[name] = torch.as_strided(flat, like.shape, like.stride())
        at += size
    return results
