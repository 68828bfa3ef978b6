"""The mirror `webhook:URL`: a POST for each job that failed, version that was published or refused, and promotion.

The body is JSON. `Mongotorch-Signature: sha256=…` is its HMAC-SHA256 under the setting `webhook_secret`, and
`Mongotorch-Delivery` names the event. A receiver cannot be asked what it has: what was sent is recorded in
`mt.mirrors` after each answer. A mirror that is killed in between sends that one event again, under the same name.

Guarantees: every event is sent, once it is there, until the receiver takes or refuses it. Nothing of the address
of the database is in it, and no message shows more of the URL than its host.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import logging
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, Final, Self, final
from urllib.parse import urlsplit

from bson import json_util

from mongotorch.datalayer import Datalayer
from mongotorch.errors import SettingError
from mongotorch.mirrors.base import Mirror
from mongotorch.store import RunEvent

_TIMEOUT_S: Final = 10.0
_BEFORE: Final = timedelta(seconds=60)
_TRIED_AGAIN: Final = frozenset({408, 425, 429})  # and everything from 500 on
_LONGEST_PAUSE: Final = timedelta(seconds=300)
_JSON: Final = json_util.JSONOptions(json_mode=json_util.JSONMode.RELAXED)
_log = logging.getLogger("mongotorch.mirrors")
Post = Callable[[str, bytes, dict[str, str]], int]
"""Sends a body to a URL, with headers; the status of the answer. Raises: OSError."""


@final
class WebhookMirror(Mirror):
    """Posts events.

    Args:
        url: Where to.
        secret: The key of the signatures.
        post: Sends a request; for tests.
    """

    name: ClassVar[str] = "webhook"

    def __init__(self, url: str, secret: bytes, *, post: Post | None = None) -> None:
        self._url, self._secret, self._post = url, secret, post or _posted
        self._name = f"webhook:{hashlib.sha256(url.encode()).hexdigest()[:32]}"
        self._failed: dict[str, tuple[int, Any]] = {}  # event: how often, and when it is tried again

    def __repr__(self) -> str:
        return f"WebhookMirror({urlsplit(self._url).hostname!r})"

    @classmethod
    def open(cls, target: str, db: Datalayer) -> Self:
        """Check the URL and the secret. Raises: SettingError."""
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError("webhook: give an address with http:// or https://", setting="to")
        if parts.username or parts.password:
            raise SettingError("webhook: an address has no user and password; requests are signed", setting="to")
        if db.settings.webhook_secret is None:
            raise SettingError(
                "webhook: set webhook_secret (MONGOTORCH_WEBHOOK_SECRET), by which requests are signed",
                setting="webhook_secret",
            )
        return cls(target, db.settings.webhook_secret.get_secret_value().encode())

    def close(self) -> None:
        """Do nothing: a request opens and closes its connection."""

    def update(self, db: Datalayer) -> int:
        """Post what has happened since the last call, from the first call of the first mirror on."""
        positions, count = db.run_log.positions, 0
        since, sent = positions.begin(self._name)
        now = positions.now()
        events = db.run_log.events(since)
        for event in events:
            if event.id in sent or self._failed.get(event.id, (0, now))[1] > now:
                continue
            if self._deliver(event, now):
                positions.record(self._name, event.id)
                sent.add(event.id)
                count += 1
        if all(event.id in sent for event in events):
            # What is committed late, or by a clock that is behind, is still seen.
            after = max(since, now - _BEFORE)
            kept = {event.id for event in events if event.time >= after}
            if after - since > _BEFORE or kept != sent:
                positions.advance(self._name, after, kept)
        return count

    def _deliver(self, event: RunEvent, now: Any) -> bool:
        """Post one event; False where it has to be tried again."""
        fields = {"id": event.id, "event": event.kind, "time": event.time.isoformat() + "Z", **event.details}
        body = json_util.dumps(fields, json_options=_JSON).encode()
        signature = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        headers = {
            "Content-Type": "application/json",
            "Mongotorch-Event": event.kind,
            "Mongotorch-Delivery": event.id,
            "Mongotorch-Signature": f"sha256={signature}",
        }
        try:
            status = self._post(self._url, body, headers)
        except (OSError, http.client.HTTPException) as error:
            status = 599
            why = type(error).__name__
        else:
            why = f"status {status}"
        host = urlsplit(self._url).hostname
        if status < 300:
            self._failed.pop(event.id, None)
            return True
        if status < 500 and status not in _TRIED_AGAIN:
            _log.error("webhook: %s refused event %s (%s); it is not sent again", host, event.id, why)
            return True
        number = self._failed.get(event.id, (0, now))[0] + 1
        pause = min(timedelta(seconds=2.0 ** min(number, 10)), _LONGEST_PAUSE)
        self._failed[event.id] = (number, now + pause)
        _log.warning("webhook: %s did not take event %s (%s); it is sent again", host, event.id, why)
        return False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the signed body is for the address that was given."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Give no further request, so that the answer itself counts."""
        return


def _posted(url: str, body: bytes, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")  # noqa: S310 - http or https
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return int(error.code)
