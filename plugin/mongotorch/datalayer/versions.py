"""The part of a datalayer about stored versions: show, remove, compare, reproduce, export; move aliases."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import EllipsisType
from typing import Any

from mongotorch.component import arguments_checked
from mongotorch.datalayer.reprs import move_list, version_list
from mongotorch.mongo.connection import Connection
from mongotorch.query import Query
from mongotorch.resources import Owner
from mongotorch.schedule import Schedule
from mongotorch.services.composition import Services
from mongotorch.services.lineage import Diff, Reproduction, TrainedOn, diff, reproduce, trained_on
from mongotorch.services.prediction import Predicted, Predictor
from mongotorch.services.training.ranks import Ranks
from mongotorch.services.versions.bundles import Bundle
from mongotorch.services.versions.live import Live, OnPromote
from mongotorch.settings import Settings
from mongotorch.store import LIVE, Move


class Versions(Owner):
    """What a datalayer does with versions; `Datalayer` is the one class of it."""

    settings: Settings
    _connection: Connection
    _services: Services

    @arguments_checked
    def show(
        self,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
    ) -> Any:
        """What is stored: kinds, identifiers of a kind, versions of a name, or one version's whole document.

        The document says besides whether the version is `trained`: published by a run, rather than applied.

        Args:
            type_id: The kind; None lists the kinds.
            identifier: The name; None lists the names of the kind.
            version: The version; None lists the versions of the name.
            uuid: Instead of all these: the document of exactly that version.

        Raises:
            NotFoundError: There is no such version.
            TrustError: It is not signed by a trusted key.
        """
        found = self._services.catalog.show(type_id, identifier, version, uuid=uuid)
        if uuid is not None or type_id is None or identifier is None or version is not None:
            return found
        return version_list(found, type_id, identifier, self._services.overview)

    @arguments_checked
    def remove(self, type_id: str, identifier: str, version: int | None = None, force: bool = False) -> int:
        """Remove a version, or all versions of a name; returns how many were removed.

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
        removed = self._services.catalog.remove(type_id, identifier, version, force=force)
        if type_id == Schedule.type_id:
            self._services.register.forget(identifier)
        return removed

    # Aliases: which version is live

    @arguments_checked
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
        """Point an alias at a version: `load` returns it, and handles of `live` switch to it.

        Args:
            type_id: The kind.
            identifier: The name.
            version: The version; None is the newest that a run published and no gate refused (the newest of all
                where none was trained), unless a uuid is given.
            uuid: Instead of the version.
            alias: The alias.
            why: The reason, for the history.
            who: The author; None is user@host of this process.
            expected: The newest move you know, None for an alias that was never moved: if there is a newer one,
                nothing is moved. Without it: the newest move there is.

        Returns:
            The move; if the alias already points at that version, the existing move.

        Raises:
            NotFoundError: There is no such version, or it was removed meanwhile.
            ConflictError: The alias was moved meanwhile; the message says by whom.
            ParameterError: Both a version and a uuid were given.
            IdentifierError: The alias is not a valid name.
            TrustError: A record is not signed by a trusted key.
        """
        return self._services.catalog.promoter.promote(
            type_id, identifier, version, uuid, alias=alias, why=why, who=who, expected=expected
        )

    @arguments_checked
    def rollback(
        self, type_id: str, identifier: str, *, alias: str = LIVE, why: str = "", who: str | None = None
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
            ConflictError: The alias was moved meanwhile; the message says by whom.
            TrustError: A record is not signed by a trusted key.
        """
        return self._services.catalog.promoter.rollback(type_id, identifier, alias=alias, why=why, who=who)

    @arguments_checked
    def history(
        self, type_id: str, identifier: str, *, alias: str = LIVE, at: datetime | None = None
    ) -> list[Move]:
        """All moves of an alias, in their order.

        Args:
            type_id: The kind.
            identifier: The name.
            alias: The alias.
            at: Only the moves made until then (aware, or naive UTC); None is all.

        Raises:
            TrustError: A move is not signed by a trusted key.
        """
        return move_list(self._services.catalog.aliases.history(type_id, identifier, alias, until=at))

    @arguments_checked
    def live(
        self, type_id: str, identifier: str, *, alias: str = LIVE, on_promote: OnPromote | None = None
    ) -> Live:
        """A model that switches to another version whenever the alias is moved, between two predictions.

        A thread follows the alias: by a change stream, or by looking once a second where there is none (mongomock,
        a server without a replica set). It loads a version while the old one serves.

        Args:
            type_id: The kind: `model`.
            identifier: The name.
            alias: The alias. While `live` names nothing, it is what `load` gives at the time of this call.
            on_promote: Called with the old and the new model, in that thread, after each change; an error in it
                is logged and kept in `error`.

        Returns:
            A handle with `predict` and `predict_batches`; close it, or use it as a context manager. It follows
            for as long as this datalayer is open.

        Raises:
            ParameterError: It is no model.
            NotFoundError, PythonVersionError, IntegrityError, TrustError: As `load`.
        """
        name = (type_id, identifier, alias)
        return Live(self._connection, self._services.catalog, name, on_promote=on_promote)

    @arguments_checked
    def predict(
        self,
        type_id: str,
        identifier: str,
        version: int | None = None,
        *,
        alias: str | None = None,
        select: Query,
        into: str,
        key: Any = None,
        batch_size: int = 256,
        force: bool = False,
        workers: int = 1,
    ) -> Predicted:
        """Predict the documents of a query, and write the predictions into them.

        A document gets `{"value": …, "model": identifier, "version": number, "uuid": …}` in the field `into`. A
        call that ended in the middle is continued by the same call, since documents with a prediction by this very
        version are left out; a query with a skip, a limit or a pipeline is predicted as a whole each time.

        Args:
            type_id: The kind: `model`.
            identifier: The name.
            version: The version; None is the live one, or else the newest that was trained.
            alias: The version that this alias names.
            select: The documents.
            into: The field for the prediction, dotted where it is inside of others.
            key: The fields of one input, in the structure that the model's `predict` takes; None is the trainer's
                key without the target.
            batch_size: Documents that are predicted and written together.
            force: Predict again what this version has predicted, such as documents that were changed since.
            workers: How many processes predict together, each its own part of the documents; the setting
                `launcher` says where they run, on this machine unless given. On a CPU each computes with one
                thread, and predictions have the bits that one process with one thread gives.

        Returns:
            How many documents were written, and by which version.

        Raises:
            NotFoundError: There is no such version; none was trained and none is live.
            ParameterError: It is no model; `into` is or overlaps with a field that is read; the trainer does not
                tell the fields of an input.
            QueryError: A pipeline that gives other documents than those of the collection.
            EmptySelectError: The collection has no document.
            StoreError: It is a view or a time series collection; or the server refuses a document.
            SettingError: The user may not write.
            UnsupportedError: Several workers, and mongomock, or a query that is read as a whole, or no room.
            DataError: A document lacks a field, or cannot be predicted; `document_id` names it. Notes of this and
                the other errors that come later say how many were written before.
            JobProcessError: The process of a worker ended, or was killed.
        """
        return self.predictor.predict(
            type_id,
            identifier,
            version,
            alias,
            select=select,
            into=into,
            key=key,
            batch_size=batch_size,
            force=force,
            workers=workers,
        )

    @property
    def predictor(self) -> Predictor:
        """Predicts documents; the processes that do so together use it."""
        services, connection = self._services, self._connection
        return Predictor(
            connection,
            self.settings,
            Ranks(connection, self.settings, services.jobs),
            find=services.catalog.find,
            load=services.catalog.load,
            head=services.catalog.aliases.head,
        )

    # Lineage

    @arguments_checked
    def diff(self, uuid1: str, uuid2: str) -> Diff:
        """How the version `uuid2` differs from `uuid1`: parameters, measurements, data, environment.

        Raises:
            NotFoundError: There is no such version.
            IntegrityError: A blob is not what was stored.
        """
        return diff(self._services.catalog, uuid1, uuid2)

    @arguments_checked
    def trained_on(self, document_id: Any, collection: str | None = None) -> list[TrainedOn]:
        """The versions whose training set contained a document, newest first.

        Args:
            document_id: Its `_id`.
            collection: The collection of the document; None is any.

        Returns:
            The versions; one whose training set was not recorded by document is listed as not `certain`.

        Raises:
            DataError: BSON cannot hold such an `_id`.
            IntegrityError: A blob is not what was stored.
        """
        return trained_on(self._services.catalog, document_id, collection)

    @arguments_checked
    def reproduce(self, uuid: str, *, anyway: bool = False) -> Reproduction:
        """Train a version again in this process, and compare the weights bit for bit; nothing is published.

        Args:
            uuid: The uuid of a model that a run has published.
            anyway: Train although its data has changed; by default the result reports the change, untrained.

        Raises:
            NotFoundError: There is no such version, or what it was trained from is gone.
            ParameterError: No run has published it.
            MongotorchError: The run failed.
        """
        return reproduce(self._services.catalog, self._connection, self.settings, uuid, anyway=anyway)

    # Bundles: a version in a file

    @arguments_checked
    def export(
        self,
        path: str | Path,
        type_id: str | None = None,
        identifier: str | None = None,
        version: int | None = None,
        *,
        uuid: str | None = None,
        alias: str | None = None,
        force: bool = False,
    ) -> Bundle:
        """Write a version into one file, with what it refers to, its blobs, its job and what was measured.

        The documents that it was trained on are not in it; their hashes are, where they were recorded.

        Args:
            path: The file, a zip; by custom its name ends with `.zip`.
            type_id: The kind: `model`, `trainer`, `metric`, `validation`, `dataset`.
            identifier: The name.
            version: The version; None is the one that `load` gives.
            uuid: Instead of all these.
            alias: The version that this alias names.
            force: Write over a file that is there.

        Raises:
            NotFoundError: There is no such version.
            ParameterError: It is of another kind; or neither a uuid nor a kind and a name is given.
            BundleError: The file is there already, or cannot be written.
            IntegrityError: A blob is not what was stored.
            TrustError: A record is not signed by a trusted key.
        """
        found = self._services.catalog.find(type_id, identifier, version, uuid=uuid, alias=alias)
        return self._services.bundles.write(Path(path), found, replace=force)

    def import_bundle(self, path: str | Path) -> Bundle:
        """Store the version of a bundle as the next version of its name, under its uuid; nothing is unpickled.

        Every hash and, where there are keys, every signature is checked before anything is written. No alias is
        moved. A version that is here already is recognised, and nothing is written.

        Args:
            path: The file that `export` wrote.

        Returns:
            What was imported; `version` is its number here, `exported_version` that in the other database.

        Raises:
            BundleError: It is no bundle, is cut, or holds what no bundle holds.
            FormatError: A newer release wrote it.
            IntegrityError: Something in it is not what its manifest says.
            TrustError: A record in it is not signed by a trusted key.
            SettingError: Only signed records are trusted here, and there is no key to sign with.
            ConflictError: One of its uuids belongs to something else here.
        """
        return self._services.bundles.take_in(path)
