"""The handle that serves the version an alias names, and switches to another one between two predictions.

Guarantees: a prediction takes no lock and is made by one version; a version takes over when it is loaded
completely, by one assignment; if a version cannot be loaded, the old one serves on and `error` says why.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, final

from mongotorch.component import is_refused, is_trained
from mongotorch.errors import NotFoundError, ParameterError, ServerUnavailableError, StoreError
from mongotorch.mongo.connection import Connection
from mongotorch.resources import Owner
from mongotorch.services.versions.catalog import Catalog
from mongotorch.store import LIVE, Move, follow_alias
from mongotorch.train import TorchModel

OnPromote = Callable[[TorchModel, TorchModel], object]
"""Called with the version that served and the one that serves now."""
_LOOK_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.1
_MOST_PAUSE_S: Final = 5.0
_CLOSE_S: Final = 5.0
_log = logging.getLogger(__name__)


@final
class Live(Owner):
    """A model that is always the version an alias names. `db.live` makes it; close it, or use it in `with`.

    Any number of threads may predict with it at once. While a version is loaded, two are in memory.

    Args:
        connection: The open database; the datalayer closes it.
        catalog: Loads the versions.
        name: Kind, identifier, alias.
        on_promote: Called after each change.
    """

    __mongotorch_unpicklable__: ClassVar[bool] = True

    def __init__(
        self,
        connection: Connection,
        catalog: Catalog,
        name: tuple[str, str, str],
        *,
        on_promote: OnPromote | None,
    ) -> None:
        self._connection, self._catalog = connection, catalog
        self._name, self._on_promote = name, on_promote
        self._stop, self._swapped = threading.Event(), threading.Condition()
        self._lost: Exception | None = None
        self._error: Exception | None = None
        # The move is read before the version it names: the first look sees a move that is made in between.
        self._head = catalog.aliases.head(*name)
        type_id, identifier, alias = name
        found = catalog.find(type_id, identifier, alias=None if alias == LIVE else alias)
        self._model = self._loaded(found)
        self._thread = threading.Thread(target=self._follow, name=f"mongotorch-live-{identifier}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Live({'/'.join(self._name)}, version={self.version}, uuid={self.uuid!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise ParameterError(
            "a Live handle follows a database and cannot be pickled; pass `db.uri` and call `live` there"
        )

    @property
    def model(self) -> TorchModel:
        """The version that serves now; this object does not change when another version takes over."""
        return self._model

    @property
    def version(self) -> int | None:
        """The version number that serves now."""
        return self._model.version

    @property
    def uuid(self) -> str:
        """The uuid that serves now."""
        return self._model.uuid

    @property
    def error(self) -> Exception | None:
        """Why it does not serve what the alias names, or what `on_promote` raised; None if neither."""
        return self._error or self._lost

    def predict(self, x: Any) -> Any:
        """The prediction for one item, by the version that serves when this is called; as `TorchModel.predict`."""
        return self._model.predict(x)

    def predict_batches(self, items: Sequence[Any], *, batch_size: int = 256) -> list[Any]:
        """The predictions for many items, all by one version; as `TorchModel.predict_batches`."""
        return self._model.predict_batches(items, batch_size=batch_size)

    def wait_for(
        self, version: int | None = None, *, uuid: str | None = None, timeout_s: float | None = None
    ) -> bool:
        """Wait until a version serves.

        Args:
            version: Its number.
            uuid: Its uuid, instead.
            timeout_s: Seconds to wait at most; None waits without a limit.

        Returns:
            Whether it serves; False when the time is over.

        Raises:
            ParameterError: Neither a version nor a uuid, or both.
        """
        if (version is None) == (uuid is None):
            raise ParameterError("give a version or a uuid", field="version")
        with self._swapped:
            return self._swapped.wait_for(
                lambda: self.version == version if uuid is None else self.uuid == uuid, timeout_s
            )

    def close(self) -> None:
        """Stop following the alias; the current version can still predict. A second call does nothing."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)

    def _follow(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._is_over():
            try:
                with follow_alias(self._connection.database, *self._name) as wake:
                    while not self._is_over():
                        self._look()
                        self._lost, pause = None, _FIRST_PAUSE_S
                        wake(_LOOK_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, the old version serves on
                if not self._is_over():
                    self._lost = error
                    _log.warning("%r cannot follow its alias, and tries again in %.1f s: %s", self, pause, error)
            self._stop.wait(pause)
            pause = min(2 * pause, _MOST_PAUSE_S)

    def _is_over(self) -> bool:
        if self._connection.closed and not self._stop.is_set():
            self._lost = StoreError("the datalayer was closed: the handle serves what it has, and follows no more")
            self._stop.set()
        return self._stop.is_set()

    def _look(self) -> None:
        """Switch to what the alias names now, if it was moved since the last look."""
        head = self._catalog.aliases.head(*self._name)
        if head is None or head == self._head:
            return
        try:
            found = self._named(head)
            if found["_id"] != self.uuid:
                self._swap(self._loaded(found))
            else:
                self._error = None
        except ServerUnavailableError:
            raise  # the same move again, when there is a server
        except Exception as error:  # noqa: BLE001 - a stored model can raise anything when it is loaded
            self._error = error
            _log.warning("%r serves on: the version that %r names cannot be loaded: %s", self, head.alias, error)
        self._head = head

    def _named(self, head: Move) -> dict[str, Any]:
        if head.to_uuid is not None:
            return self._catalog.named_by(head)
        # Removed: as in `load`. The removed one may still be there for a moment.
        untrained = None
        for version in reversed(self._catalog.components.versions(head.type_id, head.identifier)):
            with contextlib.suppress(NotFoundError):  # gone since it was listed
                found = self._catalog.components.find(head.type_id, head.identifier, version)
                if head.alias != LIVE or found["_id"] == head.from_uuid or is_refused(found):
                    continue
                if is_trained(found):
                    return found
                untrained = untrained or found
        if untrained is None:
            raise NotFoundError(f"{head.alias!r} of {head.type_id} {head.identifier!r} names nothing any more")
        return untrained

    def _loaded(self, document: dict[str, Any]) -> TorchModel:
        model = self._catalog.load(document)
        if not isinstance(model, TorchModel):
            raise ParameterError(f"{document['type_id']} {document['identifier']!r} is no model", field="type_id")
        model.predict_batches([])  # takes it to its device now, and not in the first prediction
        return model

    def _swap(self, new: TorchModel) -> None:
        old = self._model
        with self._swapped:
            self._model, self._error = new, None
            self._swapped.notify_all()
        if self._on_promote is not None:
            try:
                self._on_promote(old, new)
            except Exception as error:  # noqa: BLE001 - it is the caller's code, and the thread must go on
                self._error = error
                _log.exception("on_promote of %r raised", self)
