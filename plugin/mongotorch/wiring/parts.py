"""The parts of one open database, made and wired once.

Always: making them makes the indexes that their promises rest on; they hold nothing but the connection.
"""

from __future__ import annotations

import functools
from typing import final

from mongotorch.codecs import Codecs
from mongotorch.run import Schedule, engine_named
from mongotorch.settings import Settings
from mongotorch.store import (
    Aliases,
    Artifacts,
    Checker,
    Checkpoints,
    Components,
    Connection,
    Jobs,
    Points,
    trust_of,
)
from mongotorch.wiring.applying import Applier
from mongotorch.wiring.checkpointing import Checkpointing
from mongotorch.wiring.comparing import Comparer
from mongotorch.wiring.lineage import Facts
from mongotorch.wiring.load import Loader
from mongotorch.wiring.performing import Performer
from mongotorch.wiring.publish import Publisher
from mongotorch.wiring.removing import Remover
from mongotorch.wiring.reproducing import Reproducer
from mongotorch.wiring.schedules.parts import ScheduleParts
from mongotorch.wiring.serving import Promoter
from mongotorch.wiring.training import Training
from mongotorch.wiring.works import Works


@final
class Parts:
    """What a datalayer hands out.

    Args:
        connection: The open database, which stays the datalayer's.
        settings: Of the datalayer.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection, self._settings = connection, settings
        database, codecs = connection.database, Codecs.default()
        secret = settings.signing_key.get_secret_value() if settings.signing_key is not None else None
        trust = trust_of(key=secret, key_file=settings.signing_key_file, policy=settings.trust)
        self.components, self.artifacts = Components(database, trust), Artifacts(database)
        self.jobs, self.points = Jobs(database), Points(database)
        self.checkpoints = Checkpoints(database, trust)
        self.aliases, self.checker = Aliases(database, trust), Checker(database, trust)
        for part in (self.components, self.artifacts, self.jobs, self.points, self.checkpoints, self.aliases):
            part.ensure_indexes()
        self.loader = Loader(self.components, self.artifacts, self.aliases, codecs)
        self.publisher = Publisher(self.components, self.artifacts, codecs)
        self.promoter = Promoter(self.components, self.aliases)
        self.remover = Remover(self.components, self.artifacts, self.promoter)
        checkpointing = Checkpointing(self.checkpoints, self.artifacts, codecs)
        training = self._training(checkpointing)
        standing = ScheduleParts(
            connection=connection,
            settings=settings,
            components=self.components,
            artifacts=self.artifacts,
            aliases=self.aliases,
            jobs=self.jobs,
            loader=self.loader,
            promoter=self.promoter,
            training=training,
        )
        self.register, self.scheduler = standing.register, standing.scheduler
        works = Works(training, {Schedule.type_id: standing.retraining})
        self.performer = Performer(self.jobs, works, settings)
        self.applier = Applier(
            components=self.components,
            jobs=self.jobs,
            publisher=self.publisher,
            loader=self.loader,
            engine=engine_named(settings.compute),
            perform=self.performer.perform,
            forget=checkpointing.drop,
            register=self.register,
        )

    def _training(self, checkpointing: Checkpointing) -> Training:
        return Training(
            connection=self._connection,
            settings=self._settings,
            components=self.components,
            points=self.points,
            loader=self.loader,
            publisher=self.publisher,
            checkpointing=checkpointing,
            jobs=self.jobs,
            facts=Facts(self._connection, self._settings),
        )

    @functools.cached_property
    def comparer(self) -> Comparer:
        """Compares versions."""
        return Comparer(self.components, self.artifacts)

    @functools.cached_property
    def reproducer(self) -> Reproducer:
        """Trains versions again."""
        return Reproducer(
            connection=self._connection,
            settings=self._settings,
            components=self.components,
            artifacts=self.artifacts,
            loader=self.loader,
            facts=Facts(self._connection, self._settings),
        )
