"""Reads and writes the file of a bundle: a plain zip of named members, and a manifest with the hash of each.

    manifest.json            what it is, and length and SHA-256 of every other member
    records/UUID.bson        the documents of the versions, as they are stored, signatures included
    evidence/NAME.bson       what is known of them besides: the job, what was measured, the moves of aliases
    blobs/SHA256             the bytes that the records name

Members are not compressed, so that none is larger than the file. Nothing is ever unpacked into a folder.

Guarantees: a file that is written is whole or not there, and of the same content always the same bytes; of a file
that is read nothing is given out that the manifest does not name, or that has another length or hash than it says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid as uuids
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self, final

import bson
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import BSONError

from mongotorch.errors import BundleError, FormatError, IntegrityError
from mongotorch.resources import Owner

BUNDLE_FORMAT: Final = 1
"""The format that this release writes, and the newest that it reads."""
MANIFEST: Final = "manifest.json"
MEMBER: Final = re.compile(r"records/[0-9A-Za-z-]{1,64}\.bson|evidence/[a-z]{1,32}\.bson|blobs/[0-9a-f]{64}")
_MOST_MANIFEST_BYTES: Final = 2**26
_ALWAYS: Final = (1980, 1, 1, 0, 0, 0)  # the time of every member
_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
_READ_BYTES: Final = 2**20


def write_bundle(
    path: Path, about: Mapping[str, Any], members: Iterable[tuple[str, bytes]], *, replace: bool = False
) -> str:
    """Write a bundle.

    Args:
        path: The file.
        about: What the manifest says besides the members; plain JSON.
        members: Their names and bytes; one is in memory at a time.
        replace: Write over a file that is there.

    Returns:
        The SHA-256 of the manifest in hex, which names the content.

    Raises:
        BundleError: There is such a file, or it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuids.uuid4().hex[:8]}")
    try:
        if path.exists() and not replace:
            raise BundleError(f"{path} is there; name another file, or say that it is to be replaced")
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED) as archive:
            listed: dict[str, Any] = {}
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name, _ALWAYS), data)
                listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest = {"format": BUNDLE_FORMAT, **about, "members": listed}
            text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
            archive.writestr(zipfile.ZipInfo(MANIFEST, _ALWAYS), text)
        if replace:
            partial.replace(path)
        else:
            os.link(partial, path)  # fails where another process was faster
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return hashlib.sha256(text).hexdigest()


def to_bson(value: Mapping[str, Any]) -> bytes:
    """A record or evidence as the bytes of a member."""
    return bson.encode(value, codec_options=_OPTIONS)


@final
class BundleFile(Owner):
    """A bundle that is read; a context manager that closes the file.

    Args:
        path: The file.

    Attributes:
        manifest: What the manifest says.
        digest: Its SHA-256 in hex.

    Raises:
        BundleError: It cannot be read, is no bundle, is cut, or holds what no bundle holds.
        FormatError: A newer release wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, EOFError) as error:
            raise BundleError(f"{path} is no bundle, or it was cut: {error}") from error
        try:
            self.manifest, self.digest = self._read_manifest()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file; see the class."""
        return cls(Path(path))

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    @property
    def members(self) -> dict[str, Mapping[str, Any]]:
        """Length (`bytes`) and `sha256` of each member, by its name."""
        return dict(self.manifest["members"])

    def names(self, folder: str) -> list[str]:
        """The names of the members of a folder, without it, sorted."""
        return sorted(name.removeprefix(f"{folder}/") for name in self.members if name.startswith(f"{folder}/"))

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            IntegrityError: They are not what the manifest says.
            BundleError: There is no such member.
        """
        if name not in self.members:
            raise BundleError(f"{self.path} has no {name}")
        data = b"".join(self._parts(name))
        self._check(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def read_record(self, name: str) -> dict[str, Any]:
        """A member as BSON. Raises: IntegrityError, BundleError."""
        data = self.read(name)
        try:
            return dict(bson.decode(data, codec_options=_OPTIONS))
        except (BSONError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BundleError(f"{name} of {self.path} is no BSON: {error}") from error

    def verify(self) -> None:
        """Read every member, and compare it with the manifest. Raises: IntegrityError, BundleError."""
        for name in self.members:
            digest, count = hashlib.sha256(), 0
            for part in self._parts(name):
                digest.update(part)
                count += len(part)
            self._check(name, count, digest.hexdigest())

    def _check(self, name: str, count: int, digest: str) -> None:
        entry = self.members[name]
        if (count, digest) != (entry["bytes"], entry["sha256"]):
            raise IntegrityError(f"{name} of {self.path} is not what the manifest says; get the file again")

    def _parts(self, name: str) -> Iterator[bytes]:
        try:
            with self._archive.open(name) as member:
                while part := member.read(_READ_BYTES):
                    yield part
        except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, EOFError, OSError) as error:
            raise IntegrityError(f"{name} of {self.path} cannot be read: {error}; get the file again") from error

    def _read_manifest(self) -> tuple[dict[str, Any], str]:
        sizes = self._sizes()
        if not 0 < sizes.get(MANIFEST, 0) <= _MOST_MANIFEST_BYTES:
            raise self._odd(f"it has no {MANIFEST}, or one of an odd size")
        data = b"".join(self._parts(MANIFEST))
        try:
            manifest = json.loads(data)
            written = manifest["format"]
            listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["members"].items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._odd(f"its manifest cannot be read: {type(error).__name__}: {error}") from error
        if type(written) is int and written > BUNDLE_FORMAT:
            raise FormatError(
                f"{self.path} has the format {written}, and this release reads bundles up to {BUNDLE_FORMAT}: a "
                "newer mongotorch wrote it; update mongotorch"
            )
        if written != BUNDLE_FORMAT:
            raise self._odd(f"its format is {written!r}")
        there = {name: size for name, size in sizes.items() if name != MANIFEST}
        if {name: size for name, (size, _) in listed.items()} != there:
            raise self._odd("its members are not those that the manifest names, or have other lengths")
        if not all(isinstance(digest, str) for _, digest in listed.values()):
            raise self._odd("its manifest lacks hashes")
        return manifest, hashlib.sha256(data).hexdigest()

    def _sizes(self) -> dict[str, int]:
        """The length of each member. Raises: BundleError for names and forms that no bundle has."""
        sizes: dict[str, int] = {}
        for info in self._archive.infolist():
            name = info.filename
            if name != MANIFEST and not MEMBER.fullmatch(name):
                raise self._odd(f"it has a member {name[:100]!r}")
            if name in sizes:
                raise self._odd(f"it has {name} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise self._odd(f"its {name} is compressed or encrypted")
            if info.compress_size != info.file_size:
                raise self._odd(f"its {name} has two lengths")
            sizes[name] = info.file_size
        if sum(sizes.values()) > self.path.stat().st_size:
            raise self._odd("its members are longer than the file")
        return sizes

    def _odd(self, why: str) -> BundleError:
        return BundleError(f"{self.path} is no bundle that mongotorch wrote: {why}; nothing was imported")
