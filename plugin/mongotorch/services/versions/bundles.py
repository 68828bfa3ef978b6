"""Exports a version with all it is made of into one file, and imports it into another database.

A bundle holds the documents of the version and of what it refers to, their blobs, and the evidence: its job, what
was measured, and the moves of aliases that name it. Data that it was trained on is not in it, nor is its parent.

Guarantees: nothing of a bundle is written before every hash, every reference and, where there are keys, every
signature was checked, and nothing of it is unpickled; one insert, the last one, makes the version visible. A
uuid stays the same, so that a second import recognises the first; the number is the next one that is free, and the
document says in `imported` which one it was, and who had signed it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

from mongotorch._version import __version__
from mongotorch.codecs import NamedBlob, check_format
from mongotorch.component import IDENTIFIER, title
from mongotorch.errors import BundleError, ConflictError, NotFoundError, ParameterError, SettingError
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import BundleFile, Jobs, MetricLog, Trust, current_user, to_bson, write_bundle

KINDS: Final = ("model", "trainer", "metric", "validation", "dataset")
IMPORTED: Final = "imported"
"""In the document of an imported version: where it comes from."""
_SIGNATURE: Final = "signature"
_COMPONENT: Final = "component"
_NAME: Final = re.compile(r"[0-9a-f]{64}")
_UUID: Final = re.compile(r"[0-9A-Za-z-]{1,64}")
_BATCH_BYTES: Final = 2**26
_BATCH: Final = 500  # blobs that are stored together
_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "type_id": str,
    "identifier": str,
    "version": int,
    "digest": str,
    "created": datetime,
    "fields": dict,
    "blobs": list,
    "refs": list,
    "class": dict,
}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A version in a file.

    Attributes:
        path: The file.
        type_id: The kind of the version.
        identifier: Its name.
        version: Its number in this database.
        uuid: Its uuid, the same in every database.
        exported_version: Its number in the database that it was exported from.
        components: How many components the file has: the version, and what it refers to.
        blobs: How many blobs.
        nbytes: The size of the file in bytes.
        was_there: Of an import: whether this database had the version already, so that nothing was written.
    """

    path: Path
    type_id: str
    identifier: str
    version: int
    uuid: str
    exported_version: int
    components: int
    blobs: int
    nbytes: int
    was_there: bool = False


@final
class Bundles:
    """Exports and imports versions of one database.

    Args:
        catalog: The versions.
        jobs: The job documents.
        metric_log: What runs measured.
        trust: Checks what is imported, and signs it; None does neither.
    """

    def __init__(self, catalog: Catalog, jobs: Jobs, metric_log: MetricLog, trust: Trust | None) -> None:
        self._catalog, self._jobs, self._metric_log, self._trust = catalog, jobs, metric_log, trust

    # Into a file

    def write(self, path: Path, document: Mapping[str, Any], *, replace: bool = False) -> Bundle:
        """Write the bundle of a version; see `Datalayer.export`. Raises: ParameterError, BundleError and others.

        Args:
            path: The file.
            document: The document of the version. One that a run published together with a model is exported with
                that model, as the version of the model.
            replace: Write over a file that is there.
        """
        components = self._catalog.components
        root = components.get(document["anchor"]) if document.get("anchor") else document
        if root["type_id"] not in KINDS:
            raise ParameterError(f"a {root['type_id']} cannot be exported; these can: {', '.join(KINDS)}")
        documents = {root["_id"]: root}
        waiting = [*root["refs"]]
        while waiting:
            if (uuid := waiting.pop()) not in documents:
                documents[uuid] = components.get(uuid)
                waiting += documents[uuid]["refs"]
        blobs = sorted({name for one in documents.values() for name in one["blobs"]})
        about = {
            "mongotorch": __version__,
            **{name: root[name] for name in ("type_id", "identifier", "version")},
            "uuid": root["_id"],
        }
        write_bundle(path, about, self._members(root, documents, blobs), replace=replace)
        return _bundle(path, root, exported_version=root["version"], components=len(documents), blobs=len(blobs))

    def _members(
        self, root: Mapping[str, Any], documents: Mapping[str, Mapping[str, Any]], blobs: Iterable[str]
    ) -> Iterator[tuple[str, bytes]]:
        for uuid in sorted(documents):
            yield f"records/{uuid}.bson", to_bson(documents[uuid])
        if root.get("job") is not None:
            with contextlib.suppress(NotFoundError):  # it was removed: the document has what matters
                yield "evidence/job.bson", to_bson(self._jobs.get(root["job"]))
            yield "evidence/metrics.bson", to_bson({"rows": self._metric_log.of(root["job"])})
        yield "evidence/aliases.bson", to_bson({"moves": [*self._moves(root)]})
        for name in blobs:
            yield f"blobs/{name}", self._catalog.blobs.get(name)

    def _moves(self, root: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        aliases, named = self._catalog.aliases, (root["type_id"], root["identifier"])
        for alias in aliases.aliases(*named):
            for move in aliases.history(*named, alias):
                if root["_id"] in (move.from_uuid, move.to_uuid):
                    yield move.to_document()

    # Out of a file

    def take_in(self, path: str | Path) -> Bundle:
        """Import the version of a bundle; see `Datalayer.import_bundle`.

        Raises:
            BundleError: It is no bundle, or not whole, or its records do not belong together.
            FormatError: A newer release wrote it, or a record in it.
            IntegrityError: A member is not what the manifest says.
            TrustError: A record is not signed by a trusted key.
            SettingError: Only signed records are trusted, and there is no key to sign it with.
            ConflictError: One of its uuids belongs to something else here.
        """
        with BundleFile.open(path) as file:
            records, root = self._records(file)
            counts = {"components": len(records), "blobs": len(file.names("blobs"))}
            missing = self._missing(records)
            known = self._catalog.components.peek(root["_id"])
            if known is not None:
                return _bundle(file.path, known, exported_version=root["version"], was_there=True, **counts)
            if self._trust is not None and self._trust.required and self._trust.signing is None:
                raise SettingError(
                    "trust='signed' takes what is signed, and an import is signed again with its new number; give "
                    "a key that can sign",
                    setting="signing_key",
                )
            file.verify()
            self._put_blobs(file)
            self._put_evidence(file, root)
            for record in _in_order(records, root["_id"]):
                if record["_id"] in missing:
                    self._publish(record, file.digest)
            stored = self._catalog.components.get(root["_id"])
            return _bundle(file.path, stored, exported_version=root["version"], **counts)

    def _records(self, file: BundleFile) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """The checked documents of a bundle by uuid, and that of its version."""
        records: dict[str, dict[str, Any]] = {}
        for name in file.names("records"):
            record = file.read_record(f"records/{name}")
            _check_record(record, f"records/{name}", file.path)
            if self._trust is not None:
                self._trust.check(record, kind=_COMPONENT)
            records[record["_id"]] = record
        root = records.get(str(file.manifest.get("uuid")))
        if root is None or "anchor" in root:
            raise _odd(file.path, "it lacks the record of its version")
        _check_together(records, root["_id"], file)
        return records, root

    def _missing(self, records: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """The uuids that are not stored here. Raises: ConflictError for one that belongs to something else."""
        missing: set[str] = set()
        for uuid, record in records.items():
            known = self._catalog.components.peek(uuid)
            if known is None:
                missing.add(uuid)
            elif known["digest"] != record["digest"]:
                raise ConflictError(
                    f"uuid {uuid} is {title(known)} here, with another content than {title(record)} of the "
                    "bundle; nothing was imported",
                    field="uuid",
                )
        return missing

    def _put_blobs(self, file: BundleFile) -> None:
        batch: list[NamedBlob] = []
        names = file.names("blobs")
        for name in names:
            batch.append(NamedBlob.of(file.read(f"blobs/{name}")))
            full = len(batch) >= _BATCH or sum(blob.data.nbytes for blob in batch) >= _BATCH_BYTES
            if full or name == names[-1]:
                self._catalog.blobs.put_all(batch)
                batch = []

    def _put_evidence(self, file: BundleFile, root: Mapping[str, Any]) -> None:
        """Store the job and what was measured; they mean nothing until a version names them."""
        job, there = root.get("job"), file.names("evidence")
        if job is None:
            return
        if "metrics.bson" in there:
            rows = file.read_record("evidence/metrics.bson").get("rows")
            self._metric_log.put_back(job, rows if isinstance(rows, list) else [])
        if "job.bson" in there:
            self._jobs.put_back(job, file.read_record("evidence/job.bson"), result=root["_id"])

    def _publish(self, record: Mapping[str, Any], digest: str) -> None:
        imported = {
            "version": record["version"],
            "bundle": digest,
            "at": datetime.now(UTC),
            "who": current_user(),
            _SIGNATURE: record.get(_SIGNATURE),
            "before": record.get(IMPORTED),  # that of an earlier import
        }
        document = {name: value for name, value in record.items() if name not in ("version", _SIGNATURE)}
        document |= {"format": record.get("format", 1), IMPORTED: imported}
        components = self._catalog.components
        try:
            components.publish(document, needs={*record["refs"]} - {record.get("anchor")})
        except ConflictError:  # another process imports the same bundle at this moment
            known = components.peek(record["_id"])
            if known is None or known["digest"] != record["digest"]:
                raise


def _check_record(record: Mapping[str, Any], name: str, path: Path) -> None:
    """Raises: BundleError for what is no document of a version, FormatError for one of a newer release."""
    check_format(record, f"{name} of {path}:")
    wrong = [field for field, kind in _TYPES.items() if not isinstance(record.get(field), kind)]
    texts = [record.get("job"), record.get("anchor")]
    right = (
        not wrong
        and record.get("_id") == name.removeprefix("records/").removesuffix(".bson")
        and record["type_id"] in KINDS
        and IDENTIFIER.fullmatch(record["identifier"]) is not None
        and type(record["version"]) is not bool
        and _NAME.fullmatch(record["digest"]) is not None
        and all(isinstance(blob, str) and _NAME.fullmatch(blob) for blob in record["blobs"])
        and all(isinstance(ref, str) and _UUID.fullmatch(ref) for ref in record["refs"])
        and all(text is None or (isinstance(text, str) and _UUID.fullmatch(text)) for text in texts)
    )
    if not right:
        raise _odd(path, f"{name} is no record of a version" + (f": {', '.join(wrong)}" if wrong else ""))


def _check_together(records: Mapping[str, Mapping[str, Any]], root: str, file: BundleFile) -> None:
    """Raises: BundleError unless the records refer to one another alone, and to all blobs of the bundle."""
    met, waiting = {root}, [root]
    while waiting:
        for ref in records[waiting.pop()]["refs"]:
            if ref not in records:
                raise _odd(file.path, f"a record refers to {ref}, which is not in it")
            if ref not in met:
                met.add(ref)
                waiting.append(ref)
    if met != records.keys():
        raise _odd(file.path, "it has records that do not belong to its version")
    for record in records.values():
        anchor = record.get("anchor")
        if anchor is not None and (anchor != root or record["_id"] not in records[root]["refs"]):
            raise _odd(file.path, f"{record['_id']} was published with another version")
    blobs = {name for record in records.values() for name in record["blobs"]}
    if blobs != {*file.names("blobs")}:
        raise _odd(file.path, "its blobs are not those that its records name")
    if any(file.members[f"blobs/{name}"]["sha256"] != name for name in blobs):
        raise _odd(file.path, "a blob has another hash than its name")


def _in_order(records: Mapping[str, dict[str, Any]], root: str) -> list[dict[str, Any]]:
    """The records, each behind what it refers to, and that of the version last."""
    ordered: dict[str, dict[str, Any]] = {}
    open_ = {root}

    def visit(uuid: str) -> None:
        for ref in sorted(records[uuid]["refs"]):
            if ref not in open_ and ref not in ordered:
                open_.add(ref)
                visit(ref)
        ordered[uuid] = records[uuid]

    visit(root)
    return list(ordered.values())


def _bundle(path: Path, document: Mapping[str, Any], **more: Any) -> Bundle:
    named = {name: document[name] for name in ("type_id", "identifier", "version")}
    return Bundle(path=path, uuid=document["_id"], nbytes=path.stat().st_size, **named, **more)


def _odd(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} is no bundle that mongotorch wrote: {why}; nothing was imported")
