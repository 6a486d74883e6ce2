"""Operator groups and the slicer: the third of the four levels."""

from .base import FUSED, SLICED, UNTOUCHED, Group, Status
from .state import Context, State

__all__ = ["FUSED", "SLICED", "UNTOUCHED", "Context", "Group", "State", "Status"]
