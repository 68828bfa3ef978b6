"""Trains one model on several workers: the group of ranks, and the lanes into which the rows of a step are cut."""

from mongotorch.train.parallel.group import Alone, Group, ProcessGroup
from mongotorch.train.parallel.lanes import COMPUTE_OPTIONS, Lanes, check_compute

__all__ = ["COMPUTE_OPTIONS", "Alone", "Group", "Lanes", "ProcessGroup", "check_compute"]
