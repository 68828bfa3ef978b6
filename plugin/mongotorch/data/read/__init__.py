"""Which documents are read, in ranges and folds, and how they are read from a server or from mongomock."""

from mongotorch.data.read.bad_documents import Form, decode_fitting
from mongotorch.data.read.folds import (
    assign_folds,
    check_select,
    count,
    fold_by,
    fold_of,
    mock_documents,
    query_for,
)
from mongotorch.data.read.plan import MOST_SHUFFLED_RANGES, Plan, RunDtypes, Sizes, make_plan, resume_plan
from mongotorch.data.read.reader import (
    DatabaseAccess,
    IdRange,
    Reader,
    ServerReader,
    is_snapshot_lost,
    open_reader,
    regrouped,
)
from mongotorch.data.read.weights import weights_of, with_weights

__all__ = [
    "MOST_SHUFFLED_RANGES",
    "DatabaseAccess",
    "Form",
    "IdRange",
    "Plan",
    "Reader",
    "RunDtypes",
    "ServerReader",
    "Sizes",
    "assign_folds",
    "check_select",
    "count",
    "decode_fitting",
    "fold_by",
    "fold_of",
    "is_snapshot_lost",
    "make_plan",
    "mock_documents",
    "open_reader",
    "query_for",
    "regrouped",
    "resume_plan",
    "weights_of",
    "with_weights",
]
