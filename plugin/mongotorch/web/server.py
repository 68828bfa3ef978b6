"""Serves the dashboard: opens the port, says the address, and runs until it is told to stop."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import final

import uvicorn

from mongotorch.datalayer import Datalayer
from mongotorch.errors import SettingError
from mongotorch.web.app import create_app
from mongotorch.web.security import check_token

HOST = "127.0.0.1"
PORT = 8265
_STARTS_S = 30.0


def serve(
    db: Datalayer,
    *,
    host: str = HOST,
    port: int = PORT,
    token: str | None = None,
    say: Callable[[str], object] | None = None,
) -> None:
    """Serve the dashboard of a database until SIGINT or SIGTERM.

    Args:
        db: The database.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        token: What each request has to bring; needed where others can reach the host.
        say: Called with the address once the port is open.

    Raises:
        SettingError: The port is taken, or there is no token where one is needed.
    """
    with _listening(host, port) as (listener, address):
        server = _server(db, host, token)
        if say is not None:
            say(address)
        server.run(sockets=[listener])


@contextlib.contextmanager
def serving(db: Datalayer, *, token: str | None = None) -> Iterator[str]:
    """Serve the dashboard from a thread while the context is open, on a free port of 127.0.0.1.

    Args:
        db: The database.
        token: What each request has to bring.

    Yields:
        The address.

    Raises:
        SettingError: The token is too short.
    """
    with _listening(HOST, 0) as (listener, address):
        server = _server(db, HOST, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(_STARTS_S)


@final
class _Server(uvicorn.Server):
    """Ends the event streams of open pages first: they would not end by themselves."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close everything."""
        self.config.app.state.events.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def _server(db: Datalayer, host: str, token: str | None) -> _Server:
    check_token(host, token)
    config = uvicorn.Config(
        create_app(db, token=token),
        log_level="warning",
        access_log=False,  # an address may hold the token
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket, and the address that people open."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise SettingError(
            f"cannot listen on {host} port {port}: {error}; --port 0 takes a free one", setting="port"
        ) from error
    with listener:
        shown = f"[{host}]" if ":" in host else host
        yield listener, f"http://{shown}:{listener.getsockname()[1]}/"
