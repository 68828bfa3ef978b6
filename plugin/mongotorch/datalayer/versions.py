"""What is stored through a datalayer: versions are loaded, shown, removed, collected and verified.

Always: nothing here changes a stored version.
"""

from __future__ import annotations

from typing import Any

from mongotorch.datalayer.base import Opened
from mongotorch.run import Schedule
from mongotorch.store import Collected, Garbage, Verified


class Versions(Opened):
    """The part of a datalayer that keeps versions."""

    def load(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        alias: str | None = None,
        code: Any = None,
    ) -> Any:
        """A stored component, alone and unchanged.

        Args:
            type_id: `model`, `trainer`, `metric`, `validation`, `dataset`.
            identifier: Its name.
            version: Its version; None is the one that the alias names.
            uuid: Instead of all these: exactly that version.
            alias: The alias; None is `live`, or the newest version where `live` names none.
            code: A module of the stored structure: its weights are filled in, and nothing that the database
                holds is unpickled, imported or executed.

        Raises:
            NotFoundError: There is none, or no such alias.
            ParameterError: Neither a uuid nor a kind and a name; an alias with a version or uuid.
            PythonVersionError: It holds bytecode of another Python minor version; nothing was unpickled.
            IntegrityError: A blob is not what was stored.
            TrustError: A signature does not hold.
        """
        found = self._parts.loader.find(type_id, identifier, version, uuid=uuid, alias=alias)
        return self._parts.loader.load(found) if code is None else self._parts.loader.with_code(found, code)

    def show(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
    ) -> Any:
        """What there is: kinds, identifiers of a kind, versions of a name, or one version's whole document.

        Args:
            type_id: The kind; None lists the kinds.
            identifier: The name; None lists the names of the kind.
            version: The version; None lists the versions of the name.
            uuid: Instead of all these: the document of exactly that version.

        Raises:
            NotFoundError: There is no such version.
            TrustError: It is not what a trusted key signed.
        """
        if uuid is not None:
            return self._parts.components.get(uuid)
        if type_id is None:
            return self._parts.components.kinds()
        if identifier is None:
            return self._parts.components.identifiers(type_id)
        if version is None:
            return self._parts.components.versions(type_id, identifier)
        return self._parts.components.find(type_id, identifier, version)

    def remove(self, type_id: str, identifier: str, version: int | None = None, force: bool = False) -> int:
        """Remove a version, or all versions of a name where none is given; how many were removed.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is all of them.
            force: Remove it although another component refers to it or an alias names it; the alias then names
                nothing, and its history says `removed`.

        Raises:
            NotFoundError: There is none.
            InUseError: Another component refers to it, or an alias names it; nothing was removed.
        """
        removed = self._parts.remover.remove(type_id, identifier, version, force=force)
        if type_id == Schedule.type_id:
            self._parts.register.forget(identifier)
        return removed

    def gc(self, dry_run: bool = False, *, grace_s: float = 3600.0) -> Collected:
        """Collect what no component, checkpoint or publication under way reaches.

        Args:
            dry_run: Only say what would be collected.
            grace_s: For how long something must have been unreached, in seconds; 0 only where nobody writes.
        """
        return Garbage(self._connection.database, grace_s=grace_s).collect(dry_run=dry_run)

    def verify(self) -> Verified:
        """Read and hash every blob, check every component and alias; problems are reported, not raised."""
        return self._parts.checker.verify()
