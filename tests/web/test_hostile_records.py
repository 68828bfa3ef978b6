"""Whatever a record holds, each page is shown, and what it holds is text there.

Real records are copied with one field exchanged at a time: by script tags, a megabyte of text, values of every
other type, or nothing. On the real server also by text that is no UTF-8 and dates beyond the year 9999.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from pymongo.errors import DuplicateKeyError, PyMongoError
from tests.helpers import COLLECTION
from tests.web.pages import as_json, client, fill_with_runs, pages_of
from tests.web.test_pages import links_of

from mongotorch import Datalayer, TorchModel

SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}"
VALUES: dict[str, Any] = {
    "script": SCRIPT,
    "megabyte": "<b>" + "x" * 1_000_000,
    "none": None,
    "number": 1e308,
    "negative": -1,
    "nan": float("nan"),
    "long": 2**63 - 1,
    "true": True,
    "bytes": b"\x00\xff",
    "list": [[[SCRIPT]], 1, None],
    "mapping": {SCRIPT: {"items": 1, "values": SCRIPT}, "_codec": "value", "get": 0},
    "uuid": bson.ObjectId("5f0000000000000000000000"),
    "regex": bson.Regex("<script>", "i"),
    "decimal": bson.Decimal128("1.5"),
    "controls": "a\x00\x1b[31m\u202e\ud7ff\r\n\tb",
}
BROKEN = "\x01BROKEN\x01"  # eight bytes
RECORDS = (
    *("mt.jobs", "mt.components", "mt.aliases", "mt.metrics", "mt.schedules", "mt.checkpoints"),
    "mt.predictions",
)
KEPT = {"_id", "format"}
# mongomock itself cannot sort or group by values of several types.
SORTED = {"created", "identifier", "type_id", "version", "n", "step", "kind", "alias", "attempt"}


def variants(record: Mapping[str, Any], value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copies of a record, each with another of its fields, or of those one level below, exchanged."""
    for name, part in record.items():
        if name in KEPT:
            continue
        yield name, {**record, name: value}
        for inner in part if isinstance(part, dict) else ():
            changed = copy.deepcopy(dict(record))
            changed[name][inner] = value
            yield f"{name}.{inner}", changed


def own_key(name: str, record: dict[str, Any], field: str, kind: str) -> dict[str, Any]:
    """The record under keys that no other one has, but for the field that was exchanged."""
    tail = f"{field}-{kind}".replace(".", "-")
    keys: dict[str, Any] = {"_id": f"{name}-{tail}"}
    if name == "mt.jobs":
        keys |= {"component": tail, "key": tail}
    elif name == "mt.metrics":
        keys |= {"step": abs(hash(tail)) % 10**9}
    elif name == "mt.components":
        keys |= {"version": abs(hash(tail)) % 10**9, "job": tail}
    elif name == "mt.aliases":
        keys |= {"n": abs(hash(tail)) % 10**9, "job": tail}
    elif name == "mt.predictions":
        keys |= {"_id": f"{str(record['_id']).partition(' ')[0]} {tail}"}  # those of a version begin with its uuid
    return {**record, **{key: part for key, part in keys.items() if key != field or key == "_id"}}


def fill_with_predictions(db: Datalayer) -> tuple[str, TorchModel]:
    """The first job's id and its model, which has also predicted the documents."""
    job, model = fill_with_runs(db)
    db.predict("model", "m", select=db[COLLECTION].find(), into="guess")
    return job, model


def spoil(db: Datalayer, kind: str) -> None:
    """Insert the variants of one record of each kind; those that an index refuses are left out."""
    database = db[COLLECTION].raw.database
    for name in RECORDS:
        record = database[name].find_one({"job": {"$type": "string"}} if name == "mt.components" else {})
        if record is None:
            continue
        for field, changed in variants(record, VALUES[kind]):
            if field in SORTED and db.uri.startswith("mongomock"):
                continue
            with contextlib.suppress(PyMongoError):
                database[name].insert_one(own_key(name, changed, field, kind))


def look_at_all(db: Datalayer, job: str, model: TorchModel) -> None:
    database = db[COLLECTION].raw.database
    jobs = [str(found["_id"]) for found in database["mt.jobs"].find({}, {"_id": 1})]
    versions = [str(found["_id"]) for found in database["mt.components"].find({"type_id": "model"}, {"_id": 1})]
    addresses = [*pages_of(db, job, model)[:-2], "/?limit=1000", "/storage"]
    addresses += [f"/runs/{one}" for one in jobs[:40]] + [f"/lineage/{one}" for one in versions[:40]]
    with client(db) as web:
        for address in addresses:
            page, twin = web.get(address), web.get(as_json(address))
            assert (page.status_code, twin.status_code) == (200, 200), (address, twin.text[:500])
            json.loads(twin.text, parse_constant=pytest.fail)
            assert "<script>alert" not in page.text
            assert "<img" not in page.text
            assert len(page.text) < 3_000_000, address


@pytest.mark.parametrize("kind", VALUES)
def test_no_value_breaks_a_page(db: Datalayer, kind: str) -> None:
    job, model = fill_with_predictions(db)
    spoil(db, kind)
    look_at_all(db, job, model)


def test_no_missing_field_breaks_a_page(db: Datalayer) -> None:
    job, model = fill_with_predictions(db)
    database = db[COLLECTION].raw.database
    for name in RECORDS:
        for record in list(database[name].find().limit(1)):
            for field in [field for field in record if field not in KEPT]:
                less = own_key(name, {key: part for key, part in record.items() if key != field}, "", field)
                less.pop(field, None)
                database[name].insert_one(less)
        database[name].insert_one({"_id": f"{name}-nothing"})
    look_at_all(db, job, model)


def test_broken_bson_breaks_no_page(server_uri: str) -> None:
    with Datalayer.connect(server_uri, valid_fraction=0.2, progress=False) as db:
        job, model = fill_with_predictions(db)
        database = db[COLLECTION].raw.database
        far = bson.DatetimeMS(253402300800000)  # the year 10000
        for name in RECORDS:
            record = database[name].find_one({}) or {}  # the checkpoints are gone
            for number, field in enumerate([field for field in record if field not in KEPT]):
                for value in (BROKEN, far):
                    tail = f"broken-{number}-{type(value).__name__}"
                    changed = own_key(name, {**record, field: value}, field, tail)
                    raw = bson.encode(changed).replace(BROKEN.encode(), b"\xff\xfe\xc3\x28\xf0\x9f\x92\xff")
                    with contextlib.suppress(DuplicateKeyError):
                        database[name].insert_one(RawBSONDocument(raw))
        look_at_all(db, job, model)


def test_names_in_addresses_are_any_text(db: Datalayer) -> None:
    _, model = fill_with_runs(db)
    database = db[COLLECTION].raw.database
    stored = database["mt.components"].find_one({"_id": model.uuid})
    for number, name in enumerate(("a/b", "../..", "?x=1&y=2", "#top", "ü ß", SCRIPT, "..")):
        record = {**stored, "_id": f"other-{number}", "identifier": name, "job": f"other-{number}"}
        database["mt.components"].insert_one(record)
        job = {**database["mt.jobs"].find_one({}), "_id": f"{name}", "component": f"other-{number}"}
        database["mt.jobs"].insert_one({key: part for key, part in job.items() if key != "key"})
    with client(db) as web:
        for page in ("/models", "/"):
            for link in links_of(web.get(page).text):
                if link.startswith(("/models/", "/runs/")):
                    assert web.get(link).status_code == 200, link
