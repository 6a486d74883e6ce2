"""Frechet distances, and how far they would differ for other samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COVERAGE = 0.9
# Resampled at once: 50 sets of 200 features of 64 channels in float64 are 5 MiB.
_TOGETHER = 50


@dataclass(frozen=True)
class Interval:
    """A number with the spread that it has over resampled pictures.

    Args:
        value: of the pictures themselves.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def signed(self) -> str:
        """The same for a difference."""
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interval(value: float, draws: Tensor, coverage: float = COVERAGE) -> Interval:
    """The spread of ``draws`` ``[D]`` around their mean, laid around ``value``.

    A Frechet distance of few pictures is biased upwards, that of a resample once more; the
    draws' mean, not the value, is what they scatter about.

    Raises:
        ValueError: ``coverage`` is not between 0 and 1.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is {coverage}; allowed: above 0, below 1")
    tail = (1 - coverage) / 2
    ends = torch.quantile(
        draws.double() - draws.double().mean(), torch.tensor([tail, 1 - tail]).double()
    )
    return Interval(value, value + float(ends[0]), value + float(ends[1]))


class Bootstrap:
    """Distances of resampled pictures to the Gaussian fitted to a fixed reference.

    All rows are resampled alike: picture ``i`` of every row is made from the same noise, so
    that differences between rows are paired.

    Args:
        reference: features ``[M, C]`` of held-out pictures, which are not resampled.
        samples: pictures of a row.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: fewer than two samples, or no resample.
    """

    def __init__(self, reference: Tensor, samples: int, resamples: int, seed: int = 0) -> None:
        if samples < 2:
            raise ValueError(f"samples is {samples}; allowed: at least 2, for a covariance")
        if resamples < 1:
            raise ValueError(f"resamples is {resamples}; allowed: at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.randint(samples, (resamples, samples), generator=generator)
        reference = reference.double()
        covariance = torch.cov(reference.T).view(reference.shape[1], -1)
        values, vectors = torch.linalg.eigh(covariance)
        self._mean = reference.mean(dim=0)
        self._root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        self._trace = covariance.trace()

    def distance(self, features: Tensor) -> float:
        """Of features ``[N, C]`` as they are."""
        return float(self._distances(features.double()[None]))

    def draws(self, features: Tensor) -> Tensor:
        """Of every resample of features ``[N, C]``, ``[resamples]`` in float64."""
        features = features.double()
        return torch.cat([self._distances(features[part]) for part in self.drawn.split(_TOGETHER)])

    def _distances(self, sets: Tensor) -> Tensor:
        """Of each set of ``[D, N, C]``, ``[D]``."""
        mean = sets.mean(dim=1)
        centred = sets - mean[:, None]
        covariance = centred.mT @ centred / (sets.shape[1] - 1)
        # tr sqrt(R S) = tr sqrt(sqrt(R) S sqrt(R)), which is symmetric.
        product = self._root @ covariance @ self._root
        cross: Tensor = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum(dim=1)
        gap = (mean - self._mean).square().sum(dim=1)
        own = covariance.diagonal(dim1=1, dim2=2).sum(dim=1)
        distances: Tensor = gap + own + self._trace - 2 * cross
        return distances
