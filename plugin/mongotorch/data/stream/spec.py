"""What a stream is asked for, as one frozen value.

Guarantees: a spec that exists can be streamed: numbers are in range, options are known, the key is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

from mongotorch.data.decode import U64
from mongotorch.data.read import DatabaseAccess, RunDtypes, Sizes
from mongotorch.data.training_set import PendingMembers
from mongotorch.errors import ParameterError
from mongotorch.loader_options import check_stream_loader
from mongotorch.query import Query
from mongotorch.signature import (
    Key,
    check_defaults,
    check_dtypes,
    check_on_bad_document,
    check_sample_weight,
    check_signature,
    weighted_key,
)


@final
@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What to stream, and how.

    Attributes:
        query: The documents.
        key: The fields; anything that `Key.parse` reads.
        batch_size: Documents of a batch.
        shuffle: A new order each epoch; else the query's sort, else `_id`.
        seed: Of the order.
        shard: (rank, world): disjoint parts with equal numbers of batches.
        shard_by: `rows` deals out the rows of each round; `batches` deals out whole batches, of which a shard has
            each world-th, so that their numbers may differ by one. `ranges` deals out the ranges of the plan, of
            which a shard reads each world-th and no other; a batch then ends with its range, so that batches are
            the same for any number of shards. It is for `samples` of a query in the order of `_id`s.
        lanes: Yield steps in place of batches: tuples of the batches of this shard's lanes, None for an empty one.
            A step of `batch_size` x `accumulation` rows is cut into so many lanes, the same on any number of
            shards. 0 yields batches.
        accumulation: Batches of a step, where there are lanes.
        drop_last: Leave out a last batch that is not full.
        transform: Makes a sample of a sample; None builds no samples.
        signature: How a sample goes into `transform`.
        collate_fn: Makes a batch of a list of samples.
        mode: `stream` reads each epoch anew; `memory` and `download` read once.
        data_prefetch: Read ahead in a thread.
        across_epochs: What reads ahead, a thread or workers, goes on across the end of an epoch: the first windows
            of the next one are read while the last ones of this are served, up to the same bounds.
        prefetch_size: Documents that are read at a time.
        prefetch_factor: Times `prefetch_size` that may be ready or under way; half of it, 64 at most, is shuffled
            together.
        prefetch_bytes: Bytes that may be ready.
        worker_niceness: What is added to the niceness of worker processes that read ahead.
        loader: Options of `torch.utils.data.DataLoader`: `num_workers`, `pin_memory` and the like.
        cache_dir: Folder for `download`.
        content: The digest of the documents, as `Members.digest` gives it, by which a download of them is found;
            None: they are read once to compute it.
        members: Hashes of `_id`s, uint64, ascending: only the documents of this set are streamed, whatever else
            the query finds meanwhile; they take the place of a skip and a limit. None: what the query finds.
        pending: The same, of a set whose scan has not ended, of a query without a skip, a limit or a pipeline.
        read_deadline_s: Seconds after which a broken read is given up.
        on_bad_document: `skip` leaves out documents that do not fit, and counts them.
        dtypes: The dtype of fields that is not left to a sample of the documents: numpy's name of a number.
        defaults: The values of fields that a document lacks, or has as null.
        sample_weight: A field: how many times a document is expected in an epoch, see `Order.times`; None: once.
        run_dtypes: The dtypes of all fields, shared by the streams of one run; a stream alone has its own.
    """

    query: Query
    key: Any
    batch_size: int = 1
    shuffle: bool = False
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    shard_by: Literal["rows", "batches", "ranges"] = "rows"
    lanes: int = 0
    accumulation: int = 1
    drop_last: bool = False
    transform: Callable[..., Any] | None = None
    signature: str = "*args"
    collate_fn: Callable[[list[Any]], Any] | None = None
    mode: Literal["stream", "memory", "download"] = "stream"
    data_prefetch: bool = False
    across_epochs: bool = False
    prefetch_size: int = 1000
    prefetch_factor: int = 100
    prefetch_bytes: int = 256 * 2**20
    worker_niceness: int = 10
    loader: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: Path | None = None
    content: str | None = None
    members: U64 | None = field(default=None, compare=False, repr=False)
    pending: PendingMembers | None = field(default=None, compare=False, repr=False)
    read_deadline_s: float = 60.0
    on_bad_document: Literal["raise", "skip"] = "raise"
    dtypes: Mapping[str, str] | None = None
    defaults: Mapping[str, Any] | None = None
    sample_weight: str | None = None
    run_dtypes: RunDtypes = field(default_factory=RunDtypes, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check it all.

        Raises:
            ParameterError: A value that cannot be used; `field` names it.
        """
        object.__setattr__(self, "key", Key.parse(self.key))
        for name in ("batch_size", "accumulation", "prefetch_size", "prefetch_factor", "prefetch_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name}={value!r}: it must be a whole number from 1 on", field=name)
        shard = self.shard
        is_pair = isinstance(shard, list | tuple) and len(shard) == 2 and all(type(n) is int for n in shard)
        if not is_pair or not 0 <= shard[0] < shard[1]:
            raise ParameterError(f"shard={self.shard!r}: it is (rank, world), 0 <= rank < world", field="shard")
        if self.shard_by not in ("rows", "batches", "ranges"):
            raise ParameterError(f"shard_by={self.shard_by!r}: 'rows', 'batches' or 'ranges'", field="shard_by")
        if type(self.lanes) is not int or self.lanes < 0 or self.lanes % shard[1]:
            raise ParameterError(
                f"lanes={self.lanes!r}: it must be 0, or a number that {shard[1]} shard(s) can share evenly",
                field="lanes",
            )
        check_signature(self.signature)
        if self.mode not in ("stream", "memory", "download"):
            raise ParameterError(f"mode={self.mode!r}: 'stream', 'memory' or 'download'", field="mode")
        check_stream_loader(self.loader)
        check_on_bad_document(self.on_bad_document)
        check_dtypes(self.dtypes, self.key.paths)
        check_sample_weight(self.sample_weight)
        check_defaults(self.defaults, self.read_key.paths)

    @property
    def read_key(self) -> Key:
        """What is read of a document: the fields of the key, and the weight."""
        return weighted_key(self.key, self.sample_weight)

    @property
    def builds_samples(self) -> bool:
        """Whether batches are made of samples and not of columns."""
        return self.transform is not None or self.collate_fn is not None

    def open_access(self, open_database: Callable[[], Any], database: Any = None) -> DatabaseAccess:
        """The database as a stream of this spec reads it; see `DatabaseAccess`."""
        query = self.query
        if self.members is not None:  # what is inserted meanwhile may not push members out of a limit
            query = replace(query, skipped=0, limited=None)
        return DatabaseAccess(
            open_database,
            database,
            query=query,
            projection=self.read_key.projection,
            deadline_s=self.read_deadline_s,
        )

    @property
    def sizes(self) -> Sizes:
        """What bounds the plan."""
        return Sizes(
            prefetch_size=self.prefetch_size,
            prefetch_factor=self.prefetch_factor,
            prefetch_bytes=self.prefetch_bytes,
        )

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that may be on their way from the server, besides the windows: an eighth of `prefetch_bytes`."""
        return self.prefetch_bytes // 8

    @property
    def workers(self) -> int:
        """Worker processes."""
        return int(self.loader.get("num_workers", 0))
