"""From a model, shapes and a memory budget to a plan: how every group is cut."""

from .plan import ComponentPlan, GroupPlan, Plan

__all__ = ["ComponentPlan", "GroupPlan", "Plan"]
