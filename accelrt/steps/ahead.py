"""Outputs of a model that stand for a later time than that of their step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Schedulers whose step uses one output as the mean over the step, whatever its time.
FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler")
MULTISTEP = "DPMSolverMultistepScheduler"


def check_ahead(scheduler: Any) -> None:
    """Refuse a scheduler that cannot be told of the time that an output stands for.

    Raises:
        ValueError: naming it and those that can.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if name in FIRST_ORDER:
        return
    known = name == MULTISTEP and config.solver_order <= 2
    known = known and config.algorithm_type == "dpmsolver++" and config.solver_type == "midpoint"
    if not known or config.prediction_type != "epsilon" or config.thresholding:
        raise ValueError(
            f"{name} cannot be given an output that stands for a later time; allowed: "
            f"{', '.join(FIRST_ORDER)}, and {MULTISTEP} with dpmsolver++, midpoint, order 1 or 2 "
            f"and epsilon prediction"
        )


@dataclass
class AheadOutputs:
    """What DPM-Solver++ (2M) is handed so that its step takes outputs at their own times.

    Between two steps 2M takes the predicted sample as a line through its last two values over
    the logarithm of the signal-to-noise ratio, and its value in the middle of the step. Here
    the line goes through the times that the outputs stand for. The output returned is the one
    with which the scheduler's own formula gives that value, so that the scheduler stays as it is.

    Source: the update is eq. 2M of DPM-Solver++ (arXiv 2211.01095).
    """

    last: tuple[float, Tensor] | None = None
    handed: Tensor | None = field(default=None, repr=False)

    def fitted(
        self, scheduler: Any, index: int, time: float, output: Tensor, sample: Tensor
    ) -> Tensor:
        """The output to hand to the scheduler at step ``index``.

        Args:
            scheduler: before its step.
            index: of the step.
            time: timestep that ``output`` stands for.
            output: predicted noise ``[B, C, ...]``, as seen from ``sample``.
            sample: of the step.
        """
        if type(scheduler).__name__ != MULTISTEP:
            return output
        sigma = float(scheduler.sigmas[index])
        alpha_t, sigma_t = _parts(sigma)
        x = sample.float()
        predicted = (x - sigma_t * output.float()) / alpha_t
        now = _log_ratio_at(scheduler, time)
        handed = predicted
        following = float(scheduler.sigmas[index + 1])
        lower = scheduler.config.solver_order == 1 or index == len(scheduler.timesteps) - 1
        if self.last is not None and self.handed is not None and not lower and following > 0:
            here, after = _log_ratio(sigma), _log_ratio(following)
            before = _log_ratio(float(scheduler.sigmas[index - 1]))
            slope = (predicted - self.last[1]) / (now - self.last[0])
            wanted = predicted + ((here + after) / 2 - now) * slope
            half = 0.5 * (after - here) / (here - before)
            handed = (wanted + half * self.handed) / (1 + half)
        self.last, self.handed = (now, predicted), handed
        return ((x - alpha_t * handed) / sigma_t).to(output.dtype)


def _parts(sigma: float) -> tuple[float, float]:
    alpha = 1.0 / (1.0 + sigma * sigma) ** 0.5
    return alpha, sigma * alpha


def _log_ratio(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return -float(torch.tensor(sigma, dtype=torch.float64).log())


def _log_ratio_at(scheduler: Any, time: float) -> float:
    products = scheduler.alphas_cumprod.double()
    low = min(int(time), len(products) - 1)
    high = min(low + 1, len(products) - 1)
    sigmas = ((1 - products) / products).sqrt()
    # Between whole timesteps as the scheduler does it: sigmas on a line.
    return _log_ratio(float(sigmas[low] + (time - low) * (sigmas[high] - sigmas[low])))
