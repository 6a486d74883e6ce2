"""Metrics, and the paired comparison of a pipeline with its accelerated self."""

from accelrt.quality.compare import Comparison, Side, compare
from accelrt.quality.metrics import psnr, relative_error, ssim

__all__ = ["Comparison", "Side", "compare", "psnr", "relative_error", "ssim"]
