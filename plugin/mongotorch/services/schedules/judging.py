"""The gate of a schedule's run: the new model against what is served, on the documents that are there now.

Always: both are measured on the same documents, read once; what is served is said by an alias before anything new
is published, so that publishing alone changes nothing for who loads; a promotion is for the version that the
verdict compared with, and for no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.data import Stream, check_select
from mongotorch.errors import ConflictError, MongotorchError, NotFoundError
from mongotorch.mongo.connection import Connection
from mongotorch.schedule import Gate, Scores, Verdict
from mongotorch.services.training.streams import validation_spec
from mongotorch.services.versions.catalog import Loader
from mongotorch.services.versions.promotion import Promoter
from mongotorch.settings import Settings
from mongotorch.store import Aliases
from mongotorch.train import Scored, TorchModel, TorchTrainer, score

Document = Mapping[str, Any]


@final
class Judge:
    """Compares, and promotes what a gate lets through.

    Args:
        connection: The database.
        settings: Of the datalayer.
        aliases: The moves of the aliases.
        loader: Loads what is served.
        promoter: Moves the alias.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        settings: Settings,
        aliases: Aliases,
        loader: Loader,
        promoter: Promoter,
    ) -> None:
        self._connection, self._settings = connection, settings
        self._aliases, self._loader, self._promoter = aliases, loader, promoter

    def served(self, model: TorchModel) -> dict[str, Any] | None:
        """The document of the version of a model's name that is served: the live one, else the newest."""
        try:
            return self._loader.find(model.type_id, model.identifier)
        except NotFoundError:
            return None

    def hold(self, model: TorchModel, why: str) -> dict[str, Any] | None:
        """Let the alias name what is served, so that a newer version is not served by being newer."""
        served = self.served(model)
        head = self._aliases.head(model.type_id, model.identifier)
        if served is not None and (head is None or head.to_uuid is None):
            try:
                self._promoter.promote(model.type_id, model.identifier, uuid=served["_id"], why=why, expected=head)
            except ConflictError:  # somebody promotes right now: that is what is served
                return self.served(model)
        return served

    def judge(self, gate: Gate, trainer: TorchTrainer, challenger: TorchModel, why: str) -> dict[str, Any]:
        """What a gate says of a model against the served one of its name.

        Args:
            gate: The gate.
            trainer: Says which documents, and the objective.
            challenger: The trained model.
            why: Why the alias names what is served, should it name nothing yet.

        Returns:
            The verdict, plain, with the version it is `against`.
        """
        served = self.hold(challenger, why)
        champion = None if served is None else self._loader.by_uuid(served["_id"])
        try:
            before, now = self._scores(trainer, challenger, champion)
            verdict = gate.judge(before, now)
        except MongotorchError as error:
            verdict = _without_scores(gate, error)
        against = None if served is None else {"uuid": served["_id"], "version": served["version"]}
        return {**verdict.to_document(), "against": against}

    def promote(self, published: Document, *, job: str, who: str) -> str | None:
        """Do what the verdict of a published version says, once a job.

        Returns:
            None where it is live now; else why not.
        """
        verdict = published["verdict"]
        if not verdict["promote"]:
            return str(verdict["why"])
        type_id, identifier = published["type_id"], published["identifier"]
        against = verdict["against"]["uuid"] if verdict["against"] else None
        head = self._aliases.head(type_id, identifier)
        moved = head is not None and head.job != job and head.to_uuid != against
        if moved and head is not None:
            return f"it was judged against {against}, and {head.to_uuid} is live by now"
        try:
            self._promoter.promote(
                type_id,
                identifier,
                uuid=published["_id"],
                why=verdict["why"],
                who=who,
                expected=head,
                job=job,
            )
        except ConflictError as error:
            return str(error)
        return None

    def _scores(
        self, trainer: TorchTrainer, challenger: TorchModel, champion: Any
    ) -> tuple[Scores | None, Scores]:
        """Both on the fold `valid` of the select."""
        database = self._connection.database
        check_select(database, trainer.select, folds=("valid",))
        spec = validation_spec(trainer, self._settings, trainer.select.fold("valid"))
        with Stream(self._connection.opener(), spec, database=database) as batches:
            now, *before = score(trainer, [challenger, *([] if champion is None else [champion])], batches)
        return (_scores(before[0]) if before else None), _scores(now)


def _scores(scored: Scored) -> Scores:
    return Scores(losses=scored.losses, values=scored.values)


def _without_scores(gate: Gate, error: MongotorchError) -> Verdict:
    if not gate.needs_scores:
        return gate.judge(None, None)
    return Verdict(
        promote=False,
        why=f"the two could not be compared: {error}",
        gate=repr(gate),
        documents=0,
        champion=None,
        challenger={},
        interval=None,
    )
