"""The number of the format that records are written in, and the refusal of records that a newer release wrote.

Guarantees: every record that mongotorch writes has the number in its field `format`; one without it was written by
the first releases and is of format 1. This release reads formats 1 and 2 and writes 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mongotorch.errors import FormatError

FORMAT: Final = 2
"""The format that this release writes, and the newest that it reads."""
FIELD: Final = "format"
WRITTEN: Final = {FIELD: FORMAT}
"""What a record says of its format."""
READABLE: Final = {FIELD: {"$not": {"$gt": FORMAT}}}
"""The filter for records that this release can read."""
NEWER: Final = {FIELD: {"$gt": FORMAT}}
"""The filter for records that it cannot read."""


def check_format(record: Mapping[str, Any], kind: str) -> None:
    """Return if this release can read a record.

    Args:
        record: As it is stored.
        kind: What it is, for the error.

    Raises:
        FormatError: A newer release wrote it, or its `format` is no number of a format; nothing of it was read.
    """
    written = record.get(FIELD, 1)
    name = f"{kind} {record.get('_id')!r}"
    if isinstance(written, bool) or not isinstance(written, int) or written < 1:
        raise FormatError(f"{name} has format={written!r}, which is no number of a format", field=FIELD)
    if written > FORMAT:
        raise FormatError(
            f"{name} is of format {written}, written by a newer mongotorch; this one reads up to format {FORMAT}: "
            "upgrade mongotorch",
            field=FIELD,
        )
