"""Measuring memory."""

from typing import TYPE_CHECKING

from accelrt import lazy

__all__ = ["PeakTracker", "storage_bytes", "track_peak", "weight_bytes"]

if TYPE_CHECKING:
    from .tracker import PeakTracker, storage_bytes, track_peak, weight_bytes
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__, dict.fromkeys(__all__, "accelrt.memory.tracker")
    )
