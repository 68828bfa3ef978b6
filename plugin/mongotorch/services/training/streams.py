"""From what a trainer says to the streams that feed it.

Always: the select and its folds are checked before a stream is made; the fold is added to the select, so that
training and validation documents come from the same one; what is opened here is closed by `close`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, final

from mongotorch.data import Stream, StreamSpec, check_select
from mongotorch.mongo.connection import Connection
from mongotorch.query import Fold, Query
from mongotorch.resources import Owner
from mongotorch.settings import Settings
from mongotorch.train import TorchModel, TorchTrainer

_MODES: dict[str, Literal["memory", "download"]] = {"in_memory": "memory", "download": "download"}
_STREAM_OPTIONS = frozenset(
    {
        "drop_last",
        "transform",
        "signature",
        "collate_fn",
        "data_prefetch",
        "across_epochs",
        "prefetch_size",
        "prefetch_factor",
    }
)
_OWN_PARAMETERS = ("batch_size", "shuffle", "drop_last")


@final
class Streams(Owner):
    """The streams of one run; a context manager that closes them.

    Args:
        trainer: Says what is read, and how.
        model: Its validation may have datasets of its own.
        connection: The database.
        settings: Of the datalayer.
        train_query: The training documents, in place of the fold `train` of the trainer's select.

    Attributes:
        batches: The training batches.
        sets: The validation batches by the name of their set; the empty name is the fold `valid`.
    """

    def __init__(
        self,
        trainer: TorchTrainer,
        model: TorchModel,
        connection: Connection,
        settings: Settings,
        *,
        train_query: Query | None = None,
    ) -> None:
        self._connection = connection
        self._opened = ExitStack()
        validates = trainer.validation_interval is not None
        _check(connection, trainer, train_query, validates=validates)
        self.batches = self._open(training_spec(trainer, settings, train_query))
        self.sets: dict[str, Stream] = {}
        if not validates:
            return
        self.sets[""] = self._open(validation_spec(trainer, settings, trainer.select.fold("valid")))
        for dataset in model.validation.datasets if model.validation is not None else ():
            check_select(connection.database, dataset.select, folds=())
            self.sets[dataset.identifier] = self._open(validation_spec(trainer, settings, dataset.select))

    def close(self) -> None:
        """End threads and processes, let go of memory and files."""
        self._opened.close()

    def _open(self, spec: StreamSpec) -> Stream:
        connection = self._connection
        return self._opened.enter_context(Stream(connection.opener(), spec, database=connection.database))


def _check(connection: Connection, trainer: TorchTrainer, train_query: Query | None, *, validates: bool) -> None:
    """Refuse what cannot be read, before a stream is made."""
    wanted: dict[Fold, bool] = {"train": train_query is None, "valid": validates}
    folds = [fold for fold, needed in wanted.items() if needed]
    if folds:
        check_select(connection.database, trainer.select, folds=folds)
    if train_query is not None:
        check_select(connection.database, train_query, folds=())


def training_spec(trainer: TorchTrainer, settings: Settings, query: Query | None = None) -> StreamSpec:
    """How a trainer's training documents are streamed: the fold `train` of its select, unless others are given."""
    options = dict(trainer.loader_kwargs or {})
    return _spec(
        trainer,
        settings,
        trainer.select.fold("train") if query is None else query,
        shuffle=bool(options.get("shuffle")),
        drop_last=bool(options.get("drop_last")),
        across_epochs=True,
    )


def validation_spec(trainer: TorchTrainer, settings: Settings, query: Query) -> StreamSpec:
    """How validation documents are streamed: all of them, in their own order."""
    return _spec(trainer, settings, query, shuffle=False, drop_last=False)


def stream_spec(settings: Settings, query: Query, options: Mapping[str, Any], **chosen: Any) -> StreamSpec:
    """How a query is streamed for a loop of one's own.

    Args:
        settings: Of the datalayer.
        query: The documents.
        options: Of the trainer's kind and of a DataLoader's, told apart here.
        chosen: Fields of the `StreamSpec`.

    Raises:
        ParameterError, LoaderOptionError: An option that does not exist, or a value that cannot be used.
    """
    own = {name: value for name, value in options.items() if name in _STREAM_OPTIONS}
    loader = {name: value for name, value in options.items() if name not in {*_STREAM_OPTIONS, *_MODES}}
    modes = [mode for name, mode in _MODES.items() if options.get(name)]
    return StreamSpec(
        query=query,
        mode=modes[0] if modes else "stream",
        prefetch_bytes=settings.prefetch_bytes,
        loader=loader,
        cache_dir=settings.cache_dir,
        read_deadline_s=settings.read_deadline_s,
        **{"data_prefetch": True, **own},
        **chosen,
    )


def _spec(trainer: TorchTrainer, settings: Settings, query: Query, **order: Any) -> StreamSpec:
    options = dict(trainer.loader_kwargs or {})
    loader = {name: value for name, value in options.items() if name not in _OWN_PARAMETERS}
    workers = (trainer.compute_kwargs or {}).get("num_workers")
    if workers is not None:
        loader.setdefault("num_workers", workers)
    return StreamSpec(
        query=query,
        key=trainer.key,
        batch_size=options.get("batch_size", 1),
        seed=trainer.seed,
        transform=trainer.transform,
        signature=trainer.signature,
        collate_fn=trainer.collate_fn,
        mode="memory" if trainer.in_memory else "download" if trainer.download else "stream",
        data_prefetch=trainer.data_prefetch,
        prefetch_size=trainer.prefetch_size,
        prefetch_factor=trainer.prefetch_factor,
        prefetch_bytes=settings.prefetch_bytes,
        loader=loader,
        cache_dir=settings.cache_dir,
        read_deadline_s=settings.read_deadline_s,
        **order,
    )
