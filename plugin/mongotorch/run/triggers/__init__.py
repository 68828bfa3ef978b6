"""When a schedule's run is due: triggers of time, of documents, of the live model, and combinations of them.

Always: a trigger is a frozen value and its `due` a pure function, so that it can be stored, asked anywhere, and
asked about another time than now.
"""

from __future__ import annotations

from mongotorch.run.triggers.base import Decision, State, Trigger, moment
from mongotorch.run.triggers.combined import AllOf, AnyOf
from mongotorch.run.triggers.cron import Cron
from mongotorch.run.triggers.documents import Changed, NewDocuments, Waited
from mongotorch.run.triggers.every import Every
from mongotorch.run.triggers.metric import MetricAbove, MetricBelow

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
