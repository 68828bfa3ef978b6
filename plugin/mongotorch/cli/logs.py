"""Sets up the log of the worker command: lines for people or JSON for programs, on stderr.

Guarantees: no password of an address is in a line; a JSON line is one object, whatever a message holds.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

FIELDS: Final = ("event", "job", "attempt", "component", "step", "values", "version", "why", "schedule")
"""What records of mongotorch say besides their message."""


def redact(text: str) -> str:
    """A text without the passwords of addresses."""
    from mongotorch.mongo.driver_errors import redact as redacted  # imports the driver

    return redacted(text)


class LogLevel(enum.StrEnum):
    """What is logged at least."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(enum.StrEnum):
    """How a record is written."""

    text = "text"
    json = "json"


class TextFormatter(logging.Formatter):
    """Time in UTC, level, and message."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        lines = [f"{moment}Z {record.levelname} {record.name}: {record.getMessage()}"]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return redact("\n".join(lines))


class JsonFormatter(logging.Formatter):
    """One JSON object a record: `time`, `level`, `logger`, `message`, and the `FIELDS` that the record has."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {"time": moment, "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = redact(record.getMessage())
        entry |= {name: _readable(getattr(record, name)) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


def _readable(value: Any) -> Any:
    """A value of a field as JSON has it: a number that is none becomes text."""
    if isinstance(value, Mapping):
        return {str(name): _readable(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return redact(value) if isinstance(value, str) else value


class _OwnHandler(logging.StreamHandler[Any]):
    """A handler that this module has set up."""


def configure_logging(level: str, form: str) -> None:
    """Write what mongotorch logs to stderr, and the warnings of others, in place of what an earlier call set up.

    What the driver, torch and `warnings` have to say goes the same way, so that every line has one format and no
    password of an address.

    Args:
        level: The name of the least level of mongotorch's own records.
        form: `text` or `json`.
    """
    handler = _OwnHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root, logger = logging.getLogger(), logging.getLogger("mongotorch")
    root.handlers = [*(one for one in root.handlers if not isinstance(one, _OwnHandler)), handler]
    logging.captureWarnings(True)
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


@contextlib.contextmanager
def logging_to_stderr(level: str, form: str) -> Iterator[None]:
    """Write what is logged to stderr inside; see `configure_logging`."""
    root, logger = logging.getLogger(), logging.getLogger("mongotorch")
    before, of_root = (logger.handlers, logger.level, logger.propagate), root.handlers
    configure_logging(level, form)
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before
        root.handlers = of_root
        logging.captureWarnings(False)
