"""The operators on a device: ours, eager, each backend of SDPA, torch.compile; shares of ceilings.

Run by benchmarks/device.sh. Attention and linear layers run with torch's products and with our
kernels (what ACCELRT_CUDA_PRODUCTS chooses), in the same rounds. Ceilings are a copy of
1 GiB and a large product in the same dtype, measured at the start. All cases run without
torch.compile first, then again with it, in the order of the list until the seconds are spent. The
file is written after each; what was not reached is named in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import cases
from cases import Case, Inputs
from device_timing import Budget, Replay, ceilings, machine, replay, time_replays, with_own_products

from accelrt import _C
from accelrt.benchmarking.gpu_use import OPERATOR_SECONDS, DriverWatch
from accelrt.benchmarking.limits import OutOfTime, time_limit
from accelrt.benchmarking.timing import copies_for_cold_cache, ratio
from accelrt.files import write_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS, OWN, EAGER, COMPILED = "ours", "own products", "eager", "compile"
WITH_PRODUCTS = ("attention", "linear", "feed_forward")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
FORMS = (OURS, OWN, EAGER, *BACKENDS, COMPILED)
COMPILE_SECONDS = 30.0  # of one operator with max-autotune

# Head dims 40, 64, 72, 80, 160 at the sizes where the models have them; what a GPU needs beside
# the sizes of the CPU's list.
FULL = [
    Case("attention", "AnimateDiff 512 32x4096, 8x40", "compute",
         cases.attention(32, 4096, 4096, 8, 40)),
    Case("attention", "SVD 576x1024 28x9216, 5x64", "compute",
         cases.attention(28, 9216, 9216, 5, 64)),
    Case("attention", "PixArt 1024 2x4096, 16x72", "compute",
         cases.attention(2, 4096, 4096, 16, 72)),
    Case("attention", "AnimateDiff 512 32x1024, 8x80", "compute",
         cases.attention(32, 1024, 1024, 8, 80)),
    Case("attention", "AnimateDiff 512 32x256, 8x160", "compute",
         cases.attention(32, 256, 256, 8, 160)),
    Case("attention", "AnimateDiff 512 32x4096 to 77, 8x40", "compute",
         cases.attention(32, 4096, 77, 8, 40)),
    Case("linear", "AnimateDiff 512 131072 rows 320->320", "compute",
         cases.linear(131072, 320, 320)),
    Case("linear", "AnimateDiff 512 131072 rows 320->1280, GEGLU", "compute",
         cases.linear(131072, 320, 1280, "geglu")),
    Case("temporal_attention", "AnimateDiff 512 2x16x4096, 8x40", "memory",
         cases.temporal_attention(2, 16, 4096, 8, 40)),
    Case("temporal_attention", "SVD 576x1024 2x14x9216, 5x64", "memory",
         cases.temporal_attention(2, 14, 9216, 5, 64)),
    *cases.CASES,
]  # fmt: skip

TINY = [
    Case("attention", "2x16, 2x40", "compute", cases.attention(2, 16, 16, 2, 40)),
    Case("attention", "2x16 to 7, 2x72, masked", "compute",
         cases.attention(2, 16, 7, 2, 72, masked=True)),
    Case("linear", "8 rows 32->48", "compute", cases.linear(8, 32, 48)),
    Case("linear", "8 rows 32->48, GELU", "compute", cases.linear(8, 32, 48, "gelu_tanh")),
    Case("linear", "8 rows 32->48, GEGLU", "compute", cases.linear(8, 32, 48, "geglu")),
    Case("conv2d", "2x16x8x8", "compute", cases.conv2d(2, 16, 8, 24)),
    Case("feed_forward", "8 rows 32->48->32, GEGLU", "compute", cases.feed_forward(8, 32, 48)),
    Case("temporal_attention", "2x5x6, 2x40", "memory", cases.temporal_attention(2, 5, 6, 2, 40)),
    Case("group_norm+silu", "4x32x6x5", "memory", cases.group_norm_silu((4, 32, 6, 5))),
    Case("group_norm+silu", "4x32x6x5, 2 frames", "memory",
         cases.group_norm_silu((4, 32, 6, 5), frames=2)),
    Case("layer_norm_modulate", "2x9x48", "memory", cases.layer_norm_modulate(2, 9, 48)),
    Case("gate_residual_layer_norm_modulate", "2x9x48", "memory",
         cases.gate_residual_layer_norm_modulate(2, 9, 48)),
    Case("geglu", "7x40", "memory", cases.geglu(7, 40)),
    *(Case(name, "7x40", "memory", cases.activation(name, 7, 40))
      for name in ("silu", "gelu", "gelu_tanh")),
    Case("residual_blend", "4x32x6x5", "memory", cases.residual_blend((4, 32, 6, 5), False)),
    Case("residual_blend alpha", "4x32x6x5", "memory", cases.residual_blend((4, 32, 6, 5), True)),
    Case("guided_step", "2x4x3x8x8", "memory", cases.guided_step((2, 4, 3, 8, 8))),
    Case("feature_delta", "2x9x48, L1", "memory", cases.feature_delta((2, 9, 48), 1)),
    Case("feature_delta", "2x9x48, L2", "memory", cases.feature_delta((2, 9, 48), 2)),
    Case("weighted_sum", "2x9x48, 3 slots", "memory", cases.weighted_sum((2, 9, 48), 3)),
]  # fmt: skip
SIZES = {"full": FULL, "tiny": TINY}


def forms_of(
    case: Case, sets: Sequence[Inputs], names: Sequence[str], compiler: str
) -> dict[str, list[Callable[[], object]]]:
    """The calls of each form on each set; nothing runs yet."""
    found: dict[str, list[Callable[[], object]]] = {OURS: [one.ours for one in sets]}
    if OWN in names and case.op in WITH_PRODUCTS:
        found[OWN] = [with_own_products(one.ours) for one in sets]
    if EAGER in names:
        found[EAGER] = [one.eager for one in sets]
    if case.op == "attention":
        for name, backend in BACKENDS.items():
            if name in names:
                found[name] = [_with_backend(one.eager, backend) for one in sets]
    elif COMPILED in names:
        torch._dynamo.reset()
        options: dict[str, Any] = {"backend": compiler}
        if compiler == "inductor":
            options["mode"] = "max-autotune-no-cudagraphs"  # the graph is ours, as for the others
        compiled = torch.compile(sets[0].function, dynamic=False, **options)
        found[COMPILED] = [one.compiled(compiled) for one in sets]
    return found


def _with_backend(call: Callable[[], object], backend: SDPBackend) -> Callable[[], object]:
    def run() -> object:
        with sdpa_kernel(backend):
            return call()

    return run


@torch.no_grad()
def measure(
    case: Case,
    dtype: torch.dtype,
    device: str,
    top: dict[str, Any],
    names: Sequence[str] = FORMS,
    *,
    driver: DriverWatch,
    compiler: str = "inductor",
    seconds: float = COMPILE_SECONDS,
    rounds: int = 5,
    slice_seconds: float = 0.02,
) -> dict[str, Any]:
    """One operator at one size.

    Args:
        case: which.
        dtype: of its tensors.
        device: ``"cpu"`` or ``"cuda"``.
        top: what :func:`~device_timing.ceilings` found.
        names: forms beside ours, of :data:`FORMS`.
        driver: is asked about ours and eager, or about the compiled one where there is one.
        compiler: backend of ``torch.compile``.
        seconds: that a form may take until it can be timed.
        rounds: in which all forms take turns.
        slice_seconds: roughly how long each runs in a round.

    Returns:
        A row: microseconds of each form, ours over it, its share of the ceiling; why a form is
        not there.
    """
    first = case.make(dtype, device)
    # What is bound by arithmetic reads its operands many times: a cold cache changes nothing.
    count = copies_for_cold_cache(first.moved_bytes) if case.bound == "memory" else 1
    sets = [first, *(case.make(dtype, device) for _ in range(count - 1))]
    left_out: dict[str, str] = {}
    ready: dict[str, Replay] = {}
    for name, calls in forms_of(case, sets, names, compiler).items():
        with _noted(name, left_out), time_limit(seconds):
            ready[name] = replay(calls, device)
    if OURS not in ready:
        raise RuntimeError(f"{case.op}, {case.size}: {left_out[OURS]}")
    timings = time_replays(ready, device, rounds, slice_seconds)
    for name in (COMPILED,) if COMPILED in ready else (OURS, EAGER):
        if name in ready:
            label, one = f"{case.op}, {case.size}: {name}", ready[name]
            driver.repeat(label, one.run, OPERATOR_SECONDS, one.calls)
    ours = timings[OURS]
    work = first.flops if case.bound == "compute" else first.moved_bytes
    limit = top["flops_per_second" if case.bound == "compute" else "bytes_per_second"]
    return {
        "op": case.op,
        "size": case.size,
        "dtype": str(dtype).removeprefix("torch."),
        "ceiling": "product" if case.bound == "compute" else "copy",
        "moved_bytes": first.moved_bytes,
        "flops": first.flops,
        "forms": {
            name: {
                "us": timing.median * 1e6,
                "ours_over_it": ratio(timing, ours),
                "of_ceiling": work / timing.median / limit,
                "captured": ready[name].captured,
            }
            for name, timing in timings.items()
        },
        "left_out": left_out,
    }


@contextlib.contextmanager
def _noted(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """A form that fails is a finding, not the end: a backend may not know a head dim."""
    try:
        yield
    except OutOfTime as error:
        left_out[name] = str(error)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        left_out[name] = f"{type(error).__name__}: {text[0][:160]}"
    if torch.cuda.is_available() and name in left_out:
        torch.cuda.empty_cache()


def _passes(forms: list[str]) -> list[list[str]]:
    """What takes long comes after everything else, beside what it is compared with."""
    quick = [name for name in forms if name != COMPILED]
    return [quick, [OURS, OWN, EAGER, COMPILED]] if COMPILED in forms else [quick]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--only", default="", help="operators, with commas; default: all")
    parser.add_argument("--forms", default=",".join(FORMS), help="with commas")
    parser.add_argument("--seconds", type=float, default=150.0, help="of the whole run")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--once", action="store_true", help="call ours twice each; for profilers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write."""
    options = parse(arguments)
    budget = Budget(options.seconds)
    dtype = DTYPES[options.dtype]
    only = [name for name in options.only.split(",") if name]
    chosen = [case for case in SIZES[options.size] if not only or case.op in only]
    if options.once:
        with torch.no_grad():
            for case in chosen:
                inputs = case.make(dtype, options.device)
                calls = [inputs.ours]
                if case.op in WITH_PRODUCTS and hasattr(_C, "set_cuda_products"):
                    calls.append(with_own_products(inputs.ours))
                for call in calls:
                    call()
                    call()
        return {}
    top = ceilings(options.device, dtype, options.size)
    driver = DriverWatch(options.device)
    document: dict[str, Any] = {
        "machine": machine(options.device), "gpu": driver.found.to_dict(), "ceilings": top,
        "rows": [], "not_reached": [],
    }  # fmt: skip
    forms = options.forms.split(",")
    rows: dict[str, dict[str, Any]] = {}
    for names in _passes(forms):
        for case in chosen:
            if COMPILED in names and case.op == "attention":
                continue
            name = f"{case.op}, {case.size}"
            label = f"{name}: {COMPILED}" if COMPILED in names else name
            if budget.left <= 0:
                document["not_reached"].append(label)
                continue
            print(f"{label} ({budget.left:.0f} s left)", flush=True)
            try:
                rows[name] = measure(
                    case, dtype, options.device, top, names, driver=driver,
                    compiler=options.compiler, seconds=max(1.0, min(COMPILE_SECONDS, budget.left)),
                    rounds=5 if options.size == "full" else 2,
                    slice_seconds=0.02 if options.size == "full" else 1e-4,
                )  # fmt: skip
            except RuntimeError as error:
                document["not_reached"].append(f"{label}: {str(error).splitlines()[0][:160]}")
            document["gpu"] = driver.found.to_dict()
            document["rows"] = list(rows.values())
            if options.out is not None:
                write_text(options.out, json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    main()
