"""A version that nobody signed does not stop those who ask for signed ones; keys are changed without a loss."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.helpers import model, same, state

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
