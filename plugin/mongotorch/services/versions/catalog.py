"""From a live component to what is stored: all blobs first, then one insert that makes it visible.

Always: nothing is written until everything has been encoded, so a refused value leaves no trace; a uuid
belongs to one stored version for ever; the same content is recognised and not stored twice; where two documents
become visible together, the first carries the uuid of the second as its `anchor`, and the insert of the
second publishes both. A crash before it leaves garbage, never a half version.

From what is stored to a live component, with everything it refers to.

Always: a component is loaded alone and unchanged, by uuid or by name and version; what one load meets twice is
one object (a model and its trainer refer to each other); nothing is unpickled before its bytes are verified.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, final

from mongotorch.codecs import Codecs
from mongotorch.component import Component, begin_component, content_digest, encode_component, fill_component
from mongotorch.errors import CodecError, ConflictError, NotFoundError, ParameterError, TrustError
from mongotorch.store import LIVE, Aliases, BlobStore, Components, Move
from mongotorch.train import TorchModel, fill_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """What became of a component that was handed in.

    Attributes:
        uuid: The uuid of the stored version.
        new: Whether this call stored it; False: it was recognised.
    """

    uuid: str
    new: bool


@dataclasses.dataclass(kw_only=True)
class _Draft:
    """What is going to be written; nothing of it is visible yet."""

    documents: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    blobs: dict[str, bytes | memoryview] = dataclasses.field(default_factory=dict)
    uuids: dict[int, str] = dataclasses.field(default_factory=dict)
    refs: dict[str, set[str]] = dataclasses.field(default_factory=dict)


@final
class Publisher:
    """Stores components in one database.

    Args:
        components: The component documents.
        artifacts: The blobs.
        codecs: The codecs that write fields.
    """

    def __init__(self, components: Components, artifacts: BlobStore, codecs: Codecs) -> None:
        self._components = components
        self._artifacts = artifacts
        self._codecs = codecs

    def store(self, component: Component, *, exact: bool = False) -> Stored:
        """Store a component as a new version, with the parts that are not stored yet.

        Args:
            component: What to store.
            exact: Recognise only a version of this very content, not one that was trained from it.

        Returns:
            Its uuid, and whether it is new: content that equals the newest version, or equals what the newest
            version was trained from, is recognised and not stored again.

        Raises:
            CodecError: A field cannot be stored; nothing was written.
            UnsafeClosureError: A field would carry a database client; nothing was written.
            ConflictError: The uuid belongs to a different component.
        """
        digest = content_digest(component, self._codecs)
        recognised = self._recognise(component, digest, exact=exact)
        if recognised is not None:
            return Stored(uuid=recognised, new=False)
        draft = _Draft()
        self._draft(component, draft, always=(component.uuid,), digest=digest)
        self._write(draft)
        return Stored(uuid=component.uuid, new=True)

    def publish(
        self,
        root: Component,
        *,
        with_: Component,
        facts: Mapping[str, Mapping[str, Any]],
        attached: Mapping[str, bytes] | None = None,
    ) -> None:
        """Make two components that refer to each other visible in one insert, that of `root`.

        Args:
            root: The trained model.
            with_: The trainer that trained it.
            facts: Per uuid, what else the document says: `source_digest`, `job`, `parent`.
            attached: The blobs, by name, that the root's facts speak of; they live as long as its document.

        Raises:
            CodecError: A field cannot be stored; nothing was written.
        """
        draft = _Draft()
        self._draft(with_, draft, always=(root.uuid, with_.uuid))
        if root.uuid not in draft.documents:
            self._draft(root, draft, always=(root.uuid, with_.uuid))
        for uuid, more in facts.items():
            draft.documents[uuid].update(more)
        draft.blobs |= attached or {}
        own = draft.documents[root.uuid]
        own["blobs"] = sorted({*own["blobs"], *(attached or {})})
        draft.documents[with_.uuid]["anchor"] = root.uuid
        draft.documents[root.uuid] = draft.documents.pop(root.uuid)  # written last: it is the publication
        self._write(draft)

    def _recognise(self, component: Component, digest: str, *, exact: bool) -> str | None:
        taken = self._components.peek(component.uuid)
        if taken is not None and taken["digest"] != digest:
            raise ConflictError(
                f"uuid {component.uuid} belongs to version {taken['version']} of {taken['type_id']} "
                f"{taken['identifier']!r}, which differs from what is applied now; "
                "give the changed one a uuid of its own, for instance by `component.replace()`",
                field="uuid",
            )
        if exact:
            same = self._components.by_digest(component.type_id, component.identifier, digest)
            return None if same is None else str(same["_id"])
        newest = self._components.newest(component.type_id, component.identifier)
        if newest is not None and digest in (newest["digest"], newest.get("source_digest")):
            return str(newest["_id"])
        return None if taken is None else str(taken["_id"])

    def _draft(
        self, component: Component, draft: _Draft, *, always: tuple[str, ...] = (), digest: str | None = None
    ) -> str:
        """Encode a component and its parts into the draft; the uuid it is, or will be, stored under."""
        if id(component) in draft.uuids:
            return draft.uuids[id(component)]
        digest = digest or content_digest(component, self._codecs)
        draft.uuids[id(component)] = component.uuid
        if digest_known := self._known(component, digest, always):
            draft.uuids[id(component)] = digest_known
            return digest_known
        refs: set[str] = set()
        own: set[str] = set()

        def ref(child: Component) -> str:
            refs.add(uuid := self._draft(child, draft, always=always))
            return uuid

        body = encode_component(component, self._codecs, _collect(draft.blobs, own), ref)
        draft.documents[component.uuid] = {
            "_id": component.uuid,
            "type_id": component.type_id,
            "identifier": component.identifier,
            **body,
            "digest": digest,
            "blobs": sorted(own),
            "refs": sorted(refs),
            "created": datetime.now(UTC),
        }
        return component.uuid

    def _known(self, component: Component, digest: str, always: tuple[str, ...]) -> str | None:
        if component.uuid in always:
            return None
        known = self._components.by_digest(component.type_id, component.identifier, digest)
        return None if known is None else str(known["_id"])

    def _write(self, draft: _Draft) -> None:
        for data in draft.blobs.values():
            self._artifacts.put(data)
        for document in draft.documents.values():
            # What refers back to what is published after it cannot ask for that to be there.
            needs = set(document["refs"]) - {document.get("anchor")}
            self._components.publish(document, needs=needs)


def _collect(blobs: dict[str, bytes | memoryview], own: set[str]) -> Callable[[bytes | memoryview], str]:
    def put(data: bytes | memoryview) -> str:
        name = hashlib.sha256(data).hexdigest()
        blobs.setdefault(name, data)
        own.add(name)
        return name

    return put


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

    def __init__(self, components: Components, artifacts: BlobStore, aliases: Aliases, codecs: Codecs) -> None:
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
