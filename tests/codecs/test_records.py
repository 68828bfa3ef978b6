"""What a stored record says without being decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mongotorch import Cron
from mongotorch.codecs import (
    FORMAT,
    WRITTEN,
    Codecs,
    Opaque,
    check_format,
    codec_of,
    describe,
    reference,
    referenced,
)
from mongotorch.errors import FormatError


def stored(value: Any) -> Any:
    return Codecs.builtin().encode(value, lambda data: "0" * 64)


@pytest.mark.parametrize(
    "value", [None, 1, 2**70, "x", [1, "a"], ("x", ("y", 2)), {"lr": 0.1, "betas": (0.9, 0.99)}]
)
def test_plain_values_and_tuples_are_described_as_they_are(value: Any) -> None:
    assert describe(stored(value)) == value
    assert type(describe(stored(value))) is type(value)


def test_names_and_values_are_described_by_todays_names() -> None:
    assert describe(stored(np.mean)) == "numpy.mean"
    assert describe({"_codec": "name", "name": "mongotorch.run.triggers.cron.Cron"}) == "mongotorch.Cron"
    first = {**stored(Cron("0 3 * * *")), "class": "mongotorch.run.triggers.cron:Cron"}
    described = describe([first])[0]
    assert described["class"] == "mongotorch:Cron"
    assert described["fields"]["expression"] == "0 3 * * *"


def test_what_lies_in_blobs_is_named_and_can_be_told_from_text() -> None:
    described = describe(stored([np.zeros(2), lambda: 0, "<array>"]))
    assert described == ["<array>", "<dill>", "<array>"]
    assert [isinstance(part, Opaque) for part in described] == [True, True, False]


def test_a_reference_is_known_by_its_uuid() -> None:
    record = reference("u", type_id="model", identifier="m")
    assert (referenced(record), codec_of(record)) == ("u", None)
    assert describe(record) == record
    assert referenced({"a": 1}) is referenced([record]) is referenced("u") is None


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
