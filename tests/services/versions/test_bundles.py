"""A version goes through a file into another database; a file that is not what it says changes nothing there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import COLLECTION, documents_in, fill, model, points, same, state, trainer

from mongotorch import Better, Datalayer, Metric, NewDocuments, Schedule, Validation, Worker
from mongotorch.codecs import Codecs
from mongotorch.errors import (
    BundleError,
    ConflictError,
    FormatError,
    IntegrityError,
    MongotorchError,
    NotFoundError,
    ParameterError,
    SettingError,
    StoreError,
    TrustError,
)
from mongotorch.store import Components, to_bson

KEY, OTHER_KEY = "hmac:" + "k" * 32, "hmac:" + "o" * 32


def accuracy(output: Any, target: Any) -> Any:
    return (output.argmax(-1) == target).float().mean()


@contextlib.contextmanager
def beside(db: Datalayer, **settings: Any) -> Iterator[Datalayer]:
    """Another database on the same server."""
    scheme, _, rest = db.uri.partition("://")
    where, slash, query = rest.partition("?")
    with Datalayer.connect(f"{scheme}://{where}_beside{slash}{query}", progress=False, **settings) as other:
        yield other
        other[COLLECTION].raw.database.client.drop_database(other[COLLECTION].raw.database.name)


def trained(db: Datalayer, **given: Any) -> Any:
    validation = Validation("v", metrics=(Metric("accuracy", object=accuracy),))
    return db.apply(trainer(fill(db), model=model(validation=validation), log_interval=2, **given)).result()


def test_an_imported_version_is_the_exported_one(db: Datalayer, tmp_path: Path) -> None:
    version = trained(db)
    written = db.export(tmp_path / "m.zip", "model", "m")
    assert (written.type_id, written.identifier, written.version) == ("model", "m", 1)
    assert (written.uuid, written.components) == (version.uuid, 4)
    db.export(tmp_path / "again.zip", uuid=version.uuid)
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "m.zip").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"m.zip", "again.zip"}

    with beside(db) as other:
        for seed in (1, 2, 3):
            other.apply(model(seed))
        taken = other.import_bundle(tmp_path / "m.zip")
        assert (taken.version, taken.exported_version, taken.uuid, taken.was_there) == (3, 1, version.uuid, False)
        loaded = other.load("model", "m", 3)
        assert same(state(loaded), state(version))
        assert same(loaded.trainer.optimizer_state, version.trainer.optimizer_state)
        assert loaded.predict([1.0, 2.0, 3.0, 4.0]).tolist() == version.predict([1.0, 2.0, 3.0, 4.0]).tolist()
        assert list(other.metrics(loaded)) == list(db.metrics(version))
        here, there = other.show(uuid=version.uuid), db.show(uuid=version.uuid)
        assert {name: here[name] for name in there if name != "version"} == {
            name: value for name, value in there.items() if name != "version"
        }
        assert here["imported"]["version"] == 1
        assert other.load("model", "m").uuid == version.uuid  # the newest that was trained
        job = other.job(there["job"])
        assert (job.status, job.progress["step"]) == ("succeeded", 12)
        assert same(state(job.result()), state(version))

        before = documents_in(other)
        again = other.import_bundle(tmp_path / "m.zip")
        assert (again.was_there, again.version) == (True, 3)
        assert documents_in(other) == before
        assert not other.verify().problems
        assert other.diff(version.uuid, other.show("model", "m", 0)["_id"])
        other.gc(grace_s=0)
        assert same(state(other.load("model", "m", 3)), state(version))
        # Onward from there: what the first import says is kept.
        other.export(tmp_path / "third.zip", "model", "m", 3)
        with beside(other) as third:
            third.import_bundle(tmp_path / "third.zip")
            origin = third.show("model", "m", 0)["imported"]
            assert (origin["version"], origin["before"]["version"]) == (3, 1)


def test_the_trainer_of_a_run_goes_with_its_model_and_is_recognised(db: Datalayer, tmp_path: Path) -> None:
    applied = trainer(fill(db))
    version = db.apply(applied).result()
    assert db.export(tmp_path / "t.zip", "trainer", "t").uuid == version.uuid
    db.export(tmp_path / "first.zip", "trainer", "t", 0)
    with beside(db) as other:
        other.import_bundle(tmp_path / "first.zip")
        other.import_bundle(tmp_path / "t.zip")
        assert other.show("trainer", "t") == [0, 1]
        fill(other)
        assert other.apply(applied).result().uuid == version.uuid  # it is what was trained from this
        follow = other.apply(other.load("trainer", "t", 1).replace(max_iterations=16)).result()
        assert follow.version == 2


def test_the_verdict_and_the_moves_go_along(db: Datalayer, tmp_path: Path) -> None:
    select = fill(db)
    db.apply(trainer(select)).result()
    db.promote("model", "m", why="the first")
    db.apply(Schedule("s", trainer=trainer(select), trigger=NewDocuments(30), gate=Better()))
    db[COLLECTION].raw.insert_many([{**row, "_id": 1000 + row["_id"]} for row in points(30)])
    Worker(db).run(until_idle=True)
    written = db.export(tmp_path / "m.zip", "model", "m", 2)
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        assert "evidence/aliases.bson" in archive.namelist()
    with beside(db) as other:
        other.import_bundle(written.path)
        assert other.show("model", "m", 0)["verdict"] == db.show("model", "m", 2)["verdict"]
        assert other.history("model", "m") == []  # no alias moves by an import


def test_what_cannot_be_exported_is_refused(db: Datalayer, tmp_path: Path) -> None:
    db.apply(model())
    with pytest.raises(NotFoundError):
        db.export(tmp_path / "m.zip", "model", "other")
    with pytest.raises(ParameterError):
        db.export(tmp_path / "m.zip")
    with pytest.raises(BundleError, match="cannot be written"):
        db.export(tmp_path / "no" / "m.zip", "model", "m")
    db.export(tmp_path / "m.zip", "model", "m")
    with pytest.raises(BundleError, match="is there"):
        db.export(tmp_path / "m.zip", "model", "m")
    db.export(tmp_path / "m.zip", "model", "m", force=True)
    db.apply(Schedule("s", trainer=trainer(fill(db)), trigger=NewDocuments(30)))
    with pytest.raises(ParameterError, match="schedule"):
        db.export(tmp_path / "s.zip", "schedule", "s")
    assert [path.name for path in tmp_path.iterdir()] == ["m.zip"]


Change = Callable[[dict[str, bytes]], None]


def rewritten(source: Path, target: Path, change: Change, *, hashes: bool = False) -> Path:
    """A bundle with other members; with `hashes` its manifest is made to fit them."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if hashes:
        manifest = json.loads(members.pop("manifest.json"))
        manifest["members"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return target


def of_kind(members: dict[str, bytes], folder: str) -> str:
    return next(name for name in sorted(members) if name.startswith(folder))


def flip(folder: str) -> Change:
    def change(members: dict[str, bytes]) -> None:
        name = of_kind(members, folder)
        data = bytearray(members[name])
        data[len(data) // 2] ^= 1
        members[name] = bytes(data)

    return change


def add(name: str, data: bytes = b"x") -> Change:
    return lambda members: members.update({name: data})


def drop(folder: str) -> Change:
    return lambda members: members.__delitem__(of_kind(members, folder))


def manifest(**fields: Any) -> Change:
    def change(members: dict[str, bytes]) -> None:
        members["manifest.json"] = json.dumps({**json.loads(members["manifest.json"]), **fields}).encode()

    return change


def record(**fields: Any) -> Change:
    """Other fields in every record."""

    def change(members: dict[str, bytes]) -> None:
        import bson

        for name in [name for name in members if name.startswith("records/")]:
            members[name] = to_bson({**bson.decode(members[name]), **fields})

    return change


WRONG: dict[str, tuple[Change, bool, type[MongotorchError]]] = {
    "a bit of a blob": (flip("blobs/"), False, IntegrityError),
    "a bit of a record": (flip("records/"), False, IntegrityError),
    "a blob under another name": (flip("blobs/"), True, BundleError),
    "a blob is missing": (drop("blobs/"), False, BundleError),
    "a blob is missing everywhere": (drop("blobs/"), True, BundleError),
    "a record is missing everywhere": (drop("records/"), True, BundleError),
    "a blob that nothing names": (add("blobs/" + "0" * 64), True, BundleError),
    "no manifest": (drop("manifest"), False, BundleError),
    "an empty manifest": (add("manifest.json", b""), False, BundleError),
    "a manifest of text": (add("manifest.json", b"nonsense"), False, BundleError),
    "a deep manifest": (add("manifest.json", b"[" * 100_000), False, BundleError),
    "a manifest without members": (manifest(members=3), False, BundleError),
    "a newer format": (manifest(format=2), False, FormatError),
    "an odd format": (manifest(format="new"), False, BundleError),
    "another version": (manifest(uuid="other"), False, BundleError),
    "a path upwards": (add("../../escaped"), True, BundleError),
    "an absolute path": (add("/tmp/escaped"), True, BundleError),
    "a path upwards among blobs": (add("blobs/../escaped"), True, BundleError),
    "a record of a newer format": (record(format=99), True, FormatError),
    "a record without fields": (record(fields=None), True, BundleError),
    "a record of another kind": (record(type_id="schedule"), True, BundleError),
    "an operator as a name": (record(identifier="$where"), True, BundleError),
    "an operator as a number": (record(version={"$gt": 0}), True, BundleError),
    "records that refer outwards": (record(refs=["elsewhere"]), True, BundleError),
    "an anchor elsewhere": (record(anchor="elsewhere"), True, BundleError),
    "a job that is a query": (record(job={"$exists": True}), True, BundleError),
    "no BSON": (lambda m: m.update({of_kind(m, "records/"): b"\x05\x00\x00"}), True, BundleError),
}


def test_a_file_that_is_not_what_it_says_changes_nothing(db: Datalayer, tmp_path: Path) -> None:
    trained(db)
    whole = db.export(tmp_path / "m.zip", "model", "m").path
    with beside(db) as other:
        other.apply(model())
        before = documents_in(other)
        for what, (change, hashes, error) in WRONG.items():
            path = rewritten(whole, tmp_path / "wrong.zip", change, hashes=hashes)
            with pytest.raises(StoreError) as caught:
                other.import_bundle(path)
            assert type(caught.value) is error, (what, caught.value)
            assert documents_in(other) == before, what
        data = whole.read_bytes()
        for length in {0, 10, len(data) // 3, len(data) // 2, len(data) - 1}:
            (tmp_path / "cut.zip").write_bytes(data[:length])
            with pytest.raises(BundleError, match="cut"):
                other.import_bundle(tmp_path / "cut.zip")
        for path in (tmp_path, tmp_path / "missing.zip"):
            with pytest.raises(BundleError, match="cannot be read"):
                other.import_bundle(path)
        assert documents_in(other) == before
        assert {path.name for path in tmp_path.iterdir()} == {"m.zip", "wrong.zip", "cut.zip"}
        assert not (tmp_path.parent / "escaped").exists()


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    compressed, overlapping = tmp_path / "compressed.zip", tmp_path / "overlapping.zip"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"0" * 2**24)
    with zipfile.ZipFile(overlapping, "w") as archive:
        archive.writestr("manifest.json", b"{}")
        archive.writestr("blobs/" + "0" * 64, b"0" * 2**16)
        for n in range(1, 100):  # each says that it is the same bytes
            info = zipfile.ZipInfo(f"blobs/{n:064x}")
            info.file_size, info.compress_size, info.CRC = 2**16, 2**16, 0
            info.header_offset = archive.infolist()[1].header_offset
            archive.filelist.append(info)
    with Datalayer.connect("mongomock://bomb", progress=False) as db:
        with pytest.raises(BundleError, match="compressed"):
            db.import_bundle(compressed)
        with pytest.raises(BundleError, match="longer than the file"):
            db.import_bundle(overlapping)


def test_signatures_are_checked_and_made_anew(db: Datalayer, tmp_path: Path) -> None:
    unsigned = db.apply(model(5)).result()
    db.export(tmp_path / "unsigned.zip", uuid=unsigned.uuid)
    with beside(db, signing_key=KEY) as source:
        version = trained(source)
        source.export(tmp_path / "m.zip", "model", "m")
        with beside(source, signing_key=f"{OTHER_KEY} {KEY}", trust="signed") as other:
            before = documents_in(other)
            for change in (record(class_="other"), record(signature=None)):
                rewritten(tmp_path / "m.zip", tmp_path / "forged.zip", change, hashes=True)
                with pytest.raises(TrustError):
                    other.import_bundle(tmp_path / "forged.zip")
            with pytest.raises(TrustError, match="not signed"):
                other.import_bundle(tmp_path / "unsigned.zip")
            assert documents_in(other) == before
            other.import_bundle(tmp_path / "m.zip")
            assert same(state(other.load("model", "m")), state(version))
            signed = other.show("model", "m", 0)
            assert signed["signature"]["key"] != signed["imported"]["signature"]["key"]
        with beside(source, signing_key=OTHER_KEY, trust="signed") as other, pytest.raises(TrustError):
            other.import_bundle(tmp_path / "m.zip")


def test_without_a_key_that_signs_nothing_is_imported_where_signatures_are_asked_for(tmp_path: Path) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    import base64

    secret = ed25519.Ed25519PrivateKey.generate()
    private = "ed25519:" + base64.b64encode(secret.private_bytes_raw()).decode()
    public = "ed25519-public:" + base64.b64encode(secret.public_key().public_bytes_raw()).decode()
    with Datalayer.connect("mongomock://signs", signing_key=private, progress=False) as source:
        source.apply(model())
        source.export(tmp_path / "m.zip", "model", "m")
    with Datalayer.connect("mongomock://reads", signing_key=public, trust="signed") as other:
        with pytest.raises(SettingError) as caught:
            other.import_bundle(tmp_path / "m.zip")
        assert caught.value.setting == "signing_key"
        assert documents_in(other) == {}


def test_nothing_is_visible_before_the_last_insert(
    db: Datalayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = trained(db)
    db.export(tmp_path / "m.zip", "model", "m")
    publish = Components.publish

    def failing(self: Components, document: Any, **more: Any) -> int:
        if document["_id"] == version.uuid:
            raise ConnectionError("the process was killed")
        return publish(self, document, **more)

    def decoding(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    with beside(db) as other:
        with monkeypatch.context() as patch:
            patch.setattr(Components, "publish", failing)
            patch.setattr(Codecs, "decode", decoding)
            with pytest.raises(ConnectionError):
                other.import_bundle(tmp_path / "m.zip")
            assert other.show("model") == other.show("trainer") == []
            patch.setattr(Components, "publish", publish)
            assert other.import_bundle(tmp_path / "m.zip").version == 0
        assert same(state(other.load("model", "m")), state(version))
        assert not other.verify().problems


def test_two_imports_at_once_make_one_version(db: Datalayer, tmp_path: Path) -> None:
    trained(db)
    db.export(tmp_path / "m.zip", "model", "m")
    with beside(db) as other:
        barrier, found = threading.Barrier(4), list[Any]()

        def take() -> None:
            barrier.wait()
            try:
                found.append(other.import_bundle(tmp_path / "m.zip").version)
            except MongotorchError as error:
                found.append(error)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [0] * 4
        assert other.show("model", "m") == other.show("trainer", "t") == [0]


def test_a_uuid_that_is_something_else_here_is_refused(db: Datalayer, tmp_path: Path) -> None:
    mine = model(0)
    db.apply(mine)
    db.export(tmp_path / "m.zip", "model", "m")
    with beside(db) as other:
        other.apply(model(1, uuid=mine.uuid))
        with pytest.raises(ConflictError, match="another content"):
            other.import_bundle(tmp_path / "m.zip")
        assert torch.equal(state(other.load("model", "m"))["0.weight"], state(model(1))["0.weight"])
