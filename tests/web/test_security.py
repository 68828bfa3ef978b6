"""Who may see the dashboard, and what a browser may do with it."""

from __future__ import annotations

import pytest
from tests.web.pages import client

from mongotorch import Datalayer
from mongotorch.errors import SettingError
from mongotorch.web.security import COOKIE, HEADERS, check_token, is_loopback
from mongotorch.web.server import serve

TOKEN = "correct-horse-battery-staple"
PAGE = {"Accept": "text/html"}


@pytest.fixture
def db() -> object:
    with Datalayer.connect("mongomock://dashboard-access", progress=False) as datalayer:
        yield datalayer


def test_every_answer_has_the_headers(db: Datalayer) -> None:
    with client(db) as web:
        for address in ("/", "/nowhere", "/static/dashboard.js", "/models?format=json"):
            headers = web.get(address).headers
            for name, value in HEADERS.items():
                assert headers[name] == value, address
            assert "unsafe" not in headers["Content-Security-Policy"]
        assert web.get("/").headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(db: Datalayer, method: str) -> None:
    with client(db) as web:
        assert web.request(method, "/").status_code == 405
    with client(db, token=TOKEN) as web:
        assert web.request(method, "/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 405


@pytest.mark.parametrize("host", ["localhost:8265", "127.0.0.1", "[::1]:8265", "127.8.9.1:1"])
def test_this_machine_is_let_in(db: Datalayer, host: str) -> None:
    with client(db) as web:
        assert web.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8265", "10.0.0.7", ""]
)
def test_a_name_that_only_resolves_to_this_machine_is_not(db: Datalayer, host: str) -> None:
    with client(db) as web:
        assert web.get("/", headers={"Host": host}).status_code == 421


def test_a_token_is_needed_everywhere(db: Datalayer) -> None:
    with client(db, token=TOKEN, at="http://dashboard.example") as web:
        for address in ("/", "/runs/x", "/models?format=json", "/events", "/nowhere"):
            assert web.get(address).status_code == 401, address
            assert web.get(address, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert web.get(address, headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
            assert web.get(address, headers={"Cookie": f"{COOKIE}={TOKEN}"}).status_code == 401
        assert web.get("/models?format=json").json() == {"error": "this dashboard needs a token"}
        assert "password" in web.get("/", headers=PAGE).text
        assert web.get("/static/dashboard.css").status_code == 200
        assert web.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_logging_in_sets_a_cookie_that_is_not_the_token(db: Datalayer) -> None:
    with client(db, token=TOKEN) as web:
        wrong = web.post("/login", data={"token": "wrong"})
        assert wrong.status_code == 401
        assert COOKIE not in wrong.cookies
        right = web.post("/login", data={"token": TOKEN})
        assert (right.status_code, right.headers["Location"]) == (303, "/")
        written = right.headers["Set-Cookie"].lower()
        assert "httponly" in written
        assert "samesite=strict" in written
        assert TOKEN not in written
        assert web.get("/").status_code == 200
        assert TOKEN not in web.get("/").text


@pytest.mark.parametrize(
    ("address", "target"),
    [
        (f"/models?token={TOKEN}&format=json", "/models?format=json"),
        (f"/?token={TOKEN}", "/"),
        (f"//evil.example/?token={TOKEN}", "/evil.example/"),
        (f"/%5Cevil.example?token={TOKEN}", "/%5Cevil.example"),
    ],
)
def test_a_token_in_the_address_is_taken_out_of_it(db: Datalayer, address: str, target: str) -> None:
    with client(db, token=TOKEN) as web:
        answer = web.get("http://127.0.0.1" + address)
        assert (answer.status_code, answer.headers["Location"]) == (303, target)
        assert COOKIE in answer.cookies


def test_a_huge_login_is_not_read(db: Datalayer) -> None:
    with client(db, token=TOKEN) as web:
        assert web.post("/login", content=b"token=" + b"x" * 10_000_000).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_others_are_not_served_without_a_token(db: Datalayer, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(SettingError, match="token"):
        check_token(host, None)
    check_token(host, TOKEN)


def test_a_short_token_is_refused() -> None:
    with pytest.raises(SettingError, match="16 characters"):
        check_token("127.0.0.1", "short")


def test_a_port_that_is_taken_is_one_sentence(db: Datalayer) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingError, match="--port 0"):
        serve(db, port=taken.getsockname()[1])
