"""Inner Loop Feedback: a learned block lets one pass do the work of several steps."""

from .module import FeedbackModule
from .schedule import FeedbackSchedule

__all__ = ["FeedbackModule", "FeedbackSchedule"]
