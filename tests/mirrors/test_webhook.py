"""A webhook gets each event, signed, once, and again only where it did not say that it has it."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.helpers import fill, trainer
from tests.mirrors.mirrored import Written

from mongotorch import Always, Datalayer, Every, Never, Schedule, Worker
from mongotorch.errors import SettingError
from mongotorch.mirrors import open_mirror
from mongotorch.mirrors.webhook import WebhookMirror

SECRET = "a secret of the receiver"


class Receiver:
    """A server that keeps what it gets, and answers as the test says."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                status = outer.answers.pop(0) if outer.answers else 204
                self.send_response(status)
                if status in (301, 302, 307):
                    self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=t0ken"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def signed(uri: str, db: Datalayer) -> Iterator[Datalayer]:
    """A datalayer with the secret."""
    with Datalayer.connect(uri, progress=False, webhook_secret=SECRET, compute="queue") as signed:
        yield signed


def open_hook(db: Datalayer, receiver: Receiver) -> WebhookMirror:
    hook = open_mirror(f"webhook:{receiver.url}", db)
    assert isinstance(hook, WebhookMirror)
    hook.update(db)
    return hook


def test_events_are_signed_and_sent_once(db: Datalayer, signed: Datalayer, receiver: Receiver) -> None:
    select = fill(db)
    db.apply(trainer(select, seed=99))
    hook = open_hook(signed, receiver)
    assert receiver.got == [], "what happened before the first mirror is nobody's news"

    job = db.apply(trainer(select))
    db.promote("model", "m", why="reviewed")
    db.apply(trainer(select, objective=no_objective)).exception()
    assert hook.update(signed) == 3
    assert hook.update(signed) == 0
    again = open_mirror(f"webhook:{receiver.url}", signed)
    assert again.update(signed) == 0

    assert [event["event"] for event in receiver.events] == ["published", "promoted", "failed"]
    published, promoted, failed = receiver.events
    assert published["job"] == job.uuid
    assert published["model"]["version"] == 2
    assert published["metrics"]["objective"] == pytest.approx(job.result().trainer.metric_values["objective"][-1])
    assert (promoted["to"], promoted["alias"], promoted["why"]) == (2, "live", "reviewed")
    assert failed["error"]["type"] == "RuntimeError"
    for headers, body in receiver.got:
        expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        assert headers["Mongotorch-Signature"] == f"sha256={expected}"
        assert headers["Mongotorch-Delivery"] == json.loads(body)["id"]
        assert b"hunter2" not in body
        assert SECRET.encode() not in body


def no_objective(output: Any, target: Any) -> Any:
    raise RuntimeError("mongodb://me:hunter2@host is not for your eyes")


def test_a_model_that_the_gate_refuses_is_told(db: Datalayer, signed: Datalayer, receiver: Receiver) -> None:
    hook = open_hook(signed, receiver)
    quick = trainer(fill(db))
    for name, gate in (("yes", Always()), ("no", Never())):
        db.apply(Schedule(name, trainer=quick, trigger=Every(seconds=3.6e6), gate=gate))
        db.fire(name)
        Worker(db, schedules=False).once()
    hook.update(signed)
    kinds = [event["event"] for event in receiver.events]
    assert sorted(kinds) == ["promoted", "published", "published", "refused"]
    (refused,) = [event for event in receiver.events if event["event"] == "refused"]
    assert refused["why"]


def test_what_was_not_taken_is_sent_again(
    db: Datalayer, signed: Datalayer, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = open_hook(signed, receiver)
    Written(db, "a").fail()
    Written(db, "b").fail()
    receiver.answers = [503, 200]
    assert hook.update(signed) == 1
    assert hook.update(signed) == 0, "it waits before it tries again"
    hook._failed.clear()
    assert hook.update(signed) == 1
    names = [event["identifier"] for event in receiver.events]
    assert names == ["a", "b", "a"]


def test_a_mirror_that_was_killed_before_it_recorded_sends_the_same_delivery_again(
    db: Datalayer, signed: Datalayer, receiver: Receiver
) -> None:
    hook = open_hook(signed, receiver)
    Written(db, "a").fail()
    Written(db, "b").fail()
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(type(signed.run_log.positions), "record", killed)
        with pytest.raises(KeyboardInterrupt):
            hook.update(signed)
    assert open_mirror(f"webhook:{receiver.url}", signed).update(signed) == 2
    deliveries = [headers["Mongotorch-Delivery"] for headers, _ in receiver.got]
    assert deliveries[0] == deliveries[1]
    assert len(set(deliveries)) == 2


@pytest.mark.parametrize("answer", [400, 404, 302])
def test_what_is_refused_is_not_sent_again(
    db: Datalayer, signed: Datalayer, receiver: Receiver, answer: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hook = open_hook(signed, receiver)
    Written(db).fail()
    receiver.answers = [answer]
    hook.update(signed)
    hook._failed.clear()
    assert hook.update(signed) == 0
    assert len(receiver.got) == 1
    assert "refused" in caplog.text
    assert "t0ken" not in caplog.text + repr(hook)


def test_a_job_without_a_name_is_told_as_well(db: Datalayer, signed: Datalayer, receiver: Receiver) -> None:
    hook = open_hook(signed, receiver)
    run = Written(db)
    db["mt.jobs"].raw.update_one({"_id": run.uuid}, {"$unset": {"type_id": ""}})
    run.fail()
    assert hook.update(signed) == 1


def test_a_receiver_that_is_not_there_slows_nothing(db: Datalayer, signed: Datalayer) -> None:
    hook = open_mirror("webhook:http://127.0.0.1:1/", signed)
    hook.update(signed)
    Written(db).fail()
    assert hook.update(signed) == 0


@pytest.mark.parametrize("target", ["ftp://host/", "host", "http://", "http://me:secret@host/", ""])
def test_an_address_that_cannot_be_used_is_refused(signed: Datalayer, target: str) -> None:
    with pytest.raises(SettingError) as caught:
        open_mirror(f"webhook:{target}", signed)
    assert "secret@" not in str(caught.value)


def test_without_a_secret_nothing_is_sent(db: Datalayer) -> None:
    with pytest.raises(SettingError, match="webhook_secret"):
        open_mirror("webhook:http://host/", db)


def test_a_mirror_that_does_not_exist_is_refused_with_those_there_are(db: Datalayer) -> None:
    with pytest.raises(SettingError, match="tensorboard"):
        open_mirror("nothing:here", db)
