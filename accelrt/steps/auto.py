"""The step policy of ``rehash="auto"``."""

from __future__ import annotations

from .policies import Interval
from .predictors import Taylor
from .rehash import Rehash

#: Every second step after a few, by a first-order forecast of the last features.
CONSERVATIVE = Rehash(policy=Interval(2, warmup_steps=3), predictor=Taylor(1))
