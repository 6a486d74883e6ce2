"""The cut along time: which denoising steps are computed, and what takes the place of the rest."""

from typing import TYPE_CHECKING

from accelrt import lazy

from .boundary import Boundary
from .calibrate import Calibration
from .origin import model_hash, scheduler_hash
from .policies import Interval, Policy, Schedule, Threshold, Verified, walk
from .predictors import AdamsBashforth, Hermite, LearnedLinear, Predictor, Reuse, Taylor
from .rehash import Origin, Rehash

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(__name__)

__all__ = [
    "AdamsBashforth",
    "Boundary",
    "Calibration",
    "Hermite",
    "Interval",
    "LearnedLinear",
    "Origin",
    "Policy",
    "Predictor",
    "Rehash",
    "Reuse",
    "Schedule",
    "Taylor",
    "Threshold",
    "Verified",
    "model_hash",
    "scheduler_hash",
    "walk",
]
