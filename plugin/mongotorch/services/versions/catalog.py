"""The catalog of one database: finds, loads, stores, publishes and removes versions of components.

Guarantees: nothing is written before everything is encoded, so a refused value leaves no trace; blobs are stored
first, and one insert makes a version visible. Two documents that become visible together share one insert: the
first has the uuid of the second as its `anchor`. A uuid belongs to one stored version;
equal content is recognised and not stored again. Nothing is unpickled before its bytes are verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, final

from mongotorch.codecs import Codecs, NamedBlob, codec_of
from mongotorch.component import (
    Component,
    Encoder,
    begin_component,
    content_digest,
    digest_fields,
    encode_component,
    fill_component,
    is_trained,
    title,
)
from mongotorch.errors import (
    CodecError,
    ConflictError,
    InUseError,
    NotFoundError,
    ParameterError,
    TrustError,
)
from mongotorch.services.versions.promotion import Promoter
from mongotorch.store import LIVE, Aliases, BlobStore, Components, Move, Trust
from mongotorch.store.components import SLOW_S
from mongotorch.train import TorchModel, fill_module

_log = logging.getLogger("mongotorch")
_STORE_TRIES = 100
_PLAIN = ("forward_method", "train_forward_method")
Documents = dict[str, Mapping[str, Any]]
"""The documents of versions, by uuid."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredFields:
    """Fields of a stored component as they are before a run, which can change what they hold.

    Attributes:
        values: The value of each field, to recognise one that was not replaced.
        records: What is stored of each.
        digested: The part of each in the digest of the content.
        blobs: The blobs that the component's document names.
        refs: The uuids that it refers to.
        digest: The digest of the whole content.
    """

    values: Mapping[str, Any]
    records: Mapping[str, Any]
    digested: Mapping[str, Any]
    blobs: frozenset[str]
    refs: frozenset[str]
    digest: str

    def unchanged(self, component: Component) -> list[str]:
        """The fields of a component that are the very values of these."""
        return [name for name, value in self.values.items() if getattr(component, name) is value]

    def referred(self, fields: Iterable[str]) -> tuple[set[str], set[str]]:
        """The blobs and the uuids that the records of some fields refer to."""
        texts = {text for name in fields for text in _texts(self.records[name])}
        return texts & self.blobs, texts & self.refs


@dataclasses.dataclass(kw_only=True)
class _Draft:
    """Documents and blobs that are going to be written; none of them is visible yet.

    Attributes:
        encoder: Encodes fields, for digests and documents.
        documents: By uuid.
        blobs: By name.
        uuids: By the id of a component, the uuid that it is, or will be, stored under.
        components: Components with the fields that need not be encoded where they did not change.
        numbers: By uuid, the only version number a document may take; None: any.
    """

    encoder: Encoder
    documents: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    blobs: dict[str, NamedBlob] = dataclasses.field(default_factory=dict)
    uuids: dict[int, str] = dataclasses.field(default_factory=dict)
    numbers: dict[str, int] | None = None
    components: list[tuple[Component, StoredFields]] = dataclasses.field(default_factory=list)

    def digested(self) -> dict[int, dict[str, Any]]:
        """The fields that did not change, by the `id` of a component, as `content_digest` takes them."""
        found: dict[int, dict[str, Any]] = {}
        for component, fields in self.components:
            unchanged = fields.unchanged(component)
            found[id(component)] = {name: fields.digested[name] for name in unchanged}
        return found


@final
class Catalog:
    """The versions of one database.

    Args:
        database: The driver's database.
        trust: Signs what is stored and checks what is loaded; None does neither.

    Attributes:
        components: The component documents.
        blobs: The blobs.
        aliases: The moves of the aliases.
        codecs: Encode and decode fields.
        promoter: Moves aliases.
    """

    def __init__(self, database: Any, trust: Trust | None = None) -> None:
        self.components, self.blobs = Components(database, trust), BlobStore(database)
        self.aliases = Aliases(database, trust)
        self.codecs = Codecs.default()
        self.promoter = Promoter(self.components, self.aliases)

    def ensure_indexes(self) -> None:
        """Make the indexes that the guarantees rest on, where they are missing."""
        for store in (self.components, self.blobs, self.aliases):
            store.ensure_indexes()

    # Documents of versions

    def show(
        self, type_id: str | None, identifier: str | None, version: int | None, *, uuid: str | None = None
    ) -> Any:
        """What is stored; see `Datalayer.show`. Raises: NotFoundError, TrustError."""
        if uuid is None and type_id is None:
            return self.components.kinds()
        if uuid is None and identifier is None:
            return self.components.identifiers(str(type_id))
        if uuid is None and version is None:
            return self.components.versions(str(type_id), str(identifier))
        found = self.find(type_id, identifier, version, uuid=uuid)
        return {**found, "trained": is_trained(found)}

    def find(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        alias: str | None = None,
    ) -> dict[str, Any]:
        """The document of a version.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is the one that the alias names.
            uuid: Instead of all these.
            alias: The alias; None is `live`. If `live` names none: the newest version that a run published and no
                gate refused, or where there is none the newest of all that no gate refused.

        Raises:
            NotFoundError: There is none.
            ParameterError: Neither a uuid, nor a kind and a name; an alias with a version or uuid.
            TrustError: A signature does not hold.
        """
        if alias is not None and not (version is None and uuid is None):
            raise ParameterError("give an alias, or a version or uuid, not both", field="alias")
        if uuid is not None:
            return self.components.get(uuid)
        if type_id is None or identifier is None:
            raise ParameterError("give a kind and an identifier, or a uuid", field="identifier")
        if version is not None:
            return self.components.find(type_id, identifier, version)
        head = self.aliases.head(type_id, identifier, alias or LIVE)
        if head is not None and head.to_uuid is not None:
            return self.named_by(head)
        if alias is None:
            return self.components.newest_by_default(type_id, identifier)
        there = self.aliases.aliases(type_id, identifier)
        raise NotFoundError(
            f"{type_id} {identifier!r} has no alias {alias!r}" + (f"; there are {there}" * bool(there))
        )

    def named_by(self, move: Move) -> dict[str, Any]:
        """The document of the version that an alias names.

        Args:
            move: The alias's newest move, which names a version.

        Raises:
            NotFoundError: That version is gone.
            TrustError: It is a version of something else, or its signature does not hold.
        """
        found = self.components.peek(str(move.to_uuid))
        what = f"{move.alias!r} of {move.type_id} {move.identifier!r} names {move.to_uuid}"
        if found is None:
            newer = self.aliases.head(move.type_id, move.identifier, move.alias)
            if newer is not None and newer != move and newer.to_uuid is not None:
                return self.named_by(newer)  # it was moved meanwhile, and what it named before was removed
            raise NotFoundError(f"{what}, which is gone; promote a version that is there")
        if (found["type_id"], found["identifier"]) != (move.type_id, move.identifier):
            raise TrustError(f"{what}, which is a {found['type_id']} {found['identifier']!r}; nothing was loaded")
        return found

    def served(self, model: TorchModel) -> dict[str, Any] | None:
        """The document of the version that a model's name serves, as `find` says; None where there is none."""
        try:
            return self.find(model.type_id, model.identifier)
        except NotFoundError:
            return None

    def champion(self, model: TorchModel) -> dict[str, Any] | None:
        """The document of the version that a trained one of the same name has to be better than.

        It is the version that `live` names, whatever that is; where it names none, the newest that a run
        published and no gate refused. None where there is neither.
        """
        with contextlib.suppress(NotFoundError):  # it is gone: nothing is live
            head = self.aliases.head(model.type_id, model.identifier)
            if head is not None and head.to_uuid is not None:
                return self.named_by(head)
        return self.components.newest_trained(model.type_id, model.identifier, refused=False)

    def pin_champion(self, model: TorchModel, why: str) -> dict[str, Any] | None:
        """Promote the champion if no alias names it, so that a newer version does not replace it.

        Args:
            model: Any model of that name.
            why: The reason, for the history.

        Returns:
            The document of the champion; None where there is none, and then nothing was promoted.
        """
        champion = self.champion(model)
        head = self.aliases.head(model.type_id, model.identifier)
        if champion is not None and (head is None or head.to_uuid is None):
            try:
                self.promoter.promote(
                    model.type_id, model.identifier, uuid=champion["_id"], why=why, expected=head
                )
            except ConflictError:  # another process promotes at this moment: its version is live
                return self.champion(model)
        return champion

    # From documents to components

    def load(self, document: Mapping[str, Any]) -> Component:
        """The component of a document, with the components it refers to; each of them is one object.

        Raises:
            NotFoundError: A component it refers to is gone.
            CodecError: A field cannot be decoded; `field` names it.
            IntegrityError: A blob is not what was stored.
        """
        return self._load(document, {}, {})

    def load_uuid(self, uuid: str) -> Component:
        """The component of a uuid. Raises: NotFoundError, and as `load`."""
        return self.load(self.components.get(uuid))

    def load_with_documents(self, uuid: str) -> tuple[Component, Documents]:
        """The component of a uuid, and by uuid the documents that it was made of. Raises: as `load_uuid`."""
        documents: Documents = {}
        return self._load(self.components.get(uuid), {}, documents), documents

    def load_model(self, uuid: str) -> TorchModel:
        """The model of a uuid. Raises: NotFoundError, and as `load`."""
        model = self.load_uuid(uuid)
        assert isinstance(model, TorchModel)  # noqa: S101 - for the type checker
        return model

    def served_model(self, model: TorchModel) -> TorchModel:
        """The version of a model's name that is served; the given model where no version is stored."""
        served = self.served(model)
        return model if served is None else self.load_model(served["_id"])

    def load_fields(self, uuid: str, fields: Iterable[str]) -> Component:
        """The component of a uuid with only these fields set; no other field is read or decoded.

        Raises:
            NotFoundError: There is none.
            CodecError: A field cannot be decoded; `field` names it.
        """
        document = self.components.get(uuid)
        component = begin_component(document, self.codecs, self.blobs.get)
        for name in set(fields) & set(document["fields"]):
            value = self.codecs.decode(document["fields"][name], self.blobs.get)
            object.__setattr__(component, name, value)
        return component

    def load_into(self, document: Mapping[str, Any], module: Any) -> TorchModel:
        """The model of a document, its weights copied into a given module; no stored code is executed.

        Args:
            document: A model's.
            module: A `torch.nn.Module` of the stored structure; it is filled in place.

        Returns:
            The model without the fields that would be code: trainer, validation, `preprocess`, `postprocess`.

        Raises:
            CodecError: The document is not a model's, or the module has another structure.
        """
        record = document["fields"].get("object") if document["type_id"] == TorchModel.type_id else None
        if record is None or codec_of(record) != "torch":
            raise CodecError(f"{document['_id']} holds no torch module; `code` fills modules only", field="code")
        fill_module(module, record, self.blobs.get)
        plain = {
            name: document["fields"][name] for name in _PLAIN if isinstance(document["fields"].get(name), str)
        }
        model = TorchModel(document["identifier"], uuid=document["_id"], object=module, **plain)
        object.__setattr__(model, "_version", document["version"])
        object.__setattr__(model, "_trained", is_trained(document))
        return model

    def _load(self, document: Mapping[str, Any], loaded: dict[str, Component], documents: Documents) -> Component:
        get = self.blobs.getter(document.get("blobs", ()))
        component = begin_component(document, self.codecs, get)
        loaded[component.uuid] = component
        documents[component.uuid] = document

        def load_ref(uuid: str) -> Component:
            return loaded[uuid] if uuid in loaded else self._load(self.components.get(uuid), loaded, documents)

        fill_component(component, document, self.codecs, get, load_ref)
        return component

    # From components to documents

    def store(self, component: Component, *, exact: bool = False) -> str:
        """Store a component as a new version, with the parts that are not stored yet.

        Args:
            component: What to store.
            exact: Recognise only a version of this very content, not one that was trained from it.

        Returns:
            Its uuid. Content that equals the newest version, or what the newest version was trained from, is not
            stored again: then it is the uuid of that version.

        Raises:
            CodecError: A field cannot be stored; nothing was written.
            UnsafeClosureError: A field would carry a database client; nothing was written.
            ConflictError: The uuid belongs to a different component.
        """
        encoder = Encoder(self.codecs)
        digest = content_digest(component, encoder)
        for attempt in itertools.count(1):
            draft = _Draft(encoder=encoder, numbers={})
            self._number(component, draft)  # before it is looked for: what comes later takes this number
            recognised = self._recognise(component, digest, exact=exact)
            if recognised is not None:
                return recognised
            self._draft(component, draft, always=(component.uuid,), digest=digest)
            try:
                self._write(draft)
            except ConflictError:  # others store at this moment: perhaps this very content
                if attempt == _STORE_TRIES:
                    raise
                continue
            return component.uuid
        raise AssertionError  # for the type checker

    def stored_fields(
        self, component: Component, *, without: Iterable[Component], known: Mapping[str, Mapping[str, Any]]
    ) -> StoredFields:
        """The fields of a stored component that a run leaves as they are; not its tensors.

        Args:
            component: A stored one.
            without: Components that the run replaces.
            known: By uuid, documents that were read before; it is read if it is not among them.

        Raises:
            NotFoundError: It is not stored.
            CodecError: A field cannot be encoded any more.
        """
        document = known.get(component.uuid) or self.components.get(component.uuid)
        records = {
            name: record
            for name, record in document["fields"].items()
            if codec_of(record) != "torch" and not any(getattr(component, name) is one for one in without)
        }
        return StoredFields(
            values={name: getattr(component, name) for name in records},
            records=records,
            digested=digest_fields(component, Encoder(self.codecs), records),
            blobs=frozenset(document["blobs"]),
            refs=frozenset(document["refs"]),
            digest=document["digest"],
        )

    def publish(
        self,
        root: Component,
        *,
        partner: Component,
        records: Mapping[str, Mapping[str, Any]],
        blobs: Mapping[str, bytes | NamedBlob],
        stored: Mapping[str, StoredFields] | None = None,
        attempt: int | None = None,
    ) -> dict[str, Any]:
        """Make two components that refer to each other visible by one insert, that of `root`.

        Args:
            root: The trained model.
            partner: The trainer that trained it.
            records: By uuid, further fields of the document: `source_digest`, `job`, `parent`.
            blobs: By name, further blobs that the root's record names; they live as long as its document.
            stored: By uuid of either, the fields that are taken as they were stored where they did not change.
            attempt: Publish only while the job runs under this attempt; None does not ask.

        Returns:
            The document of `root`.

        Raises:
            JobCancelledError: It does not; nothing is visible.
            CodecError: A field cannot be stored; nothing was written.
            ConflictError: The job has published before.
        """
        draft = _Draft(encoder=Encoder(self.codecs))
        draft.components = [(one, stored[one.uuid]) for one in (root, partner) if stored and one.uuid in stored]
        self._draft(partner, draft, always=(root.uuid, partner.uuid))
        if root.uuid not in draft.documents:
            self._draft(root, draft, always=(root.uuid, partner.uuid))
        for uuid, record in records.items():
            draft.documents[uuid].update(record)
        draft.blobs |= {
            name: data if isinstance(data, NamedBlob) else NamedBlob(name=name, data=memoryview(data))
            for name, data in blobs.items()
        }
        document = draft.documents.pop(root.uuid)
        document["blobs"] = sorted({*document["blobs"], *blobs})
        draft.documents[partner.uuid]["anchor"] = root.uuid
        begun, beside = time.monotonic(), [*draft.documents.values()]
        touched = self.blobs.put_all(draft.blobs.values())
        needs = {uuid for one in (*beside, document) for uuid in one["refs"]} - {*draft.documents, root.uuid}
        if time.monotonic() - begun > SLOW_S:
            touched = []
        version = self.components.publish(document, needs=needs, attempt=attempt, touched=touched, beside=beside)
        return {**document, "version": version}

    def _recognise(self, component: Component, digest: str, *, exact: bool) -> str | None:
        taken = self.components.peek(component.uuid)
        if taken is not None and taken["digest"] != digest:
            raise ConflictError(
                f"{title(taken)} (uuid {component.uuid}) was changed after it was stored or loaded, and a version "
                "never changes; apply `component.replace(...)`, which becomes a version of its own",
                field="uuid",
            )
        if exact:
            same = self.components.by_digest(component.type_id, component.identifier, digest)
            return None if same is None else str(same["_id"])
        newest = self.components.newest(component.type_id, component.identifier)
        if newest is not None and digest in (newest["digest"], newest.get("source_digest")):
            return str(newest["_id"])
        return None if taken is None else str(taken["_id"])

    def _number(self, component: Component, draft: _Draft) -> None:
        if draft.numbers is not None and component.uuid not in draft.numbers:
            number = self.components.next_version(component.type_id, component.identifier)
            draft.numbers[component.uuid] = number

    def _draft(
        self, component: Component, draft: _Draft, *, always: tuple[str, ...], digest: str | None = None
    ) -> str:
        """Encode a component and its parts into the draft; the uuid it is, or will be, stored under."""
        if id(component) in draft.uuids:
            return draft.uuids[id(component)]
        digest = digest or content_digest(component, draft.encoder, known=draft.digested())
        draft.uuids[id(component)] = component.uuid
        self._number(component, draft)
        if component.uuid not in always:
            known = self.components.by_digest(component.type_id, component.identifier, digest)
            if known is not None:
                draft.uuids[id(component)] = str(known["_id"])
                return str(known["_id"])
        refs: set[str] = set()
        own: set[str] = set()
        encoded: set[str] = set()

        def ref(child: Component) -> str:
            refs.add(uuid := self._draft(child, draft, always=always))
            return uuid

        unchanged: dict[str, Any] = {}
        for _, fields in (pair for pair in draft.components if pair[0] is component):
            unchanged = {name: fields.records[name] for name in fields.unchanged(component)}
            blobs, uuids = fields.referred(unchanged)
            own, refs = own | blobs, refs | uuids
        body = encode_component(component, draft.encoder, ref, known=unchanged, own=encoded)
        draft.blobs |= {name: draft.encoder.blobs[name] for name in encoded}
        draft.documents[component.uuid] = {
            "_id": component.uuid,
            "type_id": component.type_id,
            "identifier": component.identifier,
            **body,
            "digest": digest,
            "blobs": sorted(own | encoded),
            "refs": sorted(refs),
            "created": datetime.now(UTC),
        }
        return component.uuid

    def _write(self, draft: _Draft) -> None:
        begun = time.monotonic()
        touched = frozenset(self.blobs.put_all(draft.blobs.values()))
        for document in draft.documents.values():
            only_as = None if draft.numbers is None else draft.numbers[document["_id"]]
            if time.monotonic() - begun > SLOW_S:
                touched = frozenset()
            self.components.publish(document, needs=document["refs"], only_as=only_as, touched=touched)

    # Removal

    def remove(self, type_id: str, identifier: str, version: int | None = None, *, force: bool = False) -> int:
        """Remove a version, or all versions of a name. Garbage collection removes their blobs.

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
        documents = [self.components.find(type_id, identifier, version)]
        if version is None:
            numbers = self.components.versions(type_id, identifier)
            documents = list(self._trusted(type_id, identifier, numbers))
        leaving = {document["_id"] for document in documents}
        # A trainer that a run published with one of these models becomes invisible with it.
        leaving |= {
            user["_id"] for uuid in leaving for user in self.components.users(uuid) if user.get("anchor") == uuid
        }
        if not force:
            self._refuse_in_use(documents, leaving)
        self.promoter.withdraw(leaving)
        for document in documents:
            # Its blobs stay for garbage collection: a publication that is under way may have found them here.
            self.components.remove(document["_id"])
        self.promoter.withdraw(leaving)  # from aliases that were moved to it meanwhile
        return len(documents)

    def _trusted(self, type_id: str, identifier: str, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The documents of these versions, without those that no accepted key signed: the log names them."""
        for number in numbers:
            try:
                yield self.components.find(type_id, identifier, number)
            except TrustError as error:
                _log.warning("version %s of %s %r is left as it is: %s", number, type_id, identifier, error)

    def _refuse_in_use(self, documents: Iterable[Mapping[str, Any]], leaving: set[str]) -> None:
        for document in documents:
            for user in self.components.users(document["_id"]):
                if user["_id"] not in leaving:
                    raise InUseError(
                        f"{title(document)} is used by {title(user)}; remove that first, or say force=True"
                    )
        for head in self.aliases.names(leaving):
            raise InUseError(
                f"version {head.to_version} of {head.type_id} {head.identifier!r} is named by the alias "
                f"{head.alias!r}; promote another version first, or say force=True"
            )


def _texts(record: Any) -> Iterator[str]:
    """Every text in a record."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, Mapping):
        for part in record.values():
            yield from _texts(part)
    elif isinstance(record, list):
        for part in record:
            yield from _texts(part)
