"""Decides who may see the dashboard, and sets the headers that keep a browser from running what is stored.

Without a token only requests that name this machine in `Host` are answered, so that no other site can reach the
dashboard through a name of its own that resolves to 127.0.0.1. With a token each request needs it: as
`Authorization: Bearer TOKEN`, or as the cookie that `/login` sets.

Source: OWASP cheat sheets, "Content Security Policy" and "Session Management".
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from typing import Any, Final, final
from urllib.parse import parse_qs, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mongotorch.errors import SettingError

COOKIE: Final = "mongotorch_dashboard"
SHORTEST_TOKEN: Final = 16  # characters
LOGIN: Final = "/login"
_OPEN_PATHS: Final = ("/static/",)
_MOST_BODY: Final = 4096  # bytes of a login
_PAUSE_S: Final = 0.5  # after a wrong token
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def is_loopback(host: str) -> bool:
    """Whether a host, an address or `localhost`, is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_token(host: str, token: str | None) -> None:
    """Refuse to serve beyond this machine without a token.

    Args:
        host: Where the dashboard listens.
        token: The token; None: there is none.

    Raises:
        SettingError: There is none where one is needed, or it is too short.
    """
    if token is None and not is_loopback(host):
        raise SettingError(
            f"on {host} others can reach the dashboard: give it a token, such as --token "
            '"$(openssl rand -hex 16)", or listen on 127.0.0.1',
            setting="token",
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise SettingError(f"the token needs at least {SHORTEST_TOKEN} characters", setting="token")


@final
class AccessControl:
    """Middleware: checks the host or the token of each request, and sets the headers of each response.

    Args:
        app: The application.
        token: The token; None: only requests to this machine's own names.
        login_page: Renders the page that asks for the token, as HTML.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, login_page: Any) -> None:
        self._app, self._login_page = app, login_page
        self._token = None if token is None else token.encode()
        # Not the token itself: a cookie lies on a disk.
        self._session = hmac.digest(self._token or b"", b"mongotorch dashboard", hashlib.sha256).hex()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        response = await self._refusal(Request(scope, receive))
        await (self._app if response is None else response)(scope, receive, send_with_headers)

    async def _refusal(self, request: Request) -> Response | None:
        """What is answered instead of the page; None where the request is let through."""
        if self._token is None:
            if not is_loopback(_host(request.headers)):
                return PlainTextResponse("this dashboard answers on localhost and 127.0.0.1 only", 421)
        elif request.url.path == LOGIN and request.method == "POST":
            return await self._log_in(await _posted_token(request))
        elif "token" in request.query_params:
            return await self._log_in(request.query_params["token"], back=request)
        elif not request.url.path.startswith(_OPEN_PATHS) and not self._is_known(request):
            return self._ask(request)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("the dashboard only reads", 405, {"Allow": "GET, HEAD"})
        return None

    def _is_known(self, connection: HTTPConnection) -> bool:
        scheme, _, given = connection.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        cookie = connection.cookies.get(COOKIE, "")
        return hmac.compare_digest(cookie.encode(), self._session.encode())

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token)

    async def _log_in(self, given: str, back: Request | None = None) -> Response:
        """Set the cookie, and go on without the token in the address."""
        if not self._is_token(given):
            await asyncio.sleep(_PAUSE_S)
            return Response(self._login_page(wrong=True), 401, media_type="text/html")
        target = "/"
        if back is not None:
            # One slash first: `//other.example` would be another site.
            left = [(name, value) for name, value in back.query_params.multi_items() if name != "token"]
            target = "/" + quote(back.scope["path"].lstrip("/")) + (f"?{urlencode(left)}" if left else "")
        response = RedirectResponse(target, 303)
        response.set_cookie(COOKIE, self._session, httponly=True, samesite="strict")
        return response

    def _ask(self, request: Request) -> Response:
        wants_page = "text/html" in request.headers.get("Accept", "")
        challenge = {"WWW-Authenticate": "Bearer"}
        if not wants_page or request.query_params.get("format") == "json":
            return JSONResponse({"error": "this dashboard needs a token"}, 401, challenge)
        return Response(self._login_page(wrong=False), 401, challenge, media_type="text/html")


def _host(headers: Headers) -> str:
    """The host that a request names, without its port."""
    host = headers.get("Host", "")
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _posted_token(request: Request) -> str:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BODY:
            return ""
    return parse_qs(body.decode(errors="replace")).get("token", [""])[0]
