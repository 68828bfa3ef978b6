"""What nothing reaches is collected after the grace, and what anything reaches, or may soon, never. On both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pymongo
import pymongo.monitoring
import pytest

from mongotorch.errors import ConflictError, IntegrityError
from mongotorch.mongo.server_features import utc_now
from mongotorch.store import BlobStore, Checkpoints, Components, GarbageCollector, Jobs, MetricLog, Verifier
from mongotorch.store.maintenance import GRACE_S, Collected


class Later:
    """A clock that is so many seconds ahead of the store's."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> Any:
        return utc_now() + timedelta(seconds=self.seconds)


class House:
    def __init__(self, database: Any) -> None:
        self.database = database
        self.blobs, self.components = BlobStore(database), Components(database)
        self.checkpoints, self.jobs = Checkpoints(database), Jobs(database)
        for room in (self.blobs, self.components, self.checkpoints, self.jobs):
            room.ensure_indexes()

    def publish(self, uuid: str, *blobs: str, **more: Any) -> None:
        names = {"type_id": "model", "identifier": uuid, "digest": "d", "refs": []}
        self.components.publish({"_id": uuid, **names, "blobs": list(blobs), **more})

    def run(self, component: str = "c") -> tuple[str, int]:
        job, _ = self.jobs.add(component=component, type_id="trainer", identifier="t")
        claimed = self.jobs.claim(worker="w", lease_s=60, job_id=job)
        assert claimed is not None
        return job, claimed["attempt"]

    def collect(self, after_s: float = 2 * GRACE_S, **more: Any) -> Collected:
        return GarbageCollector(self.database, now=Later(after_s)).collect(**more)

    def chunks(self) -> int:
        return int(self.database["mt.artifacts.chunks"].count_documents({}))


@pytest.fixture
def house(database: Any) -> House:
    return House(database)


def test_a_blob_that_nothing_reaches_goes_after_the_grace_and_not_before(house: House) -> None:
    used, unused = house.blobs.put(b"used"), house.blobs.put(b"unused!")
    house.publish("a", used)

    early = house.collect(after_s=GRACE_S / 2)
    assert (early.blobs, early.waiting) == ((), 1)
    assert house.blobs.has(unused)

    late = house.collect()
    assert (late.blobs, late.nbytes, late.waiting) == ((unused,), len(b"unused!"), 0)
    assert not house.blobs.has(unused)
    assert house.blobs.get(used) == b"used"
    assert house.chunks() == 1
    assert house.collect() == Collected()


def test_a_dry_run_says_the_same_and_writes_nothing(house: House) -> None:
    unused = house.blobs.put(b"unused")
    names = set(house.database.list_collection_names())

    assert house.collect(dry_run=True).blobs == (unused,)

    assert house.blobs.get(unused) == b"unused"
    assert set(house.database.list_collection_names()) == names


def test_a_blob_of_a_removed_version_that_another_shares_stays(house: House) -> None:
    shared, alone = house.blobs.put(b"shared"), house.blobs.put(b"alone")
    house.publish("a", shared, alone)
    house.publish("b", shared)
    house.components.remove("a")

    assert house.collect().blobs == (alone,)


def test_a_blob_that_is_put_again_starts_its_grace_anew(database: Any) -> None:
    house = House(database)
    name = house.blobs.put(b"old")
    ancient = utc_now() - timedelta(days=30)
    database["mt.artifacts.files"].update_one({}, {"$set": {"touched": ancient, "uploadDate": ancient}})

    assert house.blobs.put(b"old") == name  # by a publication that is now in flight
    assert GarbageCollector(database).collect().blobs == ()
    house.publish("a", name)

    assert house.collect().blobs == ()


def test_a_blob_that_is_touched_between_the_decision_and_the_delete_stays(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = house.blobs.put(b"old")
    ancient = utc_now() - timedelta(days=30)
    house.database["mt.artifacts.files"].update_one({}, {"$set": {"touched": ancient}})
    garbage = GarbageCollector(house.database)
    reachable = garbage._reachable

    def slow(*args: Any) -> set[str]:
        names = reachable(*args)
        house.blobs.put(b"old")
        house.publish("a", name)
        return names

    monkeypatch.setattr(garbage, "_reachable", slow)

    assert garbage.collect().blobs == ()
    assert house.blobs.get(name) == b"old"


def test_nothing_is_published_whose_blob_was_collected(house: House) -> None:
    name = house.blobs.put(b"old")
    house.collect()

    with pytest.raises(IntegrityError, match=name):
        house.publish("a", name)

    assert house.components.peek("a") is None


def test_chunks_of_an_upload_that_died_go_when_they_were_seen_a_grace_ago(house: House) -> None:
    house.publish("a", house.blobs.put(b"whole"))
    house.database["mt.artifacts.chunks"].insert_many([{"files_id": 7, "n": n, "data": b"x"} for n in (0, 1)])

    assert house.collect(after_s=0).waiting == 1
    assert house.collect(after_s=GRACE_S / 2).uploads == ()
    assert house.chunks() == 3

    assert house.collect().uploads == ("7",)
    assert house.chunks() == 1
    assert house.database["mt.garbage"].count_documents({}) == 0


def test_an_upload_that_ends_after_it_was_seen_is_let_be(house: House) -> None:
    house.database["mt.artifacts.chunks"].insert_one({"files_id": 7, "n": 0, "data": b"x"})
    house.collect(after_s=0)
    house.database["mt.artifacts.files"].insert_one({"_id": 7, "filename": "f", "length": 1, "touched": utc_now()})

    assert house.collect(after_s=GRACE_S / 2).uploads == ()
    assert house.database["mt.garbage"].count_documents({}) == 0


def test_half_a_publication_goes_with_its_blobs_once_its_job_has_ended(house: House) -> None:
    job, attempt = house.run()
    blob = house.blobs.put(b"state")
    house.publish("trainer", blob, anchor="model", job=job)

    house.collect(after_s=0)
    assert house.collect().components == ()  # the job runs, and may still publish the model

    house.jobs.fail(job, attempt, error={"type": "E", "message": "no"})
    house.collect(after_s=0)
    collected = house.collect()
    assert (collected.components, collected.blobs) == (("trainer",), (blob,))
    assert house.database["mt.components"].count_documents({}) == 0


def test_both_halves_of_a_publication_stay(house: House) -> None:
    job, attempt = house.run()
    house.publish("trainer", anchor="model", job=job)
    house.publish("model", house.blobs.put(b"w"), job=job, refs=["trainer"])
    house.jobs.succeed(job, attempt, result="model")

    house.collect(after_s=0)

    assert house.collect() == Collected()
    assert house.components.get("trainer")["_id"] == "trainer"


def test_what_an_earlier_try_left_goes_though_its_anchor_was_published(house: House) -> None:
    job, attempt = house.run()
    house.publish("first", anchor="model", job=job)
    house.publish("second", anchor="model2", job=job)
    house.publish("model2", job=job, refs=["second"])
    house.jobs.succeed(job, attempt, result="model2")

    house.collect(after_s=0)

    assert house.collect().components == ("first",)
    assert house.components.get("second")


def test_checkpoints_are_kept_while_the_job_runs_and_collected_after_it(house: House) -> None:
    job, attempt = house.run()
    blob = house.blobs.put(b"state")
    house.checkpoints.put(job, attempt, 1, {}, [blob])
    assert house.collect() == Collected()

    house.jobs.succeed(job, attempt, result="m")

    assert house.collect(after_s=GRACE_S / 2).checkpoints == ()
    collected = house.collect()
    assert (len(collected.checkpoints), collected.blobs) == (1, (blob,))
    assert house.checkpoints.newest(job) is None


def test_with_no_grace_everything_goes_at_once(house: House) -> None:
    job, attempt = house.run()
    house.checkpoints.put(job, attempt, 1, {}, [house.blobs.put(b"state")])
    house.publish("half", house.blobs.put(b"half"), anchor="nothing")
    house.database["mt.artifacts.chunks"].insert_one({"files_id": 7, "n": 0, "data": b"x"})
    house.jobs.cancel(job)
    garbage = GarbageCollector(house.database, grace_s=0)

    report = garbage.collect(dry_run=True)
    assert garbage.collect() == report

    assert (len(report.blobs), len(report.uploads), len(report.components), len(report.checkpoints)) == (
        2,
        1,
        1,
        1,
    )
    for name in ("mt.artifacts.files", "mt.artifacts.chunks", "mt.components", "mt.checkpoints", "mt.garbage"):
        assert house.database[name].count_documents({}) == 0


def test_who_slept_through_the_grace_publishes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = house.blobs.put(b"w")
    insert = house.components._insert

    def slept(document: Any, only_as: int | None, attempt: int | None) -> int:
        house.blobs.remove(blob)  # a collection, an hour later
        monkeypatch.setattr("mongotorch.store.components.SLOW_S", -1.0)
        return insert(document, only_as, attempt)

    monkeypatch.setattr(house.components, "_insert", slept)
    with pytest.raises(IntegrityError, match=blob):
        house.publish("a", blob)

    assert house.database["mt.components"].count_documents({}) == 0


def test_a_job_publishes_once(house: House) -> None:
    house.publish("t1", anchor="a", job="j")  # an attempt that died here
    house.publish("t2", anchor="b", job="j")
    house.publish("b", job="j")

    with pytest.raises(ConflictError, match="job j"):
        house.publish("a", job="j")
    with pytest.raises(ConflictError, match="gone"):
        house.components.publish({"_id": "z", "type_id": "m", "identifier": "i", "blobs": []}, needs=["t9"])


def test_a_plan_that_nobody_uses_goes_after_thirty_days(house: House, database: Any) -> None:
    plans = database["mt.plans"]
    day = 24 * 3600.0
    plans.insert_many([{"_id": "old", "used": utc_now() - timedelta(days=29)}, {"_id": "of an earlier release"}])
    assert house.collect(after_s=0).plans == ()
    assert house.collect(after_s=2 * day, dry_run=True).plans == ("old",)
    job, attempt = house.run()
    assert house.collect(after_s=2 * day).plans == ("old",), "the job began after it was used last"
    plans.insert_one({"_id": "of the run", "used": utc_now() + timedelta(seconds=1)})
    assert "of the run" not in house.collect(after_s=40 * day).plans, "an unfinished job may resume in it"
    house.jobs.succeed(job, attempt, result="r")
    # The one of an earlier release went before, unless it was first seen in the millisecond of the job's start.
    assert "of the run" in house.collect(after_s=40 * day).plans
    assert plans.count_documents({}) == 0


def test_jobs_and_measurements_go_when_they_are_older_than_they_are_kept(house: House) -> None:
    log = MetricLog(house.database)

    def ended(component: str, *, result: str | None = None) -> str:
        job, attempt = house.run(component)
        log.add(job=job, component=component, step=1, kind="valid", values={"objective": 1.0})
        if result is None:
            house.jobs.fail(job, attempt, error={"type": "E", "message": "no"})
        else:
            house.publish(result, job=job)
            house.jobs.succeed(job, attempt, result=result)
        return job

    failed, published, gone = ended("a"), ended("b", result="v"), ended("c", result="w")
    house.components.remove("w")
    running, _ = house.run("d")
    day = 86_400.0

    def collect(after_s: float, **more: Any) -> Collected:
        return GarbageCollector(house.database, keep_jobs_s=day, now=Later(after_s)).collect(**more)

    assert collect(day / 2).jobs == 0
    assert house.collect(after_s=9 * day).jobs == 0  # they are kept for ever unless that is said
    assert collect(2 * day, dry_run=True).jobs == 2
    assert len(house.jobs.find()) == 4

    assert collect(2 * day).jobs == 2

    assert {job["_id"] for job in house.jobs.find()} == {published, running}
    assert (len(log.of(failed)), len(log.of(gone)), len(log.of(published))) == (0, 0, 1)


def test_a_thousand_old_jobs_go_in_few_requests_that_indexes_answer(server_uri: str) -> None:
    requests = Requests()
    with pymongo.MongoClient[dict[str, Any]](server_uri, event_listeners=[requests]) as client:
        house = House(client.get_database())
        jobs, documents = house.database["mt.jobs"], house.database["mt.components"]
        long_ago = utc_now() - timedelta(days=30)
        old = [
            {"_id": f"j{n}", "component": f"c{n}", "method": "fit", "status": "succeeded", "finished": long_ago}
            for n in range(1000)
        ]
        jobs.insert_many(old)
        documents.insert_many([{"_id": f"v{n}", "version": n, "job": f"j{n}", "blobs": []} for n in range(100)])
        requests.seen.clear()
        house.database.command("profile", 2)
        removed = GarbageCollector(house.database, keep_jobs_s=86_400.0).collect().jobs
        house.database.command("profile", 0)
        asked = list(house.database["system.profile"].find({"command.query.job": {"$exists": True}}))
        assert removed == 900
        assert jobs.count_documents({}) == 100
        assert len(requests.seen) < 60, requests.seen
        assert {one["ns"].rpartition(".mt.")[2] for one in asked} >= {"components"}
        assert not [one for one in asked if one["planSummary"] == "COLLSCAN"], asked


class Requests(pymongo.monitoring.CommandListener):
    """What is asked of the server."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def started(self, event: pymongo.monitoring.CommandStartedEvent) -> None:
        self.seen.append(event.command_name)

    def succeeded(self, event: pymongo.monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: pymongo.monitoring.CommandFailedEvent) -> None: ...


def test_damaged_and_missing_blobs_are_put_back_from_files(house: House, tmp_path: Path) -> None:
    texts = {"cut": b"cut" * 99, "changed": b"changed" * 99, "missing": b"missing" * 99, "lost": b"lost" * 99}
    names = {word: house.blobs.put(data) for word, data in texts.items()}
    house.publish("a", *names.values())
    files, chunks = house.database["mt.artifacts.files"], house.database["mt.artifacts.chunks"]
    ids = {word: files.find_one({"filename": name})["_id"] for word, name in names.items()}
    chunks.delete_one({"files_id": ids["cut"]})
    chunks.update_one({"files_id": ids["changed"]}, {"$set": {"data": b"x" * len(texts["changed"])}})
    for word in ("missing", "lost"):
        house.blobs.remove(names[word])
    (tmp_path / "backup").mkdir()
    for word in ("cut", "changed", "missing"):
        (tmp_path / "backup" / word).write_bytes(texts[word])
    (tmp_path / "other").write_bytes(b"something else")
    assert len(Verifier(house.database).verify().problems) == 4

    found = Verifier(house.database).verify(copies=tmp_path)

    assert set(found.repaired) == {names[word] for word in ("cut", "changed", "missing")}
    assert [names["lost"] in problem for problem in found.problems] == [True]
    for word in ("cut", "changed", "missing"):
        assert house.blobs.get(names[word]) == texts[word]
    assert Verifier(house.database).verify(copies=tmp_path).repaired == ()
