"""The operators of the models at their sizes, in bfloat16: ours, eager and torch.compile.

``python benchmarks/ops/of_models.py [--only PART] [--threads N] [--save]``. What is bound by
arithmetic is given as a share of the rate of a 2048^3 product, what is bound by memory as a share
of a copy's bandwidth, both measured in the same rounds. Everything runs twice, the second time in
a process whose malloc keeps freed memory. torch.compile freezes: it packs weights ahead. On one
thread the clock is the thread's processor time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import (
    Case,
    Inputs,
    Linear,
    attention,
    gate_residual_layer_norm_modulate,
    group_norm_silu,
    layer_norm_modulate,
    linear,
    temporal_attention,
)
from torch import Tensor, nn

from accelrt import _C, ops
from accelrt.benchmarking.flops import PRODUCT_SIZE, matrix_product
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.tables import driver_markdown
from accelrt.benchmarking.timing import calls_per_round, interleave, ratio
from accelrt.benchmarking.tuned import ENVIRONMENT

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLUMNS = (
    "operator", "size", "ceiling", "eager", "eager, tuned malloc", "compiled", "ours",
    "over eager", "over eager, tuned malloc", "over compiled", "ms",
)  # fmt: skip


class FeedForward(nn.Module):
    """GEGLU and the product after it, added to the residual stream."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = Linear(width, 2 * inner, "geglu", dtype)
        self.second = nn.Linear(inner, width, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        y: Tensor = stream + self.second(self.first(x))
        return y


def feed_forward(rows: int, width: int, inner: int) -> Callable[..., Inputs]:
    """The feed-forward of a UNet's transformer."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        module = FeedForward(width, inner, dtype).to(device)
        x, stream = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
        hidden = torch.empty(rows, inner, dtype=dtype, device=device)
        one, two = module.first.layer, module.second

        def ours(out: Tensor | None = hidden) -> object:
            y = ops.linear(x, one.weight, one.bias, activation="geglu", out=out)
            return ops.linear(y, two.weight, two.bias, add_to=stream)

        return Inputs(
            ours=ours,
            ours_allocating=lambda: ours(None),
            eager=lambda: module(x, stream),
            compiled=lambda compiled: lambda: compiled(x, stream),
            function=module,
            moved_bytes=3 * x.numel() * x.element_size(),
            flops=2 * rows * width * inner * 3,
        )

    return make


def convolution(channels: int, images: int, side: int) -> Callable[..., Inputs]:
    """3x3, padded; eager has the default layout, ours channels-last and the same weights."""

    def make(dtype: torch.dtype, device: str) -> Inputs:
        module = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype).requires_grad_(False)
        x = torch.randn(images, channels, side, side).to(dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        return Inputs(
            ours=lambda: module(last),
            ours_allocating=lambda: module(last),
            eager=lambda: module(x),
            compiled=lambda compiled: lambda: compiled(last),
            function=module,
            moved_bytes=2 * x.numel() * x.element_size(),
            flops=2 * 9 * channels * channels * images * side * side,
        )

    return make


CASES = [
    Case("attention", "PixArt 2x4096, 16x72", "compute", attention(2, 4096, 4096, 16, 72)),
    Case("attention", "AnimateDiff 32x1024, 8x40", "compute", attention(32, 1024, 1024, 8, 40)),
    Case("temporal_attention", "AnimateDiff 32768 pixels, 16 frames, 8x40", "memory",
         temporal_attention(8, 16, 4096, 8, 40)),
    Case("linear, GEGLU, linear", "AnimateDiff 32768 rows 320->2560->320", "compute",
         feed_forward(32768, 320, 1280)),
    Case("GroupNorm, SiLU", "AnimateDiff 32x320x64x64", "memory",
         group_norm_silu((32, 320, 64, 64))),
    Case("LayerNorm, modulate", "PixArt 2x4096x1152", "memory",
         layer_norm_modulate(2, 4096, 1152)),
    Case("gate, residual, LayerNorm, modulate", "PixArt 2x4096x1152", "memory",
         gate_residual_layer_norm_modulate(2, 4096, 1152)),
    *(Case("linear, tanh GELU", f"{rows} rows 1152->4608", "compute",
           linear(rows, 1152, 4608, "gelu_tanh")) for rows in (512, 2048, 8192)),
    Case("convolution 3x3", "AnimateDiff 32x320x64x64", "compute", convolution(320, 32, 64)),
    Case("convolution 3x3", "AnimateDiff 32x1280x16x16", "compute", convolution(1280, 32, 16)),
]  # fmt: skip


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """Shares of the ceiling, in this process."""
    inputs = case.make(torch.bfloat16, "cpu")
    torch._dynamo.reset()
    compiled = inputs.compiled(torch.compile(inputs.function, dynamic=False))
    forms = {"eager": inputs.eager, "compiled": compiled, "ours": inputs.ours}
    if case.bound == "memory":
        half = inputs.moved_bytes // 2
        target, source = torch.ones(half, dtype=torch.uint8), torch.zeros(half, dtype=torch.uint8)
        ceiling: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731
        ceiling_work, work = inputs.moved_bytes, inputs.moved_bytes
    else:
        ceiling, ceiling_work = matrix_product(PRODUCT_SIZE["cpu"], torch.bfloat16, "cpu")
        work = inputs.flops
    # The ceiling stands between the forms, so that it meets the machine as they do.
    thunks: dict[str, list[Any]] = {}
    calls = {}
    for name, form in forms.items():
        thunks[f"ceiling before {name}"] = [ceiling]
        thunks[name] = [form]
        calls[name] = calls_per_round(thunks[name], "cpu", seconds)
    each = calls_per_round([ceiling], "cpu", seconds)
    calls |= {name: each for name in thunks if name not in calls}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    timings = interleave(thunks, rounds=rounds, calls=calls, clock=clock)
    best = min(timings[f"ceiling before {name}"].median for name in forms)
    return {
        "operator": case.op,
        "size": case.size,
        "ceiling": "copy" if case.bound == "memory" else "product",
        "GB/s or GFLOP/s of the ceiling": ceiling_work / best / 1e9,
        **{f"ms, {name}": timings[name].median * 1e3 for name in forms},
        **{name: work / timings[name].median * best / ceiling_work for name in forms},
        "over eager": ratio(timings["eager"], timings["ours"]),
        "over compiled": ratio(timings["compiled"], timings["ours"]),
    }


def combine(default: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """One row of both processes: compiled and ours are those of the tuned one."""
    return {
        **tuned,
        "eager": default["eager"],
        "eager, tuned malloc": tuned["eager"],
        "over eager": default["over eager"],
        "over eager, tuned malloc": tuned["over eager"],
        "ms": tuned["ms, ours"],
        "processes": {"default": default, "tuned": tuned},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as the README shows it."""

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:.2f}"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def rows_of(lines: str) -> list[dict[str, Any]]:
    """The rows that a process has printed."""
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def main() -> None:
    """Measure, print, write."""
    import torch._inductor.config as inductor

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each form in a round")
    parser.add_argument("--only", default="", help="part of the names of the operators")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--lines", action="store_true", help="rows as lines of JSON, this malloc")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.lines:
        inductor.freezing = True
        with torch.no_grad():
            for case in CASES:
                if options.only in case.op:
                    row = measure(case, options.rounds, options.seconds)
                    print(json.dumps(row), flush=True)
        return
    runs = []
    for environment in ({}, ENVIRONMENT):
        command = [sys.executable, *sys.argv, "--lines"]
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        runs.append(rows_of(done.stdout))
    rows = [combine(default, tuned) for default, tuned in zip(*runs, strict=True)]
    gpu = DriverWatch("cpu").found
    page = markdown(rows) + "\n\n" + driver_markdown(gpu)
    print(page, end="")
    if options.save:
        machine = {
            "cpu_isa": _C.active_isa(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        path = RESULTS / "ops-of-models-cpu.json"
        document = {"machine": machine, "gpu": gpu.to_dict(), "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
