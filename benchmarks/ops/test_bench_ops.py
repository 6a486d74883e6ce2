"""Every operator against eager and torch.compile, beside the copy bandwidth of the same run.

`make bench`, or `pytest benchmarks/ops`. Options: --bench-device, --bench-dtypes,
--bench-compile/--no-bench-compile. Results: a table, and benchmarks/results/ops-<device>.json.
Nothing here asserts a time.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case

from accelrt.benchmarking.gpu_use import OPERATOR_SECONDS, DriverWatch
from accelrt.benchmarking.timing import copies_for_cold_cache, interleave, ratio

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.getoption("--bench-dtypes").split(",")
    metafunc.parametrize("dtype_name", names)
    metafunc.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.size}".replace(" ", "_"))


@torch.no_grad()
def test_op(
    case: Case, dtype_name: str, benchmark, pytestconfig, op_results, driver: DriverWatch
) -> None:
    device = pytestconfig.getoption("--bench-device")
    dtype = DTYPES[dtype_name]
    first = case.make(dtype, device)
    # What is bound by arithmetic reads its operands many times: a cold cache changes nothing.
    count = copies_for_cold_cache(first.moved_bytes) if case.bound == "memory" else 1
    sets = [first, *(case.make(dtype, device) for _ in range(count - 1))]

    half = first.moved_bytes // 2
    sources = [torch.zeros(half, dtype=torch.uint8, device=device) for _ in sets]
    targets = [torch.ones(half, dtype=torch.uint8, device=device) for _ in sets]
    thunks = {
        "ours": [s.ours for s in sets],
        "ours, allocating": [s.ours_allocating for s in sets],
        "eager": [s.eager for s in sets],
        "copy": [
            lambda d=d, s=s: d.copy_(s) for d, s in zip(targets, sources, strict=True)
        ],
    }  # fmt: skip
    if pytestconfig.getoption("--bench-compile"):
        torch._dynamo.reset()
        compiled = torch.compile(first.function, dynamic=False)
        thunks["compiled"] = [s.compiled(compiled) for s in sets]
    timings = interleave(thunks, device=device)
    benchmark.pedantic(first.ours, rounds=3, warmup_rounds=1)
    for name, form in (("ours", first.ours), ("eager", first.eager)):
        driver.repeat(f"{case.op}, {case.size}, {dtype_name}: {name}", form, OPERATOR_SECONDS)

    ours = timings["ours"]
    row = {
        "op": case.op,
        "size": case.size,
        "dtype": dtype_name,
        "ms": ours.median * 1e3,
        "GB/s": first.moved_bytes / ours.median / 1e9,
        "of copy": ratio(timings["copy"], ours) if case.bound == "memory" else None,
        "over eager": ratio(timings["eager"], ours),
        "over eager, allocating": ratio(timings["eager"], timings["ours, allocating"]),
        "over compile": ratio(timings["compiled"], ours) if "compiled" in timings else None,
        "GFLOP/s": first.flops / ours.median / 1e9 if first.flops else None,
    }
    benchmark.extra_info.update(row)
    op_results.append(row)
