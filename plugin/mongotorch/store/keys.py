"""From settings to keys: what a person writes into an environment variable or a key file.

A key is one word: `SECRET` or `hmac:SECRET` (at least 16 characters), `ed25519:SEED` or `ed25519-public:KEY`
(32 bytes in base64; needs the package `cryptography`). Several are separated by blanks, commas or lines; `#`
starts a comment. The first that can sign signs, all are accepted: to rotate, put the new one in front.

Always: no error holds a key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from mongotorch.errors import SettingError
from mongotorch.store.ed25519 import Ed25519Key
from mongotorch.store.trust import LEAST_SECRET, HmacKey, Key, Signer, Trust, Verifier

Policy = Literal["any", "signed"]


def trust_of(*, key: str | None, key_file: Path | None, policy: Policy) -> Trust:
    """How to sign and check.

    Args:
        key: Keys, as one text.
        key_file: A file of keys, accepted as well; its first key signs where `key` has none.
        policy: `signed` refuses whatever no accepted key has signed; `any` takes unsigned documents too.

    Raises:
        SettingError: A key cannot be used, the file cannot be read, or `signed` without any key.
    """
    keys = parse_keys(key or "", setting="signing_key")
    if key_file is not None:
        try:
            text = Path(key_file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingError(
                f"signing_key_file {str(key_file)!r} cannot be read: {why}", setting="signing_key_file"
            ) from None
        keys += parse_keys(text, setting="signing_key_file")
    if not keys:
        if policy == "signed":
            raise SettingError(
                "trust='signed' needs the keys to trust: set MONGOTORCH_SIGNING_KEY, or signing_key_file",
                setting="trust",
            )
        return Trust()
    signing = next((each for each in keys if each.can_sign), None)
    verifier = Verifier.of(*keys, required=policy == "signed")
    return Trust(None if signing is None else Signer(signing), verifier)


def parse_keys(text: str, *, setting: str) -> list[Key]:
    """The keys of a text, in order. Raises: SettingError."""
    words = re.sub(r"(^|\s)#.*", "", text, flags=re.MULTILINE).replace(",", " ").split()
    return [_parse_key(word, setting, place) for place, word in enumerate(words, start=1)]


def _parse_key(word: str, setting: str, place: int) -> Key:
    kind, colon, material = word.partition(":")
    if colon and kind in ("ed25519", "ed25519-public"):
        return Ed25519Key.parse(material, private=kind == "ed25519", setting=setting)
    secret = material if colon and kind == "hmac" else word
    if len(secret.encode()) < LEAST_SECRET:
        raise SettingError(
            f"{setting}: key {place} is shorter than {LEAST_SECRET} bytes; make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`",
            setting=setting,
        )
    return HmacKey(secret.encode())
