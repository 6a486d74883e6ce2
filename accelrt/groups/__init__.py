"""Operator groups and the slicer: the third of the four levels."""

from typing import TYPE_CHECKING

from accelrt import lazy

from .base import FUSED, SLICED, UNTOUCHED, Group, Status
from .state import Context, State

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(__name__)

__all__ = ["FUSED", "SLICED", "UNTOUCHED", "Context", "Group", "State", "Status"]
