"""The training loop all stages share, and the diffusion losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

LossFn = Callable[[int, torch.Generator], torch.Tensor]


@dataclass
class FitResult:
    """What one training loop measured."""

    steps: int
    final_loss: float
    seconds: float
    loss_curve: list[tuple[int, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The result as plain JSON types, with at most ten points of the loss curve."""
        stride = max(1, math.ceil(len(self.loss_curve) / 10))
        return {
            "steps": self.steps,
            "final_loss": round(self.final_loss, 5),
            "seconds": round(self.seconds, 1),
            "loss_curve": {str(step): round(loss, 5) for step, loss in self.loss_curve[::stride]},
        }


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the current parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()), [parameters[k] for k in self.shadow], 1 - decay
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    """bfloat16 autocast on the CPU, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def step_rng(seed: int, name: str, step: int) -> torch.Generator:
    """An independent generator for one step of one stage (so that resuming changes nothing)."""
    key = sum(ord(c) * 31**i for i, c in enumerate(name)) % 100_003
    return torch.Generator().manual_seed((seed * 100_003 + key) * 1_000_003 + step)


def fit(
    name: str,
    module: nn.Module,
    loss_fn: LossFn,
    *,
    steps: int,
    lr: float,
    work: Path,
    seed: int,
    ema_decay: float = 0.999,
    weight_decay: float = 0.0,
    warmup: int = 100,
    checkpoint_every: int = 200,
) -> FitResult:
    """Train ``module`` with AdamW, a cosine schedule and EMA; leaves the EMA weights in it.

    The state is written to ``work/<name>.pt`` now and then and at the end; a second call
    continues from there (or returns at once when the stage is done).
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay
    )
    ema = Ema(module, ema_decay)
    path = work / f"{name}.pt"
    start, seconds, average = 0, 0.0, math.nan
    curve: list[tuple[int, float]] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow = state["ema"]
        start, seconds, average = state["step"], state["seconds"], state["average"]
        curve = [tuple(point) for point in state["curve"]]

    def save(step: int) -> None:
        part = path.with_suffix(".part")
        torch.save(
            {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.shadow,
                "step": step,
                "seconds": seconds,
                "average": average,
                "curve": [list(point) for point in curve],
            },
            part,
        )
        part.replace(path)

    module.train()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, refresh_per_second=0.5) as progress:
        task = progress.add_task(name, total=steps, completed=start, loss=average)
        for step in range(start, steps):
            began = time.perf_counter()
            ramp = min(1.0, (step + 1) / warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * ramp * max(cosine, 0.01)
            loss = loss_fn(step, step_rng(seed, name, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            ema.update(module, step)
            value = loss.item()
            average = value if math.isnan(average) else 0.98 * average + 0.02 * value
            seconds += time.perf_counter() - began
            if (step + 1) % 100 == 0:
                curve.append((step + 1, average))
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                save(step + 1)
            progress.update(task, advance=1, loss=average)
    ema.copy_to(module)
    module.eval()
    return FitResult(steps, average, seconds, curve)


class DiffusionLoss:
    """Noise-prediction loss with min-SNR weights for a linear-beta schedule."""

    def __init__(self, betas: torch.Tensor, min_snr_gamma: float = 5.0) -> None:
        betas = betas.double()
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - previous) / (1 - alphas_cumprod)
        posterior[0] = posterior[1]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self.num_timesteps = len(betas)
        self.weight = (snr.clamp(max=min_snr_gamma) / snr).float()
        self.signal = alphas_cumprod.sqrt().float()
        self.sigma = (1 - alphas_cumprod).sqrt().float()
        self.log_beta = betas.log().float()
        self.log_posterior = posterior.log().float()
        self.mean_x0 = (betas * previous.sqrt() / (1 - alphas_cumprod)).float()
        self.mean_xt = ((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod)).float()

    def add_noise(
        self, clean: torch.Tensor, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random timesteps; returns (noisy, noise, timesteps)."""
        timesteps = torch.randint(self.num_timesteps, (len(clean),), generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        noisy = _at(self.signal, timesteps, clean) * clean
        return noisy + _at(self.sigma, timesteps, clean) * noise, noise, timesteps

    def simple(
        self, prediction: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Weighted squared error of the predicted noise."""
        error = (prediction.float() - noise).square().flatten(1).mean(dim=1)
        return (error * self.weight[timesteps]).mean()

    def variational(
        self,
        prediction: torch.Tensor,
        variance: torch.Tensor,
        clean: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """The bound that trains the learned-range variance; the mean is left out of it."""
        mean_x0 = _at(self.mean_x0, timesteps, clean)
        mean_xt = _at(self.mean_xt, timesteps, clean)
        sigma, signal = _at(self.sigma, timesteps, clean), _at(self.signal, timesteps, clean)
        predicted_clean = (noisy - sigma * prediction.detach().float()) / signal
        # Both means share the x_t term, so that their difference needs only x_0.
        gap = (mean_x0 * (clean - predicted_clean)).square()
        noisy_mean = mean_x0 * predicted_clean + mean_xt * noisy
        low = _at(self.log_posterior, timesteps, clean)
        high = _at(self.log_beta, timesteps, clean)
        fraction = (variance.float() + 1) / 2
        log_var = fraction * high + (1 - fraction) * low
        kl = 0.5 * (log_var - low + torch.exp(low - log_var) + gap * torch.exp(-log_var) - 1)
        nll = 0.5 * (log_var + (clean - noisy_mean).square() * torch.exp(-log_var))
        first = (timesteps == 0).view(-1, *[1] * (clean.dim() - 1))
        return torch.where(first, nll, kl).mean() / math.log(2)


def _at(table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return table[timesteps].view(-1, *[1] * (like.dim() - 1))


def kl_to_standard_normal(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence per latent element."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared plus absolute error: sharp edges, exact background."""
    return F.mse_loss(output.float(), target) + 0.2 * F.l1_loss(output.float(), target)
