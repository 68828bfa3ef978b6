"""Moves aliases from one version to another: promote, roll back, and withdraw what is removed.

Guarantees: an alias moves by one compare-and-set, to a version that exists; a version that is removed while it is
promoted ends up with no alias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import EllipsisType
from typing import Any, final

from mongotorch.component import is_trained, title
from mongotorch.errors import ConflictError, NotFoundError, ParameterError
from mongotorch.store import LIVE, Aliases, Components, Move, current_user

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
        """Point an alias at a version.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is the newest that a run published and no gate refused (the newest of all
                where none was trained), unless a uuid is given.
            uuid: Instead of the version.
            alias: The alias.
            why: The reason, for the history.
            who: The author; None is user@host of this process.
            expected: The newest move the caller knows, None for an alias that was never moved; `...` is the
                newest move there is.
            job: The job that promotes; if it has promoted before, that move is returned.

        Returns:
            The move; if the alias already points at that version, the existing move.

        Raises:
            NotFoundError: There is no such version, or it was removed meanwhile; no version was named, and a gate
                refused all that were trained.
            ConflictError: The alias was moved meanwhile, or since `expected`.
            ParameterError: Both a version and a uuid were given.
            IdentifierError: The alias is not a valid name.
            TrustError: A record is not signed by a trusted key.
        """
        target = self._target(type_id, identifier, version, uuid)
        head = self._aliases.head(type_id, identifier, alias)
        before = head if isinstance(expected, EllipsisType) else expected
        if head is not None and head == before and head.to_uuid == target["_id"]:
            return head
        move = self._aliases.move(
            type_id, identifier, alias, to=target, expected=before, who=who or current_user(), why=why, job=job
        )
        # A removal looks for aliases after it, a promotion looks for the version: one of the two sees the other.
        if self._components.peek(target["_id"]) is None:
            self.withdraw([target["_id"]])
            raise NotFoundError(f"{title(target)} was removed while it was promoted; {alias!r} does not name it")
        return move

    def rollback(
        self,
        type_id: str,
        identifier: str,
        *,
        alias: str = LIVE,
        why: str = "",
        who: str | None = None,
    ) -> Move:
        """Point an alias back at what it named before its newest move; a second rollback undoes the first.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            why: The reason, for the history.
            who: The author; None is user@host of this process.

        Raises:
            NotFoundError: It named nothing before, or that version was removed.
            ConflictError: The alias was moved meanwhile.
            TrustError: A record is not signed by a trusted key.
        """
        head = self._aliases.head(type_id, identifier, alias)
        if head is None or head.from_uuid is None:
            raise NotFoundError(
                f"nothing to roll back to: {alias!r} of {type_id} {identifier!r} named nothing before"
            )
        return self.promote(type_id, identifier, uuid=head.from_uuid, alias=alias, why=why, who=who, expected=head)

    def withdraw(self, uuids: Iterable[str]) -> None:
        """Make every alias that names one of these uuids name nothing. Raises: TrustError."""
        gone = list(uuids)
        while heads := self._aliases.names(gone):
            for head in heads:
                # Another process may have moved it away, or back: the loop looks again.
                with contextlib.suppress(ConflictError):
                    self._aliases.move(*head.name, to=None, expected=head, who=current_user(), why=REMOVED)

    def _target(self, type_id: str, identifier: str, version: int | None, uuid: str | None) -> dict[str, Any]:
        if uuid is None and version is None:
            found = self._components.newest_by_default(type_id, identifier)
            refused = None if is_trained(found) else self._components.newest_trained(type_id, identifier)
            if refused is not None:
                raise NotFoundError(
                    f"the gate of a schedule refused every trained version of {type_id} {identifier!r}; name the "
                    f"version to promote, such as {refused['version']}"
                )
            return found
        if uuid is None:
            return self._components.find(type_id, identifier, version)
        if version is not None:
            raise ParameterError("give a version or a uuid, not both", field="version")
        found = self._components.get(uuid)
        if (found["type_id"], found["identifier"]) != (type_id, identifier):
            raise NotFoundError(f"{type_id} {identifier!r} has no version {uuid}: that is {title(found)}")
        return found
