"""All pages with code run one after the other over one database, and then once more, as a reader may do it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from tests.docs.pages import in_order, name_of, run_page


@pytest.fixture(scope="module")
def one_database(mongod: str) -> Iterator[str]:
    yield (uri := f"mongodb://{mongod}/docs_in_order?replicaSet=rs0")
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        client.drop_database("docs_in_order")


@pytest.mark.timeout(1200)
def test_all_pages_in_order_over_one_database_twice(
    one_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for turn in ("first", "second"):
        for page in in_order():
            try:
                run_page(page, monkeypatch, tmp_path / turn / name_of(page).replace("/", "-"), one_database)
            except Exception as error:
                error.add_note(f"in {name_of(page)}, the {turn} time")
                raise
