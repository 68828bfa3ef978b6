"""Signs stored documents, and verifies signatures before anything of a document is decoded or unpickled.

Keys are written into a setting or a key file: `SECRET` or `hmac:SECRET` (at least 16 bytes) is shared by all;
with `ed25519:SEED` and `ed25519-public:KEY` (32 bytes in base64; needs the package `cryptography`) those who only
load cannot sign. Several keys are separated by blanks, commas or lines; `#` starts a comment. The first that can
sign signs, all are accepted: to rotate, put the new key in front.

A signature covers the blobs by their names: a document lists the SHA-256 of each, and every read checks it. It
cannot tell that a document is missing, or which of two genuine versions somebody means.

Guarantees: the whole document except the signature is signed, in the one form that BSON gives it, so that a change
of any byte that matters is noticed; no key is in a `repr`, an error or a document.
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
MIN_SECRET_BYTES: Final = 16
_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)


class SigningKey(Protocol):
    """One key: verifies its own signatures, and may be able to make them."""

    @property
    def key_id(self) -> str:
        """Names the key in a document, without revealing it."""

    @property
    def algorithm(self) -> str:
        """`hmac-sha256` or `ed25519`."""

    @property
    def can_sign(self) -> bool:
        """Whether it can make signatures; a public key cannot."""

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes."""

    def fits(self, data: bytes, signature: bytes) -> bool:
        """Whether this key made the signature; takes the same time for every wrong one."""


@final
class HmacKey:
    """A secret shared by all who sign or verify.

    Args:
        secret: At least 16 random bytes.
    """

    algorithm: Final = "hmac-sha256"
    can_sign: Final = True

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.key_id = key_id_of(b"hmac", secret)

    def __repr__(self) -> str:
        return f"HmacKey({self.key_id})"

    def sign(self, data: bytes) -> bytes:
        """See `SigningKey.sign`."""
        return hmac.digest(self._secret, data, "sha256")

    def fits(self, data: bytes, signature: bytes) -> bool:
        """See `SigningKey.fits`."""
        return hmac.compare_digest(self.sign(data), signature)


@final
@dataclasses.dataclass(frozen=True)
class Trust:
    """How one datalayer signs and verifies documents; without keys it does neither.

    Args:
        signing: The key that signs; None: documents are stored without a signature.
        accepted: The keys whose signatures are verified; without any, and unless required, nothing is.
        required: Refuse documents that are not signed, or signed with another key.
    """

    signing: SigningKey | None = None
    accepted: tuple[SigningKey, ...] = ()
    required: bool = False

    def sign(self, document: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
        """The document, with a signature if there is a key for it.

        Args:
            document: The whole document, as it will be stored.
            kind: `component`, `checkpoint` or `alias`; signed too, so that none passes for another.

        Raises:
            CodecError: BSON cannot hold it.
        """
        if self.signing is None:
            return dict(document)
        value = self.signing.sign(canonical(document, kind=kind))
        return {
            **document,
            FIELD: {"key": self.signing.key_id, "algorithm": self.signing.algorithm, "value": value},
        }

    def check(self, document: Mapping[str, Any], *, kind: str) -> None:
        """Return if the document is what its signer wrote.

        Args:
            document: The document as it is stored.
            kind: As it was signed.

        Raises:
            TrustError: It was changed, or no accepted key signed it; nothing of it was decoded.
        """
        key = self.check_signer(document, kind=kind)
        if key is None:
            return
        signature = document[FIELD]
        # Exact types: a binary of another subtype is not the form that a signature has.
        types = {name: type(part) for name, part in signature.items()}
        whole = types == {"key": str, "algorithm": str, "value": bytes} and signature["algorithm"] == key.algorithm
        if not whole or not _fits(key, document, kind, signature["value"]):
            raise _untrusted(document, kind, "is not what was signed: somebody changed it")

    def check_signer(self, document: Mapping[str, Any], *, kind: str) -> SigningKey | None:
        """The accepted key that a document says it is signed with; its signature is not checked.

        Args:
            document: The document as it is stored.
            kind: As it was signed.

        Returns:
            None where there is none, and none is required.

        Raises:
            TrustError: There is none, and one is required.
        """
        if not self.accepted and not self.required:
            return None
        signature = document.get(FIELD)
        if signature is None:
            self._refuse_if_required(document, kind, "is not signed, and trust='signed' was asked for")
            return None
        if not isinstance(signature, Mapping):
            raise _untrusted(document, kind, "has a signature of no known form")
        key_id = str(signature.get("key"))
        key = next((each for each in self.accepted if each.key_id == key_id), None)
        if key is None:
            why = (
                f"is signed with the key {key_id[:40]!r}, which is not among the accepted ones (if it is yours, "
                "put it behind the first key, and run `mongotorch resign`)"
            )
            self._refuse_if_required(document, kind, why)
        return key

    def _refuse_if_required(self, document: Mapping[str, Any], kind: str, why: str) -> None:
        if self.required:
            raise _untrusted(document, kind, why)


def canonical(document: Mapping[str, Any], *, kind: str) -> bytes:
    """The bytes that are signed: the document as BSON, its top-level fields sorted by name.

    The server changes the order of the top-level fields only (`_id` comes first); inside a field the order may
    matter (a sort).

    Raises:
        CodecError: BSON cannot hold it.
    """
    ordered = {name: document[name] for name in sorted(document) if name != FIELD}
    try:
        return f"mongotorch {kind} 1\0".encode() + bson.encode(ordered, codec_options=_OPTIONS)
    except (bson.errors.BSONError, OverflowError, TypeError, ValueError) as error:
        raise CodecError(f"{kind} {document.get('_id')} cannot be stored: {error}") from error


def key_id_of(kind: bytes, material: bytes) -> str:
    """The id of a key: a hash of it, from which the key cannot be found."""
    return hashlib.sha256(b"mongotorch key\0" + kind + b"\0" + material).hexdigest()[:16]


def _fits(key: SigningKey, document: Mapping[str, Any], kind: str, value: bytes) -> bool:
    try:
        return key.fits(canonical(document, kind=kind), value)
    except CodecError:
        return False


def _untrusted(document: Mapping[str, Any], kind: str, why: str) -> TrustError:
    name = f"{document.get('type_id', kind)} {document.get('identifier', document.get('job', ''))!r}"
    return TrustError(
        f"{name} ({document.get('_id')}) {why}; nothing of it was loaded", document_id=document.get("_id")
    )


_ED25519_BYTES: Final = 32


@final
class Ed25519Key:
    """A public key, and the private key that belongs to it for those who sign.

    Args:
        public: The public key, of the package `cryptography`.
        private: The private key, of that package too; None: it cannot sign.
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
        """The key of 32 bytes in base64.

        Args:
            text: The bytes in base64.
            private: Whether it is the seed of the private key; else it is the public key.
            setting: Where it was read, for errors.

        Raises:
            SettingError: It is not 32 bytes in base64.
            UnsupportedError: The package `cryptography` is not installed.
        """
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != _ED25519_BYTES:
            raise SettingError(f"{setting}: an Ed25519 key is {_ED25519_BYTES} bytes in base64", setting=setting)
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
        """Whether it has the private key."""
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


def trust_of(*, key: str | None, key_file: Path | None, policy: Policy) -> Trust | None:
    """How to sign and verify, by the settings.

    Args:
        key: The text of keys.
        key_file: A file of more keys; the first that can sign signs if none of `key` can.
        policy: `signed` refuses documents that no accepted key has signed; `any` accepts unsigned ones.

    Returns:
        None where there are no keys: nothing is signed or verified.

    Raises:
        SettingError: A key cannot be used, the file cannot be read, or the policy is `signed` without any key.
        UnsupportedError: A key needs the package `cryptography`, which is not installed.
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
        return None
    signing = next((each for each in keys if each.can_sign), None)
    return Trust(signing, tuple(keys), required=policy == "signed")


def parse_keys(text: str, *, setting: str) -> list[SigningKey]:
    """The keys of a text, in order. Raises: SettingError, UnsupportedError."""
    words = re.sub(r"(^|\s)#.*", "", text, flags=re.MULTILINE).replace(",", " ").split()
    return [_parse_key(word, setting, number) for number, word in enumerate(words, start=1)]


def _parse_key(word: str, setting: str, number: int) -> SigningKey:
    kind, colon, material = word.partition(":")
    if colon and kind in ("ed25519", "ed25519-public"):
        return Ed25519Key.parse(material, private=kind == "ed25519", setting=setting)
    secret = material if colon and kind == "hmac" else word
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise SettingError(
            f"{setting}: key {number} is shorter than {MIN_SECRET_BYTES} bytes; make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`",
            setting=setting,
        )
    return HmacKey(secret.encode())
