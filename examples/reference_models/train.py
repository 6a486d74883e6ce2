"""Train the reference models and write them, their metrics and a sample sheet.

    python examples/reference_models/train.py
    python examples/reference_models/train.py --only dit --seed 1 --out some/folder

Every stage keeps its state in ``<out>/.work`` and continues from there when it is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import evaluate  # noqa: E402
import torch  # noqa: E402
from reference_digits import report, stages  # noqa: E402

STAGES = ("classifier", "vae", "dit", "animatediff", "evaluate")
# The pipeline's default guidance first, then a milder one (more variety).
GUIDANCE = {"dit": (4.0, 2.0), "animatediff": (7.5, 3.0)}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the reference models.")
    parser.add_argument("--only", choices=STAGES, action="append", help="run only this stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="where the models are written")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply every number of steps (0.01 = smoke)"
    )
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> stages.Settings:
    """The stage settings, with the numbers of steps scaled."""
    cfg = stages.Settings(out=args.out, work=args.out / ".work", seed=args.seed)
    if args.scale == 1.0:
        return cfg
    scaled = {
        f.name: max(2, round(getattr(cfg, f.name) * args.scale))
        for f in dataclasses.fields(cfg)
        if f.name.endswith("_steps")
    }
    return dataclasses.replace(cfg, **scaled)


def main() -> None:
    """Run the chosen stages."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    cfg = settings_of(args)
    cfg.work.mkdir(parents=True, exist_ok=True)
    chosen = args.only or list(STAGES)
    metrics_file = cfg.out / "metrics.json"

    def finish(stage: str, values: dict[str, Any], began: float) -> None:
        metrics = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
        metrics["seed"] = cfg.seed
        metrics["versions"] = {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "diffusers", "transformers", "scikit-learn")},
        }
        seconds = round(time.perf_counter() - began, 1)
        metrics[stage] = {**values, "stage_seconds": seconds}
        metrics["megabytes"] = report.folder_megabytes(cfg.out)
        metrics_file.write_text(json.dumps(metrics, indent=2) + "\n")

    if "classifier" in chosen:
        began = time.perf_counter()
        finish("classifier", stages.train_classifier(cfg), began)
    if {"vae", "dit", "animatediff"} & set(chosen):
        began = time.perf_counter()
        vae, values = stages.train_vae(cfg)  # returns at once when it is trained already
        if "vae" in chosen:
            finish("vae", values, began)
    for stage, train in (("dit", stages.train_dit), ("animatediff", stages.train_animatediff)):
        if stage in chosen:
            began = time.perf_counter()
            finish(stage, train(cfg, vae), began)
    if "evaluate" in chosen:
        began = time.perf_counter()
        results = {
            stage: [evaluate.evaluate_saved(cfg.out, stage, guidance_scale=g) for g in scales]
            for stage, scales in GUIDANCE.items()
        }
        report.write_sample_sheet(cfg.out, cfg.out / "samples.png")
        finish("evaluate", results, began)


if __name__ == "__main__":
    main()
