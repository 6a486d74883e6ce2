"""Whole forwards on a device: eager, torch.compile, accelrt and what can be set of it.

Run by benchmarks/device.sh. First every model eager and with accelrt, whose products are torch's
or our own (what ACCELRT_CUDA_PRODUCTS chooses), then within the least memory, then as a CUDA graph
and with slices that overlap (pipeline_slices), at two sizes of slices, then torch.compile, which
takes minutes: each part in the order of the models, until the seconds are spent. Forms of
one part take turns, each after a large product of its own; weights are shared. The file is written
after each model. Exit status 1 if a form of accelrt breaks the rule on errors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from device_operators import _noted as noted
from device_timing import Budget, machine, with_own_products

import accelrt
from accelrt.benchmarking.flops import count_flops
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.limits import time_limit
from accelrt.benchmarking.measure import DTYPES, Form, Settings, truth_of, weights_of
from accelrt.benchmarking.models import TINY, ModelCase, Run, animatediff, dit, pixart_1024, svd
from accelrt.benchmarking.process import GpuWatch, release_memory
from accelrt.benchmarking.rates import time_forms
from accelrt.benchmarking.results import error_bound
from accelrt.benchmarking.timing import synchronise
from accelrt.benchmarking.weights import share
from accelrt.files import write_text
from accelrt.memory import track_peak, weight_bytes
from accelrt.quality.metrics import relative_error

EAGER, OURS, OWN, LEAST, COMPILED = (
    "eager", "accelrt", "accelrt, own products", "accelrt, least memory", "compile",
)  # fmt: skip
GRAPHED, PIPELINED, SMALL, SMALL_PIPELINED = (
    "accelrt, CUDA graphs", "accelrt, two slices", "accelrt, 8 MiB", "accelrt, 8 MiB, two slices",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    LEAST: {"memory_budget": "min"},
    GRAPHED: {"cuda_graphs": "auto"},
    PIPELINED: {"pipeline_slices": True},
    SMALL: {"slice_mib": 8.0},
    SMALL_PIPELINED: {"slice_mib": 8.0, "pipeline_slices": True},
}
PARTS = (
    (EAGER, OURS, OWN),
    (EAGER, LEAST),
    (EAGER, OURS, GRAPHED, PIPELINED, SMALL, SMALL_PIPELINED),
    (EAGER, OURS, OWN, COMPILED),
)
FULL: dict[str, Callable[[], ModelCase]] = {
    "dit": dit,
    "pixart-1024": pixart_1024,
    "animatediff": lambda: animatediff(16, 64, 64),
    "svd": lambda: svd(14, 72, 128),
}
SIZES = {"full": FULL, "tiny": {name: TINY[name] for name in FULL}}
LEAST_SECONDS = 8.0  # of a part of a model that is begun at all
ENERGY_SECONDS = {"full": 1.0, "tiny": 0.0}


def make(
    name: str, case: ModelCase, model: Any, dtype: torch.dtype, device: str, compiler: str
) -> Form:
    """A form of the model around its weights."""
    inputs = case.inputs(dtype, device)
    if name == EAGER:
        return Form(model, inputs, case.run)
    if name == COMPILED:
        torch._dynamo.reset()
        return Form(torch.compile(share(model), dynamic=False, backend=compiler), inputs, case.run)
    run = with_products_of(case.run) if name == OWN else case.run
    return Form(accelrt.wrap(share(model), **SETTINGS.get(name, {})), inputs, run)


def with_products_of(run: Run) -> Run:
    """The model's call with our own products."""
    return lambda model, inputs: with_own_products(lambda: run(model, inputs))()


def watched(
    form: Form, truth: torch.Tensor, device: str, *, hidden: bool = False
) -> dict[str, Any]:
    """Error and memory of one forward, after one that is not counted.

    Returns:
        ``error`` against the truth (``None`` if not finite), ``live_bytes`` of tensors beside
        weights and inputs (``None`` where they are ``hidden``: buffers of compiled code and of
        graphs are seen by the allocator alone),
        ``allocated_bytes`` and ``reserved_bytes`` of the CUDA allocator,
        ``first_seconds`` of the first forward, ``seconds`` of this one.
    """
    began = _now(device)
    form()
    first = _now(device) - began
    gc.collect()
    began = _now(device)
    with GpuWatch(device) as gpu:
        output = form()
    seconds = _now(device) - began
    finite = bool(output.isfinite().all())
    error = relative_error(output.double().cpu(), truth) if finite else None
    del output
    live = None
    if not hidden:
        with track_peak() as memory:  # by itself: it slows the launches down
            form()
        live = memory.peak_bytes
    return {
        "error": error,
        "live_bytes": live,
        "allocated_bytes": gpu.allocated,
        "reserved_bytes": gpu.reserved,
        "first_seconds": first,
        "seconds": seconds,
    }


def _now(device: str) -> float:
    synchronise(device)
    return time.perf_counter()


class Model:
    """A model that is measured in parts.

    Args:
        name: of :data:`FULL`.
        options: of the command line.
        driver: is asked about each form.
    """

    def __init__(self, name: str, options: argparse.Namespace, driver: DriverWatch) -> None:
        self.options = options
        self.case = SIZES[options.size][name]()
        self.settings = Settings(
            size=options.size,
            dtype=options.dtype,
            device=options.device,
            truth="fp64" if options.dtype == "fp32" else "fp32",
            switches=False,
        )
        self.flops = count_flops(self.case)
        self.found: dict[str, Any] = {
            "name": name, "title": self.case.title, "detail": self.case.detail,
            "dtype": options.dtype, "truth": self.settings.truth, "flops": self.flops,
            "forms": {}, "parts": [], "left_out": {},
        }  # fmt: skip
        self._truth: torch.Tensor | None = None
        self._driver = driver
        self._asked: set[str] = set()

    def part(self, names: Sequence[str], budget: Budget) -> None:
        """Measure some forms in turn; what fails or is too slow is noted."""
        options, device = self.options, self.options.device
        dtype = DTYPES[options.dtype]
        model = weights_of(self.case, self.settings)
        self.found["weight_bytes"] = weight_bytes(model)
        if self._truth is None:
            self._truth = truth_of(self.case, model, self.settings)
        forms: dict[str, Form] = {}
        for name in names:
            print(f"{self.case.title}: {name} ({budget.left:.0f} s left)", flush=True)
            with noted(name, self.found["left_out"]), time_limit(max(1.0, budget.left)), \
                    torch.no_grad():  # fmt: skip
                form = make(name, self.case, model, dtype, device, options.compiler)
                known = watched(form, self._truth, device, hidden=name in (COMPILED, GRAPHED))
                self.found["forms"].setdefault(name, known)
                forms[name] = form
        if not forms:
            return
        rates = time_forms(
            forms, {name: self.found["forms"][name]["seconds"] for name in forms}, self.flops,
            first=next(iter(forms)), dtype=dtype, device=device, size=options.size,
            rounds=options.rounds,
        )  # fmt: skip
        self.found["parts"].append(dataclasses.asdict(rates))
        for name, form in forms.items():
            if name not in self._asked and budget.left > 0:
                self._asked.add(name)
                label = f"{self.case.title}: {name}"
                self._driver.repeat(label, form, ENERGY_SECONDS[options.size])
        del model, forms, form
        release_memory()

    @property
    def above(self) -> list[str]:
        """Forms of accelrt whose error is above 1.1 times that of eager, and 1e-6."""
        forms = self.found["forms"]
        stock = forms[EAGER]["error"] if EAGER in forms else None
        return [
            name
            for name in (OURS, OWN, *SETTINGS)
            if name in forms
            and (
                forms[name]["error"] is None
                or (stock is not None and forms[name]["error"] > error_bound(stock))
            )
        ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--model", default=",".join(FULL), help="with commas")
    parser.add_argument("--parts", type=int, default=len(PARTS), help="the first so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=180.0, help="of the whole run")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and write."""
    options = parse(arguments)
    budget = Budget(options.seconds)
    driver = DriverWatch(options.device)
    document: dict[str, Any] = {
        "machine": machine(options.device), "gpu": driver.found.to_dict(), "models": [],
        "not_reached": [], "above_the_bound": [],
    }  # fmt: skip
    models: dict[str, Model] = {}
    for names in PARTS[: options.parts]:
        for name in options.model.split(","):
            label = f"{name}: {', '.join(names)}"
            if budget.left < (LEAST_SECONDS if options.size == "full" else 0.0):
                document["not_reached"].append(label)
                continue
            try:
                model = models.setdefault(name, Model(name, options, driver))
                model.part(names, budget)
            except (RuntimeError, ValueError) as error:  # out of memory, say
                document["not_reached"].append(f"{label}: {str(error).splitlines()[0][:160]}")
                release_memory()
            document["gpu"] = driver.found.to_dict()
            document["models"] = [one.found for one in models.values()]
            document["above_the_bound"] = [
                f"{one.found['title']}: {form}" for one in models.values() for form in one.above
            ]
            if options.out is not None:  # after each: a run may be interrupted
                write_text(options.out, json.dumps(document, indent=1) + "\n")
    return document


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        worse = main()["above_the_bound"]
        if worse:
            sys.exit("error above the bound: " + ", ".join(worse))
