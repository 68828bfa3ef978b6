"""Triggers decide when a schedule's run is due: by time, documents or metrics, and combinations of these."""

from mongotorch.schedule.triggers.base import Decision, State, Trigger, moment
from mongotorch.schedule.triggers.combined import AllOf, AnyOf
from mongotorch.schedule.triggers.documents import Changed, NewDocuments, Waited
from mongotorch.schedule.triggers.metric import MetricAbove, MetricBelow
from mongotorch.schedule.triggers.time import Cron, Every

__all__ = [
    "AllOf",
    "AnyOf",
    "Changed",
    "Cron",
    "Decision",
    "Every",
    "MetricAbove",
    "MetricBelow",
    "NewDocuments",
    "State",
    "Trigger",
    "Waited",
    "moment",
]
