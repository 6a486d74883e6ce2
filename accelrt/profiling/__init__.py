"""Profiles of pipelines: named ranges, traces, tables, memory over time and the roofline."""

from .analysis import Row
from .capture import Profile, profile
from .ceilings import Ceilings

__all__ = ["Ceilings", "Profile", "Row", "profile"]
