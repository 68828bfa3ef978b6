"""`db.live`: predictions go on while versions change, and each is the answer of a version that was served."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pymongo
import pytest
import torch
from tests.helpers import run_elsewhere
from torch import nn

from mongotorch import Datalayer, Live, Metric, TorchModel
from mongotorch.errors import NotFoundError, ParameterError, UnsafeClosureError
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import Aliases

SOON_S = 10.0
PREDICTIONS, PROMOTIONS, READERS = 10_000, 20, 3


def constant(version: int) -> TorchModel:
    """A model whose weights tell its version, all of them: half of one and half of another would show."""
    module = nn.Linear(16, 8)
    nn.init.constant_(module.weight, version / 16)
    nn.init.constant_(module.bias, float(version))
    return TorchModel("m", object=module)


def said(output: Any) -> int:
    """The version that an answer to ones is of."""
    values = set(output.tolist())
    assert len(values) == 1, "all outputs are of one version"
    (value,) = values
    assert value % 2 == 0
    return int(value) // 2


ONES = torch.ones(16)


def settled(condition: Any, within_s: float = SOON_S) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture
def versions(db: Datalayer) -> Datalayer:
    for version in range(4):
        db.apply(constant(version))
    return db


@pytest.fixture
def live(versions: Datalayer) -> Iterator[Live]:
    versions.promote("model", "m", 0)
    with versions.live("model", "m") as live:
        yield live


def test_a_handle_serves_what_is_live_and_goes_over_when_that_moves(versions: Datalayer, live: Live) -> None:
    assert (live.version, said(live.predict(ONES))) == (0, 0)
    first = live.model

    move = versions.promote("model", "m", 2)
    assert live.wait_for(2, timeout_s=SOON_S)
    assert live.wait_for(uuid=move.to_uuid, timeout_s=0)

    assert [said(output) for output in live.predict_batches([ONES] * 3, batch_size=2)] == [2, 2, 2]
    assert (said(first.predict(ONES)), first.version) == (0, 0)
    versions.rollback("model", "m")
    assert live.wait_for(0, timeout_s=SOON_S)
    assert said(live.predict(ONES)) == 0
    assert not live.wait_for(3, timeout_s=0.05)
    assert live.error is None
    assert repr(live).startswith("Live(model/m/live, version=0")


def test_without_an_alias_it_serves_the_newest_there_was_until_one_names_another(versions: Datalayer) -> None:
    with versions.live("model", "m") as live:
        assert live.version == 3
        versions.apply(constant(4))
        assert not live.wait_for(4, timeout_s=1.5)  # nobody has promoted it

        versions.promote("model", "m", 1)

        assert live.wait_for(1, timeout_s=SOON_S)


def test_another_alias_is_followed_alone(versions: Datalayer) -> None:
    versions.promote("model", "m", 0)
    versions.promote("model", "m", 1, alias="stage")
    with versions.live("model", "m", alias="stage") as stage:
        versions.promote("model", "m", 3)
        assert not stage.wait_for(3, timeout_s=1.2)
        versions.promote("model", "m", 2, alias="stage")
        assert stage.wait_for(2, timeout_s=SOON_S)


def test_what_cannot_be_served_is_refused_at_once(versions: Datalayer) -> None:
    versions.apply(Metric("count", object=len))
    before = set(threading.enumerate())  # the driver's own threads come and go
    with pytest.raises(NotFoundError):
        versions.live("model", "x")
    with pytest.raises(NotFoundError, match="no alias 'stage'"):
        versions.live("model", "m", alias="stage")
    with pytest.raises(ParameterError, match="is no model"):
        versions.live("metric", "count")
    assert not [one for one in set(threading.enumerate()) - before if one.name.startswith("mongotorch")]


def test_a_handle_crosses_no_process(live: Live, versions: Datalayer) -> None:
    with pytest.raises(ParameterError, match="cannot be pickled"):
        pickle.dumps(live)
    with pytest.raises(UnsafeClosureError):
        versions.apply(TorchModel("n", object=nn.Linear(1, 1), preprocess=lambda x: live.predict(x)))
    both: list[dict[str, Any]] = [{}, {"version": 1, "uuid": "u"}]
    for wrong in both:
        with pytest.raises(ParameterError, match="a version or a uuid"):
            live.wait_for(**wrong)


def test_on_promote_is_told_both_and_what_it_raises_stops_nothing(versions: Datalayer) -> None:
    versions.promote("model", "m", 0)
    told: list[tuple[int | None, int | None, int | None]] = []

    def tell(old: TorchModel, new: TorchModel) -> None:
        told.append((old.version, new.version, handle.version))
        if new.version == 1:
            raise ValueError("no room")

    with versions.live("model", "m", on_promote=tell) as handle:
        versions.promote("model", "m", 1)
        assert settled(lambda: handle.error is not None)
        assert isinstance(handle.error, ValueError)
        assert said(handle.predict(ONES)) == 1
        versions.promote("model", "m", 2)
        assert handle.wait_for(2, timeout_s=SOON_S)
        assert settled(lambda: len(told) == 2)
        assert handle.error is None

    assert told == [(0, 1, 1), (1, 2, 2)]


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(versions: Datalayer, live: Live) -> None:
    broken = versions.show("model", "m", 1)["blobs"][0]
    versions["mt.artifacts.chunks"].raw.update_one(
        {"files_id": versions["mt.artifacts.files"].raw.find_one({"filename": broken})["_id"]},
        {"$set": {"data": b"\x00" * 600}},
    )
    versions.promote("model", "m", 1)

    assert settled(lambda: live.error is not None)
    assert "IntegrityError" in repr(live.error)
    assert (live.version, said(live.predict(ONES))) == (0, 0)
    versions.promote("model", "m", 2)
    assert live.wait_for(2, timeout_s=SOON_S)
    assert live.error is None


def test_a_version_that_is_removed_by_force_is_served_no_longer(versions: Datalayer, live: Live) -> None:
    versions.promote("model", "m", 3)
    assert live.wait_for(3, timeout_s=SOON_S)

    versions.remove("model", "m", 3, force=True)

    assert live.wait_for(2, timeout_s=SOON_S)
    versions.promote("model", "m", 0)
    assert live.wait_for(0, timeout_s=SOON_S)
    versions.remove("model", "m", force=True)
    assert said(live.predict(ONES)) in {0, 1, 2}  # nothing is left: what it has is all there is
    versions.apply(constant(4))
    versions.promote("model", "m", 4)  # numbers of removed versions are not used again
    assert live.wait_for(4, timeout_s=SOON_S)
    assert settled(lambda: said(live.predict(ONES)) == 4)


def test_an_error_of_the_database_is_shown_and_gone_with_it(
    versions: Datalayer, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("out of order")

    with monkeypatch.context() as broken:
        broken.setattr(Aliases, "head", refuse)
        assert settled(lambda: live.error is not None)
        assert said(live.predict(ONES)) == 0

    versions.promote("model", "m", 1)
    assert live.wait_for(1, timeout_s=SOON_S)
    assert settled(lambda: live.error is None)


def test_closing_ends_the_thread_and_a_closed_datalayer_does_too(uri: str, versions: Datalayer) -> None:
    versions.promote("model", "m", 0)
    with Datalayer.connect(uri, progress=False) as other:
        left, closed = other.live("model", "m"), other.live("model", "m")
        began = time.monotonic()
        closed.close()
        closed.close()
        assert time.monotonic() - began < 10
        assert not closed._thread.is_alive()
        assert (closed.error, said(closed.predict(ONES))) == (None, 0)

    assert settled(lambda: not left._thread.is_alive())
    assert "datalayer was closed" in str(left.error)
    assert said(left.predict(ONES)) == 0
    left.close()


def test_a_handle_may_be_closed_by_its_own_callback(versions: Datalayer) -> None:
    versions.promote("model", "m", 0)
    handle = versions.live("model", "m", on_promote=lambda old, new: handle.close())
    versions.promote("model", "m", 1)
    assert settled(lambda: not handle._thread.is_alive())
    assert handle.version == 1


# On the real server, under load.

PROMOTE = """
import time
from mongotorch import Datalayer

ANSWER = []
with Datalayer.connect() as db:
    for version in range(1, GIVEN["count"] + 1):
        time.sleep(GIVEN["pause_s"])
        before = time.time()
        db.promote("model", "m", version)
        ANSWER.append([version, before, time.time()])
"""


def predict_until(
    live: Live, enough: threading.Event, counts: dict[str, int]
) -> list[tuple[float, int, int, int, float]]:
    """(begin, version before, answer, version after, end) of every prediction of one thread."""
    found = []
    while not enough.is_set():
        begin, before = time.time(), live.version
        answer = said(live.predict(ONES))
        found.append((begin, before or 0, answer, live.version or 0, time.time()))
        counts["all"] += 1
    return found


def test_ten_thousand_predictions_during_twenty_promotions_by_another_process(server_uri: str) -> None:
    served: list[tuple[int | None, float]] = [(0, time.time())]
    enough = threading.Event()
    counts = {"all": 0}
    with Datalayer.connect(server_uri, progress=False) as db:
        for version in range(PROMOTIONS + 2):  # the last one is never promoted
            db.apply(constant(version))
        db.promote("model", "m", 0)
        with (
            db.live("model", "m", on_promote=lambda _, new: served.append((new.version, time.time()))) as live,
            ThreadPoolExecutor(READERS + 1) as pool,
        ):
            readers = [pool.submit(predict_until, live, enough, counts) for _ in range(READERS)]
            mover = pool.submit(run_elsewhere, server_uri, PROMOTE, count=PROMOTIONS, pause_s=0.2)
            try:
                moved = mover.result()
                assert live.wait_for(PROMOTIONS, timeout_s=SOON_S)
                assert settled(lambda: counts["all"] >= PREDICTIONS, 60)
            finally:
                enough.set()
            answers = [answer for reader in readers for answer in reader.result()]
            assert live.error is None

    assert len(answers) >= PREDICTIONS
    # Each answer is of a version that the handle served at some moment between the begin and the end of the call.
    assert all(before <= answer <= after for _, before, answer, after, _ in answers)
    order = [version or 0 for version, _ in served]
    assert order == sorted(set(order))
    assert {answer for _, _, answer, _, _ in answers} <= set(order) <= set(range(PROMOTIONS + 1))
    # And that was live in the database then, or until a moment before: the time that loading takes.
    asked = {0: 0.0, **{version: before for version, before, _ in moved}}
    until = {version - 1: done for version, _, done in moved}
    assert all(asked[answer] <= end for _, _, answer, _, end in answers)
    late = max(begin - until.get(answer, begin) for begin, _, answer, _, _ in answers)
    swaps = sorted(at - done for (version, _, done) in moved for number, at in served if number == version)
    print(f"{len(answers)} predictions, {len(order) - 1} of {PROMOTIONS} swaps")
    print(f"promoted to served: {swaps[len(swaps) // 2] * 1e3:.0f} ms median, {swaps[-1] * 1e3:.0f} ms at most")
    print(f"the oldest answer came {late * 1e3:.0f} ms after its version was live")
    assert order[-1] == PROMOTIONS
    assert len(order) > PROMOTIONS // 2
    assert late < SOON_S


def test_a_prediction_that_has_begun_ends_with_its_version(server_uri: str) -> None:
    with Datalayer.connect(server_uri, progress=False) as db:
        for version in range(2):
            db.apply(constant(version))
        db.promote("model", "m", 0)
        with db.live("model", "m") as live, ThreadPoolExecutor(1) as pool:
            inside, go_on = threading.Event(), threading.Event()

            def held(module: Any, args: Any) -> None:
                inside.set()
                assert go_on.wait(SOON_S)

            live.model.object.register_forward_pre_hook(held)
            slow = pool.submit(live.predict, ONES)
            assert inside.wait(SOON_S)
            db.promote("model", "m", 1)
            assert live.wait_for(1, timeout_s=SOON_S)
            assert said(live.predict(ONES)) == 1  # nobody waits for the slow one
            go_on.set()
            assert said(slow.result()) == 0


def test_a_version_is_loaded_while_the_old_one_serves(server_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loading, go_on = Catalog.load, threading.Event(), threading.Event()

    def slowly(self: Catalog, document: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            loading.set()
            assert go_on.wait(SOON_S)
        return load(self, document)

    monkeypatch.setattr(Catalog, "load", slowly)
    with Datalayer.connect(server_uri, progress=False) as db:
        for version in range(2):
            db.apply(constant(version))
        db.promote("model", "m", 0)
        with db.live("model", "m") as live:
            db.promote("model", "m", 1)
            assert loading.wait(SOON_S)
            assert [said(live.predict(ONES)) for _ in range(100)] == [0] * 100
            go_on.set()
            assert live.wait_for(1, timeout_s=SOON_S)


def test_a_server_that_drops_its_connections_is_found_again(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mongotorch.mongo.driver_errors.REPEAT_S", 1.0
    )  # a read is repeated for so long before it is heard
    with Datalayer.connect(server_uri, progress=False, server_timeout_s=2) as db:
        for version in range(3):
            db.apply(constant(version))
        db.promote("model", "m", 0)
        with db.live("model", "m") as live, pymongo.MongoClient[dict[str, Any]](server_uri) as client:
            name = db["x"].raw.database.name
            fail = {"configureFailPoint": "failCommand"}
            broken = {
                "failCommands": ["getMore", "aggregate", "find"],
                "closeConnection": True,
                "appName": "mongotorch",
            }
            client.admin.command({**fail, "mode": "alwaysOn", "data": broken})
            try:
                assert settled(lambda: live.error is not None)
                assert "ServerUnavailableError" in repr(live.error)
                assert said(live.predict(ONES)) == 0
                document = client[name]["mt.components"].find_one({"identifier": "m", "version": 1})
                first = client[name]["mt.aliases"].find_one({})
                assert document is not None
                assert first is not None
                ends = {"from": first["to"], "to": document["_id"], "from_version": 0, "to_version": 1}
                client[name]["mt.aliases"].insert_one({**first, "_id": "model/m/live#2", "n": 2, **ends})
            finally:
                client.admin.command({**fail, "mode": "off"})
            assert live.wait_for(1, timeout_s=SOON_S)
            assert settled(lambda: live.error is None)
            db.promote("model", "m", 2)
            assert live.wait_for(2, timeout_s=SOON_S)
