"""Whole forwards of full-size models on the CPU: eager, compiled, accelrt, within memory.

    python benchmarks/models/run.py --out benchmarks/results
    python benchmarks/models/run.py --model dit --part times --malloc tuned --rounds 5 --out ...

bf16, random weights, guidance batched. Each model has three parts, each in a process of its
own (times in two: malloc as it comes, and one that keeps freed memory):

- ``errors``: error against float32, peak of live tensors and of the process. It also fills
  the compiler's cache on disk. It need not run on a quiet machine.
- ``times``: all forms in turn, each after a matrix product.
- ``roofline``: operators of the accelrt forward against copy bandwidth and product.

``--out FOLDER`` merges into ``models-cpu.json`` there, and writes ``models-cpu.md`` and a
plot per model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import forms
import torch
from forwards import Request, errors, times
from plot import plot
from roofline import roofline
from summary import above, page

from accelrt.benchmarking.child import answer, ask
from accelrt.benchmarking.flops import count_flops
from accelrt.benchmarking.gpu_use import DriverWatch
from accelrt.benchmarking.models import SIZES
from accelrt.benchmarking.progress import Progress
from accelrt.benchmarking.tuned import ENVIRONMENT
from accelrt.reporting.environment import inspect_environment

MODELS = ("dit", "pixart", "pixart-1024", "animatediff", "svd")
#: Timed rounds: a forward of the last takes half a minute and more on two cores.
ROUNDS = {"dit": 7, "pixart": 3}
SLOW_ROUNDS = 2
PARTS = {"errors": errors, "times": times, "roofline": roofline}
MALLOCS = {"default": {}, "tuned": ENVIRONMENT}
NAME = "models-cpu"


def main() -> None:
    """Measure, print, merge and write."""
    options = parse()
    if options.answer:
        answer(handle)
        return
    threads = options.threads or torch.get_num_threads()
    document = read(options.out)
    document["environment"] = inspect_environment().to_dict()
    document["gpu"] = DriverWatch("cpu").found.to_dict()
    failed: list[str] = []
    for name in options.model or MODELS:
        case = SIZES[options.size][name]()
        request = Request(
            model=name, part="", size=options.size,
            forms=tuple(n for n in forms.NAMES if n in (options.form or forms.NAMES)),
            rounds=options.rounds or ROUNDS.get(name, SLOW_ROUNDS), threads=threads,
            seed=options.seed, limit=options.limit, compiler=options.compiler,
            flops=count_flops(case),
        )  # fmt: skip
        facts = {
            "title": case.title, "detail": case.detail, "size": request.size, "dtype": "bf16",
            "seed": request.seed, "flops": request.flops,
        }  # fmt: skip
        known = document["models"].get(name, {})
        if any(known.get(key) != value for key, value in facts.items()):
            known = {}
        document["models"][name] = known = {**known, **facts}
        for part in options.part or PARTS:
            for malloc in (options.malloc or MALLOCS) if part == "times" else ("default",):
                failed += measure(known, replace(request, part=part), malloc)
                if options.out is not None:  # after each part: a long run may be interrupted
                    write(options.out, document)
            if part == "roofline" and "roofline" in known and options.out is not None:
                plot(options.out / f"{NAME}-{name}.png", known)
    print(page(document))
    failed += [
        f"{name}: error above the bound: {', '.join(worse)}"
        for name, model in document["models"].items()
        if (worse := above(model))
    ]
    if failed:
        sys.exit("\n".join(failed))


def measure(known: dict[str, Any], request: Request, malloc: str) -> list[str]:
    """One part of a model in a process of its own, put into what is known of the model.

    Returns:
        Why the process failed, if it did: the parts after it are still measured.
    """
    label = f"{request.model}: {request.part}"
    if request.part == "times":
        label += f", {malloc} malloc"
    progress = Told(label)
    command = [sys.executable, str(Path(__file__).resolve()), "--answer"]
    try:
        found = ask(command, asdict(request), progress, MALLOCS[malloc])
    except RuntimeError as error:
        progress.call(f"failed: {error}")
        return [f"{label}: {error}"]
    found["threads"] = request.threads
    progress.call(f"done, {time.perf_counter() - progress.began:.0f} s")
    for name, reason in found.get("left_out", {}).items():
        print(f"{label}: {name} left out: {reason}", file=sys.stderr, flush=True)
    if request.part == "times":
        known.setdefault("times", {})[malloc] = found
    else:
        known[request.part] = found
    return []


class Told(Progress):
    """A line for whatever begins, with the time since the start."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.began = time.perf_counter()

    def call(self, what: str) -> None:
        seconds = time.perf_counter() - self.began
        print(f"{seconds:6.0f} s  {self.label}: {what}", file=sys.stderr, flush=True)


def handle(values: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What the process of a part does."""
    request = Request(**{**values, "forms": tuple(values["forms"])})
    torch.set_num_threads(request.threads)
    return PARTS[request.part](request, progress)


def read(folder: Path | None) -> dict[str, Any]:
    """What is known already; nothing if it was written by something else."""
    path = None if folder is None else folder / f"{NAME}.json"
    if path is not None and path.exists():
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document.get("models"), dict):
            return document
    return {"environment": {}, "models": {}}


def write(folder: Path, document: dict[str, Any]) -> None:
    """JSON and the tables."""
    order = [name for name in MODELS if name in document["models"]]
    document["models"] = {name: document["models"][name] for name in order}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.json"
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    path.with_suffix(".md").write_text(page(document), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(flag: str, choices: Any, text: str) -> None:
        parser.add_argument(flag, action="append", choices=list(choices), help=text)

    several("--model", MODELS, "may be given repeatedly; default: all")
    several("--part", PARTS, "may be given repeatedly; default: all")
    several("--malloc", MALLOCS, "of the times; default: both")
    several("--form", forms.NAMES, "may be given repeatedly; default: all")
    parser.add_argument("--rounds", type=positive(int), help=f"default: {ROUNDS}, else 2")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--threads", type=positive(int), help="default: torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument(
        "--limit", type=positive(float), default=600.0,
        help="seconds for a form's first call, compilation included (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--compiler", choices=forms.COMPILERS, default="inductor")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="merge into the results there")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def positive(kind: type) -> Any:
    def convert(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: more than 0")
        return value

    convert.__name__ = kind.__name__
    return convert


if __name__ == "__main__":
    main()
