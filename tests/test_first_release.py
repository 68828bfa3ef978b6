"""Databases that the first release wrote: they open, load, resume and verify; see `tests/fixtures`."""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import bson
import pytest
import torch

from mongotorch import Cron, Datalayer, Every, Schedule, TorchModel, Worker
from mongotorch.codecs import FORMAT, Codecs
from mongotorch.component import Component, Encoder, content_digest
from mongotorch.errors import FormatError, PythonVersionError, TrustError
from tests.fixtures import first_release as made

FIXTURES = Path(made.__file__).parent
FACTS = json.loads((FIXTURES / "first_release.json").read_text())
PLAIN, SIGNED = FACTS["plain"], FACTS["signed"]
SETTINGS: dict[str, Any] = {"compute": "queue", "progress": False}
LONG_AGO = datetime(2020, 1, 1)
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
CHANGED = ["trainer.optimizer_state", "trainer.seed", "model.object"]  # by another seed
WITH_BYTECODE = {"nameless", "lambda", "own"}  # identifiers of what holds bytecode of the Python that wrote it


def restore(db: Datalayer, file: str) -> None:
    """Put every document of a dump where it was, long ago by whatever clock this machine has."""
    found = defaultdict(list)
    for record in bson.decode_iter(gzip.decompress((FIXTURES / file).read_bytes())):
        found[record["collection"]].append(record["document"])
    if db.uri.startswith("mongomock"):  # it has no change streams to go on with
        found["mt.schedules"] = [document | {"token": None} for document in found["mt.schedules"]]
    for job in found["mt.jobs"]:
        job |= {"ready_at": LONG_AGO, "lease_until": job["lease_until"] and LONG_AGO}
    for schedule in found["mt.schedules"]:
        schedule["state"]["since"], schedule["next_at"] = LONG_AGO, schedule["next_at"] and LONG_AGO
    for name, documents in found.items():
        db[name].raw.insert_many(documents)


@pytest.fixture
def old(uri: str) -> Iterator[Datalayer]:
    """The database without signatures."""
    with Datalayer.connect(uri, **SETTINGS) as db:
        restore(db, "first_release.bson.gz")
        yield db


@pytest.fixture
def signed(uri: str) -> Iterator[Datalayer]:
    """The signed database, for somebody who accepts nothing else."""
    with Datalayer.connect(uri, **SETTINGS, signing_key=made.KEYS, trust="signed") as db:
        restore(db, "first_release_signed.bson.gz")
        yield db


def loaded(db: Datalayer, uuid: str, identifier: str) -> Component | None:
    """A component of the dump; None where it is bound to another Python, and says so."""
    if identifier in WITH_BYTECODE and FACTS["python"] != HERE:
        with pytest.raises(PythonVersionError):
            db.load(uuid=uuid)
        return None
    found: Component = db.load(uuid=uuid)
    return found


def counts(db: Datalayer) -> dict[str, int]:
    """How many components and jobs there are."""
    return {name: db[name].raw.count_documents({}) for name in ("mt.components", "mt.jobs", "mt.aliases")}


def pause_all(db: Datalayer) -> None:
    """Let no schedule fire meanwhile: hours have passed since the dump."""
    for schedule in db.schedules():
        db.pause(schedule["_id"])


def check_models(db: Datalayer, facts: Mapping[str, Any]) -> None:
    for uuid, expected in facts["models"].items():
        identifier = facts["components"][uuid]["identifier"]
        model = loaded(db, uuid, identifier)
        if model is not None:
            assert isinstance(model, TorchModel)
            assert made.state_digest(model.object) == expected["state"], identifier
            # Another processor may add in another order.
            predicted = model.predict(made.INPUT)
            torch.testing.assert_close(predicted, torch.tensor(expected["predicted"], dtype=torch.float64))


def check_unfinished(db: Datalayer, facts: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    take_step = made.RoundedTrainer.take_step

    def counted(self: Any, *args: Any) -> Any:
        steps.append(self.identifier)
        return take_step(self, *args)

    monkeypatch.setattr(made.RoundedTrainer, "take_step", counted)
    pause_all(db)
    Worker(db).run(until_idle=True)
    assert steps.count("killed-trainer") == 400 - facts["steps"], "it did not go on from its checkpoint"
    assert steps.count("waiting-trainer") == 400
    for name in ("killed", "waiting"):
        state = db.job(facts[name]).result(timeout=1).object.state_dict()
        assert state.keys() == facts["weights"].keys()
        for part, expected in facts["weights"].items():
            assert torch.equal(state[part], torch.tensor(expected, dtype=state[part].dtype)), (name, part)


def test_every_model_loads_with_the_same_bits(old: Datalayer) -> None:
    check_models(old, PLAIN)


def test_every_component_loads_under_its_name_and_version(old: Datalayer) -> None:
    codecs = Codecs.default()
    for uuid, expected in PLAIN["components"].items():
        component = loaded(old, uuid, expected["identifier"])
        if component is None:
            continue
        assert [component.type_id, component.identifier, component.version] == [
            expected[name] for name in ("type_id", "identifier", "version")
        ]
        if expected["identifier"] not in WITH_BYTECODE:  # bytecode names lines and files
            assert content_digest(component, Encoder(codecs)) == expected["digest"], expected


def test_aliases_keep_their_history_and_move_on(old: Datalayer) -> None:
    for identifier, expected in PLAIN["histories"].items():
        history = old.history("model", identifier)
        assert [[m.n, m.from_version, m.to_version, m.why] for m in history] == expected
    assert old.load("model", "digits").version == 1
    old.promote("model", "digits", 2, why="again")
    assert old.load("model", "digits").version == 2
    old.rollback("model", "digits", why="and back")
    assert old.load("model", "digits").version == 1
    assert [move.n for move in old.history("model", "digits")] == [1, 2, 3, 4, 5]
    assert not old.verify().problems


def test_schedules_load_fire_and_can_be_previewed(old: Datalayer) -> None:
    for schedule in made.schedules({}):
        stored = old.load("schedule", schedule.identifier)
        assert isinstance(stored, Schedule)
        assert (stored.trigger, stored.gate) == (schedule.trigger, schedule.gate)
    there = {document["_id"]: document for document in old.schedules()}
    assert there["always"]["outcome"]["promoted"]
    assert there["every"]["paused"]
    cron: Any = old.load("schedule", "cron")
    since = datetime(2026, 1, 1)
    assert len(old.preview(cron, since=since, until=since + timedelta(days=3))) == 3
    runs = old["mt.jobs"].raw.count_documents({})
    old.resume("every")
    old.scheduler.step()
    assert old["mt.jobs"].raw.count_documents({}) > runs
    assert [document["problem"] for document in old.schedules()] == [None] * len(there)


def test_an_interrupted_run_comes_to_the_same_weights(old: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    check_unfinished(old, PLAIN, monkeypatch)


def test_what_was_applied_then_is_recognised(old: Datalayer) -> None:
    before, revisions = counts(old), {document["_id"]: document["rev"] for document in old.schedules()}
    again: list[Component] = [made.measured(seed=1), made.plain_trainer(), made.model("alone"), made.validation()]
    for component in [*again, *made.schedules({})]:
        assert old.apply(component).done(), component
    assert counts(old) == before
    assert {document["_id"]: document["rev"] for document in old.schedules()} == revisions


def test_a_change_is_no_recognition(old: Datalayer) -> None:
    job = old.apply(made.measured(seed=2))
    pause_all(old)
    Worker(old).run(until_idle=True)
    new = job.result(timeout=1)
    assert new.version == 3
    before = old.load("model", "digits", 2)
    assert isinstance(before, TorchModel)
    assert list(old.diff(before.uuid, new.uuid).parameters) == CHANGED


def test_the_same_value_is_no_difference_under_its_old_name(old: Datalayer) -> None:
    codecs = Codecs.default()
    record = codecs.encode([Every(seconds=1), Cron], lambda data: "")
    before = [{**record[0], "class": "mongotorch.run.triggers.every:Every"}]
    before += [{**record[1], "name": "mongotorch.run.triggers.cron.Cron"}]
    first, second = (old.show("model", "digits", version) for version in (1, 2))
    for document, written in ((first, before), (second, record)):
        trainer = {"_id": document["fields"]["trainer"]["_ref"]}
        old["mt.components"].raw.update_one(trainer, {"$set": {"fields.compute_kwargs": written}})
    assert list(old.diff(first["_id"], second["_id"]).parameters) == CHANGED


def test_signed_versions_verify(signed: Datalayer) -> None:
    check_models(signed, SIGNED)
    assert not signed.verify().problems
    assert signed.load("model", "digits").version == 1
    assert signed.promote("model", "digits", 2).to_version == 2
    assert isinstance(signed.load("schedule", "cron").trigger, Cron)


def test_a_signed_run_goes_on(signed: Datalayer, monkeypatch: pytest.MonkeyPatch) -> None:
    check_unfinished(signed, SIGNED, monkeypatch)


@pytest.mark.parametrize("change", [{"fields.forward_method": "evil"}, {"format": 1}, {"format": FORMAT}])
def test_a_changed_signed_version_is_refused(signed: Datalayer, change: dict[str, Any]) -> None:
    uuid = signed.show("model", "digits", 1)["_id"]
    signed["mt.components"].raw.update_one({"_id": uuid}, {"$set": change})
    with pytest.raises(TrustError, match="not what was signed"):
        signed.load("model", "digits", 1)


def test_the_format_is_part_of_a_signature(signed: Datalayer) -> None:
    model = made.model("new")
    signed.apply(model)
    documents = signed["mt.components"].raw
    assert documents.find_one({"_id": model.uuid})["format"] == FORMAT
    documents.update_one({"_id": model.uuid}, {"$unset": {"format": 1}})
    with pytest.raises(TrustError, match="not what was signed"):
        signed.load("model", "new")


def test_records_of_a_newer_release_are_refused_with_what_to_do(old: Datalayer) -> None:
    newer = {"$set": {"format": FORMAT + 1}}
    job = PLAIN["killed"]
    reads: dict[str, Any] = {
        "mt.components": lambda: old.load("model", "digits", 1),
        "mt.aliases": lambda: old.history("model", "digits"),
        "mt.schedules": lambda: old.schedules(),
        "mt.jobs": lambda: old.job(job),
    }
    for collection, read in reads.items():
        read()
        old[collection].raw.update_many({}, newer)
        with pytest.raises(FormatError, match=rf"format {FORMAT + 1}, written by a newer mongotorch.*upgrade"):
            read()
    assert Worker(old).run(until_idle=True) == 0, "what a newer release has queued was claimed"
    assert len(old.verify().problems) > len(PLAIN["components"])
    with pytest.raises(FormatError, match="upgrade"):
        old.gc()


def test_a_checkpoint_of_a_newer_release_is_not_gone_on_with(old: Datalayer) -> None:
    pause_all(old)
    old["mt.checkpoints"].raw.update_many({}, {"$set": {"format": FORMAT + 1}})
    Worker(old).run(until_idle=True)
    record = old.job(PLAIN["killed"]).record
    assert (record["status"], record["error"]["type"]) == ("failed", "FormatError")
