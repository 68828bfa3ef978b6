"""What is served: an alias is moved to a version, back again, and away from one that is removed.

Always: an alias is moved by one compare-and-set, to a version that is there; what it named at any time can be
read later; a version that is removed while it is promoted ends up named by nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Iterable
from types import EllipsisType
from typing import Any, final

from mongotorch.errors import ConflictError, NotFoundError, ParameterError
from mongotorch.store import LIVE, Aliases, Components, Move

REMOVED = "removed"


@final
class Promoter:
    """Moves the aliases of one database.

    Args:
        components: The component documents.
        aliases: The moves.
    """

    def __init__(self, components: Components, aliases: Aliases) -> None:
        self._components, self._aliases = components, aliases

    def promote(
        self,
        type_id: str,
        identifier: str,
        version: int | None = None,
        uuid: str | None = None,
        *,
        alias: str = LIVE,
        why: str = "",
        who: str | None = None,
        expected: Move | EllipsisType | None = ...,
        job: str | None = None,
    ) -> Move:
        """Let an alias name a version.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is the newest, unless a uuid is given.
            uuid: Instead of the version.
            alias: The alias.
            why: Why.
            who: Who; None is user@host of this process.
            expected: The newest move as the caller knows it, None for an alias that was never moved; `...` is what
                is there now.
            job: The run that promotes; a second time it finds what it did the first time.

        Returns:
            The move; where the alias names that version already, the move that is there.

        Raises:
            NotFoundError: There is no such version, or it was removed meanwhile.
            ConflictError: Somebody else has moved the alias meanwhile, or since `expected`.
            ParameterError: A version and a uuid.
            IdentifierError: The alias is no name.
            TrustError: What is there is not what a trusted key signed.
        """
        target = self._target(type_id, identifier, version, uuid)
        head = self._aliases.head(type_id, identifier, alias)
        before = head if isinstance(expected, EllipsisType) else expected
        if head is not None and head == before and head.to_uuid == target["_id"]:
            return head
        move = self._aliases.move(
            type_id, identifier, alias, to=target, expected=before, who=who or somebody(), why=why, job=job
        )
        # Who removes looks for aliases after it, who promotes looks for the version after it: one of them sees it.
        if self._components.peek(target["_id"]) is None:
            self.withdraw([target["_id"]])
            raise NotFoundError(f"{_said(target)} was removed while it was promoted; {alias!r} does not name it")
        return move

    def rollback(
        self,
        type_id: str,
        identifier: str,
        *,
        alias: str = LIVE,
        why: str = "",
        who: str | None = None,
        job: str | None = None,
    ) -> Move:
        """Let an alias name again what it named before its newest move; once more, and that is undone.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            why: Why.
            who: Who; None is user@host of this process.
            job: The run that does it.

        Raises:
            NotFoundError: It named nothing before, or that version was removed.
            ConflictError: Somebody else has moved the alias meanwhile.
            TrustError: What is there is not what a trusted key signed.
        """
        head = self._aliases.head(type_id, identifier, alias)
        if head is None or head.from_uuid is None:
            raise NotFoundError(
                f"nothing to roll back to: {alias!r} of {type_id} {identifier!r} named nothing before"
            )
        return self.promote(
            type_id, identifier, uuid=head.from_uuid, alias=alias, why=why, who=who, expected=head, job=job
        )

    def naming(self, uuids: Iterable[str]) -> list[Move]:
        """The newest moves of the aliases that name one of some uuids now. Raises: TrustError."""
        return self._aliases.names(uuids)

    def withdraw(self, uuids: Iterable[str]) -> None:
        """Let the aliases that name one of some uuids name nothing, since it is removed. Raises: TrustError."""
        gone = list(uuids)
        while heads := self._aliases.names(gone):
            for head in heads:
                # Who was quicker may have moved it away, or back: look again.
                with contextlib.suppress(ConflictError):
                    self._aliases.move(*head.name, to=None, expected=head, who=somebody(), why=REMOVED)

    def _target(self, type_id: str, identifier: str, version: int | None, uuid: str | None) -> dict[str, Any]:
        if uuid is None:
            return self._components.find(type_id, identifier, version)
        if version is not None:
            raise ParameterError("give a version or a uuid, not both", field="version")
        found = self._components.get(uuid)
        if (found["type_id"], found["identifier"]) != (type_id, identifier):
            raise NotFoundError(f"{type_id} {identifier!r} has no version {uuid}: that is {_said(found)}")
        return found


def somebody() -> str:
    """Who runs this process, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = "nobody"
    return f"{user}@{socket.gethostname()}"


def _said(document: Any) -> str:
    return f"version {document['version']} of {document['type_id']} {document['identifier']!r}"
