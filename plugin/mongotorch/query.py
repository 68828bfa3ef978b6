"""Describes what to read, as an immutable value without a connection: the `Query`.

Guarantees: queries that mean the same are equal and hashable, since their content is canonical BSON from the
start; `Query.from_document(q.to_document()) == q` holds exactly; every method returns a new query.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, Final, Self, final

import bson
from bson import json_util
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError

from mongotorch.errors import ParameterError, QueryError
from mongotorch.notebook import cut, html_pairs
from mongotorch.split import DEFAULT, FOLDS, Fold, Split, as_split, split_from_document

_BSON: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
_LARGEST = 2**24 - 2**16  # bytes: a server takes 16 MB, with the bounds of a range and a fold in them
_JSON = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL,
    uuid_representation=UuidRepresentation.STANDARD,
    tz_aware=False,
)
# Keys that extended JSON would read as a value; `$regex` is an operator as well.
_LONGEST_SHOWN: Final = 300  # characters of a filter in a `repr`
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
        fold_behind: Whether the fold is of what the skip, limit or pipeline give; else those are of the fold.
        split: Which documents each fold has; None: by `_fold`, those without it by the hash of their `_id`.
    """

    collection: str
    body: bytes = dataclasses.field(repr=False)
    ordering: tuple[tuple[str, int], ...] = ()
    skipped: int = 0
    limited: int | None = None
    fold_name: Fold | None = None
    fold_behind: bool = False
    split: Split | None = None

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
            QueryError: Something in it that BSON cannot hold, or that is no filter or projection.
        """
        return cls(
            collection=collection_name(collection),
            body=_pack({"filter": checked_filter("filter", filter, {}), "projection": _projection(projection)}),
        )

    @classmethod
    def aggregate(cls, collection: str, pipeline: Sequence[Mapping[str, Any]]) -> Self:
        """A query by aggregation pipeline.

        Args:
            collection: Name of the collection.
            pipeline: The stages; writing stages (`$out`, `$merge`) are refused.

        Raises:
            QueryError: A stage that is none, that writes, or that BSON cannot hold.
        """
        if not isinstance(pipeline, list | tuple):
            raise QueryError(f"a pipeline is a list of stages, not a {type(pipeline).__name__}", field="pipeline")
        stages = [dict(stage) if isinstance(stage, Mapping) else stage for stage in pipeline]
        for stage in stages:
            if not isinstance(stage, dict) or len(stage) != 1 or not str(next(iter(stage))).startswith("$"):
                raise QueryError(f"a pipeline stage is one '$...' operator, not {stage!r}", field="pipeline")
            if {"$out", "$merge"} & set(stage):
                raise QueryError(f"a query only reads; leave {next(iter(stage))} out", field="pipeline")
        return cls(collection=collection_name(collection), body=_pack({"filter": {}, "pipeline": stages}))

    def sort(self, field: str | Sequence[tuple[str, int]], direction: int = 1) -> Query:
        """Ordered by a field, or by several `(field, direction)`; 1 ascends, -1 descends.

        Raises:
            QueryError: A field that is none, a direction that is neither, or a pipeline (use a `$sort` stage).
        """
        self._no_pipeline("sort")
        given = [(field, direction)] if isinstance(field, str) else field
        if not isinstance(given, list | tuple):
            raise QueryError(f"sort by a field, or by pairs of field and direction, not {field!r}", field="sort")
        for pair in given:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not _is_path(pair[0]):
                raise QueryError(f"sort by pairs of field and direction, not by {pair!r}", field="sort")
            if isinstance(pair[1], bool) or not isinstance(pair[1], int) or pair[1] not in (1, -1):
                raise QueryError(f"sort directions are 1 and -1, not {pair[1]!r}", field="sort")
        return dataclasses.replace(self, ordering=tuple((name, way) for name, way in given))

    def skip(self, n: int) -> Query:
        """Without the first `n` documents. Raises: QueryError for a negative number or a pipeline."""
        self._no_pipeline("skip")
        return dataclasses.replace(self, skipped=_count("skip", n, least=0))

    def limit(self, n: int) -> Query:
        """At most `n` documents. Raises: QueryError for a number below 1 or a pipeline."""
        self._no_pipeline("limit")
        return dataclasses.replace(self, limited=_count("limit", n, least=1))

    def fold(self, name: Fold, *, split: Split | float | None = None) -> Query:
        """Those of its documents that are in one fold; what a skip, limit or pipeline leaves out is in none.

        A document without a stored `_fold` is in `valid` if the hash of its `_id` says so (5 %). Nothing is
        written.
        Of a query without a sort, the skip and limit count documents by `_id`, as a training does.

        Args:
            name: `train` or `valid`.
            split: Which documents each fold has: `ByHash`, `ByTime`, `ByGroup`, `KFold`, or the share of `valid`;
                None is by `_fold`.

        Raises:
            QueryError: A fold that does not exist.
            ParameterError: A split that is none.
        """
        if name not in FOLDS:
            raise QueryError(f"a fold is 'train' or 'valid', not {name!r}", field="fold")
        return dataclasses.replace(
            self,
            fold_name=name,
            fold_behind=self.is_pipeline or self.is_cut,
            split=None if split is None else as_split(split),
        )

    def filter(self, condition: Mapping[str, Any]) -> Query:
        """With one more condition that must hold.

        In a pipeline it comes before the first stage, or behind it where that has to be the first one (`$geoNear`,
        `$search`, a `$match` with `$text`).
        """
        body = self._unpacked
        before, more = body["filter"], checked_filter("condition", condition)
        body["filter"] = {"$and": [before, more]} if before else more
        return dataclasses.replace(self, body=_pack(body))

    @property
    def is_pipeline(self) -> bool:
        """Whether it was made by `aggregate`."""
        return "pipeline" in self._unpacked

    @property
    def is_cut(self) -> bool:
        """Whether it has a skip or a limit."""
        return bool(self.skipped) or self.limited is not None

    @property
    def is_whole(self) -> bool:
        """Whether its documents are all that match its filter."""
        return not self.is_pipeline and not self.is_cut

    @property
    def runs_as_pipeline(self) -> bool:
        """Whether a server needs a pipeline for it: `stages`, and not `where` with a sort, skip and limit."""
        return self.is_pipeline or (self.fold_name is not None and self.fold_behind and self.is_cut)

    @property
    def fold_condition(self) -> dict[str, Any] | None:
        """The filter of its fold, as a server computes it; None without a fold."""
        return None if self.fold_name is None else (self.split or DEFAULT).condition(self.fold_name)

    @property
    def fold_is_small(self) -> bool:
        """Whether its fold has less than half of the documents, as far as its split says."""
        valid = None if self.fold_name is None else (self.split or DEFAULT).share
        return valid is not None and (valid if self.fold_name == "valid" else 1 - valid) < 0.5

    @property
    def where(self) -> dict[str, Any]:
        """The filter that a server gets: its own, and that of its fold unless `stages` has that behind others."""
        own: dict[str, Any] = self._unpacked["filter"]
        fold = None if self.runs_as_pipeline else self.fold_condition
        if fold is None:
            return own
        return {"$and": [own, fold]} if own else fold

    @property
    def total_order(self) -> list[tuple[str, int]]:
        """Its sort, made total by `_id`, so that a skip means the same each time."""
        ordering = list(self.ordering)
        return ordering if any(name == "_id" for name, _ in ordering) else [*ordering, ("_id", 1)]

    @property
    def projection_document(self) -> dict[str, Any] | None:
        """The projection of a find; None is whole documents."""
        projection: dict[str, Any] | None = self._unpacked.get("projection")
        return projection

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The pipeline that runs, with the filter and the fold among its stages; empty where `find` does it.

        The projection of a find is not part of it.
        """
        if not self.runs_as_pipeline:
            return []
        before, after = self.stages_around_fold
        fold = self.fold_condition
        return [*before, *([] if fold is None else [{"$match": fold}]), *after]

    @property
    def stages_around_fold(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The stages before and behind the one that divides documents into folds."""
        where = self._unpacked["filter"]
        matched = [{"$match": where}] if where else []
        if not self.is_pipeline:
            cut: list[dict[str, Any]] = [{"$sort": dict(self.total_order)}]
            cut += [{"$skip": self.skipped}] if self.skipped else []
            return [*matched, *cut, *([] if self.limited is None else [{"$limit": self.limited}])], []
        stages = list(self._unpacked["pipeline"])
        first = 1 if stages and _must_be_first(stages[0]) else 0
        names = {path.partition(".")[0] for path in (self.split or DEFAULT).fields}
        count = first
        if self.fold_name is not None and self.fold_behind:
            count = max(_stages_before_fold(stages, names), first)
        stages, left = _keeping(stages, count, names)
        before = [*stages[:first], *matched, *stages[first:count]]
        return before, [*stages[count:], *([{"$project": dict.fromkeys(left, 0)}] if left else [])]

    @property
    def is_repeatable(self) -> bool:
        """Whether nothing in it is random, so that it gives the same documents as long as those do not change."""
        return not any(operator in _RANDOM for operator in _operators(self._unpacked))

    @property
    def keeps_ids(self) -> bool:
        """Whether the `_id` of each result is that of a document of the collection."""
        stages = self._unpacked.get("pipeline", [])
        return not any(_changes_id(name, options) for stage in stages for name, options in stage.items())

    def __repr__(self) -> str:
        asked = self._unpacked
        if self.is_pipeline:
            calls = [f"aggregate({_cut(asked['pipeline'])})"]
        else:
            named = f", projection={_cut(asked['projection'])}" if asked.get("projection") else ""
            calls = [f"find({_cut(asked['filter']) if asked['filter'] or named else ''}{named})"]
        calls += [f"sort({list(self.ordering)!r})"] if self.ordering else []
        calls += [f"skip({self.skipped})"] if self.skipped else []
        calls += [f"limit({self.limited})"] if self.limited is not None else []
        split = "" if self.split is None else f", split={self.split!r}"
        calls += [f"fold({self.fold_name!r}{split})"] if self.fold_name is not None else []
        return f"Query({self.collection!r}).{'.'.join(calls)}"

    def _repr_html_(self) -> str:
        return html_pairs(f"Query of {self.collection}", [("asks", repr(self).partition(").")[2])])

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
            # Queries that were stored before these existed have them not.
            **({"fold_behind": True} if self.fold_behind else {}),
            **(
                {}
                if self.split is None
                else {"split": json_util.dumps(self.split.to_document(), json_options=_JSON)}
            ),
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
                collection=collection_name(document["collection"]),
                body=_pack(body),
                ordering=tuple((field, direction) for field, direction in document["sort"]),
                skipped=document["skip"],
                limited=document["limit"],
                fold_name=document["fold"],
                fold_behind=document.get("fold_behind", False),
                split=_split(document.get("split")),
            )
        except (KeyError, TypeError, ValueError, ParameterError) as error:
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


def _split(text: str | None) -> Split | None:
    return None if text is None else split_from_document(json_util.loads(text, json_options=_JSON))


def _escaped(value: Any) -> Any:
    return _renamed(value, lambda key: "$" + key if key in _VALUES or key.startswith("$$") else key)


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    if type(value) is dict:
        return {rename(key): _renamed(part, rename) for key, part in value.items()}
    return [_renamed(part, rename) for part in value] if isinstance(value, list) else value


def _pack(body: Mapping[str, Any]) -> bytes:
    try:
        packed = bson.encode(body, codec_options=_BSON)
    except (BSONError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise QueryError(f"a query holds only what BSON can: {error}") from error
    if len(packed) > _LARGEST:
        raise QueryError(
            f"a query of {len(packed) / 2**20:.1f} MB, and a server takes no more than {_LARGEST / 2**20:.1f}: "
            "in place of a long list of values, set a field of those documents and ask for it, or put the values "
            "into a collection and join it by $lookup",
            field="filter",
        )
    return packed


def checked_filter(field: str, value: Any, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A filter as a dict; the default for None. Raises: QueryError where it is none."""
    if value is None and default is not None:
        return default
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise QueryError(f"{field} is a dict, as MongoDB's filters are, not {value!r}", field=field)
    return dict(value)


def _projection(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence | Set):
        raise QueryError(f"projection is {value!r}; give a dict or a list of names", field="projection")
    if not all(_is_path(name) for name in value):
        raise QueryError(f"a projection names fields, not {value!r}", field="projection")
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(value, 1)


def _is_path(value: Any) -> bool:
    return _is_text(value) and not value.startswith("$")


def _is_text(value: Any) -> bool:
    """Whether it is text that BSON can hold as a name."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def collection_name(collection: str) -> str:
    """The name of a collection. Raises: QueryError where it cannot be one."""
    if not _is_text(collection) or "$" in collection or len(collection) > _LONGEST_NAME:
        raise QueryError(f"{collection!r} cannot be the name of a collection", field="collection")
    return collection


def _count(what: str, n: int, *, least: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise QueryError(f"{what} takes a whole number from {least} up, not {n!r}", field=what)
    return n


_LONGEST_NAME = 255  # characters of a collection's name, with that of its database
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


_FIRST: Final = frozenset({"$geoNear", "$search", "$searchMeta", "$vectorSearch", "$rankFusion", "$scoreFusion"})
_FIRST_SOURCES: Final = frozenset({"$documents", "$collStats", "$indexStats", "$queue"})
# They look at one document after the other, so dividing before them is the same.
_ONE_BY_ONE: Final = frozenset({"$match", "$sort", "$unwind", "$lookup", "$graphLookup", "$project", "$unset"})
_SETTING: Final = frozenset({"$addFields", "$set"})


def _must_be_first(stage: Mapping[str, Any]) -> bool:
    """Whether a server takes a stage only as the first one of a pipeline."""
    name, options = next(iter(stage.items()))
    return name in _FIRST | _FIRST_SOURCES or (name == "$match" and "$text" in _operators(options))


def _stages_before_fold(stages: Sequence[Mapping[str, Any]], names: set[str]) -> int:
    """How many stages have to come before documents are divided into folds by fields of these names.

    They are the fewest that give the same as all: behind them nothing is cut off or counted together, and
    none of these fields is set.
    """
    count = len(stages)
    while count and not _comes_before_fold(*next(iter(stages[count - 1].items())), names):
        count -= 1
    return count


def _comes_before_fold(stage: str, options: Any, names: set[str]) -> bool:
    if stage == "$project" or stage in _SETTING:
        # A field that is only kept or left out is the same before and behind it.
        given = {
            path.partition(".")[0] for path, how in options.items() if stage in _SETTING or _plain(how) is None
        }
        return bool(given & names)
    if stage == "$unwind":
        path = options if isinstance(options, str) else options.get("path", "")
        return path.removeprefix("$").partition(".")[0] in names
    if stage in ("$lookup", "$graphLookup"):
        return str(options.get("as", "")).partition(".")[0] in names
    return stage not in _ONE_BY_ONE


def _keeping(stages: list[dict[str, Any]], count: int, names: set[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The stages, the first `count` of them with the fields of these names, and what to leave out behind them."""
    kept, left = list(stages), set[str]()
    for n, stage in enumerate(stages[:count]):
        options = stage.get("$project")
        if options is None:
            continue
        dropped = {name for name in names if _plain(options.get(name)) is False}
        options = {name: how for name, how in options.items() if name not in dropped}
        if any(_includes(how) for name, how in options.items() if name != "_id"):
            dropped |= names - {path.partition(".")[0] for path in options} - {"_id"}
            options |= dict.fromkeys(sorted(dropped), 1)
        kept[n] = {"$project": options} if options else {"$match": {}}
        left |= dropped
    return kept, sorted(left)


def _plain(how: Any) -> bool | None:
    """Whether a `$project` keeps or leaves out a field; None where it computes one."""
    return bool(how) if isinstance(how, bool | int | float) else None


def _includes(how: Any) -> bool:
    """Whether an entry of a `$project` makes it one that names what is kept."""
    nested = isinstance(how, Mapping) and how and not any(name.startswith("$") for name in how)
    return any(map(_includes, how.values())) if nested else _plain(how) is not False


def _cut(value: Any) -> str:
    """A filter or a pipeline as text: it may hold thousands of `_id`s."""
    return cut(repr(value), _LONGEST_SHOWN)
