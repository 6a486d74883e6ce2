"""Train the modules of the ablations: each differs from the committed one in one setting.

    python benchmarks/feedback/ablations.py --out FOLDER [--only NAME ...]
    python benchmarks/feedback/run.py --model dit --ablations FOLDER

A short training each (a sixth of the committed module's steps, three seeds of it among them), so
that they are compared with each other, not with it. What is done is kept: run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parents[2] / "examples" / "reference_models"
sys.path.insert(0, str(REFERENCE))

import torch  # noqa: E402
import train_feedback  # noqa: E402
from evaluate import PIPELINES  # noqa: E402

from accelrt.feedback.training import DistillConfig, distill  # noqa: E402

STEPS = 1000
ALL_FED = {"feedback": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "b 3, L 1": {},
    "b 3, L 1, seed 1": {"seed": 1},
    "b 3, L 1, seed 2": {"seed": 2},
    "b 1": {"start": 1},
    "b 5": {"start": 5},
    "L 2": {"length": 2},
    "L 4": {"start": 2, "length": 4},
    "two passes": {"passes": 2},
    "without learned scales": {"learned_scale": False},
    "one scale": {"scale_shape": "scalar"},
    "second pass at the next timestep": {"conditioning": "next"},
    "from the weights of block 3": {"copy_block": 3},
    "feedback at every step": ALL_FED,
    # The paper's objective; its teacher looks half way ahead.
    "ahead, with the diffusion loss": {
        "objective": "ahead", "ahead": 0.5, "conditioning": "ahead", "diffusion_weight": 0.5,
    },
}  # fmt: skip


def config_of(model: str, name: str, steps: int) -> DistillConfig:
    """The settings of one variant."""
    settings = {**train_feedback.COMMON, **train_feedback.SETTINGS[model], "steps": steps}
    settings["validate_every"] = 0
    return DistillConfig.from_dict({**settings, **VARIANTS[name]})


def main() -> None:
    """Train those that are not done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(train_feedback.SETTINGS), default="dit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=list(VARIANTS), action="append")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only or VARIANTS:
        config = config_of(args.model, name, args.steps)
        pipe = PIPELINES[args.model].from_pretrained(REFERENCE / args.model, dtype=torch.float32)
        source = None
        if config.objective == "ahead" or config.diffusion_weight:

            def source(pipe: Any, config: DistillConfig = config) -> Any:
                return train_feedback.digits(args.model, config.seed, pipe)

        elif args.model == "pixart":
            config = config.override(prompts=train_feedback.still_prompts())
        result = distill(pipe, config, args.out / name, source)
        for row, values in result.validation.items():
            print(
                f"{name:36} {row:13} {values.relative_l2:.4f} {values.psnr_db:.2f} dB", flush=True
            )


if __name__ == "__main__":
    main()
