"""A version that nobody signed does not stop those who ask for signed ones; keys are changed without a loss."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.helpers import fill, model, same, state, trainer

from mongotorch import Datalayer
from mongotorch.errors import SettingError, TrustError

OLD, NEW = "an-old-key-of-16-bytes", "a-new-key-of-16-bytes-"


def test_a_newer_version_that_nobody_signed_is_skipped_and_said(
    uri: str, db: Datalayer, caplog: pytest.LogCaptureFixture
) -> None:
    with Datalayer.connect(uri, signing_key=OLD, trust="signed") as signed:
        signed.apply(model(1))
        db.apply(model(2))
        with pytest.raises(TrustError):
            signed.load("model", "m", 1)

        with caplog.at_level(logging.WARNING):
            assert same(state(signed.load("model", "m")), state(model(1)))
        assert "is not signed" in caplog.text
        assert signed.apply(model(1)).result().version == 0  # it is recognised
        assert signed.apply(model(3)).result().version == 2
        assert same(state(signed.load("model", "m")), state(model(3)))

        assert signed.remove("model", "m") == 2
        assert signed.show("model", "m") == [1]
        with pytest.raises(TrustError):
            signed.load("model", "m")
    assert same(state(db.load("model", "m")), state(model(2)))


def test_what_was_changed_since_it_was_signed_is_not_skipped(uri: str) -> None:
    with Datalayer.connect(uri, signing_key=OLD, trust="signed") as signed:
        signed.apply(model(1))
        signed.apply(model(2))
        signed["mt.components"].raw.update_one({"version": 1}, {"$set": {"digest": "0"}})

        with pytest.raises(TrustError, match="somebody changed it"):
            signed.load("model", "m")


def test_records_are_signed_again_before_a_key_is_dropped(uri: str, db: Datalayer) -> None:
    trusting: dict[str, Any] = {"trust": "signed"}
    db.apply(model(0, identifier="unsigned"))
    with Datalayer.connect(uri, signing_key=OLD, **trusting) as before:
        before.apply(model(1))
        before.promote("model", "m", 0)
        assert before.resign() == 0
    with Datalayer.connect(uri, signing_key=f"{NEW},{OLD}", **trusting) as both:
        both.apply(model(2))
        assert both.resign() == 2
        assert both.resign() == 0
    with Datalayer.connect(uri, signing_key=NEW, **trusting) as after:
        assert same(state(after.load("model", "m")), state(model(1)))
        assert same(state(after.load("model", "m", 1)), state(model(2)))
        assert len(after.verify().problems) == 1  # of the one that was never signed
    with pytest.raises(SettingError):
        db.resign()


def test_a_key_that_was_dropped_too_early_names_what_it_strands(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Datalayer.connect(uri, signing_key=OLD) as before:
        for number in range(7):
            before.apply(model(number, identifier=f"m{number}"))
        before.promote("model", "m0", 0)
        old = before["mt.components"].raw.find_one({})["signature"]["key"]
    with Datalayer.connect(uri, signing_key=NEW, trust="signed") as dropped:
        dropped.apply(model(1))
        with pytest.raises(TrustError, match="put it behind the first key, and run `mongotorch resign`"):
            dropped.load("model", "m3", 0)
        with caplog.at_level(logging.WARNING):
            assert dropped.resign() == 0
        (line,) = [record.getMessage() for record in caplog.records if "not accepted" in record.getMessage()]
        assert line.startswith(f"8 record(s) are signed with the key {old}")
        assert "model 'm0' version 0" in line
        assert "…" in line
        assert OLD not in caplog.text
    with Datalayer.connect(uri, signing_key=f"{NEW},{OLD}", trust="signed") as again:
        caplog.clear()
        assert again.resign() == 8
        assert "not accepted" not in caplog.text
    with Datalayer.connect(uri, signing_key=NEW, trust="signed") as dropped:
        assert dropped.load("model", "m3", 0).version == 0
        assert dropped.load("model", "m0", alias="live").version == 0


def published(uri: str) -> Any:
    """A trainer that a run published with its model, both signed; the document of the trainer."""
    with Datalayer.connect(uri, signing_key=OLD, trust="signed", valid_fraction=0.2, progress=False) as db:
        db.apply(trainer(fill(db))).result()
        assert db.show("trainer", "t") == [0, 1]
        return db["mt.components"].raw.find_one({"type_id": "trainer", "version": 1})


@pytest.mark.parametrize("how", ["unsigned", "of another key", "changed"])
def test_what_no_accepted_key_says_was_published_is_not_visible(
    uri: str, db: Datalayer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    document = published(uri)
    documents = db["mt.components"].raw
    anchor = documents.find_one({"_id": document["anchor"]})
    if how == "unsigned":
        documents.update_one({"_id": anchor["_id"]}, {"$unset": {"signature": ""}})
    elif how == "of another key":
        documents.update_one({"_id": anchor["_id"]}, {"$set": {"signature.key": "0" * 16}})
    else:
        documents.update_one({"_id": anchor["_id"]}, {"$set": {"steps": 99}})

    with Datalayer.connect(uri, signing_key=OLD, trust="signed") as signed, caplog.at_level(logging.WARNING):
        assert signed.show("trainer", "t") == [0]
        with pytest.raises(TrustError):
            signed.load(uuid=document["_id"])
    assert "cannot be trusted" in caplog.text
    with Datalayer.connect(uri) as trusting:
        assert trusting.show("trainer", "t") == [0, 1]
