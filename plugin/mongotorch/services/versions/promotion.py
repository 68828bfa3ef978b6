"""What is served: an alias is moved to a version, back again, and away from one that is removed.

Always: an alias is moved by one compare-and-set, to a version that is there; what it named at any time can be
read later; a version that is removed while it is promoted ends up named by nothing.

What `remove` does: takes a version away that nothing needs, and the blobs that nothing else names.

Always: what another component refers to, or an alias names, stays unless that is forced; a blob that another
component shares stays in any case; the component's document goes first, so that nothing visible lacks a blob.
"""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any, final

from mongotorch.errors import ConflictError, InUseError, NotFoundError, ParameterError
from mongotorch.store import LIVE, Aliases, BlobStore, Components, Move

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


@final
class Remover:
    """Removes components of one database.

    Args:
        components: The component documents.
        artifacts: The blobs.
        promoter: Knows what aliases name.
    """

    def __init__(self, components: Components, artifacts: BlobStore, promoter: Promoter) -> None:
        self._components, self._artifacts, self._promoter = components, artifacts, promoter

    def remove(self, type_id: str, identifier: str, version: int | None = None, *, force: bool = False) -> int:
        """Remove a version, or all versions of a name.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is all of them.
            force: Remove it although another component refers to it or an alias names it; the alias then names
                nothing.

        Returns:
            How many versions were removed.

        Raises:
            NotFoundError: There is none.
            InUseError: Another component refers to one of them, or an alias names one; nothing was removed.
        """
        documents = [self._components.find(type_id, identifier, version)]
        if version is None:
            numbers = self._components.versions(type_id, identifier)
            documents = [self._components.find(type_id, identifier, number) for number in numbers]
        leaving = {document["_id"] for document in documents}
        leaving |= self._partners(leaving)
        if not force:
            for document in documents:
                self._refuse_in_use(document, leaving)
            self._refuse_served(leaving)
        self._promoter.withdraw(leaving)
        for document in documents:
            self._components.remove(document["_id"])
        self._promoter.withdraw(leaving)  # from who promoted it meanwhile
        for name in {blob for document in documents for blob in document["blobs"]}:
            if not self._components.names_blob(name):
                self._artifacts.remove(name)
        return len(documents)

    def _partners(self, leaving: set[str]) -> set[str]:
        """Trainers that a run published together with a model that leaves: they become invisible with it."""
        return {
            user["_id"] for uuid in leaving for user in self._components.users(uuid) if user.get("anchor") == uuid
        }

    def _refuse_in_use(self, document: Mapping[str, Any], leaving: set[str]) -> None:
        for user in self._components.users(document["_id"]):
            if user["_id"] not in leaving:
                raise InUseError(
                    f"{_said(document)} is used by {_said(user)}; remove that first, or say force=True"
                )

    def _refuse_served(self, leaving: set[str]) -> None:
        for head in self._promoter.naming(leaving):
            said = f"version {head.to_version} of {head.type_id} {head.identifier!r}"
            raise InUseError(
                f"{said} is named by the alias {head.alias!r}; promote another version first, or say force=True"
            )
