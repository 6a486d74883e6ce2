"""What is minimised: outputs that land on the teacher's trajectory, or the teacher's further on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from accelrt.feedback.module import FeedbackModule

from .config import DistillConfig
from .denoiser import Denoiser, combined
from .solver import Outer, landing_outputs, states

StudentCall = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Student(nn.Module):
    """The model with feedback; the feedback module is all that it registers.

    So only the feedback module is trained, moved, and kept in step between processes.
    """

    def __init__(self, denoiser: Denoiser, feedback: FeedbackModule) -> None:
        super().__init__()
        self.feedback = feedback
        self.denoiser = denoiser

    def forward(self, x: Tensor, timestep: Tensor, ahead: Tensor, index: Tensor) -> Tensor:
        """The output ``[B, C, H, W]``; arguments as of :meth:`Denoiser.output`, and the
        timestep ``[B]`` of the passes with feedback."""
        with self.feedback.applied(self.denoiser.model, ahead):
            return self.denoiser.output(x, timestep, index)


@dataclass(frozen=True)
class Training:
    """What objectives share.

    Args:
        config: the settings.
        denoiser: the frozen teacher.
        outer: the outer steps.
        latents: of the data of this process, ``[N, C, H, W]``; ``None`` if there is only noise.
        index: of the conditions of the data, or of all there are, ``[N]``.
        rank, world: this process, and their number.
        device: where the models are.
        autocast: makes the context of mixed precision.
        guidance: least and largest scale.
        shape: of one sample's latents, ``[C, H, W]``.
    """

    config: DistillConfig
    denoiser: Denoiser
    outer: Outer
    latents: Tensor | None
    index: Tensor
    rank: int
    world: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    guidance: tuple[float, float]
    shape: tuple[int, ...]

    def rng(self, name: str, *numbers: int) -> torch.Generator:
        """A generator of its own for each place in the training: resuming changes nothing."""
        text = f"{self.config.seed}/{self.rank}/{name}/{numbers}"
        # Two checksums: 64 bits.
        high = zlib.crc32(text[::-1].encode())
        return torch.Generator().manual_seed((high << 31) + zlib.crc32(text.encode()))

    def draw_conditions(self, count: int, rng: torch.Generator) -> Tensor:
        """Indices of conditions, as often as the data has them, ``[count]``."""
        return self.index[torch.randint(len(self.index), (count,), generator=rng)]

    def draw_scales(self, count: int, rng: torch.Generator) -> Tensor:
        """Scales of guidance, ``[count]``."""
        low, high = self.guidance
        return low + (high - low) * torch.rand(count, generator=rng)

    def _mixture(self, like: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal and noise at timesteps ``[B]``, ``[B, 1, 1, 1]``."""
        table: Tensor = self.outer.scheduler.alphas_cumprod.to(like)
        signal = table[timestep].view(-1, 1, 1, 1)
        return signal.sqrt(), (1 - signal).sqrt()

    def noisy(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents at the noise of timesteps ``[B]``."""
        alpha, sigma = self._mixture(clean, timestep)
        return alpha * clean + sigma * noise

    def diffusion_target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What a model of the scheduler's kind predicts."""
        kind = self.outer.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        if kind == "v_prediction":
            alpha, sigma = self._mixture(clean, timestep)
            return alpha * noise - sigma * clean
        raise ValueError(f"prediction_type is {kind!r}; allowed: epsilon, sample, v_prediction")

    def draw_data(self, count: int, rng: torch.Generator) -> DataRows:
        """Rows of data, noised at outer timesteps with feedback."""
        assert self.latents is not None
        place = torch.randint(len(self.latents), (count,), generator=rng)
        clean = self.latents[place]
        noise = torch.randn(clean.shape, generator=rng)
        fed = torch.tensor(self.outer.fed)
        k = fed[torch.randint(len(fed), (count,), generator=rng)]
        index = self.index[place]
        dropped = torch.rand(count, generator=rng) < self.config.condition_dropout
        index = torch.where(dropped, self.denoiser.empty, index)
        times, ahead = torch.tensor(self.outer.times)[k], torch.tensor(self.outer.ahead())[k]
        second = torch.tensor(self.outer.second(self.config.conditioning))[k].to(self.device)
        device = self.device
        clean, noise, index = clean.to(device), noise.to(device), index.to(device)
        times, ahead = times.to(device), ahead.to(device)
        x = self.noisy(clean, noise, times)
        return DataRows(x, times, ahead, second, index, clean, noise)


@dataclass(frozen=True)
class DataRows:
    """Noised data: ``x``, ``clean`` and ``noise`` ``[B, C, H, W]``, the others ``[B]``."""

    x: Tensor
    times: Tensor
    ahead: Tensor
    second: Tensor
    index: Tensor
    clean: Tensor
    noise: Tensor


class Objective(Protocol):
    """A loss."""

    def loss(self, student: StudentCall, number: int) -> dict[str, Tensor]:
        """The loss and its parts.

        Args:
            student: called once: processes agree on gradients between its calls.
            number: of the pass, counted from the beginning of the training.

        Returns:
            ``"loss"``, with gradients, and its parts, without.
        """
        ...


class Ahead:
    """The teacher's output at a less noisy timestep, from the same picture and noise.

    Source: Inner Loop Feedback (arXiv 2501.13107, section 3), as understood here: there the
    less noisy timestep is half way.

    Raises:
        ValueError: there is no data.
    """

    def __init__(self, training: Training) -> None:
        if training.latents is None:
            raise ValueError("the objective ahead needs data")
        self.training = training

    def loss(self, student: StudentCall, number: int) -> dict[str, Tensor]:
        """Squared error to the teacher, and weighted to the noise."""
        training = self.training
        config = training.config
        rows = training.draw_data(config.batch, training.rng("ahead", number))
        less_noisy = training.noisy(rows.clean, rows.noise, rows.ahead)
        with torch.no_grad(), training.autocast():
            target = training.denoiser.output(less_noisy, rows.ahead, rows.index)
        with training.autocast():
            output = student(rows.x, rows.times, rows.second, rows.index)
        distillation = (output - target).square().mean()
        parts = {"distillation": distillation}
        loss = distillation
        if config.diffusion_weight:
            wanted = training.diffusion_target(rows.clean, rows.noise, rows.ahead)
            parts["diffusion"] = (output - wanted).square().mean()
            loss = loss + config.diffusion_weight * parts["diffusion"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}


@dataclass(frozen=True)
class Round:
    """Trajectories of the teacher.

    Args:
        x: states before the steps with feedback, ``[F, N, C, H, W]``.
        outputs: that land on the next states, likewise.
        index: of the conditions, ``[N]``.
        scales: of guidance, ``[N]``.
        weights: of the steps, ``[F]``.
    """

    x: Tensor
    outputs: Tensor
    index: Tensor
    scales: Tensor
    weights: Tensor


class Landing:
    """Outputs with which the scheduler's outer steps land on the teacher's trajectory.

    The teacher goes each outer interval in several small steps with guidance. The states
    at the outer timesteps are kept; which outputs lead the outer scheduler from each to the
    next is solved exactly, with the scheduler's history of those outputs. Trajectories
    are made anew every few epochs.

    Raises:
        ValueError: the scheduler's steps are random or not affine in the model's output,
            the intervals are too short, or there is a weight for a loss on data but no data.
    """

    def __init__(self, training: Training) -> None:
        config = training.config
        if config.diffusion_weight and training.latents is None:
            raise ValueError(
                f"diffusion_weight is {config.diffusion_weight}, but there is no data; allowed: 0"
            )
        self.training = training
        # Of every process the same number, so that all take as many passes.
        self.pool = -(-config.pool // training.world)
        self.rows = self.pool * len(training.outer.fed)
        if self.rows < config.batch:
            raise ValueError(
                f"a round has {self.rows} rows for each process; allowed: at least batch, "
                f"{config.batch}"
            )
        self.fine = training.outer.fine(config.substeps)
        self._round: tuple[int, Round] | None = None
        self._weights: Tensor | None = None
        #: Called with the number of a round before its trajectories are made.
        self.on_round: Callable[[int], None] | None = None

    def round(self, number: int) -> Round:
        """The trajectories of a round; the same every time for one seed."""
        if self._round is None or self._round[0] != number:
            self._round = None  # two rounds need not be held at once
            if self.on_round is not None:
                self.on_round(number)
            self._round = number, self._made(number)
        return self._round[1]

    @torch.no_grad()
    def _made(self, number: int) -> Round:
        training, outer = self.training, self.training.outer
        rng = training.rng("round", number)
        noise = torch.randn(self.pool, *training.shape, generator=rng)
        index = training.draw_conditions(self.pool, rng).to(training.device)
        scales = training.draw_scales(self.pool, rng).to(training.device)
        found: list[list[Tensor]] = []
        wanted: list[list[Tensor]] = []
        gains: list[float] = []
        for part in chunks(self.pool, training.config.rollout_batch):
            x = noise[part].to(training.device)
            trajectory = self.trajectory(x, index[part], scales[part])
            outputs, gains = landing_outputs(outer, trajectory)
            found.append([trajectory[k] for k in outer.fed])
            wanted.append([outputs[k] for k in outer.fed])

        def joined(parts: list[list[Tensor]]) -> Tensor:
            return torch.stack([torch.cat(each) for each in zip(*parts, strict=True)])

        before, landing = joined(found), joined(wanted)
        if self._weights is None and number:
            self._made(0)  # the weights are those of the first round, also after a resume
        if self._weights is None:
            squares = torch.tensor([gains[k] ** 2 for k in outer.fed], device=training.device)
            self._weights = self._balanced(before, landing, index, scales, squares)
        return Round(before, landing, index, scales, self._weights)

    def _balanced(
        self, x: Tensor, outputs: Tensor, index: Tensor, scales: Tensor, squares: Tensor
    ) -> Tensor:
        """Weights of the steps ``[F]``, so that the plain outputs' weighted loss is 1.

        The plain outputs miss by amounts that differ a thousandfold between steps; so do their
        effects on the latents. Neither alone lets all steps learn.
        """
        training, outer = self.training, self.training.outer
        some = slice(0, min(self.pool, training.config.rollout_batch))
        missed = []
        for place, k in enumerate(outer.fed):
            time = torch.full_like(index[some], outer.times[k])
            with training.autocast():
                plain = training.denoiser.guided(
                    training.denoiser.output, x[place, some], time, index[some], scales[some]
                )
            missed.append((plain - outputs[place, some]).double().square().mean())
        misses = torch.stack(missed).clamp(min=1e-12)
        weights = (misses * squares) ** training.config.weight_power / misses
        made: Tensor = (weights / (weights * misses).mean()).to(x)
        return made

    @torch.no_grad()
    def trajectory(self, x: Tensor, index: Tensor, scales: Tensor) -> list[Tensor]:
        """The teacher's states at the outer timesteps and at the end, from noise ``x``."""
        training = self.training
        denoiser, substeps = training.denoiser, training.config.substeps

        def predict(state: Tensor, step: int) -> Tensor:
            time = torch.full_like(index, self.fine[step])
            with training.autocast():
                return denoiser.guided(denoiser.output, state, time, index, scales)

        scheduler = training.outer.started_at(self.fine)
        return [state for i, state in enumerate(states(scheduler, x, predict)) if i % substeps == 0]

    def loss(self, student: StudentCall, number: int) -> dict[str, Tensor]:
        """Weighted squared error to the outputs that land, and to the noise on data."""
        training, outer = self.training, self.training.outer
        config, denoiser = training.config, training.denoiser
        per_epoch = self.rows // config.batch
        epoch, place = divmod(number, per_epoch)
        number_of_round, epoch = divmod(epoch, config.epochs)
        made = self.round(number_of_round)
        order = torch.randperm(self.rows, generator=training.rng("order", number_of_round, epoch))
        chosen = order[place * config.batch : (place + 1) * config.batch].to(training.device)
        step, sample = chosen // self.pool, chosen % self.pool
        fed = torch.tensor(outer.fed, device=training.device)[step]
        times = torch.tensor(outer.times, device=training.device)[fed]
        ahead = torch.tensor(outer.second(config.conditioning), device=training.device)[fed]
        x, scales, index = made.x[step, sample], made.scales[sample], made.index[sample]
        guided = training.guidance != (1, 1)
        rows = (x, times, index)
        if guided:
            rows = denoiser.doubled(*rows)
            ahead = torch.cat([ahead, ahead])
        xs, ts, aheads, indices = [rows[0]], [rows[1]], [ahead], [rows[2]]
        plain = None
        if config.diffusion_weight:
            plain = training.draw_data(config.batch, training.rng("data", number))
            for held, more in zip(
                (xs, ts, aheads, indices), (plain.x, plain.times, plain.second, plain.index),
                strict=True,
            ):  # fmt: skip
                held.append(more)
        with training.autocast():
            output = student(torch.cat(xs), torch.cat(ts), torch.cat(aheads), torch.cat(indices))
        ours = output[: len(rows[0])]
        ours = combined(ours, scales) if guided else ours
        error = (ours - made.outputs[step, sample]).square().flatten(1).mean(dim=1)
        loss = (made.weights[step] * error).mean()
        parts = {"landing": loss.detach()}
        if plain is not None:
            wanted = training.diffusion_target(plain.clean, plain.noise, plain.times)
            diffusion = (output[len(rows[0]) :] - wanted).square().mean()
            parts["diffusion"] = diffusion.detach()
            loss = loss + config.diffusion_weight * diffusion
        return {"loss": loss, **parts}


def chunks(count: int, size: int) -> list[slice]:
    """``count`` rows in parts of ``size``."""
    return [slice(i, i + size) for i in range(0, count, size)]


def objective_of(training: Training) -> Objective:
    """The objective that the settings name."""
    return Landing(training) if training.config.objective == "landing" else Ahead(training)
