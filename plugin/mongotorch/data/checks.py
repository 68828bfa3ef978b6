"""What is known to be wrong before the first batch: an empty select or fold, documents without a fold.

Always: a check reads at most a document each; every refusal is a typed error that says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pymongo.errors import PyMongoError

from mongotorch.data.patience import is_passing
from mongotorch.errors import (
    EmptyFoldError,
    EmptySelectError,
    FoldMissingError,
    QueryError,
    ServerUnavailableError,
)
from mongotorch.query import FOLD_FIELD, FOLDS, Fold, Query


def check_select(database: Any, query: Query, *, folds: Iterable[Fold] = FOLDS) -> None:
    """Refuse a select that cannot be trained on.

    Args:
        database: A pymongo (or mongomock) database.
        query: The select, without a fold.
        folds: The folds that are needed; none means that folds do not matter.

    Raises:
        EmptySelectError: It matches no document.
        FoldMissingError: A document without a fold; `document_id` names it.
        EmptyFoldError: A fold that is needed has no document.
        QueryError: The server refuses the query.
        ServerUnavailableError: The server cannot be read.
    """
    name = query.collection
    if first(database, query) is None:
        raise EmptySelectError(
            f"the select matches no document in collection {name!r}; insert documents, or change its filter"
        )
    needed = tuple(folds)
    if not needed:
        return
    without = first(database, query.filter({FOLD_FIELD: {"$nin": list(FOLDS)}}))
    if without is not None:
        document_id = without.get("_id")
        raise FoldMissingError(
            f"document {document_id!r} of collection {name!r} has no {FOLD_FIELD!r} of 'train' or 'valid'; "
            f'insert through the datalayer, or call db["{name}"].assign_folds()',
            document_id=document_id,
            field=FOLD_FIELD,
        )
    for fold in needed:
        if first(database, query.fold(fold)) is None:
            raise EmptyFoldError(
                f"no document of the select is in the {fold!r} fold of collection {name!r}; "
                "add documents, choose another valid_fraction, or train without validation",
                field=FOLD_FIELD,
            )


def first(database: Any, query: Query) -> dict[str, Any] | None:
    """The first document of a query, `_id` and fold only where it is a find; None where there is none."""
    source = database[query.collection]
    try:
        if query.is_pipeline:
            return next(iter(source.aggregate([*(query.stages or []), {"$limit": 1}])), None)
        if query.limited == 0 or not query.skipped:
            found = source.find_one(query.where, {"_id": 1, FOLD_FIELD: 1})
            return None if found is None else dict(found)
        cursor = source.find(query.where, {"_id": 1, FOLD_FIELD: 1}).skip(query.skipped).limit(1)
        return next(iter(cursor), None)
    except PyMongoError as error:
        kind = ServerUnavailableError if is_passing(error) else QueryError
        raise kind(f"reading collection {query.collection!r} failed: {error}") from error
