"""Which documents are read, in ranges, and how they are read from a server or from mongomock."""

from mongotorch.data.read.plan import MOST_SHUFFLED_RANGES, Plan, RunDtypes, Sizes, make_plan, resume_plan
from mongotorch.data.read.reader import DatabaseAccess, IdRange, Reader, open_reader, regrouped

__all__ = [
    "MOST_SHUFFLED_RANGES",
    "DatabaseAccess",
    "IdRange",
    "Plan",
    "Reader",
    "RunDtypes",
    "Sizes",
    "make_plan",
    "open_reader",
    "regrouped",
    "resume_plan",
]
