"""The columns of the table, from what the rows' calls gave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import verdict
from bootstrap import Bootstrap, Interval, interval
from counting import Work
from measure import Baselines, Row, Samples, mean_psnr
from tasks import Judge, Task
from torch import Tensor

from accelrt.quality import relative_error

# Slower than feedback by less than this still counts as its time: what repeats differ by.
SAME_TIME = 1.1


@dataclass(frozen=True)
class Line:
    """A row as measured.

    Args:
        name, kind: of the :class:`measure.Row`.
        steps: that the pipeline was asked for.
        outer, blocks: see :class:`counting.Work`.
        seconds: median wall seconds of sampling one batch, without prompts and the VAE.
        speedup, of_stock: medians over the batches of the seconds of exact and of stock with
            all steps over this row's.
        of_ilf: median over the batches of this row's seconds over those of feedback.
        distance: Frechet's, of the classifier's features to those of held-out digits.
        gap: how much larger it is than that of stock with all steps, pictures paired.
        accuracy: share of pictures that show the digit asked for.
        psnr_db: mean over pictures against the reference.
        latent_error: relative L2 error of the final latents against it.
    """

    name: str
    kind: str
    steps: int
    outer: int
    blocks: int
    seconds: float
    speedup: float
    of_stock: float
    of_ilf: float
    distance: Interval
    gap: Interval
    accuracy: float
    psnr_db: float
    latent_error: float

    @property
    def frechet(self) -> float:
        """The distance without its interval."""
        return self.distance.value


def lines_of(
    rows: Sequence[Row],
    samples: dict[str, Samples[Work]],
    reference: tuple[Sequence[Tensor], Sequence[Tensor]],
    baselines: Baselines,
    ilf: str,
    task: Task,
    judge: Judge,
    resamples: int,
) -> list[Line]:
    """The lines of all rows that ran.

    Args:
        rows: in the order of the table.
        samples: of those that ran.
        reference: final latents and pictures of each batch.
        baselines: names of stock and exact with all steps.
        ilf: name of the row with feedback.
        task: what was asked for.
        judge: of the pictures.
        resamples: of the pictures, for intervals.
    """
    latents, pictures = torch.cat(list(reference[0])), torch.cat(list(reference[1]))
    bootstrap = Bootstrap(judge.reference, len(pictures), resamples)
    stock = samples[baselines.stock].seconds
    exact, fed = samples[baselines.exact].seconds, samples[ilf].seconds
    read = {name: judge.read(torch.cat(found.pictures), task.wanted)
            for name, found in samples.items()}  # fmt: skip
    base = bootstrap.distance(read[baselines.stock][1])
    base_draws = bootstrap.draws(read[baselines.stock][1])
    lines = []
    for row in rows:
        if row.name not in samples:
            continue
        mine = samples[row.name]
        hits, features = read[row.name]
        distance, draws = bootstrap.distance(features), bootstrap.draws(features)
        shown = torch.cat(mine.pictures)
        lines.append(
            Line(
                name=row.name,
                kind=row.kind,
                steps=row.steps,
                outer=mine.count.outer,
                blocks=mine.count.blocks,
                seconds=statistics.median(mine.seconds),
                speedup=paired(exact, mine.seconds),
                of_stock=paired(stock, mine.seconds),
                of_ilf=paired(mine.seconds, fed),
                distance=interval(distance, draws),
                gap=interval(distance - base, draws - base_draws),
                accuracy=hits.float().mean().item(),
                psnr_db=mean_psnr(shown.flatten(0, 1), pictures.flatten(0, 1)),
                latent_error=relative_error(torch.cat(mine.latents), latents),
            )
        )
    return lines


def paired(seconds: Sequence[float], over: Sequence[float]) -> float:
    """Median over batches of the ratio of two rows' seconds."""
    return statistics.median(a / b for a, b in zip(seconds, over, strict=True))


def gain(line: Line, lines: Sequence[Line]) -> verdict.Verdict | None:
    """Against plain steps in the same time; ``None`` for plain rows themselves."""
    plain = [other for other in lines if other.kind == "exact"]
    return None if line.kind in ("stock", "exact") else verdict.judge(line, plain)


@dataclass(frozen=True)
class EqualTime:
    """What else there is in the time that feedback takes.

    Args:
        plain: name of the exact row, of fewer steps, whose time is nearest.
        caching, rehash: names of the rows with the highest PSNR among those no slower than
            ``SAME_TIME`` times; ``None`` where all are slower.
    """

    plain: str | None
    caching: str | None
    rehash: str | None


def equal_time(lines: Sequence[Line]) -> EqualTime:
    """Chosen from measured lines."""
    exact = [line for line in lines if line.kind == "exact"]
    most = max((line.steps for line in exact), default=0)
    fewer = [line for line in exact if line.steps < most]
    nearest = min(fewer, key=lambda line: max(line.of_ilf, 1 / line.of_ilf), default=None)

    def best(kinds: tuple[str, ...]) -> str | None:
        known = [x for x in lines if x.kind in kinds and x.of_ilf <= SAME_TIME]
        found = max(known, key=lambda line: line.psnr_db, default=None)
        return None if found is None else found.name

    return EqualTime(
        None if nearest is None else nearest.name, best(("rival", "caching")), best(("rehash",))
    )
