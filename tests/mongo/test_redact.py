"""No password in what people read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mongotorch.mongo.redact import redact

_word = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
_secret = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=4, max_size=20)


@given(_word, _secret, _word, st.sampled_from(["", "?authSource=admin", "/shop?tls=true"]))
def test_no_password_survives_redaction(user: str, secret: str, host: str, rest: str) -> None:
    address = f"mongodb://{user}:<{secret}>@{host}{rest}"

    for text in (address, f"cannot reach {address}, is it up?", f"{address} {address}"):
        assert f"<{secret}>" not in redact(text)
        assert f"mongodb://{user}:***@" in redact(text)


@pytest.mark.parametrize("option", ["tlsCertificateKeyFilePassword", "authMechanismProperties", "proxyPassword"])
def test_options_that_hold_secrets_are_hidden(option: str) -> None:
    found = redact(f"mongodb://h/db?w=1&{option}=s3cret&tls=true")

    assert "s3cret" not in found
    assert found.endswith("&tls=true")


def test_text_without_an_address_stays_as_it_is() -> None:
    text = "a@b: mongodb://h/db has 3 documents, see user@example.net"

    assert redact(text) == text
