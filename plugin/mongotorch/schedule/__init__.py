"""Schedules, triggers and gates: values that say when to retrain, and which model goes live."""

from mongotorch.schedule.gates import Always, Better, Gate, Never, Scores, Verdict, gate_of
from mongotorch.schedule.schedule import Firing, Schedule, preview
from mongotorch.schedule.triggers.base import Decision, State, Trigger
from mongotorch.schedule.triggers.combined import AllOf, AnyOf
from mongotorch.schedule.triggers.documents import Changed, NewDocuments
from mongotorch.schedule.triggers.metric import MetricAbove, MetricBelow
from mongotorch.schedule.triggers.time import Cron, Every

__all__ = [
    "AllOf",
    "Always",
    "AnyOf",
    "Better",
    "Changed",
    "Cron",
    "Decision",
    "Every",
    "Firing",
    "Gate",
    "MetricAbove",
    "MetricBelow",
    "Never",
    "NewDocuments",
    "Schedule",
    "Scores",
    "State",
    "Trigger",
    "Verdict",
    "gate_of",
    "preview",
]
