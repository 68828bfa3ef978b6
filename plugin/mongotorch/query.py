"""Describes what to read, as an immutable value without a connection: the `Query`.

Guarantees: queries that mean the same are equal and hashable, since their content is canonical BSON from the
start; `Query.from_document(q.to_document()) == q` holds exactly; every method returns a new query.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, final

import bson
from bson import json_util
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError

from mongotorch.errors import QueryError

Fold = Literal["train", "valid"]
FOLD_FIELD = "_fold"
FOLDS: tuple[Fold, ...] = ("train", "valid")
_BSON: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
_JSON = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL,
    uuid_representation=UuidRepresentation.STANDARD,
    tz_aware=False,
)
# Keys that extended JSON would read as a value; `$regex` is an operator as well.
_VALUES = frozenset(
    {"$binary", "$code", "$date", "$dbPointer", "$maxKey", "$minKey", "$oid", "$ref", "$regex", "$symbol"}
    | {"$numberDecimal", "$numberDouble", "$numberInt", "$numberLong", "$regularExpression", "$timestamp"}
    | {"$undefined", "$uuid"}
)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """What to read from one collection; made by `find` or `aggregate`.

    Attributes:
        collection: Name of the collection.
        body: The filter and projection, or the pipeline, as canonical BSON.
        ordering: `((field, 1 or -1), ...)`, empty for none.
        skipped: How many documents to skip.
        limited: The most documents to read; None is all.
        fold_name: `train`, `valid`, or None for both.
    """

    collection: str
    body: bytes = dataclasses.field(repr=False)
    ordering: tuple[tuple[str, int], ...] = ()
    skipped: int = 0
    limited: int | None = None
    fold_name: str | None = None

    @classmethod
    def find(
        cls,
        collection: str,
        filter: Mapping[str, Any] | None = None,
        projection: Mapping[str, Any] | Sequence[str] | None = None,
    ) -> Self:
        """A query by filter.

        Args:
            collection: Name of the collection.
            filter: A MongoDB filter; None is every document.
            projection: A MongoDB projection, or the names of the fields to keep; None is whole documents.

        Raises:
            QueryError: Something in it that BSON cannot hold.
        """
        if isinstance(projection, str):
            raise QueryError(f"projection is the text {projection!r}; give a list of names", field="projection")
        fields = (
            projection if projection is None or isinstance(projection, Mapping) else dict.fromkeys(projection, 1)
        )
        return cls(collection=_name(collection), body=_pack({"filter": dict(filter or {}), "projection": fields}))

    @classmethod
    def aggregate(cls, collection: str, pipeline: Sequence[Mapping[str, Any]]) -> Self:
        """A query by aggregation pipeline.

        Args:
            collection: Name of the collection.
            pipeline: The stages; writing stages (`$out`, `$merge`) are refused.

        Raises:
            QueryError: A stage that is none, that writes, or that BSON cannot hold.
        """
        stages = [dict(stage) for stage in pipeline]
        for stage in stages:
            if len(stage) != 1 or not next(iter(stage)).startswith("$"):
                raise QueryError(f"a pipeline stage is one '$...' operator, not {sorted(stage)}", field="pipeline")
            if {"$out", "$merge"} & set(stage):
                raise QueryError(f"a query only reads; leave {next(iter(stage))} out", field="pipeline")
        return cls(collection=_name(collection), body=_pack({"filter": {}, "pipeline": stages}))

    def sort(self, field: str | Sequence[tuple[str, int]], direction: int = 1) -> Query:
        """Ordered by a field, or by several `(field, direction)`; 1 ascends, -1 descends.

        Raises:
            QueryError: A direction that is neither, or a pipeline (use a `$sort` stage).
        """
        self._no_pipeline("sort")
        pairs = ((field, direction),) if isinstance(field, str) else tuple((f, d) for f, d in field)
        if any(d not in (1, -1) for _, d in pairs):
            raise QueryError(f"sort directions are 1 and -1, not {[d for _, d in pairs]}", field="sort")
        return dataclasses.replace(self, ordering=pairs)

    def skip(self, n: int) -> Query:
        """Without the first `n` documents. Raises: QueryError for a negative number or a pipeline."""
        self._no_pipeline("skip")
        return dataclasses.replace(self, skipped=_count("skip", n, least=0))

    def limit(self, n: int) -> Query:
        """At most `n` documents. Raises: QueryError for a number below 1 or a pipeline."""
        self._no_pipeline("limit")
        return dataclasses.replace(self, limited=_count("limit", n, least=1))

    def fold(self, name: Fold) -> Query:
        """The documents of one fold only. Raises: QueryError for a fold that does not exist."""
        if name not in FOLDS:
            raise QueryError(f"a fold is 'train' or 'valid', not {name!r}", field="fold")
        return dataclasses.replace(self, fold_name=name)

    def filter(self, condition: Mapping[str, Any]) -> Query:
        """With one more condition that must hold; in a pipeline it comes before the first stage."""
        body = self._unpacked
        before = body["filter"]
        body["filter"] = {"$and": [before, dict(condition)]} if before else dict(condition)
        return dataclasses.replace(self, body=_pack(body))

    @property
    def is_pipeline(self) -> bool:
        """Whether it was made by `aggregate`."""
        return "pipeline" in self._unpacked

    @property
    def where(self) -> dict[str, Any]:
        """The whole filter, the fold included."""
        own: dict[str, Any] = self._unpacked["filter"]
        if self.fold_name is None:
            return own
        fold = {FOLD_FIELD: self.fold_name}
        return {"$and": [own, fold]} if own else fold

    @property
    def projection_document(self) -> dict[str, Any] | None:
        """The projection of a find; None is whole documents."""
        projection: dict[str, Any] | None = self._unpacked.get("projection")
        return projection

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The pipeline that runs, with the filter and fold as its first stage; empty for a find."""
        if not self.is_pipeline:
            return []
        return ([{"$match": self.where}] if self.where else []) + list(self._unpacked["pipeline"])

    @property
    def is_repeatable(self) -> bool:
        """Whether nothing in it is random, so that it gives the same documents as long as those do not change."""
        return not any(operator in _RANDOM for operator in _operators(self._unpacked))

    @property
    def keeps_ids(self) -> bool:
        """Whether the `_id` of each result is that of a document of the collection."""
        stages = self._unpacked.get("pipeline", [])
        return not any(_changes_id(name, options) for stage in stages for name, options in stage.items())

    def to_document(self) -> dict[str, Any]:
        """The query as plain BSON; filter, projection and pipeline are canonical extended JSON text in it."""
        body = {key: json_util.dumps(_escaped(value), json_options=_JSON) for key, value in self._unpacked.items()}
        return {
            "collection": self.collection,
            **body,
            "sort": [list(pair) for pair in self.ordering],
            "skip": self.skipped,
            "limit": self.limited,
            "fold": self.fold_name,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The query that `to_document` described. Raises: QueryError when it is not such a document."""
        try:
            body = {
                key: _renamed(
                    json_util.loads(document[key], json_options=_JSON),
                    lambda name: name[1:] if name.startswith("$$") else name,
                )
                for key in ("filter", "projection", "pipeline")
                if key in document
            }
            return cls(
                collection=_name(document["collection"]),
                body=_pack(body),
                ordering=tuple((field, direction) for field, direction in document["sort"]),
                skipped=document["skip"],
                limited=document["limit"],
                fold_name=document["fold"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise QueryError(f"not the document of a query: {error}") from error

    def digest(self) -> str:
        """SHA-256 of the whole query, in hex."""
        return hashlib.sha256(_pack({**self.to_document(), "body": self.body})).hexdigest()

    @property
    def _unpacked(self) -> dict[str, Any]:
        return bson.decode(self.body, _BSON)

    def _no_pipeline(self, what: str) -> None:
        if self.is_pipeline:
            raise QueryError(f"{what} a pipeline by a ${what} stage of its own", field=what)


def _escaped(value: Any) -> Any:
    return _renamed(value, lambda key: "$" + key if key in _VALUES or key.startswith("$$") else key)


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    if type(value) is dict:
        return {rename(key): _renamed(part, rename) for key, part in value.items()}
    return [_renamed(part, rename) for part in value] if isinstance(value, list) else value


def _pack(body: Mapping[str, Any]) -> bytes:
    try:
        return bson.encode(body, codec_options=_BSON)
    except (BSONError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise QueryError(f"a query holds only what BSON can: {error}") from error


def _name(collection: str) -> str:
    if not isinstance(collection, str) or not collection or "$" in collection or "\0" in collection:
        raise QueryError(f"{collection!r} cannot be the name of a collection", field="collection")
    return collection


def _count(what: str, n: int, *, least: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise QueryError(f"{what} takes a whole number from {least} up, not {n!r}", field=what)
    return n


_RANDOM = frozenset({"$sample", "$sampleRate", "$rand", "$$NOW", "$$CLUSTER_TIME"})
_OTHER_IDS = frozenset(
    {
        *("$group", "$bucket", "$bucketAuto", "$sortByCount", "$count", "$facet", "$replaceRoot", "$replaceWith"),
        *("$unionWith", "$documents", "$densify"),
    }
)


def _operators(value: Any) -> Iterator[str]:
    """The operators and variables in a filter or pipeline, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _operators(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _operators(inner)
    elif isinstance(value, str) and value.startswith("$$"):
        yield value


def _changes_id(stage: str, options: Any) -> bool:
    if stage == "$unset":
        return "_id" in ([options] if isinstance(options, str) else options)
    if stage in ("$project", "$addFields", "$set") and isinstance(options, Mapping) and "_id" in options:
        return stage != "$project" or options["_id"] not in (1, True)
    return stage in _OTHER_IDS
