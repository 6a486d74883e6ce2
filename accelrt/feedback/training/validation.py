"""How near the outer steps come to the teacher's trajectory, with feedback and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accelrt.feedback.module import FeedbackModule, like_blocks
from accelrt.quality.metrics import psnr, relative_error

from .objectives import Student, Training, chunks
from .solver import final_state


@dataclass(frozen=True)
class Row:
    """One way of sampling against the teacher's trajectory of small steps.

    Args:
        steps: passes through the model.
        blocks: that one trajectory runs, those of the feedback among them.
        relative_l2: error of the final latents, over all trajectories.
        psnr_db: of the decoded pictures; infinity for identical ones.
    """

    steps: int
    blocks: int
    relative_l2: float
    psnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Validator:
    """Fixed noises and conditions, sampled by the teacher in small steps and by the outer steps.

    What does not depend on the module is computed once: the teacher's trajectory, the outer
    steps without feedback, as many plain steps as the outer ones stand for, and as many as
    run no fewer blocks than the outer ones.

    Args:
        training: what objectives share.
        feedback: the module.
    """

    def __init__(self, training: Training, feedback: FeedbackModule) -> None:
        self.training = training
        self.student = Student(training.denoiser, feedback)
        count = training.config.validation_samples
        rng = training.rng("validation")
        self.noise = torch.randn(count, *training.shape, generator=rng).to(training.device)
        # Of all the data, so that the number of processes changes nothing.
        known = training.denoiser.index
        place = torch.randint(len(known), (count,), generator=rng)
        self.index = known[place].to(training.device)
        self.scales = torch.linspace(*training.guidance, count).to(training.device)
        self._truth: tuple[Tensor, Tensor] | None = None
        self._fixed: dict[str, Row] = {}

    def run(self) -> dict[str, Row]:
        """``feedback``, ``without`` it, ``equal_blocks`` and ``stands_for`` plain steps."""
        training, outer = self.training, self.training.outer
        schedule, feedback = outer.schedule, self.student.feedback
        depth = len(like_blocks(training.denoiser.model))
        blocks = sum(feedback.blocks_run(depth, on) for on in schedule.feedback)
        if not self._fixed:
            fine = outer.fine(training.config.substeps)
            truth = self._sampled(lambda: outer.started_at(fine), fed=False)
            self._truth = truth, training.denoiser.pictures(truth)
            count = len(outer.times)
            self._fixed["without"] = self._row(outer.started, count, count * depth)
            for name, steps in (
                # Rounded up: the rival gets no less than we take.
                ("equal_blocks", math.ceil(blocks / depth)),
                ("stands_for", schedule.stands_for),
            ):
                self._fixed[name] = self._row(
                    partial(outer.started_with, steps), steps, steps * depth
                )
        row = self._row(outer.started, len(outer.times), blocks, fed=True)
        return {"feedback": row, **self._fixed}

    def _row(self, started: Callable[[], Any], steps: int, blocks: int, fed: bool = False) -> Row:
        assert self._truth is not None
        truth, pictures = self._truth
        final = self._sampled(started, fed)
        decoded = self.training.denoiser.pictures(final)
        return Row(steps, blocks, relative_error(final, truth), psnr(decoded, pictures))

    @torch.no_grad()
    def _sampled(self, started: Callable[[], Any], fed: bool) -> Tensor:
        """Final latents of all trajectories."""
        parts = chunks(len(self.noise), self.training.config.rollout_batch)
        return torch.cat([self._part(started(), part, fed) for part in parts])

    def _part(self, scheduler: Any, part: slice, fed: bool) -> Tensor:
        training, outer = self.training, self.training.outer
        denoiser = training.denoiser
        index, scales = self.index[part], self.scales[part]

        def predict(x: Tensor, k: int) -> Tensor:
            def with_feedback(x: Tensor, timestep: Tensor, index: Tensor) -> Tensor:
                ahead = torch.full_like(timestep, outer.second(training.config.conditioning)[k])
                output: Tensor = self.student(x, timestep, ahead, index)
                return output

            output = with_feedback if fed and outer.schedule.feedback[k] else denoiser.output
            time = torch.full_like(index, int(scheduler.timesteps[k]))
            with training.autocast():
                guided: Tensor = denoiser.guided(output, x, time, index, scales)
            return guided

        final: Tensor = final_state(scheduler, self.noise[part], predict)
        return final
