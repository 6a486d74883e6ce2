"""Train the reference models and write them, their metrics and a sample sheet.

    python examples/reference_models/train.py
    python examples/reference_models/train.py --only dit --seed 1 --out some/folder
    python examples/reference_models/train.py --only pixart --only evaluate

Every stage keeps its state in ``<out>/.work`` and continues from there when it is run again.
The last stage measures the models that were chosen too, or all of them, and draws the
sample sheet once there are all four.
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
from reference_digits import data, pixart, report, stages, svd  # noqa: E402

STAGES = ("classifier", "vae", "dit", "animatediff", "pixart", "svd", "evaluate")
# The pipeline's default guidance first, then a milder one (more variety).
GUIDANCE = {
    "dit": (4.0, 2.0),
    "animatediff": (7.5, 3.0),
    "pixart": (4.5, 2.0),
    "svd": (3.0, 1.5),
}


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
    trainers = {
        "dit": stages.train_dit,
        "animatediff": stages.train_animatediff,
        "pixart": pixart.train_pixart,
    }
    if "vae" in chosen or {*trainers} & {*chosen}:
        began = time.perf_counter()
        vae, values = stages.shared_vae(cfg, train="vae" in chosen)
        if values is not None:
            finish("vae", values, began)
    for stage, train in trainers.items():
        if stage in chosen:
            began = time.perf_counter()
            finish(stage, train(cfg, vae), began)
    if "svd" in chosen:  # it has an autoencoder of its own
        began = time.perf_counter()
        values = svd.train_svd(cfg)
        folder = cfg.out / "svd" / "first_frames"
        folder.mkdir(exist_ok=True)
        for digit, image in enumerate(evaluate.first_frames(data.NUM_CLASSES)[0]):
            image.save(folder / f"{digit}.png")
        finish("svd", values, began)
    if "evaluate" in chosen:
        began = time.perf_counter()
        measured = [model for model in GUIDANCE if model in chosen] or list(GUIDANCE)
        results = {
            model: [
                evaluate.evaluate_saved(cfg.out, model, guidance_scale=g) for g in GUIDANCE[model]
            ]
            for model in measured
        }
        if all((cfg.out / model).exists() for model in GUIDANCE):
            report.write_sample_sheet(
                cfg.out / "samples.png",
                lambda model: evaluate.load_pipeline(model, cfg.out),
                evaluate.first_frames(report.SHEET_VIDEOS)[0],
                evaluate.PIXART_CALL,
                evaluate.SVD_CALL,
            )
        if metrics_file.exists():  # keep what was measured before and not now
            before = json.loads(metrics_file.read_text()).get("evaluate", {})
            results = {**before, **results}
        finish("evaluate", results, began)


if __name__ == "__main__":
    main()
