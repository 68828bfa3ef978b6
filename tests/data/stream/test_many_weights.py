"""Weights over many documents, as the server sends them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mongotorch.data import Stream, StreamSpec
from mongotorch.mongo.connection import open_address
from mongotorch.query import Query
from mongotorch.settings import read_settings


@pytest.mark.parametrize("uri", ["mongod"], indirect=True)
def test_a_hundred_thousand_documents_come_as_their_weights_say(uri: str, database: Any) -> None:
    """1 : 9; resumed in the middle of an epoch, and by 1 and 2 workers, the same rows in the same order."""
    database["many"].insert_many([{"_id": n, "y": n, "w": 1.8 if n % 2 else 0.2} for n in range(100_000)])
    given: dict[str, Any] = {"query": Query.find("many"), "key": "y", "sample_weight": "w", "batch_size": 500}
    with open_address(uri, read_settings()) as connection:
        opener = connection.opener

    def read(workers: int, stop: int | None = None) -> list[list[int]]:
        spec = StreamSpec(shuffle=True, seed=7, loader={"num_workers": workers}, **given)
        with Stream(opener, spec) as stream:
            running = iter(stream)
            rows = [batch.tolist() for batch in itertools.islice(running, stop)]
            if stop is None:
                return rows
            with Stream(opener, spec) as resumed:
                resumed.load_state_dict(stream.state_dict())
                return rows + [batch.tolist() for batch in resumed.rest()]

    expected = read(0)
    flat = [y for batch in expected for y in batch]
    heavy = sum(y % 2 for y in flat)
    assert len(flat) == pytest.approx(100_000, rel=0.01)
    assert heavy / len(flat) == pytest.approx(0.9, abs=0.01)
    assert read(1) == read(2) == read(0, stop=77) == expected
