"""What is served out of a datalayer: aliases are moved, and their history read.

Always: nothing here changes a stored version or a move that was made.
"""

from __future__ import annotations

from datetime import datetime
from types import EllipsisType

from mongotorch.datalayer.base import Opened
from mongotorch.store import LIVE, Move
from mongotorch.wiring.live import Live, OnPromote


class Serving(Opened):
    """The part of a datalayer that says which version counts."""

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
    ) -> Move:
        """Let an alias name a version: `load` gives it, and handles of `live` go over to it.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is the newest, unless a uuid is given.
            uuid: Instead of the version.
            alias: The alias.
            why: Why, for the history.
            who: Who; None is user@host of this process.
            expected: The newest move as you know it, None for an alias that was never moved: if another has been
                made since, nothing is moved. Without it: what is there when this is called.

        Returns:
            The move; where the alias names that version already, the move that is there.

        Raises:
            NotFoundError: There is no such version, or it was removed meanwhile.
            ConflictError: Somebody else has moved the alias meanwhile; the message says who.
            ParameterError: A version and a uuid.
            IdentifierError: The alias is no name.
            TrustError: What is there is not what a trusted key signed.
        """
        return self._parts.promoter.promote(
            type_id, identifier, version, uuid, alias=alias, why=why, who=who, expected=expected
        )

    def rollback(
        self, type_id: str, identifier: str, *, alias: str = LIVE, why: str = "", who: str | None = None
    ) -> Move:
        """Let an alias name again what it named before its newest move; once more, and that is undone.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            why: Why, for the history.
            who: Who; None is user@host of this process.

        Raises:
            NotFoundError: It named nothing before, or that version was removed.
            ConflictError: Somebody else has moved the alias meanwhile; the message says who.
            TrustError: What is there is not what a trusted key signed.
        """
        return self._parts.promoter.rollback(type_id, identifier, alias=alias, why=why, who=who)

    def history(
        self, type_id: str, identifier: str, *, alias: str = LIVE, at: datetime | None = None
    ) -> list[Move]:
        """The moves of an alias in their order, none left out.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            at: The history as it stood then (aware, or naive UTC): its last move was in force. None: up to now.

        Raises:
            TrustError: A move is not what a trusted key signed.
        """
        return self._parts.aliases.history(type_id, identifier, alias, until=at)

    def live(
        self, type_id: str, identifier: str, *, alias: str = LIVE, on_promote: OnPromote | None = None
    ) -> Live:
        """A model that goes over to another version whenever the alias is moved, between two predictions.

        A thread of its own follows the alias: by a change stream, where there is none (mongomock, a server
        without a replica set) by looking once a second. It loads a version while the old one serves.

        Args:
            type_id: The kind: `model`.
            identifier: The name.
            alias: The alias. While `live` names nothing, the version is the newest there was when this was called.
            on_promote: Called with the model that served and the one that serves now, in that thread, after each
                change; what it raises is logged and kept in `error`.

        Returns:
            A handle with `predict` and `predict_batches`; close it, or use it as a context manager. It follows
            for as long as this datalayer is open.

        Raises:
            NotFoundError: There is no such version, or no such alias.
            ParameterError: It is no model.
            PythonVersionError: It holds bytecode of another Python minor version; nothing was unpickled.
            IntegrityError: A blob is not what was stored.
            TrustError: A signature does not hold.
        """
        return Live(
            connection=self._connection,
            components=self._parts.components,
            aliases=self._parts.aliases,
            loader=self._parts.loader,
            name=(type_id, identifier, alias),
            on_promote=on_promote,
        )
