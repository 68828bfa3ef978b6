"""Defines every error that mongotorch raises on purpose, in one tree.

    MongotorchError
    ├── SettingError                a setting, URI or option that cannot be used
    │   └── UnsupportedError        the store or platform lacks what was asked
    ├── ServerUnavailableError      the database cannot be reached
    │   └── EmbeddedServerError     the private mongod does not start or is missing
    │       └── ServerVersionError  its data are of a newer MongoDB, or of one too old
    ├── ParameterError              an argument of a component, refused at construction
    │   ├── IdentifierError
    │   ├── OptimizerError
    │   ├── SignatureError
    │   └── LoaderOptionError
    ├── QueryError                  a query that cannot be run or stored
    ├── DataError                   documents that cannot be trained on
    │   ├── EmptySelectError
    │   ├── EmptyFoldError
    │   ├── FoldMissingError        documents that are in no fold
    │   ├── FieldMissingError       a key that a document lacks
    │   ├── DtypeError              a value that does not fit the dtype of its field
    │   ├── ShapeError              shapes or types that differ between documents
    │   ├── TransformError          a `transform` or `collate_fn` raised
    │   ├── LengthUnknownError      only reading tells how many batches there are
    │   └── DataProcessError        a worker process of a stream died, or made what cannot be handed over
    ├── TrainingError               a run that cannot go on
    │   ├── NonFiniteLossError
    │   └── WorkerLostError         another worker of the run is gone, or did not answer in time
    ├── CodecError                  a value that cannot be stored or read back
    │   ├── UnsafeClosureError      a pickle would carry a client, and its password
    │   └── PythonVersionError      bytecode of another Python minor version
    ├── StoreError                  what the database holds, or refuses to
    │   ├── NotFoundError
    │   ├── BundleError             a file that is no bundle, is cut, or cannot be written
    │   ├── ConflictError           a uuid or version that is taken
    │   ├── InUseError              something else needs what should be removed
    │   ├── FormatError             a record that a newer mongotorch wrote
    │   ├── IntegrityError          bytes that are not what was stored
    │   └── TrustError              a document that nobody trusted has signed, or that was changed
    └── JobError                    a run that did not end in success
        ├── JobFailedError          the run raised, in another process
        ├── JobCancelledError
        ├── JobProcessError         the process of the run ended, or was killed
        ├── JobReleasedError        the worker had to stop; the job waits for another one
        ├── JobRuntimeError         an attempt took longer than `max_runtime_s`
        └── JobTimeoutError         `result(timeout)` ran out; the run goes on

The message says what failed and what to do; `document_id`, `field` and `setting` say where; the driver's own
error is the `__cause__`.

Guarantees: no message holds a password.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

_LONGEST = 4_000  # characters of a message


class MongotorchError(Exception):
    """The root of the tree.

    Args:
        message: What failed and what to do about it, for a person.
        document_id: The `_id` of the document concerned, if there is one.
        field: The field (dotted path) or parameter concerned.
        setting: The setting concerned.
    """

    def __init__(
        self,
        message: str,
        *,
        document_id: Any = None,
        field: str | None = None,
        setting: str | None = None,
    ) -> None:
        # A value that is shown may be a megabyte long.
        message = (
            message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 4 :]}"
        )
        super().__init__(message)
        self.message = message
        self.document_id = document_id
        self.field = field
        self.setting = setting

    def __reduce__(self) -> tuple[Any, ...]:
        # The default drops keyword arguments, and these errors cross from worker processes.
        values = (type(self), self.message, self.document_id, self.field, self.setting)
        return _rebuild, (*values, _crossing(self.__cause__), list(getattr(self, "__notes__", ())))


def _rebuild(
    cls: type[MongotorchError],
    message: str,
    document_id: Any,
    field: str | None,
    setting: str | None,
    cause: BaseException | None = None,
    notes: Sequence[str] = (),
) -> MongotorchError:
    error = cls(message, document_id=document_id, field=field, setting=setting)
    error.__cause__ = cause
    for note in notes:
        error.add_note(note)
    return error


def _crossing(cause: BaseException | None) -> BaseException | None:
    """A cause that another process can rebuild; the message of an error says what matters of any other."""
    try:
        rebuilt = pickle.loads(pickle.dumps(cause))  # noqa: S301 - it was pickled here
    except Exception:  # noqa: BLE001 - an error of somebody else may hold anything
        return None
    return cause if type(rebuilt) is type(cause) else None


class SettingError(MongotorchError):
    """A setting, URI or option that cannot be used."""


class UnsupportedError(SettingError):
    """The store or the platform lacks what was asked for."""


class ServerUnavailableError(MongotorchError):
    """The database cannot be reached."""


class EmbeddedServerError(ServerUnavailableError):
    """The private mongod is missing or does not start."""


class ServerVersionError(EmbeddedServerError):
    """The folder's data are of a newer MongoDB than the mongod that is to open them, or of one too old for it."""


class ParameterError(MongotorchError):
    """An argument of a component, refused at construction."""


class IdentifierError(ParameterError):
    """An identifier outside `[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}`."""


class OptimizerError(ParameterError):
    """An optimizer that does not exist or refuses its arguments."""


class SignatureError(ParameterError):
    """A signature that does not exist, or does not fit the sample or the model."""


class LoaderOptionError(ParameterError):
    """A `loader_kwargs` option that a DataLoader does not have or refuses, or that means nothing here."""


class QueryError(MongotorchError):
    """A query that cannot be run or stored."""


class DataError(MongotorchError):
    """Documents that cannot be trained on."""


class EmptySelectError(DataError):
    """The select matches no document."""


class EmptyFoldError(DataError):
    """The select matches documents, but none in the fold that is needed."""


class FoldMissingError(DataError):
    """A document that is in no fold, such as one with something else than `train` or `valid` under `_fold`."""


class FieldMissingError(DataError):
    """A field of `key` that a document lacks."""


class DtypeError(DataError):
    """A value that does not fit the dtype which a field has for the whole run."""


class ShapeError(DataError):
    """Shapes or types that differ between the documents of a batch."""


class TransformError(DataError):
    """A `transform` or a `collate_fn` raised, or gave nothing; the cause is what it raised."""


class LengthUnknownError(DataError, TypeError):
    """How many batches an epoch has is not known; also a `TypeError`, as for anything else without a length."""


class DataProcessError(DataError):
    """A worker process of a stream ended before its work did, or made what cannot be handed over."""


class TrainingError(MongotorchError):
    """A run that cannot go on."""


class NonFiniteLossError(TrainingError):
    """The objective is NaN or infinite."""


class WorkerLostError(TrainingError):
    """Another worker that trains the same model is gone, or did not answer in time."""


class CodecError(MongotorchError):
    """A value that cannot be stored or read back."""


class UnsafeClosureError(CodecError):
    """A pickle would carry a database client, and with it the password."""


class PythonVersionError(CodecError):
    """A pickle holds bytecode of another Python minor version."""


class StoreError(MongotorchError):
    """What the database holds, or refuses to."""


class NotFoundError(StoreError):
    """Nothing is stored under this name, version or uuid."""


class BundleError(StoreError):
    """A file that is no bundle, is not whole, holds what no bundle holds, or cannot be read or written."""


class ConflictError(StoreError):
    """A uuid or a version that is taken by something else."""


class InUseError(StoreError):
    """Something else needs what should be removed."""


class FormatError(StoreError):
    """A record of a format that this release cannot read: a newer mongotorch wrote it."""


class IntegrityError(StoreError):
    """Stored bytes that are not what was stored."""


class TrustError(StoreError):
    """A document that no accepted key has signed, or that is not what was signed."""


class JobError(MongotorchError):
    """A run that did not end in success."""


class JobFailedError(JobError):
    """The run raised; seen from a process that does not hold the error itself."""


class JobCancelledError(JobError):
    """The run was cancelled."""


class JobProcessError(JobError):
    """The process that ran the job ended in the middle of the run."""


class JobReleasedError(JobError):
    """The worker was told to stop: the run is checkpointed, and the job waits for another worker."""


class JobRuntimeError(JobError):
    """One attempt of the run took longer than `max_runtime_s`."""


class JobTimeoutError(JobError):
    """`result(timeout)` ran out of time; the run itself goes on."""
