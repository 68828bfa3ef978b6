"""Aliases: what is live is one compare-and-set, its history has no gap, and nobody else can have written it."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from tests.helpers import fill, model, run_elsewhere, same, state, trainer

from mongotorch import Datalayer, Metric
from mongotorch.errors import (
    ConflictError,
    IdentifierError,
    InUseError,
    MongotorchError,
    NotFoundError,
    ParameterError,
    TrustError,
)
from mongotorch.store import Aliases, Components, Move

KEY, FOREIGN = "k" * 16, "f" * 16
AT_ONCE = 6
NOON = datetime(2026, 5, 3, 12)


@pytest.fixture
def uuids(db: Datalayer) -> list[str]:
    """Three versions of the model `m`, none of them promoted."""
    return [db.apply(model(seed)).result().uuid for seed in range(3)]


def ends(moves: list[Move]) -> list[tuple[int, int | None, int | None]]:
    return [(move.n, move.from_version, move.to_version) for move in moves]


@pytest.mark.usefixtures("uuids")
def test_load_gives_what_is_live_and_the_newest_where_nothing_is(db: Datalayer) -> None:
    assert db.load("model", "m").version == 2

    db.promote("model", "m", 1)
    db.promote("model", "m", 0, alias="old")

    assert same(state(db.load("model", "m")), state(model(1)))
    assert [db.load("model", "m", alias=alias).version for alias in ("live", "old")] == [1, 0]
    assert db.load("model", "m", 2).version == 2
    db.apply(model(3))
    assert db.load("model", "m").version == 1
    assert db.show("model", "m") == [0, 1, 2, 3]


def test_a_version_is_promoted_by_number_by_uuid_or_as_the_newest(db: Datalayer, uuids: list[str]) -> None:
    db.promote("model", "m", 1)
    db.promote("model", "m", uuid=uuids[0])
    newest = db.promote("model", "m")

    assert (newest.to_uuid, newest.to_version) == (uuids[2], 2)
    assert ends(db.history("model", "m")) == [(1, None, 1), (2, 1, 0), (3, 0, 2)]


def test_the_history_says_who_when_why_from_and_to(db: Datalayer, uuids: list[str]) -> None:
    before = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=5)
    db.promote("model", "m", 0, why="the first")
    db.promote("model", "m", 2, why="better", who="ann")

    first, second = db.history("model", "m")

    assert (second.from_uuid, second.to_uuid, second.who, second.why) == (uuids[0], uuids[2], "ann", "better")
    assert (first.from_uuid, first.to_uuid, first.why) == (None, uuids[0], "the first")
    assert "@" in first.who
    assert before <= first.when <= second.when <= before + timedelta(seconds=60)
    assert db.history("model", "m", alias="other") == []


@pytest.mark.usefixtures("uuids")
def test_promoting_what_is_live_already_moves_nothing(db: Datalayer) -> None:
    moved = db.promote("model", "m", 1, why="good")

    assert db.promote("model", "m", 1, why="again") == moved
    assert db.history("model", "m") == [moved]


@pytest.mark.usefixtures("uuids")
def test_a_rollback_goes_back_and_a_rollback_of_it_returns(db: Datalayer) -> None:
    for version in (0, 1, 2):
        db.promote("model", "m", version)

    back = db.rollback("model", "m", why="it was worse")
    assert (db.load("model", "m").version, back.why) == (1, "it was worse")
    db.rollback("model", "m")
    assert db.load("model", "m").version == 2
    db.rollback("model", "m")

    assert ends(db.history("model", "m"))[3:] == [(4, 2, 1), (5, 1, 2), (6, 2, 1)]


@pytest.mark.usefixtures("uuids")
def test_what_is_not_there_is_neither_promoted_nor_rolled_back_to_nor_loaded(db: Datalayer) -> None:
    other = db.apply(model(5, "n")).result()
    db.promote("model", "m", 1)
    before = db.history("model", "m")
    acts: list[tuple[Any, type[MongotorchError], str]] = [
        (lambda: db.promote("model", "m", 7), NotFoundError, "version 7"),
        (lambda: db.promote("model", "x"), NotFoundError, "model 'x'"),
        (lambda: db.promote("model", "m", uuid="nothing"), NotFoundError, "nothing"),
        (lambda: db.promote("model", "m", uuid=other.uuid), NotFoundError, "model 'n'"),
        (lambda: db.promote("model", "m", 1, uuid=other.uuid), ParameterError, "not both"),
        (lambda: db.promote("model", "m", 1, alias="a/b"), IdentifierError, "a/b"),
        (lambda: db.promote("model", "m", 1, alias="-x"), IdentifierError, "-x"),
        (lambda: db.rollback("model", "m"), NotFoundError, "nothing to roll back to"),
        (lambda: db.rollback("model", "n"), NotFoundError, "nothing to roll back to"),
        (lambda: db.load("model", "m", alias="stage"), NotFoundError, r"stage.*there are \['live'\]"),
        (lambda: db.load("model", "n", alias="live"), NotFoundError, "no alias 'live'"),
        (lambda: db.load("model", "m", 1, alias="live"), ParameterError, "not both"),
        (lambda: db.load(uuid=other.uuid, alias="live"), ParameterError, "not both"),
    ]
    for act, error, says in acts:
        with pytest.raises(error, match=says):
            act()
    assert db.history("model", "m") == before
    assert db["mt.aliases"].count() == 1


# Two at once.


@pytest.mark.usefixtures("uuids")
def test_who_expects_an_older_state_is_refused_and_learns_who_moved_it(db: Datalayer) -> None:
    first = db.promote("model", "m", 0)
    second = db.promote("model", "m", 1, who="ben", why="urgent", expected=first)

    for stale in (first, None):
        for version in (0, 1, 2):
            with pytest.raises(ConflictError, match=r"version 1 since ben moved it .*urgent"):
                db.promote("model", "m", version, expected=stale)
    assert db.promote("model", "m", 1, expected=second) == second
    assert db.history("model", "m") == [first, second]


def test_of_many_that_promote_at_once_with_one_expectation_one_wins(db: Datalayer, uri: str) -> None:
    for seed in range(AT_ONCE):
        db.apply(model(seed))
    start = threading.Barrier(AT_ONCE)
    rounds = 10

    def promote(version: int) -> list[Move | None]:
        found: list[Move | None] = []
        with Datalayer.connect(uri, progress=False) as own:
            for _ in range(rounds):
                moves = own.history("model", "m")
                expected = moves[-1] if moves else None
                start.wait(60)
                try:
                    found.append(own.promote("model", "m", version, expected=expected, who=str(version)))
                except ConflictError:
                    found.append(None)
                start.wait(60)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(promote, range(AT_ONCE)))

    history = db.history("model", "m")
    made = {move for moves in found for move in moves if move is not None}
    assert made == set(history)
    # A round in which the winner is who won before makes no move: it is live already.
    assert all(1 <= sum(move is not None for move in each) <= 2 for each in zip(*found, strict=True))
    assert [move.n for move in history] == list(range(1, len(history) + 1))
    assert [move.from_uuid for move in history] == [None, *(move.to_uuid for move in history[:-1])]
    assert [move.when for move in history] == sorted(move.when for move in history)
    assert all(move.who == str(move.to_version) for move in history)


def test_of_processes_that_promote_at_once_one_wins_each_move(server_uri: str) -> None:
    code = """
    from mongotorch import Datalayer
    from mongotorch.errors import ConflictError

    won = lost = 0
    with Datalayer.connect() as db:
        while won < 20:
            try:
                won += db.promote("model", "m", won % 2 + GIVEN["first"], who=GIVEN["who"]).who == GIVEN["who"]
            except ConflictError:
                lost += 1
    ANSWER = [won, lost]
    """
    with Datalayer.connect(server_uri, progress=False) as db:
        for seed in range(6):
            db.apply(model(seed))
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(run_elsewhere, server_uri, code, first=2 * n, who=f"p{n}") for n in range(3)]
            results = [call.result() for call in calls]

        history = db.history("model", "m")
        assert [won for won, _ in results] == [20, 20, 20]
        assert [move.n for move in history] == list(range(1, len(history) + 1))
        assert [move.from_uuid for move in history] == [None, *(move.to_uuid for move in history[:-1])]
        for n in range(3):
            mine = [move for move in history if move.who == f"p{n}"]
            assert {move.to_version for move in mine} == {2 * n, 2 * n + 1}


def test_a_job_moves_an_alias_once_however_often_it_is_tried(db: Datalayer, uuids: list[str]) -> None:
    aliases, documents = db._services.catalog.aliases, [db.show("model", "m", n) for n in range(3)]
    by: dict[str, Any] = {"who": "w", "why": "trained"}
    first = aliases.move("model", "m", to=documents[1], expected=None, job="j", **by)
    db.promote("model", "m", 2)

    assert aliases.move("model", "m", to=documents[1], expected=None, job="j", **by) == first
    assert db._services.catalog.promoter.promote("model", "m", uuid=uuids[1], job="j", expected=None) == first
    assert db.load("model", "m").version == 2
    assert ends(db.history("model", "m")) == [(1, None, 1), (2, 1, 2)]
    assert aliases.move("model", "m", "other", to=documents[0], expected=None, job="j", **by).n == 1
    assert db.promote("model", "m", 0).job is None


# What was live then.


def test_what_was_live_at_a_moment_is_a_query(db: Datalayer, uuids: list[str]) -> None:
    times = iter([NOON, NOON - timedelta(hours=2), NOON + timedelta(hours=1)])
    aliases = Aliases(db["mt.aliases"].raw.database, now=lambda: next(times))
    before: Move | None = None
    for version in range(3):
        document = db.show("model", "m", version)
        before = aliases.move("model", "m", to=document, expected=before, who="w", why="")

    # The clock went back: the second move is never earlier than the first.
    assert [move.when for move in db.history("model", "m")] == [NOON, NOON, NOON + timedelta(hours=1)]
    berlin = timezone(timedelta(hours=2))
    expected: list[tuple[datetime, int | None]] = [
        (NOON - timedelta(milliseconds=1), None),
        (NOON, 1),
        (NOON.replace(hour=14, tzinfo=berlin), 1),
        (NOON + timedelta(minutes=59), 1),
        (NOON.replace(hour=15, tzinfo=berlin), 2),
        (NOON + timedelta(days=365), 2),
    ]
    for moment, wanted in expected:
        then = aliases.at("model", "m", moment)
        assert (None if then is None else then.to_version) == wanted
        moves = db.history("model", "m", at=moment)
        assert (moves[-1] if moves else None) == then
        assert ends(moves) == ends(db.history("model", "m"))[: len(moves)]


# Removing.


@pytest.mark.usefixtures("uuids")
def test_what_an_alias_names_is_not_removed(db: Datalayer) -> None:
    db.promote("model", "m", 1)
    db.promote("model", "m", 1, alias="stage")
    db.promote("model", "m", 0, alias="stage")

    for version, alias in ((1, "live"), (0, "stage"), (None, "live|stage")):
        with pytest.raises(InUseError, match=rf"alias '({alias})'"):
            db.remove("model", "m", version)
    assert db.show("model", "m") == [0, 1, 2]
    assert db.remove("model", "m", 2) == 1


@pytest.mark.usefixtures("uuids")
def test_forced_the_alias_names_nothing_and_the_history_says_so(db: Datalayer) -> None:
    db.promote("model", "m", 0)
    db.promote("model", "m", 1)

    assert db.remove("model", "m", 1, force=True) == 1

    assert db.load("model", "m").version == 2
    assert ends(db.history("model", "m")) == [(1, None, 0), (2, 0, 1), (3, 1, None)]
    assert db.history("model", "m")[-1].why == "removed"
    with pytest.raises(NotFoundError, match="no alias 'live'"):
        db.load("model", "m", alias="live")
    with pytest.raises(NotFoundError):
        db.rollback("model", "m")
    db.promote("model", "m", 0)
    assert db.remove("model", "m", force=True) == 2
    assert ends(db.history("model", "m"))[3:] == [(4, None, 0), (5, 0, None)]
    with pytest.raises(NotFoundError):
        db.load("model", "m")


def test_a_trainer_that_an_alias_names_keeps_the_model_it_was_published_with(db: Datalayer) -> None:
    db.apply(trainer(fill(db)))
    db.promote("trainer", "t", 1)

    with pytest.raises(InUseError, match="alias 'live'"):
        db.remove("model", "m", 1)
    assert db.load("trainer", "t").version == 1


def test_a_version_that_is_removed_while_it_is_promoted_is_named_by_nothing(
    db: Datalayer, uuids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aliases = db._services.catalog.aliases
    move = Aliases.move

    def late(self: Aliases, *args: Any, **given: Any) -> Move:
        db["mt.components"].raw.delete_one({"_id": uuids[1]})  # as another process would, after it had looked
        monkeypatch.undo()
        return move(self, *args, **given)

    monkeypatch.setattr(Aliases, "move", late)
    with pytest.raises(NotFoundError, match="removed while"):
        db.promote("model", "m", 1)

    assert aliases.names(uuids) == []
    assert db.load("model", "m").version == 2


@pytest.mark.usefixtures("uuids")
def test_a_version_that_is_promoted_while_it_is_removed_is_named_by_nothing(
    db: Datalayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, document = Components.remove, db.show("model", "m", 1)

    def late(self: Components, uuid: str) -> None:
        # As another process would, after it had looked whether the version is there.
        db._services.catalog.aliases.move("model", "m", to=document, expected=None, who="w", why="")
        remove(self, uuid)

    monkeypatch.setattr(Components, "remove", late)
    assert db.remove("model", "m", 1) == 1

    assert ends(db.history("model", "m")) == [(1, None, 1), (2, 1, None)]
    assert db.load("model", "m").version == 2


def test_a_version_that_was_moved_away_from_and_removed_while_it_is_loaded_is_not_missed(
    db: Datalayer, uuids: list[str]
) -> None:
    stale = db.promote("model", "m", 0)
    db.promote("model", "m", 1)
    db.remove("model", "m", 0)

    assert db._services.catalog.named_by(stale)["_id"] == uuids[1]
    db["mt.components"].raw.delete_one({"_id": uuids[1]})
    with pytest.raises(NotFoundError, match="which is gone"):
        db.load("model", "m")


# Who may write it.


@pytest.fixture
def signed(uri: str) -> Any:
    with Datalayer.connect(uri, progress=False, signing_key=KEY, trust="signed") as db:
        for identifier in ("a", "b"):
            for function in (len, sum, max):
                db.apply(Metric(identifier, object=function))
        yield db


def test_signed_moves_are_read_and_made(signed: Datalayer) -> None:
    for version in (0, 1):
        signed.promote("metric", "a", version)
    signed.rollback("metric", "a")

    assert signed.load("metric", "a").version == 0
    assert len(signed.history("metric", "a")) == 3


@pytest.mark.parametrize("key", [None, FOREIGN])
def test_a_move_that_no_accepted_key_signed_is_refused(signed: Datalayer, uri: str, key: str | None) -> None:
    settings = {} if key is None else {"signing_key": key}
    with Datalayer.connect(uri, progress=False, **settings) as stranger:
        stranger.promote("metric", "a", 0)

    refused(signed, "a")


def refused(db: Datalayer, identifier: str) -> None:
    acts: list[Any] = [
        lambda: db.load("metric", identifier),
        lambda: db.history("metric", identifier),
        lambda: db.promote("metric", identifier, 2),
        lambda: db.rollback("metric", identifier),
    ]
    for act in acts:
        with pytest.raises(TrustError):
            act()


@pytest.mark.parametrize(
    "change",
    [
        {"to": "other"},
        {"to_version": 0},
        {"who": "ann"},
        {"why": "x"},
        {"when": NOON},
        {"n": 7},
        {"job": "j"},
        {"from": "other"},
        {"more": 1},
        {"signature": None},
    ],
)
def test_a_move_that_was_changed_is_refused(signed: Datalayer, change: dict[str, Any]) -> None:
    signed.promote("metric", "a", 1)
    signed["mt.aliases"].raw.update_one({}, {"$set": change})

    refused(signed, "a")


@pytest.mark.parametrize("renamed", [True, False])
def test_a_genuine_move_under_another_name_or_number_is_refused(signed: Datalayer, renamed: bool) -> None:
    signed.promote("metric", "a", 0)
    signed.promote("metric", "a", 1)
    moves = signed["mt.aliases"].raw
    document = moves.find_one({"n": 1})
    other = {"identifier": "b"} if renamed else {"n": 3}
    name = "metric/b/live#1" if renamed else "metric/a/live#3"
    moves.insert_one({**document, **other, "_id": name})

    refused(signed, "b" if renamed else "a")


def test_without_signatures_a_move_still_has_to_be_one_of_its_alias(db: Datalayer, uuids: list[str]) -> None:
    other = db.apply(model(5, "n")).result()
    db.promote("model", "m", 1)
    moves = db["mt.aliases"].raw
    document = moves.find_one({})
    for forged in (
        {**document, "_id": "model/m/live#3", "n": 4},
        {**document, "_id": "model/m/live#2", "n": 2, "to": {"$ne": None}},
        {**document, "_id": "model/m/live#2", "n": 2, "to": other.uuid},
        {"_id": "model/m/live#2", "type_id": "model", "identifier": "m", "alias": "live", "n": 2, "to": uuids[0]},
    ):
        moves.insert_one(forged)
        with pytest.raises(TrustError):
            db.load("model", "m")
        moves.delete_one({"_id": forged["_id"]})
    assert db.load("model", "m").version == 1


def test_verifying_names_every_move_that_is_broken_or_missing(signed: Datalayer) -> None:
    for identifier in ("a", "b"):
        for version in (0, 1, 2):
            signed.promote("metric", identifier, version)
    signed.promote("metric", "a", 0, alias="stage")
    assert (signed.verify().aliases, signed.verify().problems) == (7, ())

    moves = signed["mt.aliases"].raw
    moves.update_one({"_id": "metric/a/live#1"}, {"$set": {"why": "x"}})
    moves.delete_one({"_id": "metric/b/live#2"})
    gone = signed.show("metric", "a", 0)["_id"]
    signed["mt.components"].raw.delete_one({"_id": gone})
    moves.insert_one({"_id": "metric/b/other#1", "n": "one", "alias": {"x": 1}, "to": {"$ne": None}})

    report = signed.verify()
    assert report.aliases == 7
    for part in (
        "metric/a/live#1",
        "missing before metric/b/live#3",
        f"'stage' .*names {gone}",
        "metric/b/other#1",
    ):
        assert any(re.search(part, problem) for problem in report.problems)
    assert not any("a/live#2" in problem or "a/live#3" in problem for problem in report.problems)
