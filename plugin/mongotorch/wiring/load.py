"""From what is stored to a live component, with everything it refers to.

Always: a component is loaded alone and unchanged, by uuid or by name and version; what one load meets twice is
one object (a model and its trainer refer to each other); nothing is unpickled before its bytes are verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from mongotorch.codecs import Codecs
from mongotorch.component import Component, begin_component, fill_component
from mongotorch.errors import CodecError, NotFoundError, ParameterError, TrustError
from mongotorch.store import LIVE, Aliases, Artifacts, Components, Move
from mongotorch.train import TorchModel, fill_module

_PLAIN = ("forward_method", "train_forward_method")


@final
class Loader:
    """Loads components out of one database.

    Args:
        components: The component documents.
        artifacts: The blobs.
        aliases: Which say what a name without a version means.
        codecs: The codecs that read fields.
    """

    def __init__(self, components: Components, artifacts: Artifacts, aliases: Aliases, codecs: Codecs) -> None:
        self._components = components
        self._artifacts = artifacts
        self._aliases = aliases
        self._codecs = codecs

    def find(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        alias: str | None = None,
    ) -> dict[str, Any]:
        """The document of a uuid, else of a name: the version given, else what the alias names.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version.
            uuid: Instead of all these.
            alias: The alias; None is `live`, or the newest version where `live` names none.

        Raises:
            NotFoundError: There is none.
            ParameterError: Neither a uuid, nor a kind and a name; an alias with a version or uuid.
            TrustError: A signature does not hold.
        """
        if alias is not None and not (version is None and uuid is None):
            raise ParameterError("give an alias, or a version or uuid, not both", field="alias")
        if uuid is not None:
            return self._components.get(uuid)
        if type_id is None or identifier is None:
            raise ParameterError("give a kind and an identifier, or a uuid", field="identifier")
        if version is not None:
            return self._components.find(type_id, identifier, version)
        head = self._aliases.head(type_id, identifier, alias or LIVE)
        if head is not None and head.to_uuid is not None:
            return self.named(head)
        if alias is None:
            return self._components.find(type_id, identifier)
        there = self._aliases.aliases(type_id, identifier)
        raise NotFoundError(
            f"{type_id} {identifier!r} has no alias {alias!r}" + (f"; there are {there}" * bool(there))
        )

    def named(self, head: Move) -> dict[str, Any]:
        """The document of what an alias names.

        Args:
            head: Its newest move, which names something.

        Raises:
            NotFoundError: That version is gone.
            TrustError: It is a version of something else, or its signature does not hold.
        """
        found = self._components.peek(str(head.to_uuid))
        said = f"{head.alias!r} of {head.type_id} {head.identifier!r} names {head.to_uuid}"
        if found is None:
            newer = self._aliases.head(head.type_id, head.identifier, head.alias)
            if newer is not None and newer != head and newer.to_uuid is not None:
                return self.named(newer)  # it was moved meanwhile, and what it named before was removed
            raise NotFoundError(f"{said}, which is gone; promote a version that is there")
        if (found["type_id"], found["identifier"]) != (head.type_id, head.identifier):
            raise TrustError(f"{said}, which is a {found['type_id']} {found['identifier']!r}; nothing was loaded")
        return found

    def is_there(self, uuid: str) -> bool:
        """Whether there is a component of a uuid. Raises: TrustError."""
        return self._components.peek(uuid) is not None

    def by_uuid(self, uuid: str) -> Component:
        """The component of a uuid. Raises: NotFoundError, and as `load`."""
        return self.load(self._components.get(uuid))

    def load(self, document: Mapping[str, Any]) -> Component:
        """The component of a document.

        Raises:
            CodecError: A field cannot be read back; `field` names it.
            IntegrityError: A blob is not what was stored.
        """
        return self._load_document(document, {})

    def partly(self, uuid: str, fields: Iterable[str]) -> Component:
        """The component of a uuid with these fields alone: what others hold is not read, decoded or there.

        Raises:
            NotFoundError: There is none.
            CodecError: A field cannot be read back; `field` names it.
        """
        document = self._components.get(uuid)
        wanted = {name: value for name, value in document["fields"].items() if name in set(fields)}
        get = self._artifacts.get
        component = begin_component(document, self._codecs, get)
        for name, record in wanted.items():
            object.__setattr__(component, name, self._codecs.decode(record, get))
        return component

    def with_code(self, document: Mapping[str, Any], module: Any) -> TorchModel:
        """The model of a document with its weights in a given module; nothing of the database is executed.

        Args:
            document: A model's.
            module: A `torch.nn.Module` of the stored structure, which is filled.

        Returns:
            The model without what would be code: trainer, validation, `preprocess`, `postprocess`.

        Raises:
            CodecError: The document is no model's, or the module is not of the stored structure.
        """
        record = document["fields"].get("object") if document["type_id"] == TorchModel.type_id else None
        if not isinstance(record, Mapping) or record.get("_codec") != "torch":
            raise CodecError(f"{document['_id']} holds no torch module; `code` fills modules only", field="code")
        fill_module(module, record, self._artifacts.get)
        plain = {
            name: document["fields"][name] for name in _PLAIN if isinstance(document["fields"].get(name), str)
        }
        model = TorchModel(document["identifier"], uuid=document["_id"], object=module, **plain)
        object.__setattr__(model, "_version", document["version"])
        return model

    def _load(self, uuid: str, met: dict[str, Component]) -> Component:
        return met[uuid] if uuid in met else self._load_document(self._components.get(uuid), met)

    def _load_document(self, document: Mapping[str, Any], met: dict[str, Component]) -> Component:
        get = self._artifacts.get
        component = begin_component(document, self._codecs, get)
        met[component.uuid] = component
        fill_component(component, document, self._codecs, get, lambda uuid: self._load(uuid, met))
        return component
