"""Who wrote a document: a signature over all of it, checked before anything in it is decoded or unpickled.

The blobs are covered by their names: a document lists the SHA-256 of each, and every read checks it. What a
signature cannot say is that a document is missing, or which of two genuine versions somebody means.

Always: what is signed is the whole document but the signature, in the one form that BSON gives it, so that a
change of any byte that means something is noticed; no key is in a `repr`, an error or a document.

Signatures for teams: who trains holds the private key, who only loads holds the public one and cannot sign.

Needs the package `cryptography`, which is looked for when such a key is given and not before.

Always: the private key is in no `repr` and no error.

From settings to keys: what a person writes into an environment variable or a key file.

A key is one word: `SECRET` or `hmac:SECRET` (at least 16 characters), `ed25519:SEED` or `ed25519-public:KEY`
(32 bytes in base64; needs the package `cryptography`). Several are separated by blanks, commas or lines; `#`
starts a comment. The first that can sign signs, all are accepted: to rotate, put the new one in front.

Always: no error holds a key.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol, Self, final

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions

from mongotorch.errors import CodecError, SettingError, TrustError, UnsupportedError

FIELD: Final = "signature"
LEAST_SECRET: Final = 16  # bytes
_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)


class Key(Protocol):
    """One key: it recognises its own signatures, and may be able to make them."""

    @property
    def key_id(self) -> str:
        """Names the key in a document, and says nothing about it."""

    @property
    def algorithm(self) -> str:
        """`hmac-sha256` or `ed25519`."""

    @property
    def can_sign(self) -> bool:
        """Whether it can make signatures; a public key cannot."""

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes."""

    def fits(self, data: bytes, signature: bytes) -> bool:
        """Whether it made the signature; takes the same time for every wrong one."""


@final
class HmacKey:
    """A secret that all who sign and all who verify share.

    Args:
        secret: At least 16 bytes, from a generator of random ones.
    """

    algorithm: Final = "hmac-sha256"
    can_sign: Final = True

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.key_id = key_id_of(b"hmac", secret)

    def __repr__(self) -> str:
        return f"HmacKey({self.key_id})"

    def sign(self, data: bytes) -> bytes:
        """See `Key.sign`."""
        return hmac.digest(self._secret, data, "sha256")

    def fits(self, data: bytes, signature: bytes) -> bool:
        """See `Key.fits`."""
        return hmac.compare_digest(self.sign(data), signature)


@final
@dataclasses.dataclass(frozen=True)
class Signer:
    """Signs documents with one key."""

    key: Key

    def signed(self, document: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
        """The document with its signature.

        Args:
            document: All of it, in the form in which it will be stored.
            kind: What it is (`component`, `checkpoint`), so that none passes for another.

        Raises:
            CodecError: BSON cannot hold it.
        """
        value = self.key.sign(canonical(document, kind=kind))
        said = {"key": self.key.key_id, "algorithm": self.key.algorithm, "value": value}
        return {**document, FIELD: said}


@final
@dataclasses.dataclass(frozen=True)
class SignatureVerifier:
    """Checks documents against the accepted keys.

    Args:
        keys: By their id.
        required: Refuse what is not signed, or signed with another key.
    """

    keys: Mapping[str, Key]
    required: bool

    @classmethod
    def of(cls, *keys: Key, required: bool = True) -> Self:
        """One that accepts these keys."""
        return cls({key.key_id: key for key in keys}, required)

    def check(self, document: Mapping[str, Any], *, kind: str) -> None:
        """Return if the document is what its signer wrote.

        Raises:
            TrustError: It is not, or nobody trusted signed it; nothing of it was decoded.
        """
        signature = document.get(FIELD)
        if signature is None:
            self._refuse_if_required(document, kind, "is not signed, and trust='signed' was asked for")
            return
        if not isinstance(signature, Mapping):
            raise _untrusted(document, kind, "has a signature that is none")
        key = self.keys.get(str(signature.get("key")))
        if key is None:
            why = (
                f"is signed with the key {str(signature.get('key'))[:40]!r}, which is not among the accepted ones"
            )
            self._refuse_if_required(document, kind, why)
            return
        value: bytes = signature.get("value", b"")
        # Exact types: a signature has one form, and a binary of another subtype is another one.
        forms = {name: type(part) for name, part in signature.items()}
        whole = forms == {"key": str, "algorithm": str, "value": bytes} and signature["algorithm"] == key.algorithm
        if not whole or not _fits(key, document, kind, value):
            raise _untrusted(document, kind, "is not what was signed: somebody changed it")

    def _refuse_if_required(self, document: Mapping[str, Any], kind: str, why: str) -> None:
        if self.required:
            raise _untrusted(document, kind, why)


@final
@dataclasses.dataclass(frozen=True)
class Trust:
    """How one datalayer signs and checks; without either, every document is taken as it is."""

    signer: Signer | None = None
    verifier: SignatureVerifier | None = None

    def sign(self, document: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
        """The document, signed where there is a signer. Raises: CodecError."""
        return dict(document) if self.signer is None else self.signer.signed(document, kind=kind)

    def check(self, document: Mapping[str, Any], *, kind: str) -> None:
        """Check a document where there is a verifier. Raises: TrustError."""
        if self.verifier is not None:
            self.verifier.check(document, kind=kind)


def canonical(document: Mapping[str, Any], *, kind: str) -> bytes:
    """The bytes that are signed: the document as BSON, its fields by name, those inside in their order.

    The server moves `_id` to the front and nothing else; the order inside a field may mean something (a sort).

    Raises:
        CodecError: BSON cannot hold it.
    """
    ordered = {name: document[name] for name in sorted(document) if name != FIELD}
    try:
        return f"mongotorch {kind} 1\0".encode() + bson.encode(ordered, codec_options=_OPTIONS)
    except (bson.errors.BSONError, OverflowError, TypeError, ValueError) as error:
        raise CodecError(f"{kind} {document.get('_id')} cannot be stored: {error}") from error


def key_id_of(kind: bytes, material: bytes) -> str:
    """A name for a key that follows from it, one way."""
    return hashlib.sha256(b"mongotorch key\0" + kind + b"\0" + material).hexdigest()[:16]


def _fits(key: Key, document: Mapping[str, Any], kind: str, value: bytes) -> bool:
    try:
        return key.fits(canonical(document, kind=kind), value)
    except CodecError:
        return False


def _untrusted(document: Mapping[str, Any], kind: str, why: str) -> TrustError:
    name = f"{document.get('type_id', kind)} {document.get('identifier', document.get('job', ''))!r}"
    return TrustError(
        f"{name} ({document.get('_id')}) {why}; nothing of it was loaded", document_id=document.get("_id")
    )


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
    verifier = SignatureVerifier.of(*keys, required=policy == "signed")
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
