"""What no trusted key signed, or was changed after it was signed, is refused before anything is unpickled."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import pickle
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import bson
import mongomock
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mongotorch.codecs import pickles
from mongotorch.component import Component
from mongotorch.errors import (
    CodecError,
    IntegrityError,
    MongotorchError,
    SettingError,
    StoreError,
    TrustError,
    UnsupportedError,
)
from mongotorch.services.versions.catalog import Catalog
from mongotorch.settings import read_settings
from mongotorch.store import Checkpoints, Jobs, Trust, Verifier, trust_of
from mongotorch.store.signing import HmacKey, canonical

KEY, OLD, FOREIGN = HmacKey(b"k" * 16), HmacKey(b"o" * 16), HmacKey(b"f" * 16)
SIGNED = Trust(KEY, (KEY,), required=True)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Thing(Component):
    type_id: ClassVar[str] = "thing"

    value: Any = None


class House:
    def __init__(self, database: Any, trust: Trust | None = SIGNED) -> None:
        self.database = database
        self.catalog = Catalog(database, trust)
        self.catalog.ensure_indexes()
        self.components, self.blobs, self.aliases = (
            self.catalog.components,
            self.catalog.blobs,
            self.catalog.aliases,
        )
        self.documents = database["mt.components"]

    def trusting(self, trust: Trust | None) -> House:
        return House(self.database, trust)

    def store(self, name: str = "a", value: Any = None) -> str:
        return self.catalog.store(Thing(name, value=torch.arange(3.0) if value is None else value))


@pytest.fixture
def house(database: Any) -> House:
    return House(database)


@pytest.fixture
def never_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was unpickled")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(pickles._Unpickler, "load", refuse)


def test_what_was_signed_loads_and_is_recognised(house: House) -> None:
    thing = Thing("a", value={"weights": torch.arange(3.0), "when": datetime(2026, 1, 2, 3, 4, 5, 678000)})

    assert house.catalog.store(thing) == thing.uuid
    count = house.documents.count_documents({})
    assert house.catalog.store(thing) == thing.uuid
    assert house.documents.count_documents({}) == count

    loaded = house.catalog.load(house.catalog.find("thing", "a"))
    assert isinstance(loaded, Thing)
    assert torch.equal(loaded.value["weights"], torch.arange(3.0))
    assert house.documents.find_one({})["signature"]["key"] == KEY.key_id


def test_every_version_is_signed_with_its_own_number(house: House) -> None:
    for value in range(3):
        house.store(value=[value])

    assert [house.components.find("thing", "a", version)["version"] for version in range(3)] == [0, 1, 2]


@pytest.mark.usefixtures("never_unpickled")
@pytest.mark.parametrize("trust", [None, Trust(FOREIGN)])
def test_what_no_accepted_key_signed_is_refused(house: House, trust: Trust | None) -> None:
    uuid = house.trusting(trust).store()

    with pytest.raises(TrustError, match=uuid):
        house.catalog.load_uuid(uuid)
    with pytest.raises(TrustError, match="thing 'a'"):
        house.catalog.load(house.catalog.find("thing", "a"))


def test_without_the_demand_an_unsigned_document_loads_but_a_changed_one_does_not(house: House) -> None:
    lenient = house.trusting(Trust(None, (KEY,)))
    unsigned, signed = house.trusting(None).store("plain"), house.store("signed")

    assert lenient.catalog.load_uuid(unsigned)
    assert lenient.catalog.load_uuid(signed)
    house.documents.update_one({"_id": signed}, {"$set": {"fields.value": 1}})
    with pytest.raises(TrustError, match="changed"):
        lenient.catalog.load_uuid(signed)


@pytest.mark.usefixtures("never_unpickled")
@pytest.mark.parametrize(
    "change",
    [
        {"identifier": "b"},
        {"type_id": "model"},
        {"version": 7},
        {"digest": "0"},
        {"fields.value": {"_codec": "dill", "blob": "0" * 64, "python": None}},
        {"class": {"_codec": "name", "name": "os.system"}},
        {"blobs": []},
        {"refs": ["other"]},
        {"anchor": None},
        {"more": 1},
        {"signature.value": b"0" * 32},
        {"signature.key": FOREIGN.key_id},
        {"signature.algorithm": "none"},
        {"signature.more": 1},
        {"signature": "yes"},
        {"signature": None},
    ],
)
def test_a_document_that_was_changed_is_refused(house: House, change: dict[str, Any]) -> None:
    uuid = house.store()
    house.documents.update_one({"_id": uuid}, {"$set": change})

    with pytest.raises(TrustError):
        house.catalog.load_uuid(uuid)


@pytest.mark.usefixtures("never_unpickled")
def test_a_component_that_was_copied_under_another_name_or_uuid_is_refused(house: House) -> None:
    old, new = house.store("a", value=[1]), house.store("a", value=[2])
    document = house.documents.find_one({"_id": old})

    house.documents.insert_one({**document, "_id": "copy", "identifier": "b"})
    with pytest.raises(TrustError):
        house.catalog.load(house.catalog.find("thing", "b"))
    house.documents.delete_one({"_id": new})
    house.documents.insert_one({**document, "_id": new, "version": 1})  # the older one under this uuid
    with pytest.raises(TrustError):
        house.catalog.load_uuid(new)


@pytest.mark.usefixtures("never_unpickled")
def test_a_blob_in_the_place_of_another_valid_one_is_refused(house: House) -> None:
    uuid = house.store()
    mine = house.documents.find_one({"_id": uuid})["blobs"][0]
    other = house.blobs.put(b"another valid blob")
    files = house.database["mt.artifacts.files"]
    files.delete_one({"filename": mine})
    files.update_one({"filename": other}, {"$set": {"filename": mine}})

    with pytest.raises(IntegrityError, match=mine):
        house.catalog.load_uuid(uuid)


def test_keys_are_rotated_without_a_pause(house: House) -> None:
    before = house.trusting(Trust(OLD, (OLD,), required=True)).store("before")
    both = house.trusting(Trust(KEY, (KEY, OLD), required=True))
    after = both.store("after")

    assert both.catalog.load_uuid(before)
    assert both.catalog.load_uuid(after)
    with pytest.raises(TrustError, match="not among the accepted"):
        house.catalog.load_uuid(before)


def test_a_checkpoint_is_signed_too_and_does_not_pass_for_a_component(database: Any) -> None:
    jobs, checkpoints = Jobs(database), Checkpoints(database, SIGNED)
    job, _ = jobs.add(component="c", type_id="trainer", identifier="t")
    claimed = jobs.claim(worker="w", lease_s=60)
    assert claimed is not None
    assert checkpoints.put(job, claimed["attempt"], 1, {"rng": b"1", "at": [1, 2.5]}, [])

    assert Checkpoints(database, SIGNED).newest(job)
    document = database["mt.checkpoints"].find_one({})
    with pytest.raises(TrustError):
        SIGNED.check(document, kind="component")
    database["mt.checkpoints"].update_one({}, {"$set": {"body.rng": b"2"}})
    with pytest.raises(TrustError):
        checkpoints.newest(job)


def test_verifying_names_everything_that_is_broken(house: House) -> None:
    good, changed = house.store("good"), house.store("changed", value=[1])
    lost = house.store("lost", value=torch.ones(5))
    house.documents.update_one({"_id": changed}, {"$set": {"digest": "0"}})
    shared = set(house.documents.find_one({"_id": good})["blobs"])
    house.blobs.remove(next(iter(set(house.documents.find_one({"_id": lost})["blobs"]) - shared)))
    broken = house.blobs.put(b"right")
    file = house.database["mt.artifacts.files"].find_one({"filename": broken})
    house.database["mt.artifacts.chunks"].update_one({"files_id": file["_id"]}, {"$set": {"data": b"wrong"}})

    report = Verifier(house.database, SIGNED).verify()

    assert report.components == 3
    assert len(report.problems) == 3
    for part in (changed, lost, broken):
        assert sum(part in problem for problem in report.problems) == 1
    assert not any(good in problem for problem in report.problems)


# One flipped bit, anywhere: the whole of a signed component and of its blobs, on mongomock.

_client: Any = mongomock.MongoClient()


def _fresh() -> House:
    _client.drop_database("flips")
    return House(_client["flips"])


_house = _fresh()
_uuid = _house.store("a", value={"w": torch.arange(300.0), "f": [1.5, "text", b"bytes", True, 2**40]})
_document: dict[str, Any] = _house.documents.find_one({"_id": _uuid})
_raw = bson.encode(_document)


@given(st.integers(0, len(_raw) * 8 - 1))
@example(_raw.index(b"value\0 \0\0\0") * 8 + 80)  # the subtype of the signature's own binary
@settings(max_examples=400, deadline=None)
def test_any_bit_flipped_in_a_document_is_noticed_before_anything_is_unpickled(bit: int) -> None:
    raw = bytearray(_raw)
    raw[bit // 8] ^= 1 << bit % 8
    try:
        changed = bson.decode(bytes(raw))
        same = bson.encode(changed) == _raw
    except Exception:  # noqa: BLE001 - the driver itself refuses it, in its own ways
        assume(False)
        return
    assume(not same)
    if changed.get("_id") != _uuid or changed.get("anchor") is not None:
        return  # then it is another document, or invisible: not found under this uuid

    with pytest.raises(TrustError):
        SIGNED.check(changed, kind="component")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_bit_flipped_in_a_chunk_is_noticed_before_anything_is_unpickled(data: st.DataObject) -> None:
    chunks = _house.database["mt.artifacts.chunks"]
    chunk = data.draw(st.sampled_from(list(chunks.find())))
    bit = data.draw(st.integers(0, len(chunk["data"]) * 8 - 1))
    changed = bytearray(chunk["data"])
    changed[bit // 8] ^= 1 << bit % 8
    chunks.update_one({"_id": chunk["_id"]}, {"$set": {"data": bytes(changed)}})
    try:
        with pytest.raises(IntegrityError):
            _house.catalog.load_uuid(_uuid)
    finally:
        chunks.update_one({"_id": chunk["_id"]}, {"$set": {"data": chunk["data"]}})


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
    | st.datetimes(datetime(1, 1, 2), datetime(9999, 1, 1)).map(lambda d: d.replace(tzinfo=UTC)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1).filter(lambda k: "\0" not in k), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["a", "b", "_id", "fields"]), _plain))
@settings(max_examples=200, deadline=None)
def test_the_signed_form_is_the_same_before_and_after_the_database(document: dict[str, Any]) -> None:
    stored = bson.decode(bson.encode(document))

    assert canonical(stored, kind="k") == canonical(document, kind="k")
    assert canonical(dict(reversed(stored.items())), kind="k") == canonical(document, kind="k")


def test_what_bson_cannot_hold_is_refused_before_it_is_written(house: House) -> None:
    with pytest.raises(CodecError):
        house.components.publish({"_id": "u", "type_id": "t", "identifier": "i", "big": 2**70})

    assert house.documents.count_documents({}) == 0


# From settings to keys.


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's keys\nhmac:oooooooooooooooo\n\n ffffffffffffffff # old\n")
    monkeypatch.setenv("MONGOTORCH_SIGNING_KEY", "kkkkkkkkkkkkkkkk")
    monkeypatch.setenv("MONGOTORCH_SIGNING_KEY_FILE", str(file))
    monkeypatch.setenv("MONGOTORCH_TRUST", "signed")
    settings = read_settings()
    assert settings.signing_key is not None

    trust = trust_of(
        key=settings.signing_key.get_secret_value(), key_file=settings.signing_key_file, policy=settings.trust
    )

    assert trust is not None
    assert trust.signing is not None
    assert trust.signing.key_id == KEY.key_id
    assert {key.key_id for key in trust.accepted} == {KEY.key_id, OLD.key_id, FOREIGN.key_id}
    assert trust.required


def test_no_key_is_in_what_people_read() -> None:
    secret = "s3cret-s3cret-s3cret"
    trust = trust_of(key=secret, key_file=None, policy="any")

    for text in (repr(trust), repr(read_settings(signing_key=secret)), str(read_settings(signing_key=secret))):
        assert secret not in text
    with pytest.raises(SettingError) as caught:
        trust_of(key=f"{secret},short", key_file=None, policy="any")
    assert secret not in caught.value.message
    assert "short " not in caught.value.message.replace("shorter", "")


@pytest.mark.parametrize(
    ("key", "file", "policy", "setting"),
    [
        (None, None, "signed", "trust"),
        ("short", None, "any", "signing_key"),
        (None, "/nowhere/keys", "any", "signing_key_file"),
        ("ed25519:AAAA", None, "any", "signing_key"),
        ("ed25519:not base64!", None, "any", "signing_key"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(key: str, file: str, policy: Any, setting: str) -> None:
    with pytest.raises(SettingError) as caught:
        trust_of(key=key, key_file=None if file is None else Path(file), policy=policy)

    assert caught.value.setting == setting


def test_without_keys_nothing_is_signed_or_checked(house: House) -> None:
    open_house = house.trusting(trust_of(key=None, key_file=None, policy="any"))

    assert open_house.catalog.load_uuid(open_house.store())
    assert "signature" not in house.documents.find_one({})


def test_the_errors_are_of_the_store() -> None:
    assert issubclass(TrustError, StoreError)
    assert issubclass(TrustError, MongotorchError)


_SEED = base64.b64encode(bytes(range(32))).decode()


def test_who_holds_only_the_public_key_can_check_and_not_sign(house: House) -> None:
    module: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    public = module.Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
    writer = house.trusting(trust_of(key=f"ed25519:{_SEED}", key_file=None, policy="signed"))
    reading = trust_of(key=f"ed25519-public:{base64.b64encode(public).decode()}", key_file=None, policy="signed")

    uuid = writer.store()

    assert reading is not None
    assert reading.signing is None
    assert house.trusting(reading).catalog.load_uuid(uuid)
    house.documents.update_one({"_id": uuid}, {"$set": {"digest": "0"}})
    with pytest.raises(TrustError):
        house.trusting(reading).catalog.load_uuid(uuid)
    with pytest.raises(UnsupportedError):
        reading.accepted[0].sign(b"")


def test_without_the_package_an_ed25519_key_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(UnsupportedError, match="cryptography"):
        trust_of(key=f"ed25519:{_SEED}", key_file=None, policy="any")
