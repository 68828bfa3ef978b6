"""Keeps the key file and the password of an embedded server, in a folder that only its owner can read.

mongod reads the key file, and takes whoever knows its key for a member of the replica set: that is how the first
user is made, without the exception that MongoDB makes for connections from the same machine, which anybody on it
could use. All else is done by that user, with the password.

Guarantees: both are random, and never change while they are readable; neither is in a `repr`, an error or an
argument of a process; a folder that belongs to somebody else is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any, Final, Self, final

from mongotorch.errors import EmbeddedServerError

USER: Final = "mongotorch"
FOLDER: Final = "auth"
_KEY_FILE, _PASSWORD_FILE = "keyfile", "password"
_SHAPE: Final = re.compile(r"[A-Za-z0-9]{64}")


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedSecrets:
    """What proves to the server of a folder that a process may use it.

    Attributes:
        key_file: The file that mongod reads; it contains `key`.
        key: Makes whoever has it a member of the replica set, which may do everything.
        password: The password of `USER`.
    """

    key_file: Path
    key: str = dataclasses.field(repr=False)
    password: str = dataclasses.field(repr=False)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The secrets of an embedded server's folder; what is missing, or was not written whole, is made.

        Args:
            folder: The folder; it exists, and the caller holds its start lock.

        Raises:
            EmbeddedServerError: The folder of the secrets belongs to another user, or cannot be made or read.
        """
        private = folder / FOLDER
        try:
            private.mkdir(mode=0o700, exist_ok=True)
            found = private.lstat()
            if private.is_symlink() or found.st_uid != os.geteuid():
                raise EmbeddedServerError(
                    f"{private} belongs to another user, who could read the password in it; give a folder of "
                    "your own",
                    setting="uri",
                )
            private.chmod(0o700)
            return cls(
                key_file=private / _KEY_FILE,
                key=_secret(private / _KEY_FILE),
                password=_secret(private / _PASSWORD_FILE),
            )
        except OSError as error:
            raise EmbeddedServerError(
                f"the secrets of the embedded server cannot be kept in {private}: {error}", setting="uri"
            ) from error

    def login(self) -> dict[str, Any]:
        """The options of a client that logs in as `USER`."""
        return _login(USER, self.password, "admin")

    def member(self) -> dict[str, Any]:
        """The options of a client that logs in as a member of the replica set, by the key."""
        return _login("__system", self.key, "local")


def exist_in(folder: Path) -> bool:
    """Whether a folder has secrets; that of an earlier release has none."""
    return (folder / FOLDER / _KEY_FILE).exists()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, as a whole: it has the old content or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _secret(path: Path) -> str:
    """The secret in a file; a new one where there is none."""
    if path.exists():
        path.chmod(0o600)  # mongod refuses a key file that others can read
        text = path.read_text(errors="replace").strip()
        if _SHAPE.fullmatch(text):
            return text
    text = secrets.token_hex(32)
    write_private(path, text)
    return text


def _login(user: str, password: str, source: str) -> dict[str, Any]:
    # By this mechanism the server has to prove that it knows the password too, and never sees it: another process
    # that listens at the port learns nothing.
    return {
        "username": user,
        "password": password,
        "authSource": source,
        "authMechanism": "SCRAM-SHA-256",
    }
