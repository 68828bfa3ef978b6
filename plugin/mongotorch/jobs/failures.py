"""Describes the error of a run as plain values, and makes it again from them, in another process.

Guarantees: a description holds no password. An error that is made again has the type's name, the text and the
details of the first one; where its class is mongotorch's or Python's own, it has that class.
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from typing import Any, Final

from mongotorch import errors
from mongotorch.errors import (
    JobProcessError,
    JobRuntimeError,
    MongotorchError,
    ServerUnavailableError,
    TrainingError,
    WorkerLostError,
)
from mongotorch.mongo.driver_errors import is_transient, redact

RUNTIME_MARGIN_S: Final = 2.0
"""How much longer than `max_runtime_s` a run has to end by itself, between two steps."""
_MOST_TEXT: Final = 30_000  # characters of a traceback that is carried on


def too_long(job_id: str, max_runtime_s: float) -> JobRuntimeError:
    """The error of an attempt that has taken longer than it may."""
    return JobRuntimeError(
        f"job {job_id} ran for longer than max_runtime_s={max_runtime_s:g} allows; give it more, or less to do",
        setting="max_runtime_s",
    )


def described(error: BaseException) -> dict[str, Any]:
    """An error as a job's document keeps it; plain BSON but for `document_id`, which is as the error has it.

    Returns:
        `type`, `message`, `traceback`, `transient` (whether the same job may succeed later), `document_id`,
        `field` and `setting`.
    """
    own = isinstance(error, MongotorchError)
    return {
        "type": type(error).__name__,
        "message": _text(error),
        "traceback": redact("".join(traceback.format_exception(error))),
        "transient": _may_pass(error),
        "document_id": getattr(error, "document_id", None) if own else None,
        "field": getattr(error, "field", None) if own else None,
        "setting": getattr(error, "setting", None) if own else None,
    }


def rebuilt(description: Mapping[str, Any], *, where: str) -> Exception:
    """The error of a description.

    Args:
        description: What `described` gave.
        where: Where it was raised, such as `rank 1 of 4`; a note of the error says so, with the traceback.
    """
    name, message = str(description["type"]), str(description["message"])
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MongotorchError):
        details = {detail: description.get(detail) for detail in ("document_id", "field", "setting")}
        error: Exception = kind(message, **details)
    else:
        error = _builtin(name, message) or _of_name(name, message, transient=bool(description.get("transient")))
    trace = str(description.get("traceback") or "")
    error.add_note(f"on {where}" + (f":\n{trace[-_MOST_TEXT:]}" if trace else ""))
    return error


def _builtin(name: str, message: str) -> Exception | None:
    """An error of Python's own that says the same; None where there is none, or it says another thing."""
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return None
    try:
        made = kind(message)
    except Exception:  # noqa: BLE001 - some classes need further arguments
        return None
    return made if str(made) == message else None


def _of_name(name: str, message: str, *, transient: bool) -> MongotorchError:
    """An error of a class that is not known here: one of mongotorch's by the same name."""
    base = ServerUnavailableError if transient else TrainingError
    made: MongotorchError = type(name, (base,), {})(message)
    return made


def _may_pass(error: BaseException) -> bool:
    """Whether the same job may succeed later: the database or the machine failed, not the run."""
    passing = (ServerUnavailableError, JobProcessError, WorkerLostError, OSError, MemoryError)
    return isinstance(error, passing) or is_transient(error)


def _text(error: BaseException) -> str:
    """What an error says, without passwords; some cannot even say that."""
    if isinstance(error, SystemExit):
        return f"the run called sys.exit({error.code!r})"
    try:
        return redact(str(error))
    except Exception as second:  # noqa: BLE001 - any code may be in there
        return f"the error has no text: its `__str__` raised {type(second).__name__}"
