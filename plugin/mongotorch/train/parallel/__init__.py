"""Trains one model on several workers: the group of ranks, and the lanes into which the rows of a step are cut."""

from mongotorch.train.parallel.group import ALONE, Alone, Group, ProcessGroup, first_rank, portable, raise_first
from mongotorch.train.parallel.lane_step import LaneStep, seed_generators
from mongotorch.train.parallel.lanes import COMPUTE_OPTIONS, Lanes, check_compute, pinned_threads
from mongotorch.train.parallel.validation import BatchMeasures, Dealt, in_order

__all__ = [
    "ALONE",
    "COMPUTE_OPTIONS",
    "Alone",
    "BatchMeasures",
    "Dealt",
    "Group",
    "LaneStep",
    "Lanes",
    "ProcessGroup",
    "check_compute",
    "first_rank",
    "in_order",
    "pinned_threads",
    "portable",
    "raise_first",
    "seed_generators",
]
