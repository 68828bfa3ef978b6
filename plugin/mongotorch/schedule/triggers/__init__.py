"""When a schedule's run is due: triggers of time, of documents, of the live model, and combinations of them.

Always: a trigger is a frozen value and its `due` a pure function, so that it can be stored, asked anywhere, and
asked about another time than now.
"""

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
