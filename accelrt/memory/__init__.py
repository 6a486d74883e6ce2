"""Measuring memory."""

from .tracker import PeakTracker, storage_bytes, track_peak, weight_bytes

__all__ = ["PeakTracker", "storage_bytes", "track_peak", "weight_bytes"]
