"""Says what the documents of a query hold: the types, gaps and shapes of each field, from a sample.

Half of the sample are the first documents of the query, half are random ones of its collection that match (of a
query with a sort, skip, limit or pipeline all are the first). Nothing is written, and reading is all it needs.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import bson
import numpy as np
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion

from mongotorch.codecs.arrays import dtype_name, stored_array
from mongotorch.data.read import count, fold_by, mock_documents
from mongotorch.errors import EmptySelectError
from mongotorch.mongo.driver_errors import driver_errors
from mongotorch.mongo.server_features import is_mock
from mongotorch.notebook import html_table
from mongotorch.query import Query
from mongotorch.split import FOLD_FIELD, Split

SAMPLE: Final = 1_000
"""Documents that are looked at."""
_DEEPEST: Final = 3  # sub-documents whose fields are listed one by one
_MOST_SHAPES: Final = 4  # that are named of one field
_COUNT_S: Final = 1.0
_OPTIONS: CodecOptions[dict[str, Any]] = CodecOptions(
    uuid_representation=UuidRepresentation.STANDARD,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)
# In this order: a bool is an int, and an Int64 too.
_TYPES: Final[tuple[tuple[type[Any] | tuple[type[Any], ...], str], ...]] = (
    (bool, "bool"),
    (bson.Int64, "long"),
    (int, "int"),
    (float, "double"),
    (str, "string"),
    (Mapping, "object"),
    (list, "array"),
    (uuid.UUID, "uuid"),
    (bytes, "binData"),
    (bson.ObjectId, "objectId"),
    ((datetime.datetime, bson.DatetimeMS), "date"),
    ((bson.Decimal128, decimal.Decimal), "decimal"),
    (bson.Timestamp, "timestamp"),
    ((bson.Regex, re.Pattern), "regex"),
    (bson.MinKey, "minKey"),
    (bson.MaxKey, "maxKey"),
)
_NUMBERS: Final = frozenset({"int", "long", "double"})
MISSING: Final = "missing"


@final
@dataclass(frozen=True, kw_only=True)
class FieldCheck:
    """What one field holds in the documents of a sample.

    Attributes:
        path: The dotted path.
        types: Documents by the type of their value, most frequent first: MongoDB's names, `array of double`,
            `float32 array` for a stored array or vector, and `missing`.
        shapes: Documents by the shape of their value, where it is an array: `(28, 28)`, or `ragged`.
        least: The smallest number, those in arrays not counted; None without any.
        most: The largest one.
        not_finite: Documents with a NaN or an infinity.
    """

    path: str
    types: Mapping[str, int]
    shapes: Mapping[str, int]
    least: float | None = None
    most: float | None = None
    not_finite: int = 0

    def findings(self, sampled: int) -> Iterator[str]:
        """What is worth a look, each in words."""
        kinds = {name for name in self.types if name not in (MISSING, "null")}
        for name, what in ((MISSING, "lack it"), ("null", "have null")):
            if self.types.get(name):
                yield f"{self.path!r}: {self.types[name]:,} of {sampled:,} documents {what}"
        if len(kinds) > 1 and not kinds <= _NUMBERS:
            yield f"{self.path!r} is of {len(kinds)} types: {', '.join(sorted(kinds))}"
        if "double" in kinds and kinds <= _NUMBERS and len(kinds) > 1:
            yield f"{self.path!r} is a double in some documents and an integer in others: all become floats"
        if len(self.shapes) > 1 or "ragged" in self.shapes:
            shapes = [*self.shapes][:_MOST_SHAPES]
            more = ", ..." if len(self.shapes) > _MOST_SHAPES else ""
            yield (
                f"{self.path!r} has {len(self.shapes)} shapes ({', '.join(shapes)}{more}): a batch needs one, "
                "or a `collate_fn` that pads"
            )
        if self.not_finite:
            yield f"{self.path!r}: {self.not_finite:,} of {sampled:,} documents have a NaN or an infinity"


@final
@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What a sample of the documents of a query holds.

    Attributes:
        collection: Where they are.
        documents: How many the query has.
        counted: Whether they were counted; else it is the size of the collection, an upper bound.
        sampled: How many were looked at.
        folds: How many of those are in each fold; in no fold under the empty name.
        fields: The fields, in the order in which they were met.
    """

    collection: str
    documents: int
    counted: bool
    sampled: int
    folds: Mapping[str, int]
    fields: tuple[FieldCheck, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """What is worth a look, each in words; empty where nothing is."""
        found = [finding for field in self.fields for finding in field.findings(self.sampled)]
        if "" in self.folds:
            found.append(
                f"{self.folds['']:,} of {self.sampled:,} documents are in no fold: {FOLD_FIELD!r} is neither "
                "'train' nor 'valid', or the field that divides them is missing or of another type"
            )
        return tuple(found)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A row a field, for a table: path, types, shapes, range."""
        return [
            (
                field.path,
                ", ".join(_share(name, number, self.sampled) for name, number in field.types.items()),
                ", ".join([*field.shapes][:_MOST_SHAPES]),
                "" if field.least is None else f"{field.least:g} to {field.most:g}",
            )
            for field in self.fields
        ]

    def __str__(self) -> str:
        about = "" if self.counted else "at most "
        lines = [f"{self.collection}: {about}{self.documents:,} documents, {self.sampled:,} looked at"]
        rows = [("field", "types", "shapes", "range"), *self.rows()]
        widths = [min(max(len(row[column]) for row in rows), 40) for column in range(3)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])

    def _repr_html_(self) -> str:
        about = "" if self.counted else "at most "
        title = f"{self.collection}: {about}{self.documents:,} documents, {self.sampled:,} looked at"
        found = html_table("", (), [(finding,) for finding in self.findings]) if self.findings else ""
        return html_table(title, ("field", "types", "shapes", "range"), self.rows()) + found

    def to_document(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "collection": self.collection,
            "documents": self.documents,
            "counted": self.counted,
            "sampled": self.sampled,
            "folds": dict(self.folds),
            "fields": [
                {
                    "path": field.path,
                    "types": dict(field.types),
                    "shapes": dict(field.shapes),
                    "least": field.least,
                    "most": field.most,
                    "not_finite": field.not_finite,
                }
                for field in self.fields
            ],
            "findings": list(self.findings),
        }


def check_documents(
    database: Any,
    query: Query,
    *,
    paths: Sequence[str] | None = None,
    split: Split | None = None,
    sample: int = SAMPLE,
) -> DataCheck:
    """Look at a sample of the documents of a query.

    Args:
        database: An open pymongo (or mongomock) database.
        query: The documents.
        paths: The fields to look at; None is all there are, those of sub-documents one by one.
        split: Which documents each fold has; None is that of the query.
        sample: How many documents to look at, about.

    Raises:
        EmptySelectError: The query matches no document.
        QueryError: The server refuses the query.
        ServerUnavailableError: It does not answer.
    """
    with driver_errors(f"checking collection {query.collection!r}"):
        documents = _sampled(database, query, sample)
        if not documents:
            raise EmptySelectError(f"the query matches no document of collection {query.collection!r}")
        total, counted = count(database[query.collection], query, mock=is_mock(database), seconds=_COUNT_S)
    chosen = paths or [path for path in _paths(documents) if path != FOLD_FIELD]
    values = {
        path: [_value(document, path.split(".")) for document in documents] for path in dict.fromkeys(chosen)
    }
    folds = Counter(fold_by(document, split or query.split) or "" for document in documents)
    return DataCheck(
        collection=query.collection,
        documents=max(total, len(documents)),
        counted=counted,
        sampled=len(documents),
        folds=dict(folds.most_common()),
        fields=tuple(_field(path, found) for path, found in values.items()),
    )


def _sampled(database: Any, query: Query, sample: int) -> list[dict[str, Any]]:
    """The first documents, and random ones where a sample can be drawn without reading the whole query."""
    source = database[query.collection]
    if not is_mock(database):
        source = source.with_options(codec_options=_OPTIONS)
    if is_mock(database) and query.fold_name is not None:
        return mock_documents(database, query, query.projection_document)[:sample]
    if query.runs_as_pipeline:
        return list(source.aggregate([*query.stages, {"$limit": sample}]))
    whole = query.limited is None and not query.skipped and not query.ordering
    first = sample // 2 if whole else min(sample, query.limited or sample)
    cursor = source.find(query.where, query.projection_document, skip=query.skipped, limit=first)
    found = list(cursor.sort(list(query.ordering)) if query.ordering else cursor)
    if whole and len(found) == first and query.projection_document is None:
        stages = [{"$sample": {"size": sample}}, {"$match": query.where}, {"$limit": sample - first}]
        seen = {repr(document["_id"]) for document in found}
        found += [other for other in source.aggregate(stages) if repr(other["_id"]) not in seen]
    return found


def _paths(documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """The fields, those of sub-documents one by one, in the order in which they are met."""
    paths: dict[str, None] = {}

    def visit(document: Mapping[str, Any], above: str, depth: int) -> None:
        for name, value in document.items():
            inner = isinstance(value, Mapping) and value and depth < _DEEPEST and stored_array(value) is None
            # A name with a dot, or an empty one, cannot be asked for by a path.
            if inner and name and "." not in name:
                visit(value, f"{above}{name}.", depth + 1)
            elif name and "." not in name:
                paths[above + name] = None

    for document in documents:
        visit(document, "", 1)
    return list(paths)


_ABSENT: Final = object()


def _value(document: Any, names: Sequence[str]) -> Any:
    for name in names:
        if not isinstance(document, Mapping) or name not in document:
            return _ABSENT
        document = document[name]
    return document


def _field(path: str, values: Sequence[Any]) -> FieldCheck:
    types, shapes = Counter(map(_type, values)), Counter(map(_shape, values))
    del shapes[""]
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    finite = [number for number in numbers if math.isfinite(number)]
    return FieldCheck(
        path=path,
        types=dict(types.most_common()),
        shapes=dict(shapes.most_common()),
        least=min(finite, default=None),
        most=max(finite, default=None),
        not_finite=sum(1 for value in values if _is_not_finite(value)),
    )


def _type(value: Any) -> str:
    if value is _ABSENT:
        return MISSING
    if value is None:
        return "null"
    array = stored_array(value)
    if array is not None:
        return f"{dtype_name(array)} array"
    name = next((name for kind, name in _TYPES if isinstance(value, kind)), type(value).__name__)
    if name != "array":
        return name
    inner = sorted({_type(leaf) for leaf in _leaves(value)})
    return f"array of {' and '.join(inner)}" if inner else "empty array"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _shape(value: Any) -> str:
    array = stored_array(value)
    if array is not None:
        return str(array.shape)
    if not isinstance(value, list):
        return ""
    shape = _list_shape(value)
    return "ragged" if shape is None else str(shape)


def _list_shape(value: Any) -> tuple[int, ...] | None:
    """The shape of nested lists; None where they differ in length."""
    if not isinstance(value, list):
        return ()
    inner = {_list_shape(part) for part in value}
    if len(inner) > 1 or None in inner:
        return None
    return (len(value), *(inner.pop() or () if inner else ()))


def _is_not_finite(value: Any) -> bool:
    array = stored_array(value)
    if array is not None:
        return array.dtype.kind == "f" and not bool(np.isfinite(array).all())
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value))


def _share(name: str, number: int, sampled: int) -> str:
    return name if number == sampled else f"{name} {100 * number / sampled:.1f}%"
