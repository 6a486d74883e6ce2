"""Metrics, the paired comparison of a pipeline with its accelerated self, and calibration."""

from accelrt.quality.calibrate import calibrate
from accelrt.quality.compare import Comparison, Side, compare
from accelrt.quality.metrics import psnr, relative_error, ssim
from accelrt.quality.search import Point, SearchResult, measure, search

__all__ = [
    "Comparison",
    "Point",
    "SearchResult",
    "Side",
    "calibrate",
    "compare",
    "measure",
    "psnr",
    "relative_error",
    "search",
    "ssim",
]
