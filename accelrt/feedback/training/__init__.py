"""Training of feedback modules: ``accelrt distill``."""

from .api import distill
from .config import DistillConfig
from .data import LatentData, load_data
from .result import DistillResult

__all__ = ["DistillConfig", "DistillResult", "LatentData", "distill", "load_data"]
