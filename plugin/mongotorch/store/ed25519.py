"""Signatures for teams: who trains holds the private key, who only loads holds the public one and cannot sign.

Needs the package `cryptography`, which is looked for when such a key is given and not before.

Always: the private key is in no `repr` and no error.
"""

from __future__ import annotations

import base64
import binascii
import importlib
from typing import Any, Final, Self, final

from mongotorch.errors import SettingError, UnsupportedError
from mongotorch.store.trust import key_id_of

_BYTES = 32


@final
class Ed25519Key:
    """A public key, and perhaps the private one that belongs to it.

    Args:
        public: The driver's public key.
        private: The driver's private key, or None.
        raw: The 32 bytes of the public key.
    """

    algorithm: Final = "ed25519"

    def __init__(self, public: Any, private: Any, raw: bytes) -> None:
        self._public, self._private = public, private
        self.key_id = key_id_of(b"ed25519", raw)

    def __repr__(self) -> str:
        return f"Ed25519Key({self.key_id}, can_sign={self.can_sign})"

    @classmethod
    def parse(cls, text: str, *, private: bool, setting: str) -> Self:
        """A key of its 32 bytes in base64.

        Raises:
            SettingError: It is none.
            UnsupportedError: The package `cryptography` is not installed.
        """
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != _BYTES:
            raise SettingError(f"{setting}: an Ed25519 key is {_BYTES} bytes in base64", setting=setting)
        try:
            keys: Any = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
        except ImportError as error:
            raise UnsupportedError(
                "an Ed25519 key needs the package `cryptography`: pip install 'mongotorch[trust]'", setting=setting
            ) from error
        if not private:
            return cls(keys.Ed25519PublicKey.from_public_bytes(raw), None, raw)
        secret = keys.Ed25519PrivateKey.from_private_bytes(raw)
        public = secret.public_key()
        return cls(public, secret, public.public_bytes_raw())

    @property
    def can_sign(self) -> bool:
        """Whether the private key is here."""
        return self._private is not None

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes. Raises: UnsupportedError without the private key."""
        if self._private is None:
            raise UnsupportedError("this is a public key, which cannot sign", setting="signing_key")
        return bytes(self._private.sign(data))

    def fits(self, data: bytes, signature: bytes) -> bool:
        """Whether the private key made the signature."""
        invalid: Any = importlib.import_module("cryptography.exceptions").InvalidSignature
        try:
            self._public.verify(signature, data)
        except invalid:
            return False
        return True
