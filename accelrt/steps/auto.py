"""The step policy of ``rehash="auto"``."""

from __future__ import annotations

from .boundary import Boundary
from .policies import Interval
from .predictors import Taylor
from .rehash import Rehash

#: Every second step after a few, by a first-order forecast of the model's own output: of all
#: settings that need no calibration, those that changed the pictures of the reference models
#: least for their time (benchmarks/steps), on every family, with the smallest cache.
CONSERVATIVE = Rehash(
    policy=Interval(2, warmup_steps=3), predictor=Taylor(1), boundary=Boundary("out")
)
