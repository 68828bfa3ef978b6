"""From what is stored to a live component, with everything it refers to.

Always: a component is loaded alone and unchanged, by uuid or by name and version; what one load meets twice is
one object (a model and its trainer refer to each other); nothing is unpickled before its bytes are verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.codecs import Codecs
from mongotorch.component import Component, begin_component, fill_component
from mongotorch.store import Artifacts, Components


@final
class Loader:
    """Loads components out of one database.

    Args:
        components: The component documents.
        artifacts: The blobs.
        codecs: The codecs that read fields.
    """

    def __init__(self, components: Components, artifacts: Artifacts, codecs: Codecs) -> None:
        self._components = components
        self._artifacts = artifacts
        self._codecs = codecs

    def by_uuid(self, uuid: str) -> Component:
        """The component of a uuid.

        Raises:
            NotFoundError: There is none.
            CodecError: A field cannot be read back; `field` names it.
            IntegrityError: A blob is not what was stored.
        """
        return self._load(uuid, {})

    def by_name(self, type_id: str, identifier: str, version: int | None = None) -> Component:
        """The component of a name, its newest version unless one is given.

        Raises:
            NotFoundError: There is none.
            CodecError: A field cannot be read back; `field` names it.
            IntegrityError: A blob is not what was stored.
        """
        return self._load_document(self._components.find(type_id, identifier, version), {})

    def _load(self, uuid: str, met: dict[str, Component]) -> Component:
        return met[uuid] if uuid in met else self._load_document(self._components.get(uuid), met)

    def _load_document(self, document: Mapping[str, Any], met: dict[str, Component]) -> Component:
        get = self._artifacts.get
        component = begin_component(document, self._codecs, get)
        met[component.uuid] = component
        fill_component(component, document, self._codecs, get, lambda uuid: self._load(uuid, met))
        return component
