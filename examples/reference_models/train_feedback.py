"""Train the feedback modules of the reference models and write them beside the models.

    python examples/reference_models/train_feedback.py --model dit
    python examples/reference_models/train_feedback.py --model pixart --seed 1 --out some/folder

The training keeps its state in ``<work>/feedback-<model>`` and continues from there when it is
run again. The weights, their config, ``training.json`` and ``losses.json`` are copied to
``<out>``, by default the model's own folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from evaluate import PIPELINES, PIXART_CALL  # noqa: E402
from reference_digits import data, pixart, stages  # noqa: E402
from reference_digits.training import step_rng  # noqa: E402

from accelrt.feedback.training import DistillConfig, LatentData, distill  # noqa: E402

RESULTS = ("config.json", "diffusion_pytorch_model.safetensors", "training.json", "losses.json")
#: Digits that a training which needs data sees.
DIGITS = 10_000
SETTINGS: dict[str, dict[str, Any]] = {
    # Its own spacing, "leading", does not begin at the last timestep.
    "dit": {
        "guidance_scale": 4.0,
        "scheduler_options": {"timestep_spacing": "linspace", "steps_offset": 0},
    },
    "pixart": {
        "guidance_scale": 4.5,
        "max_sequence_length": PIXART_CALL["max_sequence_length"],
    },
}
COMMON: dict[str, Any] = {
    "objective": "landing",
    "stands_for": 20,
    "outer": 8,
    "timesteps": [999, 834, 677, 527, 386, 256, 142, 60],
    # At the second step plain outputs miss their landing least, by far.
    "feedback": [True, False, True, True, True, True, True, True],
    "ahead": 0.0,
    "start": 3,
    "length": 1,
    "substeps": 4,
    "pool": 384,
    "epochs": 4,
    "batch": 32,
    "steps": 6000,
    "validation_samples": 100,
    "validate_every": 1000,
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a feedback module.")
    parser.add_argument("--model", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--config", type=Path, help="settings in place of those of this file")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, help="default: feedback/ in the model's folder")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> DistillConfig:
    """Those of this file or of ``--config``, with the options in front of them."""
    if args.config is None:
        config = DistillConfig.from_dict({**COMMON, **SETTINGS[args.model]})
    else:
        config = DistillConfig.from_file(args.config)
    given = {"steps": args.steps, "seed": args.seed}
    return config.override(**{name: value for name, value in given.items() if value is not None})


def still_prompts() -> list[str]:
    """Every prompt that names a digit and no motion."""
    names = [*data.DIGIT_WORDS, *(str(digit) for digit in range(data.NUM_CLASSES))]
    return [template.format(digit=name) for template in data.STILL_TEMPLATES for name in names]


def digits(model: str, seed: int, pipe: Any) -> LatentData:
    """Latents of training digits with their classes or prompts, as the model was trained on."""
    where = pipe.vae.device
    settings = stages.Settings(out=HERE, work=HERE, seed=seed, dit_pool=DIGITS)
    latents, labels = stages.image_latents(settings, pipe.vae.to("cpu"))
    pipe.vae.to(where)
    if model == "dit":
        return LatentData(latents, labels=labels)
    prompts = pixart.image_prompts(labels, step_rng(seed, "pixart prompts", 0))
    return LatentData(latents, prompts=prompts)


def main() -> None:
    """Train, then copy what is kept."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    config = settings_of(args)
    pipe = PIPELINES[args.model].from_pretrained(HERE / args.model, dtype=torch.float32)
    source = None
    if config.objective == "ahead" or config.diffusion_weight:

        def source(pipe: Any) -> LatentData:
            return digits(args.model, config.seed, pipe)

    elif args.model == "pixart" and config.prompts is None:
        config = config.override(prompts=still_prompts())
    work = args.work / f"feedback-{args.model}"
    result = distill(pipe, config, work, source)
    target = args.out or HERE / args.model / "feedback"
    target.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        shutil.copy(work / name, target / name)
    for name, row in result.validation.items():
        print(
            f"{name:12} {row.steps:3} steps {row.blocks:4} blocks  relative L2 "
            f"{row.relative_l2:.4f}  PSNR {row.psnr_db:.2f} dB"
        )


if __name__ == "__main__":
    main()
