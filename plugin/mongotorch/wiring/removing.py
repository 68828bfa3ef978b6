"""What `remove` does: takes a version away that nothing needs, and the blobs that nothing else names.

Always: what another component refers to, or an alias names, stays unless that is forced; a blob that another
component shares stays in any case; the component's document goes first, so that nothing visible lacks a blob.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.errors import InUseError
from mongotorch.store import Artifacts, Components
from mongotorch.wiring.serving import Promoter


@final
class Remover:
    """Removes components of one database.

    Args:
        components: The component documents.
        artifacts: The blobs.
        promoter: Knows what aliases name.
    """

    def __init__(self, components: Components, artifacts: Artifacts, promoter: Promoter) -> None:
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


def _said(document: Mapping[str, Any]) -> str:
    return f"version {document['version']} of {document['type_id']} {document['identifier']!r}"
