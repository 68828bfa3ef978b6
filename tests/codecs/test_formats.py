"""The number of a record's format: which are read, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from mongotorch.codecs import FORMAT, WRITTEN, check_format
from mongotorch.errors import FormatError


@pytest.mark.parametrize("record", [{}, {"format": 1}, {"format": FORMAT}, WRITTEN])
def test_what_was_written_so_far_is_read(record: dict[str, Any]) -> None:
    check_format(record, "job")


def test_what_a_newer_release_wrote_is_refused() -> None:
    with pytest.raises(
        FormatError, match=r"job 'a' is of format 3, written by a newer mongotorch.*upgrade"
    ) as caught:
        check_format({"_id": "a", "format": 3}, "job")
    assert caught.value.field == "format"


@pytest.mark.parametrize("written", [0, -1, True, "2", None, 2.0])
def test_what_is_no_number_of_a_format_is_refused(written: Any) -> None:
    with pytest.raises(FormatError, match="no number of a format"):
        check_format({"_id": "a", "format": written}, "job")
